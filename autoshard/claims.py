"""What a rank should hold of a tensor of the model, as numbers: the proof's statement made a test.

The proof says which elements each rank holds (``proof/held.py``). Here these are taken out of the whole
tensor, and the ranks' shares of a gradient are added up to the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoshard.proof.held import OUTSIDE, Held
from autoshard.proof.placements import Array, Dim, Split, classes_of, held_by


def is_comparable(held: Held) -> bool:
    """Whether the ranks' tensors are elements of the model's one, or parts of a sum of them."""
    return held.weighed is None and held.stacked == 0


def share_of(whole: Tensor, held: Held, place: int) -> tuple[Tensor, Tensor | None]:
    """What the rank at this place of its group should have, and where that is padding (or None)."""
    share, padding = whole, None
    for dim, held_dim in enumerate(held.dims):
        if not isinstance(held_dim, Split):
            continue
        own = _elements(held_dim, place)
        share = share.index_select(dim, own.clamp(min=0))
        if bool((own < 0).any()):
            shape = [1] * whole.dim()
            shape[dim] = -1
            here = (own < 0).view(shape)
            padding = here if padding is None else padding | here
    if padding is not None:
        padding = padding.expand(share.shape)
    if held.cast is not None:
        share = share.to(held.cast)
    if held.trailing:
        share = share.reshape([*share.shape, *[1] * held.trailing])
    return share, padding


def gradient_of(shares: Sequence[Tensor], whole: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """The gradient that the ranks of a group have together, and what it should be.

    *Outside* a group each rank has the whole gradient: give one share. *Inside*, the gradient of an
    element is the sum over the ranks that hold it. Of a partial sum that is ``times`` the value, each
    rank has the gradient of its share over ``times``. Equal elements are added up on both sides: the
    gradient of either one of them reaches what both were made of.
    """
    if held.times is not None:
        right, _ = share_of(whole, held, 0)
        return torch.stack(list(shares)), (right / held.times).expand(len(shares), *right.shape)
    if held.trailing:
        whole = whole.reshape([*whole.shape, *[1] * held.trailing])
    if held.inside == OUTSIDE:
        return shares[0], whole
    total = torch.zeros((), dtype=whole.dtype)
    for place, share in enumerate(shares):
        for dim, held_dim in enumerate(held.dims):
            share = _added(share, dim, held_by(held_dim, place), held_dim)
        total = total + share
    for dim, held_dim in enumerate(held.dims):
        whole = _added(whole, dim, classes_of(held_dim), held_dim)
    return total, whole


def _elements(dim: Split, place: int) -> Tensor:
    """For each element of the rank one element of the whole that equals it; -1 for padding."""
    _, example = np.unique(classes_of(dim), return_index=True)
    own = dim.held[place]
    return torch.from_numpy(np.where(own < 0, -1, example[own.clip(0)]))


def _added(tensor: Tensor, dim: int, classes: Array, of: Dim) -> Tensor:
    """Elements of one class added up along a dimension, in the order of classes; padding left out."""
    if isinstance(of, int):
        return tensor
    shape = list(tensor.shape)
    shape[dim] = int(classes_of(of).max(initial=-1)) + 1
    kept = torch.from_numpy(np.flatnonzero(classes >= 0))
    numbers = torch.from_numpy(classes[classes >= 0])
    return tensor.new_zeros(shape).index_add(dim, numbers, tensor.index_select(dim, kept))
