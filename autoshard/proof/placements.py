"""Placements: which elements of a dimension each rank of a group holds, element by element.

A dimension is an int where every rank holds all of it, in order; else a ``Split``: one array per rank,
in the order of the rank's tensor. Elements that are known to be equal (an expanded dimension, a
repeated head) are one *class*, so an array holds the numbers of classes: of ``[kv·group]`` heads that
were repeated, element i is of class ``i // group``. -1 stands for padding, which is no element.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.int64]
LARGEST = 2**26  # elements of one array


class Unproven(Exception):
    """What a step of the proof needs does not hold."""


@dataclass(frozen=True, eq=False)
class Split:
    """A dimension of which not every rank holds everything in order. Made by ``placed`` alone.

    Attributes:
        size: elements of the whole dimension.
        held: per rank of the group, the class of each of its elements; -1 is padding.
        classes: element of the whole dimension -> its class; None where every element is its own.
    """

    size: int
    held: tuple[Array, ...]
    classes: Array | None

    def __str__(self) -> str:
        ranks = ", ".join(f"rank {r}: {_runs(h)}" for r, h in enumerate(self.held[:4]))
        more = ", ..." if len(self.held) > 4 else ""
        equal = "" if self.classes is None else " classes of equal elements"
        return f"of {self.size}{equal} ({ranks}{more})"


Dim: TypeAlias = int | Split

_MADE: weakref.WeakValueDictionary[tuple[Any, ...], Split] = weakref.WeakValueDictionary()


def placed(size: int, held: Sequence[Array], classes: Array | None = None) -> Dim:
    """The dimension of which ranks hold these elements; equal ones are the same object."""
    if classes is not None:
        classes, held = _numbered(classes, held)
    whole = np.arange(size) if classes is None else classes
    if all(h.size == size and np.array_equal(h, whole) for h in held):
        return size
    key = (size, None if classes is None else classes.tobytes(), tuple(h.tobytes() for h in held))
    known = _MADE.get(key)
    if known is None:
        known = _MADE[key] = Split(size, tuple(held), classes)
    return known


def _numbered(classes: Array, held: Sequence[Array]) -> tuple[Array | None, list[Array]]:
    """Classes numbered in the order in which they first stand; None where each has one element."""
    _, first, inverse = np.unique(classes, return_index=True, return_inverse=True)
    order = np.empty(first.size, np.int64)
    order[np.argsort(first)] = np.arange(first.size)
    known = np.full(int(max(classes.max(initial=-1), *(h.max(initial=-1) for h in held))) + 2, -2)
    known[-1] = -1
    known[classes] = order[inverse]
    renamed = [known[h] for h in held]
    if any((h == -2).any() for h in renamed):
        raise Unproven("a rank holds elements that are no part of the value")
    return (None if first.size == classes.size else order[inverse]), renamed


def classes_of(dim: Dim) -> Array:
    """The class of every element of the whole dimension."""
    if isinstance(dim, int):
        return np.arange(dim)
    return np.arange(dim.size) if dim.classes is None else dim.classes


def held_by(dim: Dim, rank: int) -> Array:
    """The classes that a rank holds, in its order."""
    return np.arange(dim) if isinstance(dim, int) else dim.held[rank]


def size_of(dim: Dim) -> int:
    """Elements of the whole dimension."""
    return dim if isinstance(dim, int) else dim.size


def local_size(dim: Dim, rank: int) -> int:
    """Elements that a rank's tensor has."""
    return dim if isinstance(dim, int) else dim.held[rank].size


@lru_cache(maxsize=512)
def joint(a: Dim, b: Dim) -> Dim | None:
    """What is held of one dimension, known from two operands; None where they contradict.

    On each rank, position p is an element of class a(p) and of class b(p); it must exist.
    """
    if a is b or (isinstance(a, int) and isinstance(b, int)):
        return a if size_of(a) == size_of(b) else None
    if size_of(a) != size_of(b):
        return None
    ranks = len(a.held if isinstance(a, Split) else b.held if isinstance(b, Split) else ())
    pairs = [(held_by(a, r), held_by(b, r)) for r in range(ranks)]
    if any(x.size != y.size or ((x < 0) != (y < 0)).any() for x, y in pairs):
        return None
    base = int(classes_of(b).max(initial=0)) + 1
    try:
        held = [np.where(x < 0, -1, x * base + y) for x, y in pairs]
        return placed(size_of(a), held, classes_of(a) * base + classes_of(b))
    except Unproven:
        return None


def merged(dims: Sequence[Dim]) -> Dim:
    """The ordered product of dimensions, the last varying fastest."""
    size = math.prod(map(size_of, dims))
    splits = [d for d in dims if isinstance(d, Split)]
    if not splits:
        return size
    if len(dims) == 1:
        return dims[0]
    if size > LARGEST:
        raise Unproven(f"a dimension of {size} elements is too large to be proven")
    counts = [int(classes_of(d).max(initial=-1)) + 1 for d in dims]
    held = [_grid([held_by(d, r) for d in dims], counts) for r in range(len(splits[0].held))]
    return placed(size, held, _grid([classes_of(d) for d in dims], counts))


