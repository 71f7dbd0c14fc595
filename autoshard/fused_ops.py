"""What runs in place of several calls of the proven graph: a matmul together with its collective.

    op              the calls that it replaces
    column_linear   copy, then a linear for each weight      (arXiv 1909.08053, figure 3: f and A)
    row_linear      a linear, reduce, and the bias           (B and g); several that are added up

In the backward pass of `column_linear` the all-reduce of the input's gradient runs while the weights'
gradients are computed. `row_linear` lets the first rank add the bias before the sum, which then holds
it once: one pass over the result fewer. Where results are added (attention and MLP side by side), what
ranks have is added first, and summed over them once: sum_r a_r + sum_r b_r = sum_r (a_r + b_r).

Where `column_linear` has several weights (q, k and v), the product that gives the input's gradient is
one, of gradients and weights laid side by side, if that moves less memory (`side_by_side`).

Both take a weight as `F.linear` does, [out, in], or transposed, [in, out], as `addmm` does. Under
autocast they are the calls that they replace, which PyTorch casts one by one. Under torch.compile the
bias is added after the sum, in the kernel of what comes next; and the products that leave a sum its
multiprocessors (`groups.Lane`) are one operator with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoshard import ops
from autoshard.beside import column_products, gradients_begun, has_lanes
from autoshard.compat import apply_own, once
from autoshard.groups import Group
from autoshard.products import as_rows, product


def column_linear(
    x: Tensor,
    group: Group,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
) -> tuple[Tensor, ...]:
    """`y_i = x W_i + b_i` of a whole `x`, whose gradient is summed over the ranks.

        dx = sum over ranks of sum_i dy_i W_iᵀ,  dW_i = xᵀ dy_i,  db_i = sum over tokens of dy_i

    x: [..., in]. Returns [..., out_i] for each weight.
    """
    backward = torch.is_grad_enabled()
    if not backward or torch.is_autocast_enabled(x.device.type):
        x = ops.copy(x, group) if backward else x
        return tuple(product(x, w, b, transposed) for w, b in zip(weights, biases, strict=True))
    found = apply_own(_ColumnLinear, x, group, transposed, len(weights), *weights, *biases)
    return cast(tuple[Tensor, ...], found)


def column_gradients(
    x: Tensor | None,
    shape: Sequence[int] | None,
    group: Group,
    weights: Sequence[Tensor] | None,
    dys: Sequence[Tensor | None],
    transposed: bool,
    of_weights: Sequence[bool],
    of_biases: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `column_linear`: of `x`, of each weight, of each bias; None where not asked.

    x: [..., in] of `shape`, or rows where that is None; None where no weight's gradient is asked.
    weights: None where that of `x` is not. dys: [..., out_i]; None of a result that nobody used.
    """
    if any([dy is None for dy in dys]):  # then it is as if there were fewer weights
        there = [place for place, dy in enumerate(dys) if dy is not None]
        own = None if weights is None else [weights[place] for place in there]
        asked = [[asked[place] for place in there] for asked in (of_weights, of_biases)]
        some = [dys[place] for place in there]
        dx, *found = column_gradients(x, shape, group, own, some, transposed, *asked)
        gradients: list[Tensor | None] = [None] * (2 * len(dys))
        for index, place in enumerate(there):
            gradients[place], gradients[len(dys) + place] = found[index], found[len(there) + index]
        return dx, *gradients
    rows = [as_rows(dy) for dy in cast(Sequence[Tensor], dys)]
    if x is None:
        wide, trained = None, [False] * len(rows)
    else:
        wide, trained = as_rows(x), list(of_weights)
    running: Callable[[], Tensor] | None = None
    if torch.compiler.is_compiling() and weights and True in trained and has_lanes(group):
        summed, *of_used = column_products(wide, rows, weights, trained, transposed, group.number)
        running = lambda: summed  # noqa: E731
    else:
        running, of_used = gradients_begun(wide, rows, weights, trained, transposed, group)
    sums = [dy.sum(0) if asked else None for dy, asked in zip(rows, of_biases, strict=True)]
    if False in trained:
        left = iter(of_used)
        of_used = [next(left) if train else None for train in trained]
    if running is None:
        return None, *of_used, *sums
    dx = running()
    return dx if shape is None else dx.view(shape), *of_used, *sums


