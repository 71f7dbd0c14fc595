"""Stages: what a long call is doing, timed, and shown as a bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


def _shown() -> bool:
    """On a terminal, on the first rank."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def _progress() -> Progress:
    return Progress(
        TextColumn("autoshard: {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not _shown(),
    )


class Stages:
    """Times the stages of a pipeline into ``seconds`` and shows which one runs."""

    def __init__(self, seconds: dict[str, float], names: Iterable[str]) -> None:
        self.seconds = seconds
        self._names = list(names)
        self._bar = _progress()
        self._task = self._bar.add_task(self._names[0], total=len(self._names))

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage."""
        self._bar.update(self._task, description=name)
        start = perf_counter()
        yield
        self.seconds[name] = perf_counter() - start
        self._bar.advance(self._task)


def each(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar while they are worked on."""
    with _progress() as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)
