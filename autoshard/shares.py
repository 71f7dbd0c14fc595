"""A rank's share of a whole tensor, and back: slices, padding, order. Nothing here communicates."""

from __future__ import annotations

import torch
from torch import Tensor

from autoshard import layouts
from autoshard.groups import Group


def local_part(x: Tensor, dim: int, layout: str, group: Group) -> Tensor:
    """What this rank holds of the whole ``x`` along ``dim``, e.g. heads ``"12/2·64"``."""
    return layouts.local_part(x, dim, layouts.parse(layout), group.coordinate)


def in_order(x: Tensor, dim: int, layout: str, degree: int) -> Tensor:
    """The whole dimension in the model's order, from shares concatenated in rank order."""
    return layouts.whole(x, dim, layouts.parse(layout), degree)


def pad_to(x: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind ``x`` along ``dim`` up to ``size`` (rows of a vocabulary)."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    padding = [0, 0] * (x.dim() - dim - 1) + [0, missing]
    return torch.nn.functional.pad(x, padding)


def own_rows(x: Tensor, dim: int, group: Group, rows: int, size: int) -> Tensor:
    """The share without its padding: ``rows`` or, on the last ranks, what is left of ``size``."""
    return x.narrow(dim, 0, max(0, min(rows, size - group.coordinate * rows)))


def unpad(x: Tensor, dim: int, padded: int, rows: int, size: int) -> Tensor:
    """The true dimension from padded shares concatenated in rank order."""
    if padded != rows:
        x = x.unflatten(dim, (-1, padded)).narrow(dim + 1, 0, rows).flatten(dim, dim + 1)
    return x.narrow(dim, 0, size)
