"""Checkpoint: parts of the rank's graph, whose activations are computed again in the backward pass.

Which nodes: those that the model ran under ``torch.utils.checkpoint`` (marked by the capture), and with
``checkpoint="layer"`` those of the numbered layers. They are cut at every collective of the forward, so
that none is repeated: a part computes from its operands, which autograd keeps, up to the next partial
sum. What follows a collective and keeps nothing itself (the bias, dropout, the residual: sums and
views) stays outside, so that the collective's result need not be kept either.

Before (the second half of one layer, pre-norm, at degree 2)::

    add = ops.reduce(addmm, tp2, True)                       # of the attention
    dropout = ops.with_stream(tp1, aten.dropout, add, 0.1, True)
    h = aten.add(dropout, x)
    norm = aten.layer_norm(h, [768], weight, bias)
    norm_copy = ops.copy(norm, tp2)
    fc = aten.linear(norm_copy, w1, b1)
    act = aten.gelu(fc)
    out = aten.linear(act, w2)
    out_reduce = ops.reduce(out, tp2, True)

After::

    add = ops.reduce(addmm, tp2, True)
    dropout = ops.with_stream(tp1, aten.dropout, add, 0.1, True)     # keeps its mask
    h = aten.add(dropout, x)                                         # keeps nothing
    part_1 = ops.checkpointed(checkpoint_1, (), h, weight, bias, tp2, w1, b1, w2)       # keeps h
    out = operator.getitem(part_1, 0)
    out_reduce = ops.reduce(out, tp2, True)

with the five calls from ``norm`` to ``out`` in the graph ``checkpoint_1``. Where nothing is split a
layer is one part and keeps its input, as in PyTorch. The second argument names the groups whose random
streams the part draws from. No value changes: ``proof/nested.py`` puts the parts back and compares.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autoshard import ops
from autoshard.analysis import CHECKPOINT
from autoshard.memory import Overwritten
from autoshard.parts import (
    ENTERING,
    graph_of,
    groups_drawn,
    operands_of,
    place_in_model,
    results_of,
    unpack,
)
from autoshard.paths import layer_call
from autoshard.sharded import Nested, Sharded

aten = torch.ops.aten

COLLECTIVES = (ops.reduce, ops.gather, ops.vocab_cross_entropy)  # those that communicate forward
# They write into running statistics, which their schemas do not say.
STATISTICS = (aten.batch_norm.default, aten.instance_norm.default)
# For their gradients these keep nothing, dropout a mask.
LIGHT = (
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.neg.default,
    aten.reshape.default, aten.contiguous.default, aten.dropout.default, aten.native_dropout.default,
    operator.getitem,
)  # fmt: skip
SCALED = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


def checkpoint(sharded: Sharded, layers: bool = False) -> Sharded:
    """The rank's graph with its nested form, where anything is computed again.

    Args:
        sharded: the rank's graph; unchanged by this.
        layers: all numbered layers, beside what the model asks for.
    """
    parts = _parts(sharded.graph, layers)
    return replace(sharded, nested=_nested(sharded.graph, parts)) if parts else sharded


@dataclass
class _Part:
    """Nodes of one part, in order. tail: it began after a collective; joined: and goes on into the next
    layer."""

    key: Any
    tail: bool = False
    joined: bool = False
    nodes: list[fx.Node] = field(default_factory=list)


def _parts(graph: fx.Graph, layers: bool) -> list[list[fx.Node]]:
    """The parts, each of consecutive nodes."""
    parts = [_Part(None)]
    overwritten = Overwritten(graph)
    for node in graph.nodes:
        part, key = parts[-1], _key(node, layers)
        if node.op != "call_function":
            parts.append(_Part(None))
            continue
        if node.target in ENTERING or not _gives_tensors(node):
            key = part.key
        if key is not None and part.key != key and part.nodes and part.tail and not part.joined:
            # What a layer does after its last collective is computed again with the beginning of the
            # next: the value between them need not be kept.
            part.key, part.joined = key, True
        elif part.key != key:
            part = _Part(key)
            parts.append(part)
        operator_, _ = _call(node)
        if operator_ in COLLECTIVES:
            parts.append(_Part(key, tail=True))
        elif _writes(node) or overwritten.reads(node):
            parts.append(_Part(key))
        elif key is not None and not (part.tail and not part.nodes and _is_light(node)):
            part.nodes.append(node)
    return [p.nodes for p in parts if len(p.nodes) > 1]


def _key(node: fx.Node, layers: bool) -> Any:
    """What is computed again together: a call of a layer, or of ``torch.utils.checkpoint``."""
    layer = layer_call(node) if layers else None
    return node.meta.get(CHECKPOINT) if layer is None else layer


def _call(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The operator and its arguments, out of stream and autocast."""
    if node.target is ops.with_stream:
        return node.args[1], node.args[2:]
    if node.target is ops.with_autocast:
        return node.args[2], node.args[3:]
    return node.target, node.args


def _is_light(node: fx.Node) -> bool:
    target, args = _call(node)
    if target in SCALED:
        return not isinstance(args[1], fx.Node)
    if target in LIGHT or not _gives_tensors(node):
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name == "aten::to":
        return False  # a cast may keep more than what it casts
    arguments = target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None  # a view


def _gives_tensors(node: fx.Node) -> bool:
    """Not a size, or what is computed of sizes."""
    if node.target is operator.getitem:
        return True
    of_python = getattr(node.target, "__module__", "") in ("_operator", "math")
    return not (of_python or node.target is aten.sym_size.int)


def _writes(node: fx.Node) -> bool:
    target, _ = _call(node)
    if target in STATISTICS:
        return True
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def _nested(graph: fx.Graph, parts: list[list[fx.Node]]) -> Nested:
    new, bodies = fx.Graph(), {}
    env: dict[fx.Node, fx.Node] = {}
    first = {part[0]: (index, part) for index, part in enumerate(parts)}
    inside = {node for part in parts for node in part}
    for node in graph.nodes:
        if node in first:
            index, part = first[node]
            name = f"checkpoint_{index}"
            operands = operands_of(part)
            bodies[name] = graph_of(part, operands)
            attribute = new.create_node("get_attr", name, name=name)
            given: Any = (attribute, groups_drawn(part), *operands)
            args = fx.map_arg(given, lambda n: env.get(n, n))
            call = new.create_node("call_function", ops.checkpointed, args, {}, name=f"part_{index}")
            call.meta = place_in_model(node)
            unpack(call, results_of(part), env)
        elif node not in inside:
            env[node] = new.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    new.lint()
    return Nested(new, bodies)
