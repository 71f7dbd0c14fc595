"""Assign axes: what every dimension of every weight-dependent value IS.

One walk over the graph; each operator's rule unifies the axes of its operands and result. Values
that depend on no parameter (masks, positions, rotary tables) are computed whole on every rank and
sliced where they are used, so each use of them gets axes of its own.

Before::

    linear = aten.linear(x, w, b)            # [B, S, 64], [192, 64], [192]
    view = aten.view(linear, [B, S, 3, 4, 16])

After: ``w`` is ``[3·heads·16, hidden]``, ``view`` is ``[B, S, 3, heads, 16]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import fx

from autoshard.analysis import Axes
from autoshard.axes import Axis, Size, freeze, product_of
from autoshard.errors import CaptureError
from autoshard.layouts import Layout
from autoshard.rules import Call, bind, rule_for, where
from autoshard.rules.call import Dims, is_continuous, is_tensor, size_of
from autoshard.rules.call import shape_of as plain_shape
from autoshard.rules.views import frozen

VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)


def assign_axes(
    graph: fx.Graph,
    parameters: Collection[str],
    inputs: Collection[str],
    held: Mapping[str, tuple[int, Layout, int]] = MappingProxyType({}),
) -> Axes:
    """Walk the graph once and unify the axes of its dimensions.

    Args:
        graph: normalized.
        parameters: placeholders of parameters.
        inputs: placeholders of the model's inputs.
        held: those of them that ranks are given shares of. Like a parameter, such an input has the same
            axes wherever it is used; what is computed from it alone is a share too.
    """
    result = Axes()
    weighted: dict[fx.Node, list[Dims | None]] = {}
    shape_of = equal_symbols(graph)

    def dims_of(node: fx.Node) -> Dims:
        if node in result.dims:
            source = node.args[0] if node.target is operator.getitem else node
            assert isinstance(source, fx.Node)
            call = result.calls.get(source)
            settled = {a.find() for a in call.settled} if call is not None else set()
            return tuple(
                Axis(a.find().size) if a.find() in settled and a.find().is_atom else a
                for a in result.dims[node]
            )
        return tuple(Axis(size) for size in shape_of(node.meta["val"]))

    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if node.name in parameters:
                result.parameters.append(node)
            if node.name in held:
                result.held[node] = held[node.name]
            if node in result.held or node.name in parameters:
                result.dims[node] = tuple(Axis(size) for size in shape_of(value))
                weighted[node] = [result.dims[node]]
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if node.name in parameters or node.name in inputs:
                    result.differentiable.add(node)
            continue
        if node.op == "output":
            result.outputs = [n for n in node.all_input_nodes if n in result.dims]
            continue
        if any(n in result.differentiable for n in node.all_input_nodes):
            if not _stops_gradient(node) and _floating(value):
                result.differentiable.add(node)
        if not any(n in weighted for n in node.all_input_nodes):
            continue
        if node.target is operator.getitem:
            source, index = node.args
            dims = weighted[source][index] if source in weighted else None
            if dims is not None:
                result.dims[node] = dims
                weighted[node] = [dims]
            continue
        if not _gives_tensors(value):
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            raise CaptureError(f"{where(node)} is no ATen operator, and reads what depends on weights")
        call = Call(node, bind(node), dims_of, shape_of)
        rule = rule_for(node.target)
        if rule is None:
            result.unknown.append(where(node))
            frozen(call)
        else:
            rule.apply(call)
            for slot in call.tensors():
                call.operand(*slot)
        result.calls[node] = call
        weighted[node] = call.outputs
        if is_tensor(node):
            dims = call.outputs[0]
            assert dims is not None and len(dims) == value.dim(), where(node)
            result.dims[node] = dims
    result.inputs = frozenset(n for n in graph.nodes if n.name in inputs)
    for axis in _inputs_axes(result):
        freeze(axis, "a dimension of an input")
    return result


def equal_symbols(graph: fx.Graph) -> Callable[[torch.Tensor], tuple[Size, ...]]:
    """Shapes in which symbols that must be equal are one.

    The labels' batch often has a symbol of its own. A view keeps the number of elements, so where
    one side counts ``s0·64`` and the other ``s1·64``, s0 is s1.
    """
    same: dict[sympy.Symbol, sympy.Symbol] = {}

    def shape(value: torch.Tensor) -> tuple[Size, ...]:
        if not same:
            return plain_shape(value)
        return tuple(replaced(s) for s in plain_shape(value))

    def replaced(size: Size) -> Size:
        if isinstance(size, int):
            return size
        result = size.xreplace(same)
        return int(result) if result.is_Integer else result

    for node in graph.nodes:
        if node.target not in VIEWS or not is_tensor(node) or not is_tensor(node.args[0]):
            continue
        before = shape(node.args[0].meta["val"])
        after = tuple(
            traced if given == -1 else given if isinstance(given, int)
            else replaced(size_of(given.meta["val"]))
            for given, traced in zip(node.args[1], shape(node.meta["val"]), strict=True)
        )  # fmt: skip
        if all(isinstance(s, int) for s in (*before, *after)):
            continue
        quotient = sympy.cancel(product_of(before) / sympy.sympify(product_of(after)))
        top, bottom = sympy.fraction(quotient)
        if top.is_Symbol and bottom.is_Symbol:
            same.update({k: v.xreplace({top: bottom}) for k, v in same.items()})
            same[top] = bottom
    return shape


def _inputs_axes(result: Axes) -> list[Axis]:
    """Axes that a lookup takes over from its indices: they are those of an input."""
    found: list[Axis] = []
    for call in result.calls.values():
        if ("indices", None) in call.operands and call.lookup is not None:
            if call.tensor("indices") not in result.dims:
                found.extend(call.operands["indices", None])
    return found


def _floating(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_floating(v) for v in value)
    return is_continuous(value)


def _gives_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def _stops_gradient(node: fx.Node) -> bool:
    return node.target in (
        torch.ops.aten.detach.default,
        torch.ops.aten.zeros_like.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.rand_like.default,
    )
