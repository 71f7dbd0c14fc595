"""Derivatives: what a call computes forward, and how its operands' gradients follow: rows of a table.

A rule emits calls into two graphs at once: `now` into the forward one, and later, inside the function
that it returns, `then` into the backward one, where every value of the forward graph that is named
becomes one that is kept. Calls without a row are differentiated by autograd (`layer_function.py`).

    call                     gradients
    linear, mm, addmm        dx = dy Wᵀ, dW = xᵀ dy, db = sum over tokens of dy
    copy                     the sum of dy over the ranks
    column_linear            `fused_ops.column_gradients`
    row_linear               as linear, of each summand
    layer_norm               native_layer_norm_backward of the mean and the deviation that are kept
    gelu, silu, relu, tanh   PyTorch's own backward operator
    y = a + b, y = a b       dy, dy;  dy b, dy a             of one shape and dtype, or numbers
    y = a ** n               dy (n a ** (n - 1))             for a number n, not 0
    views                    the inverse view; pieces: their concatenation
    detach                   none
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from autoshard import fused_ops, ops, products
from autoshard.analysis import WHOLE

aten = torch.ops.aten

Gradients = Iterable[tuple[Any, fx.Node]]  # operand -> what is added to its gradient
Backward = Callable[..., Gradients]  # of the gradient of each result, None where there is none
Made = tuple[fx.Node | list[fx.Node], Backward]  # the result or results of the call


class Builder(Protocol):
    """What a rule writes to."""

    def now(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the forward pass."""

    def then(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the backward pass, of a method where `target` is a name; keeps what it needs."""

    def flows(self, value: Any) -> bool:
        """Whether a gradient is asked of this value of the forward pass."""


Rule = Callable[..., Made | None]  # None: not of these operands


def val_of(value: Any) -> Tensor | None:
    """A node's tensor as it was traced, whole."""
    found = value.meta.get(WHOLE, value.meta.get("val")) if isinstance(value, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def alike(*values: Any) -> bool:
    """Tensors of one shape and dtype: an operator of them broadcasts and casts nothing.

    So are their shares: what meets in such an operator is split alike.
    """
    found = [val_of(value) for value in values]
    kinds = {(tuple(map(str, t.shape)), t.dtype) for t in found if t is not None}
    return all(t is not None for t in found) and len(kinds) == 1


# -- matmuls -------------------------------------------------------------------------------------


def _is_vector(x: Any) -> bool:
    """Whether a matmul's operand is known to have one dimension."""
    val = val_of(x)
    return val is not None and val.dim() < 2


def _are_rows(x: Any) -> bool:
    """Whether a matmul's operand, and so its result, is [tokens, n]."""
    val = val_of(x)
    return val is not None and val.dim() == 2


def _rows(b: Builder, x: Any, value: Any) -> Any:
    """A matmul's operand `x`, or the gradient of its result: [..., n] -> [tokens, n]."""
    return value if _are_rows(x) else b.then(torch.flatten, value, 0, -2)


def _size(b: Builder, x: Any) -> fx.Node | None:
    """Of an operand; None of rows, whose gradient needs no view."""
    return None if _are_rows(x) else b.now(Tensor.size, x)


def _of_input(
    b: Builder, dy: fx.Node, weight: Any, transposed: bool, size: fx.Node | None
) -> fx.Node:
    """dy Wᵀ for W: [in, out], in the operand's shape."""
    dx = b.then(torch.mm, dy, b.then(torch.t, weight) if transposed else weight)
    return dx if size is None else b.then(Tensor.view, dx, size)


def _of_weight(b: Builder, x: Any, dy: fx.Node, transposed: bool) -> fx.Node:
    """xᵀ dy, as W lies."""
    rows = _rows(b, x, x)
    left, right = (rows, dy) if transposed else (dy, rows)
    return b.then(torch.mm, b.then(torch.t, left), right)


def _linear(b: Builder, x: Any, weight: Any, bias: Any = None) -> Made | None:
    vectors = [val is None or val.dim() < 2 for val in (val_of(x), val_of(weight))]
    return None if any(vectors) or not fits(bias, weight, 0) else _one(b, x, weight, bias, False)


def _mm(b: Builder, x: Any, weight: Any) -> Made:
    return _one(b, x, weight, None, True)


def _addmm(b: Builder, bias: Any, x: Any, weight: Any) -> Made | None:
    return _one(b, x, weight, bias, True) if bias is not None and fits(bias, weight, 1) else None


def fits(bias: Any, weight: Any, dim: int) -> bool:
    """Whether a bias has a number for each output: one that is broadcast has another gradient."""
    if bias is None:
        return True
    one, other = val_of(bias), val_of(weight)
    if one is None or other is None:
        return False
    return one.dim() == 1 and str(one.shape[0]) == str(other.shape[dim])


def _one(b: Builder, x: Any, weight: Any, bias: Any, transposed: bool) -> Made:
    y, size = _product(b, x, weight, bias, transposed), _size(b, x)

    def gradients(whole: fx.Node) -> Gradients:
        dy = _rows(b, x, whole)
        if b.flows(x):
            yield x, _of_input(b, dy, weight, transposed, size)
        if b.flows(weight):
            yield weight, _of_weight(b, x, dy, transposed)
        if b.flows(bias):
            yield bias, b.then(torch.sum, dy, 0)

    return y, gradients


def _copy(b: Builder, x: Any, group: Any) -> Made:
    y = b.now(Tensor.view_as, x, x)
    return y, lambda dy: [(x, b.then("all_reduce", group, dy))]


def _product(b: Builder, x: Any, weight: Any, bias: Any, transposed: bool) -> fx.Node:
    if not transposed:
        return b.now(F.linear, x, weight, bias)
    return b.now(torch.mm, x, weight) if bias is None else b.now(torch.addmm, bias, x, weight)


def _column_linear(
    b: Builder, x: Any, group: Any, weights: Sequence[Any], biases: Sequence[Any], transposed: bool
) -> Made | None:
    if _is_vector(x):
        return None
    ys = [_product(b, x, *both, transposed) for both in zip(weights, biases, strict=True)]
    size = _size(b, x)

    def gradients(*dys: fx.Node | None) -> Gradients:
        trained, biased = [[b.flows(v) for v in values] for values in (weights, biases)]
        made = b.then(
            fused_ops.column_gradients, x if any(trained) else None, size, group,
            tuple(weights) if b.flows(x) else None, dys, transposed, trained, biased,
        )  # fmt: skip
        used = [True, *(dy is not None for dy in (*dys, *dys))]
        for place, value in enumerate((x, *weights, *biases)):
            if used[place] and b.flows(value):
                yield value, b.then(operator.getitem, made, place)

    return ys, gradients


def _row_linear(
    b: Builder,
    xs: Sequence[Any],
    group: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    transposed: bool,
) -> Made | None:
    if _is_vector(xs[0]) or any(_unlike(x, xs[0]) for x in xs[1:]):
        return None
    y = b.now(fused_ops.row_linear, tuple(xs), group, tuple(weights), tuple(biases), transposed)
    sizes = [_size(b, x) for x in xs]

    def gradients(whole: fx.Node) -> Gradients:
        dy = _rows(b, xs[0], whole)
        for x, weight, size in zip(xs, weights, sizes, strict=True):
            if b.flows(weight):
                yield weight, _of_weight(b, x, dy, transposed)
            if b.flows(x):
                yield x, _of_input(b, dy, weight, transposed, size)
        trained = [bias for bias in biases if b.flows(bias)]
        if trained:
            dbias = b.then(torch.sum, dy, 0)
            yield from ((bias, dbias) for bias in trained)

    return y, gradients


def _unlike(x: Any, y: Any) -> bool:
    """As `fused_ops` asks it of tensors: whether an addition of products broadcasts or casts one."""
    left, right = val_of(x), val_of(y)
    if left is None or right is None or left.dtype != right.dtype:
        return True
    return list(map(str, left.shape[:-1])) != list(map(str, right.shape[:-1]))


# -- norms and activations -----------------------------------------------------------------------


def _layer_norm(
    b: Builder,
    x: Any,
    shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Made:
    found = b.now(torch.native_layer_norm, x, shape, weight, bias, eps)
    y, mean, deviation = (b.now(operator.getitem, found, place) for place in range(3))

    def gradients(dy: fx.Node) -> Gradients:
        asked = [b.flows(value) for value in (x, weight, bias)]
        made = b.then(
            aten.native_layer_norm_backward.default,
            dy, x, shape, mean, deviation, weight, bias, asked,
        )  # fmt: skip
        for place, value in enumerate((x, weight, bias)):
            if asked[place]:
                yield value, b.then(operator.getitem, made, place)

    return y, gradients


def _of_operand(forward: Callable[..., Any], backward: Callable[..., Any]) -> Rule:
    """`dx = backward(dy, x, **options)`."""

    def rule(b: Builder, x: Any, **options: Any) -> Made:
        y = b.now(forward, x, **options)
        return y, lambda dy: [(x, b.then(backward, dy, x, **options))]

    return rule


def _of_result(forward: Callable[..., Any], backward: Callable[..., Any], *more: Any) -> Rule:
    """`dx = backward(dy, y, *more)`."""

    def rule(b: Builder, x: Any) -> Made:
        y = b.now(forward, x)
        return y, lambda dy: [(x, b.then(backward, dy, y, *more))]

    return rule


# -- sums and products ---------------------------------------------------------------------------


def _add(b: Builder, x: Any, other: Any) -> Made | None:
    if not is_number(other) and not alike(x, other):
        return None
    y = b.now(torch.add, x, other)
    return y, lambda dy: [(value, dy) for value in (x, other) if not is_number(value)]


def _mul(b: Builder, x: Any, other: Any) -> Made | None:
    if not is_number(other) and not alike(x, other):
        return None

    def gradients(dy: fx.Node) -> Gradients:
        if b.flows(x):
            yield x, b.then(torch.mul, dy, other)
        if not is_number(other) and b.flows(other):
            yield other, b.then(torch.mul, dy, x)

    return b.now(torch.mul, x, other), gradients


def _pow(b: Builder, x: Any, n: Any) -> Made | None:
    if not is_number(n) or n == 0:
        return None

    def gradients(dy: fx.Node) -> Gradients:
        yield x, b.then(torch.mul, dy, b.then(torch.mul, b.then(torch.pow, x, n - 1), n))

    return b.now(torch.pow, x, n), gradients


def is_number(value: Any) -> bool:
    """Whether an operand is a number of the graph's text."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- views ---------------------------------------------------------------------------------------


def _shaped(forward: Callable[..., Any]) -> Rule:
    def rule(b: Builder, x: Any, shape: Any) -> Made:
        y, size = b.now(forward, x, shape), b.now(Tensor.size, x)
        return y, lambda dy: [(x, b.then(torch.reshape, dy, size))]

    return rule


def _flatten(b: Builder, x: Any, first: int = 0, last: int = -1) -> Made:
    y, size = b.now(torch.flatten, x, first, last), b.now(Tensor.size, x)
    return y, lambda dy: [(x, b.then(torch.reshape, dy, size))]


def _as_tokens(b: Builder, rows: Any, size: Any) -> Made:
    y = b.now(products.as_tokens, rows, size)
    return y, lambda dy: [(rows, b.then(torch.flatten, dy, 0, -2))]


def _transpose(b: Builder, x: Any, first: int, second: int) -> Made:
    y = b.now(torch.transpose, x, first, second)
    return y, lambda dy: [(x, b.then(torch.transpose, dy, first, second))]


def _unsqueeze(b: Builder, x: Any, dim: int) -> Made:
    return b.now(torch.unsqueeze, x, dim), lambda dy: [(x, b.then(torch.squeeze, dy, dim))]


def _permute(b: Builder, x: Any, dims: Sequence[int]) -> Made:
    places = [d % len(dims) for d in dims]
    back = [places.index(d) for d in range(len(dims))]
    return b.now(torch.permute, x, dims), lambda dy: [(x, b.then(torch.permute, dy, back))]


def _split(b: Builder, x: Any, sizes: Sequence[Any], dim: int = 0) -> Made:
    return _pieces(b, torch.split_with_sizes, x, sizes, dim, len(sizes))


def _chunk(b: Builder, x: Any, count: int, dim: int = 0) -> Made | None:
    val = val_of(x)
    size = None if val is None else val.shape[dim]
    if not isinstance(size, int) or size % count:  # there may be fewer
        return None
    return _pieces(b, torch.chunk, x, count, dim, count)


def _pieces(b: Builder, how: Callable[..., Any], x: Any, sizes: Any, dim: int, count: int) -> Made:
    found = b.now(how, x, sizes, dim)
    pieces = [b.now(operator.getitem, found, place) for place in range(count)]

    def gradients(*dys: fx.Node | None) -> Gradients:
        parts = [
            b.then(torch.zeros_like, piece) if dy is None else dy
            for piece, dy in zip(pieces, dys, strict=True)
        ]
        yield x, b.then(torch.cat, parts, dim)

    return pieces, gradients


DERIVATIVES: dict[Any, Rule] = {
    fused_ops.column_linear: _column_linear,
    fused_ops.row_linear: _row_linear,
    ops.copy: _copy,
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.layer_norm.default: _layer_norm,
    aten.gelu.default: _of_operand(F.gelu, aten.gelu_backward.default),
    aten.silu.default: _of_operand(F.silu, aten.silu_backward.default),
    aten.relu.default: _of_result(torch.relu, aten.threshold_backward.default, 0),
    aten.tanh.default: _of_result(torch.tanh, aten.tanh_backward.default),
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.pow.Tensor_Scalar: _pow,
    aten.view.default: _shaped(Tensor.view),
    aten.reshape.default: _shaped(torch.reshape),
    aten.flatten.using_ints: _flatten,
    products.as_tokens: _as_tokens,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _chunk,
}
STOPS = (aten.detach.default, Tensor.size)  # no gradient flows through
COMMUNICATING = (fused_ops.column_linear, fused_ops.row_linear)
# What gives new contiguous tensors, among what rows emit into the backward graph.
OWN = (torch.mm, torch.sum, aten.native_layer_norm_backward.default)


def is_own(gradient: fx.Node | None) -> bool:
    """Whether a gradient that leaves is a contiguous tensor that nobody else reads."""
    if gradient is None or len(gradient.users) != 1:
        return False
    made: Any = gradient.args[0] if gradient.target is operator.getitem else gradient
    if made.target is fused_ops.column_gradients:
        return len(made.args[4]) == 1  # of several they may be views of one tensor
    return made.target in OWN


def results_behind(node: fx.Node, operand: fx.Node) -> Sequence[fx.Node]:
    """The results of a call that an operand's gradient comes from: a weight's from its own product."""
    if node.target is not fused_ops.column_linear or operand is node.args[0]:
        return [node]
    _, _, weights, biases, _ = node.args
    own = [place for values in (weights, biases) for place, x in enumerate(values) if x is operand]  # type: ignore[arg-type]
    return [user for user in node.users if user.target is operator.getitem and user.args[1] in own]
