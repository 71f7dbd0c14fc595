"""Decompose norms: a norm over all heads at once becomes sums, which can be split by heads.

A fused ``layer_norm`` or ``rms_norm`` needs the dimensions that it normalizes whole. Over the residual
stream that is right; over queries or keys that are later seen as ``[heads, head_dim]`` it would keep
the whole attention from being split, for the sake of two numbers per token.

Before (q is ``[B, S, heads·64]``)::

    y = layer_norm(q, [768], w, b)

After (paper's notation: mean and variance are sums over the ranks' heads)::

    c = q - mean(q, [-1], True)
    y = c * rsqrt(mean(c * c, [-1], True) + eps) * w + b
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard.analysis import Axes, Candidate, splittable
from autoshard.axes import atoms_of
from autoshard.rules import bind
from autoshard.rules.call import op_name, traced_call

aten = torch.ops.aten
LOW = (torch.float16, torch.bfloat16)  # computed in float32, as the fused kernels do


@dataclass(frozen=True, eq=False)
class Norm:
    """A fused norm as it was, and the nodes that stand for it, the last its value."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    nodes: list[fx.Node]


def decompose_norms(graph: fx.Graph, axes: Axes) -> list[Norm]:
    """Write out the norms over a product of axes.

    Args:
        graph: analysed; changed in place.
        axes: its analysis, to be made again after this.
    """
    found: list[Norm] = []
    for node in list(axes.calls):
        if op_name(node) not in ("layer_norm", "rms_norm"):
            continue
        given = bind(node)
        count = len(given["normalized_shape"])
        normalized = axes.calls[node].operand("input")[-count:]
        if all(axis.find().factors is None for axis in normalized) or given["eps"] is None:
            continue  # the residual stream; or an epsilon that is the kernel's own
        with graph.inserting_before(node):
            nodes = _written_out(graph, node, given, list(range(-count, 0)))
        node.replace_all_uses_with(nodes[-1])
        found.append(Norm(node.target, node.args, dict(node.kwargs), dict(node.meta), nodes))
        graph.erase_node(node)
    return found


def fuse_unsplit(
    graph: fx.Graph, norms: list[Norm], axes: Axes, candidates: Iterable[Candidate], tp: int
) -> bool:
    """Undo what was written out for nothing: no candidate's axis runs through it. Whether any was."""
    taken = splittable(candidates, tp)
    undone = False
    for norm in norms:
        source = next(n for n in norm.args if isinstance(n, fx.Node))
        # An input depends on no weight and has no axes of its own; what is made of it has.
        dims = axes.dims.get(source, axes.dims.get(norm.nodes[-1], ()))
        if any(taken & set(atoms_of(a)) for a in dims):
            continue
        with graph.inserting_before(norm.nodes[-1]):
            fused = graph.call_function(norm.target, norm.args, norm.kwargs)
        fused.meta = norm.meta
        norm.nodes[-1].replace_all_uses_with(fused)
        for node in reversed(norm.nodes):
            graph.erase_node(node)
        undone = True
    return undone


def _written_out(
    graph: fx.Graph, node: fx.Node, given: dict[str, Any], dims: list[int]
) -> list[fx.Node]:
    nodes: list[fx.Node] = []

    def call(target: Any, *args: Any) -> fx.Node:
        nodes.append(traced_call(graph, target, args, {}, node))
        return nodes[-1]

    def full(value: fx.Node) -> fx.Node:
        low = value.meta["val"].dtype in LOW
        return call(aten.to.dtype, value, torch.float32) if low else value

    x = full(given["input"])
    if op_name(node) == "layer_norm":
        x = call(aten.sub.Tensor, x, call(aten.mean.dim, x, dims, True))
    square = call(aten.mean.dim, call(aten.mul.Tensor, x, x), dims, True)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, square, given["eps"]))
    y = call(aten.mul.Tensor, x, scale)
    if given["weight"] is not None:
        y = call(aten.mul.Tensor, y, full(given["weight"]))
    if given.get("bias") is not None:
        y = call(aten.add.Tensor, y, full(given["bias"]))
    dtype = node.meta["val"].dtype
    if y.meta["val"].dtype != dtype:
        call(aten.to.dtype, y, dtype)
    return nodes
