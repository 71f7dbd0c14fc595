"""Normalize: one spelling per operator.

Before::

    _assert_tensor_metadata(x, dtype=float32, device=cpu)
    y = wrap_with_set_grad_enabled(False, submod_0, x)[0]
    z = add_(scores, bias)              # later uses read ``scores``
    w = cat([empty, k], -2)             # an empty cache of shape [0]
    u = new_empty(q, [.., 24]); copy_(slice(u, -1, 0, 8), a); copy_(slice(u, -1, 8, 24), b)

After::

    y = detach(cos(x))                  # nested graphs inlined
    z = add(scores, bias)               # later uses read ``z``
    w = k
    u = cat([a, b], -1)
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from autoshard.errors import CaptureError
from autoshard.rules import where
from autoshard.rules.call import op_name

DROPPED = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
IDENTITIES = {"lift_fresh_copy", "lift_fresh", "detach_", "alias"}


def normalize(
    graph: fx.Graph, parameters: Collection[str], constants: Mapping[str, Tensor]
) -> fx.Graph:
    """One spelling per operator, in place; the graph is returned.

    Args:
        graph: as captured.
        parameters: placeholders of parameters.
        constants: placeholder -> value of tensors made in ``forward``.
    """
    _inline_nested(graph)
    weighted = weight_dependent(graph, parameters)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name in DROPPED:
            graph.erase_node(node)
        elif name in IDENTITIES or (name == "dropout" and not (node.args[2] and node.args[1])):
            _replace(node, node.args[0])
        elif name in ("cat", "concat", "concatenate"):
            _drop_empty_operands(node)
        elif name in ("new_empty", "empty", "empty_like"):
            _writes_as_cat(node)
        elif name == "index":
            _index_as_slice(node, constants)
        elif name.endswith("_") and not name.startswith("_") and node in weighted:
            _out_of_place(node)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in parameters and not node.users:
            graph.erase_node(node)  # a tied parameter's other name
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _mutates(n))
    graph.lint()
    return graph


def weight_dependent(graph: fx.Graph, parameters: Collection[str]) -> set[fx.Node]:
    """The nodes whose value depends on a parameter."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in parameters:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _mutates(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable


def _replace(node: fx.Node, value: Any) -> None:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _inline_nested(graph: fx.Graph) -> None:
    """Nested graphs under ``no_grad`` become part of the outer one, their results detached."""
    module = graph.owning_module
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        kind = node.target.name()
        if kind != "wrap_with_set_grad_enabled":
            raise CaptureError(f"the nested graph {kind} is not supported yet ({where(node)})")
        enabled, submodule, *operands = node.args
        assert module is not None and isinstance(submodule, fx.Node)
        inner = getattr(module, str(submodule.target)).graph
        _inline_nested(inner)
        with graph.inserting_before(node):
            results = _copy_into(graph, inner, operands)
            if not enabled:  # an operand that comes out again keeps its history
                results = [r if _itself(r) in operands else _detached(graph, r) for r in results]
        for user in list(node.users):
            if user.target is operator.getitem:
                _replace(user, results[user.args[1]])
            else:
                raise CaptureError(f"the nested graph's results are used as one ({where(node)})")
        graph.erase_node(node)
        if not submodule.users:
            graph.erase_node(submodule)


def _copy_into(graph: fx.Graph, inner: fx.Graph, operands: list[Any]) -> list[Any]:
    values: dict[fx.Node, Any] = {}
    given = iter(operands)
    for node in inner.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            outputs = node.args[0]
            flat = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            return [values[o] if isinstance(o, fx.Node) else o for o in flat]
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    raise AssertionError("a graph without an output")


def _itself(value: Any) -> Any:
    """The tensor that a value is: ``to`` its own dtype and ``contiguous`` give the very operand."""
    while isinstance(value, fx.Node) and op_name(value) in ("to", "type_as", "contiguous"):
        source = value.args[0]
        assert isinstance(source, fx.Node)
        before, after = source.meta.get("val"), value.meta.get("val")
        copied = value.kwargs.get("copy") or (len(value.args) > 3 and value.args[3])
        if not (isinstance(before, Tensor) and isinstance(after, Tensor)) or copied:
            break
        if not _alike(before, after) or str(before.stride()) != str(after.stride()):
            break
        value = source
    return value


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not (isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)):
        return value
    if not value.meta["val"].is_floating_point():
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def _drop_empty_operands(node: fx.Node) -> None:
    """``cat`` passes over operands of shape [0], whatever the rank of the others."""
    operands = [n for n in node.args[0] if not _is_empty(n.meta["val"])]  # type: ignore[union-attr]
    if len(operands) == 1:
        _replace(node, operands[0])
    elif 0 < len(operands) < len(node.args[0]):  # type: ignore[arg-type]
        node.args = (operands, *node.args[1:])


