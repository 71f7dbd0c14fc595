"""Layouts, as parameters are stored by them and as graphs say them, read element by element."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from autoshard.layouts import Concat, Layout, Leaf, Product
from autoshard.proof.placements import Array, Unproven


@lru_cache(maxsize=1024)
def layout_positions(layout: Layout, size: int, coordinate: int) -> Array:
    """The elements of a dimension of this size that a layout gives the rank at ``coordinate``.

    A leaf cut in p parts with stride s gives part ``coordinate // s % p``, of ceil(size / p) elements,
    the last ones of fewer. One leaf may be of unknown size, which follows from the dimension's.
    """
    known = [leaf_size(f) for f in _factors(layout)]
    if known.count(-1) > 1:
        raise Unproven(f"the layout {layout} has two unknown sizes")
    rest = math.prod(n for n in known if n >= 0)
    if (size % rest if -1 in known and rest else size - rest) != 0:
        raise Unproven(f"the layout {layout} is of {rest} elements, the dimension has {size}")
    return _positions(layout, size // rest if rest else 0, coordinate)


def _factors(layout: Layout) -> tuple[Layout, ...]:
    return (layout,) if isinstance(layout, Leaf | Concat) else layout.factors


def leaf_size(layout: Layout) -> int:
    """Elements of a layout, -1 where that is not known."""
    if isinstance(layout, Leaf):
        return layout.size
    sizes = [leaf_size(c) for c in (layout.parts if isinstance(layout, Concat) else layout.factors)]
    if min(sizes) < 0:
        return -1
    return sum(sizes) if isinstance(layout, Concat) else math.prod(sizes)


def _positions(layout: Layout, unknown: int, coordinate: int) -> Array:
    if isinstance(layout, Leaf):
        count = unknown if layout.size < 0 else layout.size
        step = -(-count // layout.parts)
        begin = coordinate // layout.stride % layout.parts * step
        return np.arange(min(begin, count), min(begin + step, count))
    if isinstance(layout, Concat):
        offset, behind = 0, []
        for part in layout.parts:
            behind.append(_positions(part, unknown, coordinate) + offset)
            offset += leaf_size(part)
        return np.concatenate(behind)
    held = np.zeros(1, np.int64)
    for factor in layout.factors:
        count = unknown if leaf_size(factor) < 0 else leaf_size(factor)
        inner = _positions(factor, unknown, coordinate)
        held = (held[:, None] * count + inner[None, :]).ravel()
    return held


@lru_cache(maxsize=4096)
def layout_of(text: str) -> Layout:
    """The layout that a text in a graph says: ``2/2@4·(4/4 | 1 | 1)·64``."""
    words = text.replace(" ", "")
    place = 0

    def concatenation() -> Layout:
        nonlocal place
        parts = [product()]
        while place < len(words) and words[place] == "|":
            place += 1
            parts.append(product())
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))

    def product() -> Layout:
        nonlocal place
        factors: list[Layout] = []
        while True:
            if words[place : place + 1] == "(":
                place += 1
                factors.append(concatenation())
                if words[place : place + 1] != ")":
                    raise Unproven(f"the layout {text!r} cannot be read")
                place += 1
            else:
                factors.append(leaf())
            if words[place : place + 1] != "·":
                return factors[0] if len(factors) == 1 else Product(tuple(factors))
            place += 1

    def leaf() -> Leaf:
        nonlocal place
        start = place
        while place < len(words) and words[place] in "0123456789?/@":
            place += 1
        size, _, cut = words[start:place].partition("/")
        parts, _, stride = cut.partition("@")
        try:
            return Leaf(-1 if size == "?" else int(size), int(parts or 1), int(stride or 1))
        except ValueError:
            raise Unproven(f"the layout {text!r} cannot be read") from None

    result = concatenation()
    if place != len(words):
        raise Unproven(f"the layout {text!r} cannot be read")
    return result
