"""Tokens as rows: between its first and last matmul a layer computes on [tokens, n], not on [B, S, n].

A matmul's gradients are matmuls of rows. Where a layer's values have more dimensions, each of them is
flattened before and viewed after, twenty times a layer, and a view takes the host half a kernel's time.

Before (an MLP with its norm and residual)::

    norm = aten.layer_norm(x, [h], w, b)                                   # [B, S, h]
    norm_copy = fused_ops.column_linear(norm, tp2, (w1,), (b1,), False)
    fc = operator.getitem(norm_copy, 0)
    act = aten.gelu(fc)
    out = fused_ops.row_linear((act,), tp2, (w2,), (b2,), False)
    add = aten.add(x, out)
    return add

After::

    x_rows = aten.flatten(x, 0, -2)                                        # [B·S, h]
    x_size = Tensor.size(x)
    norm = aten.layer_norm(x_rows, [h], w, b)
    norm_copy = fused_ops.column_linear(norm, tp2, (w1,), (b1,), False)
    fc = operator.getitem(norm_copy, 0)
    act = aten.gelu(fc)
    out = fused_ops.row_linear((act,), tp2, (w2,), (b2,), False)
    add = aten.add(x_rows, out)
    add_tokens = products.as_tokens(add, x_size)                           # [B, S, h]
    return add_tokens

Operators of which each row of the result depends on that row of the operands alone are the same on
rows. What hangs together by such operators and has a matmul becomes rows; a view of rows needs no way
back, and what a view made is made as rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autoshard import fused_ops, products
from autoshard.analysis import WHOLE
from autoshard.bindings import operator_of
from autoshard.compat import without_modes
from autoshard.derivatives import alike, fits, is_number, val_of

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.reshape.default)
BETWEEN = (aten.flatten.using_ints, products.as_tokens, Tensor.size)  # rows and tokens
MATMULS = (fused_ops.column_linear, fused_ops.row_linear, aten.linear.default)


def _first(node: fx.Node) -> Sequence[Any]:
    return [node.args[0]]


def _linear(node: fx.Node) -> Sequence[Any]:
    x, weight, bias = (*node.args, None)[:3]
    value = val_of(weight)
    return [x] if value is not None and value.dim() == 2 and fits(bias, weight, 0) else []


def _norm(node: fx.Node) -> Sequence[Any]:
    shape: Any = node.args[1]
    return [node.args[0]] if len(shape) == 1 else []


def _two(node: fx.Node) -> Sequence[Any]:
    if len(node.args) == 2 and is_number(node.args[1]):
        return [node.args[0]]
    return node.args[:2] if alike(*node.args[:2]) else []


def _along_last(node: fx.Node) -> Sequence[Any]:
    value, dim = val_of(node.args[0]), _dim(node)
    return [node.args[0]] if value is not None and dim % value.dim() == value.dim() - 1 else []


def _dim(node: fx.Node) -> int:
    dim: Any = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return int(dim)


# Operator -> the operands whose rows it works on; none: it does not.
BY_ROWS: dict[Any, Callable[[fx.Node], Sequence[Any]]] = {
    fused_ops.column_linear: _first,
    fused_ops.row_linear: lambda node: node.args[0],  # type: ignore[return-value,dict-item]
    aten.linear.default: _linear,
    aten.layer_norm.default: _norm,
    aten.gelu.default: _first,
    aten.silu.default: _first,
    aten.relu.default: _first,
    aten.tanh.default: _first,
    aten.add.Tensor: _two,
    aten.mul.Tensor: _two,
    aten.pow.Tensor_Scalar: _first,
    aten.split_with_sizes.default: _along_last,
    aten.chunk.default: _along_last,
    operator.getitem: _first,
}


def tokens_as_rows(graph: fx.Graph) -> fx.Graph:
    """A copy of a layer's graph that computes on rows; the same values leave it.

    Args:
        graph: fused; its calls may be bindings. What its nodes hold of their values may be less than
            all of them: where it is not known how a value is shaped, it stays as it is.
    """
    becoming = _becoming(graph)
    if not becoming:
        return graph
    made = _Rewriting(becoming)
    for node in graph.nodes:
        if node in becoming:
            made.on_rows(node)
        elif node.op == "output":
            made.end(node)
        else:
            made.kept(node)
    made.graph.lint()
    return made.graph


def _becoming(graph: fx.Graph) -> dict[fx.Node, Sequence[fx.Node]]:
    """The nodes that are computed on rows, and of which operands."""
    able: dict[fx.Node, Sequence[fx.Node]] = {}
    for node in graph.nodes:
        operands = _by_rows(node, able)
        if operands:
            able[node] = operands
    together: dict[fx.Node, set[fx.Node]] = {}
    for node, operands in able.items():
        for operand in able.keys() & operands:
            together.setdefault(node, set()).add(operand)
            together.setdefault(operand, set()).add(node)
    reached = {node for node in able if operator_of(node) in MATMULS}
    waiting = list(reached)
    while waiting:
        for other in together.get(waiting.pop(), ()):
            if other not in reached:
                reached.add(other)
                waiting.append(other)
    return {node: operands for node, operands in able.items() if node in reached}


def _by_rows(node: fx.Node, able: dict[fx.Node, Sequence[fx.Node]]) -> Sequence[fx.Node]:
    """The operands on whose rows a node can be computed: of one leading shape of two or more sizes."""
    rule = BY_ROWS.get(operator_of(node))
    if rule is None:
        return ()
    if node.target is operator.getitem:  # a piece of what is computed so
        return (node.args[0],) if node.args[0] in able else ()  # type: ignore[return-value]
    if val_of(node) is None and any(user.target is not operator.getitem for user in node.users):
        return ()  # pieces that are used together
    operands = rule(node)
    shapes = [_leading(operand) for operand in operands]
    if not shapes or shapes[0] is None or any(shape != shapes[0] for shape in shapes):
        return ()
    if not all(operand in able or _is_contiguous(operand) for operand in operands):
        return ()  # the result would lie otherwise than before
    return operands


def _is_contiguous(value: Any) -> bool:
    """By what its sizes are called: they may be symbols, and no condition on them is to be noted."""
    val = val_of(value)
    if val is None:
        return False
    expected: list[str] = []
    step: Any = 1
    for size in reversed(val.shape):
        expected.insert(0, str(step))
        step = step * size
    return list(map(str, val.stride())) == expected


def _leading(value: Any) -> tuple[str, ...] | None:
    """All sizes but the last; None where there is one or none of them."""
    val = val_of(value)
    return None if val is None or val.dim() < 3 else tuple(map(str, val.shape[:-1]))


class _Rewriting:
    """The graph while it is written: each value whole, as rows, or both."""

    def __init__(self, becoming: dict[fx.Node, Sequence[fx.Node]]) -> None:
        self.graph = fx.Graph()
        self._becoming = becoming
        self._whole: dict[fx.Node, fx.Node] = {}
        self._rows: dict[fx.Node, fx.Node] = {}
        self._like: dict[fx.Node, fx.Node] = {}  # on rows -> a whole value of its leading sizes
        self._size: dict[fx.Node, fx.Node] = {}  # of these
        self._flat: dict[Any, Tensor] = {}  # shape and dtype -> as rows

    def on_rows(self, node: fx.Node) -> None:
        """The same call, of rows."""
        given = {operand: self.rows(operand) for operand in self._becoming[node]}
        self._like[node] = self._like[next(iter(given))]
        made = self.graph.node_copy(node, lambda n: given[n] if n in given else self.whole(n))
        if BY_ROWS[operator_of(node)] is _along_last:
            made.args, made.kwargs = (*made.args[:2], -1), {}
        self._rows[node] = self._described(made, node, rows=True)

    def kept(self, node: fx.Node) -> None:
        """The same call; a view reads rows where there are none but these."""
        source: Any = node.args[0] if node.args else None
        if _is_view(node) and source in self._rows and source not in self._whole:
            shape = fx.map_arg(node.args[1], self.whole)
            made = self.graph.create_node("call_function", node.target, (self._rows[source], shape))
        else:
            made = self.graph.node_copy(node, self.whole)
        self._whole[node] = self._described(made, node)

    def end(self, node: fx.Node) -> None:
        """The output; and views that nobody needed are gone."""
        self.graph.output(fx.map_arg(node.args[0], self.whole))
        for made in reversed(self.graph.nodes):
            if not made.users and operator_of(made) in (*VIEWS, *BETWEEN):
                self.graph.erase_node(made)

    def rows(self, node: fx.Node) -> fx.Node:
        """[..., n] as [tokens, n]."""
        if node in self._rows:
            return self._rows[node]
        last: Any = node.args[1][-1] if _is_view(node) else None  # type: ignore[index]
        # A view may be a copy: where it is needed in its own shape too, it is made once.
        if last is not None and last != -1 and all(user in self._becoming for user in node.users):
            source: Any = node.args[0]
            of = self._whole[source] if source in self._whole else self._rows[source]
            shape = [-1, fx.map_arg(last, self.whole)]
            made = self.graph.call_function(aten.reshape.default, (of, shape))
        else:
            made = self.graph.call_function(aten.flatten.using_ints, (self.whole(node), 0, -2))
        self._rows[node] = self._described(made, node, rows=True)
        self._like[node] = node
        return made

    def whole(self, node: fx.Node) -> fx.Node:
        """The value in its own shape."""
        if node not in self._whole:
            size = self._size_of(self._like[node])
            made = self.graph.call_function(products.as_tokens, (self._rows[node], size))
            self._whole[node] = self._described(made, node)
        return self._whole[node]

    def _size_of(self, like: fx.Node) -> fx.Node:
        if like not in self._size:
            self._size[like] = self.graph.call_function(Tensor.size, (self._whole[like],))
        return self._size[like]

    def _described(self, made: fx.Node, node: fx.Node, rows: bool = False) -> fx.Node:
        made.meta = {**node.meta, "stands_for": node.meta.get("stands_for", node)}
        val = val_of(node)
        if rows and val is not None:
            kind = (*map(str, val.shape), val.dtype)
            if kind not in self._flat:
                *leading, last = val.shape
                with without_modes():  # this is called in a step: nothing for the caller to count
                    self._flat[kind] = val.new_empty((math.prod(leading), last))
            made.meta[WHOLE] = self._flat[kind]
        return made


def _is_view(node: fx.Node) -> bool:
    return operator_of(node) in VIEWS and len(node.args) == 2 and not node.kwargs
