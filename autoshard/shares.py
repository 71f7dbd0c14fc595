"""A rank's share of a whole tensor, and back: slices, padding, order. Nothing here communicates."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor

from autoshard import layouts
from autoshard.groups import Group


def local_part(x: Tensor, dim: int, layout: str, group: Group) -> Tensor:
    """What this rank holds of the whole ``x`` along ``dim``, e.g. heads ``"12/2·64"``."""
    # A view of the whole value must be possible of its part too.
    return layouts.local_part(x, dim, layouts.parse(layout), group.coordinate).contiguous()


def in_order(x: Tensor, dim: int, layout: str, degree: int) -> Tensor:
    """The whole dimension in the model's order, from shares concatenated in rank order."""
    return layouts.whole(x, dim, layouts.parse(layout), degree)


def pad_to(x: Tensor, dim: int, size: int) -> Tensor:
    """Behind ``x`` along ``dim``, up to ``size``, copies of the last row (of a vocabulary).

    A row of zeros could be divided by, and zero times infinity spoil a gradient.
    """
    dim %= x.dim()
    missing = size - x.shape[dim]
    if not missing:
        return x
    shape = [*x.shape[:dim], missing, *x.shape[dim + 1 :]]
    if not x.shape[dim]:
        return torch.cat([x, x.new_ones(shape)], dim)
    last = x.detach().narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, last.expand(shape)], dim)


def weighed(x: Tensor, dim: int, layout: str, group: Group) -> Tensor:
    """Each element along ``dim`` times the number of pieces: ranks over those that hold it."""
    tree = layouts.parse(layout)
    held = Counter(i for r in range(group.degree) for i in layouts.indices(tree, r))
    factors = [group.degree / held[i] for i in layouts.indices(tree, group.coordinate)]
    weights = torch.tensor(factors, dtype=x.dtype, device=x.device)
    return x * weights.view([-1 if d == dim else 1 for d in range(x.dim())])


def joined(x: Tensor, dims: tuple[int, ...], texts: tuple[str, ...], degree: int) -> Tensor:
    """The whole tensor from shares ``[degree, ...]`` that are cut along several dimensions."""
    trees = [layouts.parse(text) for text in texts]
    source: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rank in range(degree):
        held = [layouts.indices(tree, rank) for tree in trees]
        for places in itertools.product(*(enumerate(h) for h in held)):
            source.setdefault(tuple(i for _, i in places), (rank, *(p for p, _ in places)))
    sizes = [layouts.whole_size(tree) for tree in trees]
    order = [source[place] for place in itertools.product(*map(range, sizes))]
    index = torch.tensor(order, device=x.device).view(*sizes, -1).unbind(-1)
    front = list(range(1, len(dims) + 1))
    y = x.movedim([d + 1 for d in dims], front)[index]
    return y.movedim(list(range(len(dims))), list(dims))


def own_rows(x: Tensor, dim: int, group: Group, rows: int, size: int) -> Tensor:
    """The share without its padding: ``rows`` or, on the last ranks, what is left of ``size``."""
    return x.narrow(dim, 0, max(0, min(rows, size - group.coordinate * rows)))


def unpad(x: Tensor, dim: int, padded: int, rows: int, size: int) -> Tensor:
    """The true dimension from padded shares concatenated in rank order."""
    if padded != rows:
        x = x.unflatten(dim, (-1, padded)).narrow(dim + 1, 0, rows).flatten(dim, dim + 1)
    return x.narrow(dim, 0, size)
