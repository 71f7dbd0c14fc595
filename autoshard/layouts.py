"""Layouts: which elements of a dimension a rank holds.

A dimension is a tree: a leaf of ``size`` elements cut into ``parts`` (rank ``r`` of the group holds
part ``r // stride % parts``), an ordered product, or an ordered concatenation. A fused QKV weight
over two ranks is ``[12/2·64 | 12/2·64 | 12/2·64]``: each rank holds three blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaf:
    """One axis. ``size`` is -1 where it is symbolic (then it is not cut)."""

    size: int
    parts: int = 1
    stride: int = 1

    def __str__(self) -> str:
        size = "?" if self.size < 0 else str(self.size)
        if self.parts == 1:
            return size
        return f"{size}/{self.parts}" + (f"@{self.stride}" if self.stride != 1 else "")


@dataclass(frozen=True)
class Product:
    """An ordered product of axes, the last varying fastest."""

    factors: tuple[Layout, ...]

    def __str__(self) -> str:
        return "·".join(f"({f})" if isinstance(f, Concat) else str(f) for f in self.factors)


@dataclass(frozen=True)
class Concat:
    """Axes behind each other."""

    parts: tuple[Layout, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


Layout = Leaf | Product | Concat


@lru_cache(maxsize=4096)
def parse(text: str) -> Layout:
    """The layout that ``str(layout)`` wrote: ``"2/2@4·(4/4 | 1 | 1)·64"``."""
    layout, rest = _concat(text.replace(" ", ""))
    if rest:
        raise ValueError(f"{rest!r} is left over in the layout {text!r}")
    return layout


def _concat(text: str) -> tuple[Layout, str]:
    part, text = _product(text)
    parts = [part]
    while text.startswith("|"):
        part, text = _product(text[1:])
        parts.append(part)
    return (parts[0] if len(parts) == 1 else Concat(tuple(parts))), text


def _product(text: str) -> tuple[Layout, str]:
    factors: list[Layout] = []
    while True:
        if text.startswith("("):
            factor, text = _concat(text[1:])
            text = text[1:]
        else:
            word = text
            for mark in "·|)":
                word = word.partition(mark)[0]
            text = text[len(word) :]
            size, _, cut = word.partition("/")
            parts, _, stride = cut.partition("@")
            factor = Leaf(-1 if size == "?" else int(size), int(parts or 1), int(stride or 1))
        factors.append(factor)
        if not text.startswith("·"):
            return (factors[0] if len(factors) == 1 else Product(tuple(factors))), text
        text = text[1:]


def is_split(layout: Layout) -> bool:
    """Whether any axis of the layout is cut."""
    return any(leaf.parts > 1 for leaf in leaves(layout))


def leaves(layout: Layout) -> list[Leaf]:
    """All axes of the layout, in order."""
    if isinstance(layout, Leaf):
        return [layout]
    children = layout.factors if isinstance(layout, Product) else layout.parts
    return [leaf for child in children for leaf in leaves(child)]


def whole_size(layout: Layout) -> int:
    """Number of elements of the whole dimension."""
    if isinstance(layout, Leaf):
        return layout.size
    if isinstance(layout, Product):
        return math.prod([whole_size(f) for f in layout.factors])
    return sum([whole_size(p) for p in layout.parts])


@lru_cache(maxsize=4096)
def indices(layout: Layout, coordinate: int) -> tuple[int, ...]:
    """The positions, in the whole dimension, of what the rank at ``coordinate`` holds, in order."""
    if isinstance(layout, Leaf):
        # torch.chunk's rule: ceil(size / parts) each, the last ones fewer.
        chunk = -(-layout.size // layout.parts)
        begin = min(coordinate // layout.stride % layout.parts * chunk, layout.size)
        return tuple(range(begin, min(begin + chunk, layout.size)))
    if isinstance(layout, Product):
        held: tuple[int, ...] = (0,)
        for factor in layout.factors:
            size, inner = whole_size(factor), indices(factor, coordinate)
            held = tuple(h * size + i for h in held for i in inner)
        return held
    held, offset = (), 0
    for part in layout.parts:
        held += tuple(offset + i for i in indices(part, coordinate))
        offset += whole_size(part)
    return held


def share_size(layout: Layout, coordinate: int) -> int:
    """Number of elements that the rank at ``coordinate`` holds."""
    if isinstance(layout, Leaf):
        chunk = -(-layout.size // layout.parts)
        begin = min(coordinate // layout.stride % layout.parts * chunk, layout.size)
        return min(begin + chunk, layout.size) - begin
    if isinstance(layout, Product):
        return math.prod(share_size(f, coordinate) for f in layout.factors)
    return sum(share_size(p, coordinate) for p in layout.parts)


def is_disjoint(layout: Layout, degree: int) -> bool:
    """Whether every element belongs to exactly one rank of the group."""
    return sum(share_size(layout, r) for r in range(degree)) == whole_size(layout)


@lru_cache(maxsize=4096)
def is_contiguous(layout: Layout, degree: int) -> bool:
    """Whether the ranks' shares, in rank order, are the dimension cut like ``torch.chunk`` does."""
    if isinstance(layout, Product) and not any(is_split(f) for f in layout.factors[1:]):
        layout = layout.factors[0]
    if isinstance(layout, Leaf):
        return layout.parts == degree and layout.stride == 1
    if any(leaf.size < 0 for leaf in leaves(layout)):
        return False
    order = [i for r in range(degree) for i in indices(layout, r)]
    return order == list(range(whole_size(layout)))