def _writes_as_cat(node: fx.Node) -> None:
    """A tensor made empty and written slice by slice, all of it, is a concatenation."""
    shape = node.meta["val"].shape
    parts: list[tuple[int, int, fx.Node, fx.Node]] = []  # start, end, view, write
    dims: set[int] = set()
    for view in node.users:
        if op_name(view) != "slice" or len(view.users) != 1 or len(view.args) > 4:
            break  # it is read from here on
        write = next(iter(view.users))
        given: list[Any] = list(view.args[1:])
        dim, start, end = given + [0, 0, sys.maxsize][len(given) :]
        if op_name(write) != "copy_" or write.args[0] is not view or write.users:
            break
        start = start or 0
        if not (isinstance(dim, int) and isinstance(start, int) and isinstance(end, int)):
            break
        size, source = shape[dim], write.args[1]
        if not isinstance(size, int) or not isinstance(source, fx.Node):
            break
        if not _alike(source.meta.get("val"), view.meta["val"]):
            break
        first, last = (min(max(i + size if i < 0 else i, 0), size) for i in (start, end))
        parts.append((first, last, view, write))
        dims.add(dim % len(shape))
    parts.sort(key=lambda part: part[0])
    ends = [0, *(end for _, end, *_ in parts)]
    tiled = all(start == end for (start, *_), end in zip(parts, ends, strict=False))
    if len(dims) != 1 or not tiled or ends[-1] != shape[next(iter(dims))]:
        return
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    latest = max((write for *_, write in parts), key=order.__getitem__)
    views = {view for *_, view, _ in parts}
    if any(order[user] < order[latest] for user in node.users if user not in views):
        return
    with node.graph.inserting_after(latest):
        sources = [write.args[1] for *_, write in parts]
        new = node.graph.call_function(torch.ops.aten.cat.default, (sources, dims.pop()))
    new.meta = dict(node.meta) | {k: v for k, v in latest.meta.items() if k != "val"}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in views)
    for *_, view, write in parts:
        node.graph.erase_node(write)
        node.graph.erase_node(view)


def _alike(a: Any, b: Any) -> bool:
    """Whether two tensors have one shape and dtype."""
    return isinstance(a, Tensor) and a.dtype == b.dtype and str(a.shape) == str(b.shape)


def _is_empty(value: Tensor) -> bool:
    """Whether a tensor's shape is [0]; a size that is not known counts as more."""
    return value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0


def _index_as_slice(node: fx.Node, constants: Mapping[str, Tensor]) -> None:
    """``x[..., [i]]`` with a constant list of one number is a slice."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not isinstance(given[0][1], fx.Node):
        return
    dim, index = given[0]
    value = constants.get(index.name)
    size = source.meta["val"].shape[dim]
    if value is None or value.dim() != 1 or value.numel() != 1:
        return
    start = int(value.item())
    if isinstance(size, int):
        start %= size
    end = sys.maxsize if start == -1 else start + 1
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.ops.aten.slice.Tensor, (source, dim, start, end))
    new.meta = dict(node.meta)
    _replace(node, new)


def _out_of_place(node: fx.Node) -> None:
    """``y = f_(x)`` becomes ``y = f(x)`` and later uses of x read y, where x is no view."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = op_name(node)[:-1]
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    operand = node.args[0]
    if overload is None or not isinstance(operand, fx.Node) or _is_view(operand):
        return  # stays as it is: an operator without a rule, which keeps all it touches whole
    later: set[fx.Node] = set()
    cursor = node.next
    while cursor.op != "root":
        later.add(cursor)
        cursor = cursor.next
    if any(_is_view(user) for user in operand.users if user not in later and user is not node):
        return
    node.target = overload
    operand.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _is_view(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return True
    if node.target is operator.getitem:
        source = node.args[0]
        return not isinstance(source, fx.Node) or _is_view(source)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(
        r.alias_info is not None and not r.alias_info.is_write for r in node.target._schema.returns
    )
