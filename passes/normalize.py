"""Normalize: one spelling per operator.

Before::

    _assert_tensor_metadata(x, dtype=float32, device=cpu)
    w = cat([empty, k], -2)             # an empty cache of shape [0]
    v = slice(k, 0, 0, 9223372036854775807)   # k[:, :]
    loss = nll_loss_nd(log_softmax(z, 1), labels)
    u = slice_scatter(slice_scatter(new_empty(q, [.., 24]), a, -1, 0, 8), b, -1, 8, 24)

After::

    w = k
    v = k
    loss = cross_entropy_loss(z, labels)
    u = cat([a, b], -1)
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from autoshard.memory import storage, written
from autoshard.rules import bind
from autoshard.rules.call import op_name, traced_call

aten = torch.ops.aten

DROPPED = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
FRESH = {"lift_fresh_copy", "lift_fresh"}  # torch.tensor(..) in forward: a new one in each call
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
    changed = _changed(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name in DROPPED:
            graph.erase_node(node)
        elif name in FRESH and storage(node) in changed:
            node.target = aten.clone.default  # the constant itself is there for the next call too
        elif name in IDENTITIES or (name == "slice" and _takes_all(node)):
            _replace(node, node.args[0])
        elif name in ("cat", "concat", "concatenate"):
            _drop_empty_operands(node)
        elif name == "slice_scatter":
            _writes_as_cat(node)
        elif name == "nll_loss_nd":
            _nll_as_cross_entropy(node)
        elif name == "index":
            _index_as_slice(node, constants)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in parameters and not node.users:
            graph.erase_node(node)  # a tied parameter's other name
    graph.eliminate_dead_code(_has_effects)
    graph.lint()
    return graph


def _changed(graph: fx.Graph) -> set[int]:
    """Memories that are written here, or given to the caller, who may write into them."""
    targets = [
        t for n in graph.nodes if op_name(n) != "detach_" and (t := written(n)) is not None
    ]
    returned = [n for node in graph.nodes if node.op == "output" for n in node.all_input_nodes]
    return {m for n in (*targets, *returned) if (m := storage(n)) is not None}


def _has_effects(node: fx.Node) -> bool:
    """Only what is known to do nothing but compute may be dropped (vmap leaves calls that do more)."""
    if node.op != "call_function":
        return node.op != "get_attr"
    if isinstance(node.target, torch._ops.OpOverload):
        return written(node) is not None
    return getattr(node.target, "__module__", "") not in ("_operator", "math", "builtins", "torch")


def _replace(node: fx.Node, value: Any) -> None:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _takes_all(node: fx.Node) -> bool:
    """``x[:]`` inside of an index: nothing, but its gradient would be written into zeros. What leaves
    the model stays a view."""
    if any(user.op == "output" for user in node.users):
        return False
    given = bind(node)
    size, end = given["self"].meta["val"].shape[given["dim"]], given["end"]
    whole = size if isinstance(size, int) else sys.maxsize
    ends = end is None or (isinstance(end, int) and end >= whole)
    return ends and given["start"] in (None, 0) and given["step"] == 1


def _drop_empty_operands(node: fx.Node) -> None:
    """``cat`` passes over operands of shape [0], whatever the rank of the others."""
    operands = [n for n in node.args[0] if not _is_empty(n.meta["val"])]  # type: ignore[union-attr]
    if len(operands) == 1:
        _replace(node, operands[0])
    elif 0 < len(operands) < len(node.args[0]):  # type: ignore[arg-type]
        node.args = (operands, *node.args[1:])


def _writes_as_cat(node: fx.Node) -> None:
    """A tensor made empty, every slice of which is written, is a concatenation.

    ``node`` is the last of a chain of ``slice_scatter``.
    """
    if any(op_name(u) == "slice_scatter" and u.args[0] is node for u in node.users):
        return
    shape = node.meta["val"].shape
    parts: list[tuple[int, int, fx.Node]] = []  # start, end, what is written
    dims: set[int] = set()
    base: Any = node
    while op_name(base) == "slice_scatter":
        given = bind(base)
        dim, source = given["dim"] % len(shape), given["src"]
        size, start, end = shape[dim], given["start"] or 0, given["end"]
        end = sys.maxsize if end is None else end
        if not all(isinstance(i, int) for i in (size, start, end)) or given["step"] != 1:
            return
        first, last = (min(max(i + size if i < 0 else i, 0), size) for i in (start, end))
        parts.append((first, last, source))
        dims.add(dim)
        base = given["self"]
    if op_name(base) not in ("new_empty", "empty", "empty_like") or len(dims) != 1:
        return
    dim = dims.pop()
    parts.sort(key=lambda part: part[0])
    ends = [0, *(end for _, end, _ in parts)]
    if ends[-1] != shape[dim] or any(s != e for (s, *_), e in zip(parts, ends, strict=False)):
        return
    with node.graph.inserting_before(node):
        new = traced_call(
            node.graph, aten.cat.default, ([source for *_, source in parts], dim), {}, node
        )
    _replace(node, new)


def _nll_as_cross_entropy(node: fx.Node) -> None:
    """``nll_loss(log_softmax(x))`` is the cross entropy of x."""
    given = bind(node)
    source = given["self"]
    if op_name(source) != "log_softmax" or len(source.users) != 1:
        return
    softmax, rank = bind(source), source.meta["val"].dim()
    if softmax["dim"] % rank != (1 if rank > 1 else 0):
        return
    with node.graph.inserting_before(node):
        logits = softmax["self"]
        if softmax["dtype"] is not None:
            logits = traced_call(
                node.graph, aten.to.dtype, (logits, softmax["dtype"]), {}, source
            )
        args = (logits, given["target"], given["weight"], given["reduction"], given["ignore_index"])
        new = traced_call(node.graph, aten.cross_entropy_loss.default, args, {}, node)
    _replace(node, new)


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
        new = node.graph.call_function(aten.slice.Tensor, (source, dim, start, end))
    new.meta = dict(node.meta)
    _replace(node, new)
