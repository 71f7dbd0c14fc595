"""Inline: nested graphs become part of the outer one, which is flat from here on.

Before::

    y, z = wrap_with_set_grad_enabled(False, submod_0, x, h)
    q = wrap_with_autocast("cuda", bfloat16, True, True, submod_1, h, weight)[0]

After::

    h_1 = detach(h)                     # what has a gradient enters without it; x has none
    y, z = cos(x), sin(h_1)
    q = linear(h, weight)               # meta["autocast"]: run under it

``no_grad``: operands lose their history on the way in, and an operand that comes out again is the
operand itself. ``autocast``: the casts are made when a node runs, so the node keeps what it was
traced under. A dropout that is off is its operand.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from autoshard.analysis import AUTOCAST
from autoshard.errors import CaptureError
from autoshard.memory import is_off, storage, very_operand, written
from autoshard.rules import where
from autoshard.rules.call import is_continuous, traced_call


def inline(graph: fx.Graph, sources: Collection[str]) -> fx.Graph:
    """One flat graph, in place; the graph is returned.

    Args:
        graph: as captured.
        sources: placeholders that a gradient can flow to: parameters and floating inputs.

    Raises:
        CaptureError: a nested graph of another kind; or one under ``no_grad`` that writes into a
            value which has a gradient.
    """
    _inline(graph, {n for n in graph.nodes if n.op == "placeholder" and n.name in sources})
    return graph


def _inline(graph: fx.Graph, flowing: set[fx.Node]) -> None:
    """``flowing``: nodes that depend on what a gradient can flow to; grows along the walk."""
    for node in list(graph.nodes):
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _inline_one(graph, node, flowing)
        elif is_off(node):  # before anything asks which values are one
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif any(n in flowing for n in node.all_input_nodes):
            flowing.add(node)


def _inline_one(graph: fx.Graph, node: fx.Node, flowing: set[fx.Node]) -> None:
    assert isinstance(node.target, torch._ops.HigherOrderOperator)
    kind, given = node.target.name(), list(node.args)
    frozen, autocast = False, None
    if kind == "wrap_with_set_grad_enabled":
        frozen, (submodule, *operands) = not given[0], given[1:]
    elif kind == "wrap_with_autocast":
        autocast, (submodule, *operands) = tuple(given[:4]), given[4:]
    else:
        raise CaptureError(f"the nested graph {kind} is not supported yet ({where(node)})")
    module = graph.owning_module
    assert module is not None and isinstance(submodule, fx.Node)
    inner: fx.Graph = getattr(module, str(submodule.target)).graph
    entering: list[Any] = list(operands)
    if frozen:
        with graph.inserting_before(node):
            entering = [
                traced_call(graph, torch.ops.aten.detach.default, (o,), {}, node)
                if _flows(o, flowing) else o
                for o in operands
            ]  # fmt: skip
    placeholders = [n for n in inner.nodes if n.op == "placeholder"]
    _inline(inner, {p for p, o in zip(placeholders, entering, strict=True) if o in flowing})
    if frozen:
        _refuse_writes(inner, {storage(o) for o in operands if _flows(o, flowing)})
    before = set(graph.nodes)
    with graph.inserting_before(node):
        results = _copied(graph, inner, entering, autocast)
    for new in graph.nodes:
        if new not in before and any(n in flowing for n in new.all_input_nodes):
            flowing.add(new)
    if frozen:
        came_from = dict(zip(entering, operands, strict=True))
        results = [came_from.get(very_operand(r), r) for r in results]
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"the nested graph's results are used as one ({where(node)})")
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(results[index])
        graph.erase_node(user)
    graph.erase_node(node)
    if not submodule.users:
        graph.erase_node(submodule)


def _copied(graph: fx.Graph, inner: fx.Graph, operands: list[Any], autocast: Any) -> list[Any]:
    """The inner graph's nodes at the insertion point; its results."""
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
            if autocast is not None:
                values[node].meta.setdefault(AUTOCAST, autocast)  # the innermost counts
    raise AssertionError("a graph without an output")


def _flows(value: Any, flowing: set[fx.Node]) -> bool:
    traced = value.meta.get("val") if isinstance(value, fx.Node) else None
    return value in flowing and is_continuous(traced)


def _refuse_writes(inner: fx.Graph, memory: set[int | None]) -> None:
    for node in inner.nodes:
        target = written(node)
        if target is not None and storage(target) in memory:
            raise CaptureError(
                f"{where(node)} writes under no_grad into a value that has a gradient; compute a new "
                "value instead"
            )
