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
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoshard import ops
from autoshard.groups import Group, Lane, ProcessGroupComm, numbered


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
        return tuple(_product(x, w, b, transposed) for w, b in zip(weights, biases, strict=True))
    function: Any = _ColumnLinear
    return cast(
        tuple[Tensor, ...], function.apply(x, group, transposed, len(weights), *weights, *biases)
    )


def column_gradients(
    x: Tensor | None,
    shape: Sequence[int],
    group: Group,
    weights: Sequence[Tensor] | None,
    dys: Sequence[Tensor | None],
    transposed: bool,
    of_weights: Sequence[bool],
    of_biases: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `column_linear`: of `x`, of each weight, of each bias; None where not asked.

    x: [..., in] of `shape`; None where no weight's gradient is asked. weights: None where that of `x`
    is not. dys: [..., out_i]; None of a result that nobody used.
    """
    rows = [None if dy is None else _rows(dy) for dy in dys]
    there = [place for place, dy in enumerate(rows) if dy is not None]
    used = [dy for dy in rows if dy is not None]
    wide = None if x is None else _rows(x)
    own = None if weights is None else [weights[place] for place in there]
    trained = [x is not None and of_weights[place] for place in there]
    running: Callable[[], Tensor] | None = None
    if torch.compiler.is_compiling() and own and any(trained) and _has_lanes(group):
        dx, *of_used = column_products(wide, used, own, trained, transposed, group.number)
        running = lambda: dx  # noqa: E731
    else:
        running, of_used = _begun(wide, used, own, trained, transposed, group)
    found: list[Tensor | None] = [None] * len(rows)
    asked = [place for place, train in zip(there, trained, strict=True) if train]
    for place, gradient in zip(asked, of_used, strict=True):
        found[place] = gradient
    sums = [
        dy.sum(0) if asked and dy is not None else None
        for dy, asked in zip(rows, of_biases, strict=True)
    ]
    return None if running is None else running().view(shape), *found, *sums


def _begun(
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
        if own and _has_lanes(group):
            lane = group.lane(own[0].shape[1])
        running = group.start_all_reduce(_input_gradient(beside, together, transposed), lane)
        del together
    if x is None:
        return running, ()
    found = _of_weights(x, own, transposed, lane)
    return running, found[0].split([dy.shape[1] for dy in dys]) if one else found


def _of_weights(
    x: Tensor, dys: Sequence[Tensor], transposed: bool, lane: Lane | None
) -> list[Tensor]:
    """The gradient of each weight. They leave the sum beside them room, while it runs."""
    found: list[Tensor] = []
    if lane is not None:
        covered = 0
        lane.leave()
        try:
            while covered < lane.covers and len(found) < len(dys):
                dy = dys[len(found)]
                covered += dy.shape[1]
                found.append(_of_weight(x, dy, transposed))
        finally:
            lane.take_back()
    return found + [_of_weight(x, dy, transposed) for dy in dys[len(found) :]]


def _has_lanes(group: Group) -> TypeGuard[ProcessGroupComm]:
    return isinstance(group, ProcessGroupComm) and bool(group.lanes)


@torch.library.custom_op("autoshard::column_products", mutates_args=())
def column_products(
    x: Tensor | None,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    trained: Sequence[bool],
    transposed: bool,
    number: int,
) -> list[Tensor]:
    """`_begun` and its end as one operator, which a compiler keeps as it is: what the products leave to
    the sum is said in between. number: of the group."""
    group = numbered(number)
    running, found = _begun(x, dys, weights, trained, transposed, group, joined=False)
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


def side_by_side(
    dys: Sequence[Tensor], weights: Sequence[Tensor], transposed: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`dys` and `weights` of `dx = sum_i dy_i W_iᵀ`; as one each where that moves less memory.

    dys: [tokens, out_i]. Weights [in, out_i] are left alone, as pieces of their gradient
    would not be contiguous; and what is compiled, as its sizes may be symbols.
    """
    if transposed or len(dys) < 2 or torch.compiler.is_compiling():
        return dys, weights
    tokens, size = dys[0].shape[0], weights[0].shape[1]
    columns = sum(weight.shape[0] for weight in weights)
    if not one_moves_less(len(dys), columns, tokens, size):
        return dys, weights
    return [torch.cat(tuple(dys), 1)], [torch.cat(tuple(weights))]


def one_moves_less(count: int, columns: Any, tokens: Any, size: Any) -> Any:
    """Whether one product of all the columns of so many weights moves less memory than one for each.

    In elements, with the columns of all n weights together:

        one product    2 columns (tokens + in)     gradients and weights, read and written
        n products     2 (n - 1) tokens in         dx, read and written again for each but the first

    Small products wait for memory, not for arithmetic: of 8 kv heads over 8 ranks k and v have 128
    columns each. Sizes are numbers, or expressions of sympy: then a condition on them.
    """
    return columns * (tokens + size) < (count - 1) * tokens * size


def _input_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor], transposed: bool) -> Tensor:
    """[tokens, in]."""
    pairs = [(dy, w.t() if transposed else w) for dy, w in zip(dys, weights, strict=True)]
    dx = torch.mm(*pairs[0])
    for dy, weight in pairs[1:]:
        dx.addmm_(dy, weight)
    return dx


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
            ops.reduce(_product(x, w, None, transposed), group, True)
            for x, w in zip(xs, weights, strict=True)
        ]
        parts = [y if b is None else y + b for y, b in zip(parts, biases, strict=True)]
        return reduce(torch.add, parts)
    given = [b for b in biases if b is not None]
    if torch.compiler.is_compiling():
        products = [_product(x, w, None, transposed) for x, w in zip(xs, weights, strict=True)]
        return reduce(torch.add, given, ops.reduce(reduce(torch.add, products), group))
    y = _parts(xs, group, weights, given, transposed)
    if torch.is_grad_enabled():
        function: Any = _Sum
        y = function.apply(y, group, *given) if given else ops.reduce(y, group, True)
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
    own = None
    if biases and group.coordinate == 0:
        own = biases[0].detach()
        for bias in biases[1:]:
            own = own + bias.detach()
    y = _product(_rows(xs[0]), weights[0], own, transposed)
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        y = torch.addmm(y, _rows(x), weight if transposed else weight.t())
    return y


def _unlike(x: Tensor, y: Tensor) -> bool:
    """Whether an addition of their products has to broadcast or to cast one."""
    return x.shape[:-1] != y.shape[:-1] or x.dtype != y.dtype


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _of_weight(x: Tensor, dy: Tensor, transposed: bool) -> Tensor:
    return x.t() @ dy if transposed else dy.t() @ x


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
        return tuple(_product(x, w, b, transposed) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
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
