"""Products and sums over the ranks that run beside each other, and leave each other room on a GPU.

A matmul for Hopper puts one block on every multiprocessor and gives each its share of the result at the
start. Where NCCL's kernel holds 24 of 132, the blocks that find no place begin when all others have
ended: as if nothing had run at once. So products are told to leave some (`groups.Lane`).

What compiled graphs call are operators that they keep as they are: what a product is told lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoshard.groups import Cut, Group, Lane, ProcessGroupComm, numbered
from autoshard.products import as_rows, gradient_of_input, gradient_of_weight, side_by_side

LEAST_CUT = 2**25  # bytes of a product that is summed in pieces: less is mostly latency


def has_lanes(group: Group) -> TypeGuard[ProcessGroupComm]:
    """Whether products can leave room to this group's sums."""
    return isinstance(group, ProcessGroupComm) and bool(group.lanes)


# -- backward: the sum of an input's gradient, beside the gradients of weights --------------------


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
    if together and joined:
        beside, together = side_by_side(dys, together, transposed)
    one = all(trained) and len(beside) < len(dys)
    own = beside if one else [dy for dy, train in zip(dys, trained, strict=True) if train]
    running: Callable[[], Tensor] | None = None
    lane: Lane | None = None
    if together:
        if own and has_lanes(group):
            lane = group.lane(own[0].shape[1])
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


# -- forward: the sum of a product, in pieces ----------------------------------------------------


def cut_of(group: Group, weights: Sequence[Tensor], transposed: bool) -> Cut | None:
    """How the product by this weight is cut; None where it is summed whole."""
    if len(weights) > 1 or not has_lanes(group):
        return None
    return group.cut(weights[0].shape[0 if transposed else 1])


def summed_in_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, group: ProcessGroupComm, cut: Cut
) -> Tensor:
    """The sum over the ranks of `x W + b`, in pieces of the tokens: each is summed under the next one.

    x: [tokens, in]. Returns [tokens, out]; a small one is summed whole.
    """
    matrix = weight if transposed else weight.t()
    y = x.new_empty(x.shape[0], matrix.shape[1])

    def multiply(rows: Tensor, out: Tensor) -> None:
        if bias is None:
            torch.mm(rows, matrix, out=out)
        else:
            torch.addmm(bias, rows, matrix, out=out)

    if y.nbytes < LEAST_CUT:
        multiply(x, y)
        return group.all_reduce(y, inplace=True)
    (rows, out), *others = zip(x.chunk(cut.pieces), y.chunk(cut.pieces), strict=True)
    multiply(rows, out)
    running = [group.start_all_reduce(out)]
    lane = group.lanes[0]
    try:
        if cut.leave:
            lane.leave()
        for rows, out in others:
            multiply(rows, out)
            running.append(group.start_all_reduce(out))
    finally:
        if cut.leave:
            lane.take_back()
    for wait in running:
        wait()
    return y


@torch.library.custom_op("autoshard::product_in_pieces", mutates_args=())
def product_in_pieces(x: Tensor, weight: Tensor, transposed: bool, number: int) -> Tensor:
    """`summed_in_pieces` as one operator, without a bias. number: of the group."""
    group = numbered(number)
    cut = cut_of(group, [weight], transposed)
    assert cut is not None
    return summed_in_pieces(x, weight, None, transposed, group, cut)


@product_in_pieces.register_fake
def _(x: Tensor, weight: Tensor, transposed: bool, number: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])


class InPieces(torch.autograd.Function):
    """`product_in_pieces` with its gradients: those of any product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool, number: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        y = product_in_pieces(as_rows(x), weight, transposed, number)
        return cast(Tensor, y.view(*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, needed = as_rows(dy), ctx.needs_input_grad
        dx = gradient_of_input([rows], [weight], ctx.transposed).view(x.shape) if needed[0] else None
        dweight = gradient_of_weight(as_rows(x), rows, ctx.transposed) if needed[1] else None
        return dx, dweight, None, None
