"""The sum of an input's gradient over the ranks, beside the products that give the weights' gradients.

A matmul for Hopper puts one block on every multiprocessor and gives each its share of the result at the
start. Where NCCL's kernel holds 24 of 132, the blocks that find no place begin when all others have
ended: as if nothing had run at once. So products are told to leave some (`groups.Lane`).

Compiled graphs call all of it as one operator, which they keep as it is: what a product is told lies
between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from autoshard.groups import Group, Lane, ProcessGroupComm, numbered
from autoshard.products import gradient_of_input, gradient_of_weight, side_by_side


def has_lanes(group: Group) -> TypeGuard[ProcessGroupComm]:
    """Whether products can leave room to this group's sums."""
    return isinstance(group, ProcessGroupComm) and bool(group.lanes)


def gradients_begun(
    x: Tensor | None,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    trained: Sequence[bool],
    transposed: bool,
    group: Group,
    joined: bool = True,
) -> tuple[Callable[[], Tensor] | None, Sequence[Tensor]]:
    """The sum of the input's gradient, begun, and the gradients of the weights that are `trained`.

    x: [tokens, in]; dys: [tokens, out_i]. weights: None where the input's gradient is not asked.
    joined: products may run side by side; the gradients may be views of one tensor then.
    """
    beside, together = dys, weights
    if together and joined and len(dys) > 1:
        beside, together = side_by_side(dys, together, transposed)
    untrained = False in trained
    one = len(beside) < len(dys) and not untrained
    own = [dy for dy, train in zip(dys, trained, strict=True) if train] if untrained else beside
    running: Callable[[], Tensor] | None = None
    lane: Lane | None = None
    if together:
        if own and has_lanes(group):  # by the first weight's, joined or not: compiled as in eager
            lane = group.lane(dys[trained.index(True)].shape[1])
        running = group.start_all_reduce(gradient_of_input(beside, together, transposed), lane)
        del together
    if x is None:
        return running, ()
    found = _gradients_of_weights(x, own, transposed, lane)
    return running, found[0].split([dy.shape[1] for dy in dys]) if one else found


def _gradients_of_weights(
    x: Tensor, dys: Sequence[Tensor], transposed: bool, lane: Lane | None
) -> list[Tensor]:
    """The gradient of each weight. They leave the sum beside them room, while it runs."""
    found: list[Tensor] = []
    if lane is not None:
        covered = 0
        lane.leave()
        try:
            while covered < lane.room.covers and len(found) < len(dys):
                dy = dys[len(found)]
                covered += dy.shape[1]
                found.append(gradient_of_weight(x, dy, transposed))
        finally:
            lane.take_back()
    if len(found) == len(dys):
        return found
    return found + [gradient_of_weight(x, dy, transposed) for dy in dys[len(found) :]]


@torch.library.custom_op("autoshard::column_products", mutates_args=())
def column_products(
    x: Tensor | None,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    trained: Sequence[bool],
    transposed: bool,
    number: int,
) -> list[Tensor]:
    """`gradients_begun` and its end as one operator. number: of the group."""
    group = numbered(number)
    running, found = gradients_begun(x, dys, weights, trained, transposed, group, joined=False)
    assert running is not None
    return [running(), *found]


@column_products.register_fake
def _(
    x: Tensor | None, dys: Sequence[Tensor], weights: Sequence[Tensor], trained: Sequence[bool],
    transposed: bool, number: int,
) -> list[Tensor]:  # fmt: skip
    size = weights[0].shape[0 if transposed else 1]
    own = [weight for weight, train in zip(weights, trained, strict=True) if train]
    return [dys[0].new_empty(dys[0].shape[0], size), *(w.new_empty(w.shape) for w in own)]
