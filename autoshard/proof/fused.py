"""What runs is what was proven: fused calls are taken apart again, and the graphs compared.

A fused call stands where one of its parts stood, so calls may come in another order. What is asked is
that the calls are those of the proven graph, each once, on the same operands; and that those that draw
or write keep their order. The others have no effect on a rank, so that their order has none; and
collectives meet in any order that is the same on all ranks, which run this one graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from autoshard import fused_ops, ops
from autoshard.errors import UnsoundGraphError
from autoshard.proof.arguments import same, writes
from autoshard.sharded import Sharded

aten = torch.ops.aten

Call = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


def same_as_unfused(sharded: Sharded) -> None:
    """Raises UnsoundGraphError at the first call that is not one of the proven graph."""
    fused, proven = sharded.fused, sharded.unfused
    if fused is None:
        return
    if fused.bodies.keys() != proven.bodies.keys():
        raise UnsoundGraphError("the fused graph has other parts than the proven one")
    _compare(fused.graph, proven.graph)
    for name, body in fused.bodies.items():
        _compare(body, proven.bodies[name])


def _compare(graph: fx.Graph, proven: fx.Graph) -> None:
    left = {n: None for n in proven.nodes}  # in order, those that have not been met
    env: dict[fx.Node, Any] = {}  # -> the proven node, or a tuple of them
    for node in graph.nodes:
        if node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):
            source, place = node.args
            env[node] = env[source][place]
            continue
        calls = _apart(node, env)
        if calls is None:
            given = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = _met(node, (node.target, *given), left, node.op)
            continue
        made: list[fx.Node] = []
        for target, args, kwargs in calls:
            args = tuple(made[a.number] if isinstance(a, _Made) else a for a in args)
            made.append(_met(node, (target, args, kwargs), left, "call_function"))
        env[node] = tuple(made[1:]) if node.target is fused_ops.column_linear else made[-1]
    if left:
        raise UnsoundGraphError(f"the fused graph does not compute {next(iter(left))}")


class _Made:
    """The result of an earlier call of those that one fused call is."""

    def __init__(self, number: int) -> None:
        self.number = number


def _apart(node: fx.Node, env: Mapping[fx.Node, Any]) -> Iterator[Call] | None:
    """The calls that a fused one stands for, on proven nodes; None of any other node."""
    if node.target not in (fused_ops.column_linear, fused_ops.row_linear):
        return None
    args: Any = fx.map_arg(node.args, lambda n: env[n])
    return _column(*args) if node.target is fused_ops.column_linear else _row(*args)


def _column(x: Any, group: Any, weights: Any, biases: Any, transposed: bool) -> Iterator[Call]:
    yield ops.copy, (x, group), {}
    for weight, bias in zip(weights, biases, strict=True):
        yield _linear(_Made(0), weight, bias, transposed)


def _row(xs: Any, group: Any, weights: Any, biases: Any, transposed: bool) -> Iterator[Call]:
    made, total = 0, None
    for x, weight, bias in zip(xs, weights, biases, strict=True):
        yield _linear(x, weight, None, transposed)
        yield ops.reduce, (_Made(made), group, True), {}
        made += 2
        if bias is not None:
            yield aten.add.Tensor, (_Made(made - 1), bias), {}
            made += 1
        if total is not None:
            yield aten.add.Tensor, (total, _Made(made - 1)), {}
            made += 1
        total = _Made(made - 1)


def _linear(x: Any, weight: Any, bias: Any, transposed: bool) -> Call:
    if not transposed:
        return aten.linear.default, (x, weight) if bias is None else (x, weight, bias), {}
    if bias is None:
        return aten.mm.default, (x, weight), {}
    return aten.addmm.default, (bias, x, weight), {}


def _met(node: fx.Node, call: Call, left: dict[fx.Node, None], op: str) -> fx.Node:
    """The proven node that is this call, which is then met."""
    target, args, kwargs = call
    ordered = False  # a call with an effect that comes before has not been met
    for proven in left:
        if (proven.op, proven.target) == (op, target) and (
            op == "placeholder" or (same(args, proven.args) and same(dict(kwargs), dict(proven.kwargs)))
        ):
            if ordered and _has_effect(proven):
                break
            del left[proven]
            return proven
        ordered = ordered or _has_effect(proven)
    raise UnsoundGraphError(f"{node} among fused calls is not one of the proven graph in its order")


def _has_effect(node: fx.Node) -> bool:
    """It draws or writes."""
    return node.target in (ops.with_stream, ops.with_autocast, ops.checkpointed) or writes(node)
