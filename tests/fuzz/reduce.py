"""A smaller model that fails in the same way: parts are taken out, choices become the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.spec import Net


def smaller(value: Any) -> Iterator[Any]:
    """Values that say less, the least first."""
    if isinstance(value, tuple):
        for place in range(len(value)):
            yield value[:place] + value[place + 1 :]
        for place, element in enumerate(value):
            for less in smaller(element):
                yield (*value[:place], less, *value[place + 1 :])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            now = getattr(value, field.name)
            if field.default is not dataclasses.MISSING and now != field.default:
                if not isinstance(now, tuple):
                    yield from _replaced(value, field.name, field.default)
            if isinstance(now, tuple) or dataclasses.is_dataclass(now):
                for less in smaller(now):
                    yield from _replaced(value, field.name, less)
            elif isinstance(now, int) and isinstance(field.default, int) and now // 2 > field.default:
                yield from _replaced(value, field.name, now // 2)


def _replaced(value: Any, name: str, new: Any) -> Iterator[Any]:
    try:
        yield dataclasses.replace(value, **{name: new})
    except ValueError:  # a spec that contradicts itself
        return


def reduced(spec: Net, fails: Callable[[Net], bool]) -> Net:
    """The smallest spec found that fails still, a change at a time."""
    found = True
    while found:
        found = False
        for less in smaller(spec):
            if less != spec and fails(less):
                spec, found = less, True
                break
    return spec