@lru_cache(maxsize=4096)
def chunks(layout: Layout, degree: int) -> tuple[int, int] | None:
    """(parts, stride) where rank r holds chunk ``r // stride % parts`` of ``torch.chunk(x, parts)``."""
    if any(leaf.size < 0 for leaf in leaves(layout)):
        return None
    if is_contiguous(layout, degree):
        return degree, 1
    first = layout.factors[0] if isinstance(layout, Product) else layout
    if not isinstance(first, Leaf) or not is_split(first):
        return None
    found = Leaf(whole_size(layout), first.parts, first.stride)
    return (first.parts, first.stride) if same_shares(layout, found, degree) else None


@lru_cache(maxsize=4096)
def same_shares(a: Layout, b: Layout, degree: int) -> bool:
    """Whether every rank of a group holds the same elements, in the same order."""
    return all(indices(a, rank) == indices(b, rank) for rank in range(degree))


def local_part(x: Tensor, dim: int, layout: Layout, coordinate: int) -> Tensor:
    """What the rank at ``coordinate`` holds of ``x`` along ``dim``. Differentiable."""
    if any(leaf.size < 0 for leaf in leaves(layout)):
        factors = layout.factors if isinstance(layout, Product) else (layout,)
        assert all(isinstance(f, Leaf) for f in factors)
        flat = [f for f in factors if isinstance(f, Leaf)]
        y = x.unflatten(dim, [f.size for f in flat]) if len(flat) > 1 else x
        for offset, f in enumerate(flat):
            if f.parts > 1:
                part = f.size // f.parts
                y = y.narrow(dim + offset, coordinate // f.stride % f.parts * part, part)
        return y.flatten(dim, dim + len(flat) - 1) if len(flat) > 1 else y
    held = indices(layout, coordinate)
    if not held:
        return x.narrow(dim, 0, 0)
    if held[-1] - held[0] + 1 == len(held):
        return x.narrow(dim, held[0], len(held))
    return x.index_select(dim, _index(held, x.device))


def whole(x: Tensor, dim: int, layout: Layout, degree: int) -> Tensor:
    """The whole dimension from the ranks' shares concatenated along ``dim`` in rank order."""
    if is_contiguous(layout, degree):
        return x
    if any(leaf.size < 0 for leaf in leaves(layout)):
        return _whole_symbolic(x, dim, layout, degree)
    source: dict[int, int] = {}
    position = 0
    for rank in range(degree):
        for index in indices(layout, rank):
            source.setdefault(index, position)
            position += 1
    order = tuple(source[i] for i in range(whole_size(layout)))
    return x.index_select(dim, _index(order, x.device))


def _whole_symbolic(x: Tensor, dim: int, layout: Layout, degree: int) -> Tensor:
    factors: Sequence[Layout] = layout.factors if isinstance(layout, Product) else (layout,)
    flat = [f for f in factors if isinstance(f, Leaf)]
    assert len(flat) == len(factors)
    chunks = [c.unflatten(dim, [f.size // f.parts if f.parts > 1 else f.size for f in flat])
              if len(flat) > 1 else c for c in x.chunk(degree, dim)]  # fmt: skip
    for offset in reversed(range(len(flat))):
        leaf = flat[offset]
        if leaf.parts > 1:
            groups: dict[int, list[Tensor]] = {}
            for rank, chunk in enumerate(chunks):
                key = rank - rank // leaf.stride % leaf.parts * leaf.stride
                groups.setdefault(key, []).append(chunk)
            joined = {key: torch.cat(g, dim + offset) for key, g in groups.items()}
            chunks = [
                joined[rank - rank // leaf.stride % leaf.parts * leaf.stride] for rank in range(degree)
            ]
    result = chunks[0]
    return result.flatten(dim, dim + len(flat) - 1) if len(flat) > 1 else result


_INDICES: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _index(positions: tuple[int, ...], device: torch.device) -> Tensor:
    key = positions, device
    if key not in _INDICES:
        made = torch.tensor(positions, device=device)
        if type(made) is not Tensor:  # a fake tensor of somebody's tracing must not be kept
            return made
        _INDICES[key] = made
    return _INDICES[key]