def _grid(arrays: Sequence[Array], counts: Sequence[int]) -> Array:
    result = np.zeros(1, np.int64)
    for array, count in zip(arrays, counts, strict=True):
        a, b = result[:, None], array[None, :]
        result = np.where((a < 0) | (b < 0), -1, a * count + b).ravel()
    return result


def divided(dim: Dim, sizes: Sequence[int], local: Sequence[Sequence[int]] | None = None) -> list[Dim]:
    """The factors of a dimension that is the ordered product of these sizes.

    Args:
        local: sizes of the factors on each rank; None: as many as the rank holds of each.

    Raises:
        Unproven: what a rank holds is no product of what it would hold of the factors.
    """
    if isinstance(dim, int):
        if local is not None and any(list(given) != list(sizes) for given in local):
            raise Unproven(f"whole sizes are {list(sizes)}, the rank's {list(local[0])}")
        return list(sizes)
    if any((h < 0).any() for h in dim.held):
        raise Unproven("a padded dimension is divided")
    classes = classes_of(dim)
    _, example = np.unique(classes, return_index=True)
    per_axis = [_equal_slices(dim, sizes, axis) for axis in range(len(sizes))]
    held: list[list[Array]] = [[] for _ in sizes]
    for rank, own in enumerate(dim.held):
        places = np.unravel_index(example[own], tuple(sizes))
        coordinates = [per_axis[axis][place] for axis, place in enumerate(places)]
        shape = [np.unique(c).size for c in coordinates] if local is None else list(local[rank])
        if math.prod(shape) != own.size:
            raise Unproven(f"rank {rank} holds {own.size} elements, its sizes are {shape}")
        for axis, coordinate in enumerate(coordinates):
            lines = np.moveaxis(coordinate.reshape(shape), axis, 0).reshape(shape[axis], -1)
            if (lines != lines[:, :1]).any():
                raise Unproven(f"what rank {rank} holds is no product of {list(sizes)}")
            held[axis].append(lines[:, 0] if lines.shape[1] else np.arange(0))
    return [placed(s, h, c) for s, h, c in zip(sizes, held, per_axis, strict=True)]


def _equal_slices(dim: Split, sizes: Sequence[int], axis: int) -> Array:
    """Element of one factor -> the first one for which the whole dimension's classes are the same."""
    if dim.classes is None:
        return np.arange(sizes[axis])
    rows = np.moveaxis(dim.classes.reshape(tuple(sizes)), axis, 0).reshape(sizes[axis], -1)
    _, inverse = np.unique(rows, axis=0, return_inverse=True)
    return inverse.reshape(-1)


def taken(dim: Dim, index: Array, local: Sequence[Array]) -> Dim:
    """``dim[index]`` where rank r takes ``local[r]`` of what it holds."""
    held = [held_by(dim, r)[i] for r, i in enumerate(local)]
    return placed(index.size, held, classes_of(dim)[index])


def told_apart(dim: Dim) -> Dim:
    """The dimension once each of its elements has been given random numbers of its own.

    Equal elements differ from then on. Which of them a rank's position stands for is free, as none has
    drawn yet; it is the next one of its class, in the order of ranks, and no two stand for the same.
    """
    if isinstance(dim, int) or dim.classes is None:
        return dim
    free = [list(np.flatnonzero(dim.classes == c)) for c in range(int(dim.classes.max()) + 1)]
    if any((h < 0).any() for h in dim.held):
        raise Unproven("draws random numbers for padding of repeated elements")
    counts = np.bincount(np.concatenate(dim.held), minlength=len(free))
    if any(count > len(elements) for count, elements in zip(counts, free, strict=True)):
        raise Unproven("draws different random numbers for elements that several ranks hold")
    return placed(dim.size, [np.array([free[c].pop(0) for c in h], np.int64) for h in dim.held])


def disjoint(dims: Sequence[Dim]) -> bool:
    """Whether no two ranks hold the same element of a tensor with these dimensions."""
    return any(
        isinstance(d, Split)
        and d.classes is None
        and np.unique(np.concatenate(d.held)).size == sum(h.size for h in d.held)
        for d in dims
    )


def said(dims: Sequence[Dim]) -> str:
    """The placement of a tensor, for messages."""
    parts = [f"dimension {i} {d}" for i, d in enumerate(dims) if isinstance(d, Split)]
    return "; ".join(parts) if parts else "the whole"


def _runs(held: Array) -> str:
    if not held.size:
        return "nothing"
    breaks = np.flatnonzero(np.diff(held) != 1)
    starts, ends = [0, *(breaks + 1)], [*breaks, held.size - 1]
    runs = [f"{held[a]}..{held[b]}" for a, b in zip(starts, ends, strict=True)]
    return "+".join(runs[:4]) + ("+..." if len(runs) > 4 else "")