def row_linear(
    xs: Sequence[Tensor],
    group: Group,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
) -> Tensor:
    """`y = sum_i (sum over ranks of x_i W_i, + b_i)`.

        dx_i = dy W_iᵀ,  dW_i = x_iᵀ dy,  db_i = sum over tokens of dy

    xs: [..., in_i], this rank's shares of the contractions. Returns [..., out], the same on every rank.
    """
    first, several = xs[0], len(xs) > 1
    if torch.is_autocast_enabled(first.device.type) or (several and any(_unlike(x, first) for x in xs)):
        parts = [
            ops.reduce(product(x, w, None, transposed), group, True)
            for x, w in zip(xs, weights, strict=True)
        ]
        parts = [y if b is None else y + b for y, b in zip(parts, biases, strict=True)]
        return reduce(torch.add, parts)
    given = [b for b in biases if b is not None]
    if torch.compiler.is_compiling():
        products = [product(x, w, None, transposed) for x, w in zip(xs, weights, strict=True)]
        return reduce(torch.add, given, ops.reduce(reduce(torch.add, products), group))
    y = _parts(xs, group, weights, given, transposed)
    if torch.is_grad_enabled():
        y = apply_own(_Sum, y, group, *given) if given else ops.reduce(y, group, True)
    else:
        y = group.all_reduce(y, inplace=True)
    return y if first.dim() == 2 else y.view(*first.shape[:-1], y.shape[-1])


def _parts(
    xs: Sequence[Tensor],
    group: Group,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    transposed: bool,
) -> Tensor:
    """What this rank adds to the sum, as rows: the first one also the biases.

    `F.linear` of more dimensions and a bias gives a view, which cannot be summed in place.
    """
    y = product(as_rows(xs[0]), weights[0], _bias(biases, group), transposed)
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        y = torch.addmm(y, as_rows(x), weight if transposed else weight.t())
    return y


def _bias(biases: Sequence[Tensor], group: Group) -> Tensor | None:
    """What this rank adds to its product: of the first one all biases."""
    if group.coordinate or not biases:
        return None
    return reduce(torch.add, [b.detach() if b.requires_grad else b for b in biases])


def _unlike(x: Tensor, y: Tensor) -> bool:
    """Whether an addition of their products has to broadcast or to cast one."""
    return x.shape[:-1] != y.shape[:-1] or x.dtype != y.dtype


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, transposed: bool, count: int, *operands: Any
    ) -> tuple[Tensor, ...]:
        weights, biases = operands[:count], operands[count:]
        ctx.group, ctx.transposed, ctx.count, ctx.line = group, transposed, count, ops.line()
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        # As autograd: an operand is kept where the other one's gradient is needed.
        trained = any(ctx.needs_input_grad[4 : 4 + count])
        kept = weights if ctx.needs_input_grad[0] else (None,) * count
        ctx.save_for_backward(x if trained else None, *kept)
        return tuple(product(x, w, b, transposed) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count, needed = ctx.count, ctx.needs_input_grad
        found = column_gradients(
            x, ctx.shape, ctx.group, weights if needed[0] else None, given, ctx.transposed,
            needed[4 : 4 + count], needed[4 + count :],
        )  # fmt: skip
        return found[0], None, None, None, *found[1:]


class _Sum(torch.autograd.Function):
    """The sum over the ranks of `y`, in its memory, to which the first one added the biases."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group, *biases: Tensor) -> Tensor:
        ctx.needed = ctx.needs_input_grad[2:]
        ctx.mark_dirty(y)
        group.all_reduce(y, inplace=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dbias = dy.sum(0) if any(ctx.needed) else None
        return dy, None, *(dbias if needed else None for needed in ctx.needed)
