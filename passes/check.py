"""Check: recompute from nothing where every value of the rewritten graph stands.

Trusts neither the analysis nor the rewriting, only the types of the collectives. A value is
*whole* (the same on all ranks, its gradient whole), or *inside* a group
of d ranks (its gradient a partial sum). It refuses a graph in which

- a whole value that a gradient can flow to meets an inside value without ``copy``: right outputs,
  wrong gradients;
- values inside different groups meet, or a collective is given a value on the wrong side;
- an output leaves from inside without being declared a share.

That a sum is complete (a partial result is always reduced) is not recomputed here; it is tested by
``verify``, which compares with the model itself.

Before and after: the same graph.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from autoshard import ops, shares
from autoshard.errors import UnsoundGraphError
from autoshard.rules import where
from autoshard.sharded import Sharded

ENTERS = (ops.copy, shares.local_part)
LEAVES = (ops.reduce, ops.gather, ops.leave, ops.vocab_cross_entropy)
WHOLE = 1


def check(sharded: Sharded, differentiable_inputs: set[str]) -> Sharded:
    """Refuse a rewritten graph whose values do not stand where they must; else return it.

    Args:
        sharded: the rank's graph.
        differentiable_inputs: placeholders that a gradient can flow to.

    Raises:
        UnsoundGraphError: names the first node where the check fails, its layer, what it holds and
            what is needed.
    """
    _sides(sharded, differentiable_inputs)
    return sharded


def _sides(sharded: Sharded, differentiable_inputs: set[str]) -> None:
    side: dict[fx.Node, int] = {}
    flows: set[fx.Node] = set()
    for node in sharded.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            side[node] = sharded.stored[name][2] if name in sharded.stored else WHOLE
            if name in differentiable_inputs:
                flows.add(node)
        elif node.op == "get_attr":
            continue
        elif node.op == "output":
            for value, split in zip(node.args[0], sharded.outputs, strict=True):
                if isinstance(value, fx.Node) and side[value] != (split.degree if split else WHOLE):
                    raise _refusal(value, f"an output is inside {_group(side[value])}")
        else:
            side[node] = _side(node, side, flows)
            if _passes_gradient(node) and any(n in flows for n in node.all_input_nodes):
                flows.add(node)


def _side(node: fx.Node, side: dict[fx.Node, int], flows: set[fx.Node]) -> int:
    values = [n for n in node.all_input_nodes if n.op != "get_attr"]
    groups = [int(str(n.target)[2:]) for n in node.all_input_nodes if n.op == "get_attr"]
    inside = {side[n] for n in values} - {WHOLE}
    if len(inside) > 1:
        degrees = " and ".join(map(str, sorted(inside)))
        raise _refusal(node, f"values inside groups of {degrees} ranks meet")
    if node.target in ENTERS:
        return _entering(node, groups[0], side)
    if node.target in LEAVES:
        if inside != {groups[0]}:
            raise _refusal(node, f"needs a value inside {_group(groups[0])}, has a whole one")
        return WHOLE
    if node.target is ops.vocab_embedding:
        return groups[0]
    if not inside or node.target is torch.ops.aten.sym_size.int:
        return WHOLE
    if node.target in (operator.mul, operator.floordiv):
        return WHOLE
    degree = inside.pop()
    for value in values:
        if side[value] == WHOLE and value in flows:
            raise _refusal(node, f"{value} is whole and enters {_group(degree)} without copy")
    if groups and groups[0] not in (degree, WHOLE):
        raise _refusal(node, f"draws random numbers for {groups[0]} ranks inside {_group(degree)}")
    return degree


def _entering(node: fx.Node, degree: int, side: dict[fx.Node, int]) -> int:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is ops.copy and side[source] != WHOLE:
        raise _refusal(node, f"{source} is inside {_group(side[source])} already")
    if side[source] not in (WHOLE, degree):
        raise _refusal(node, f"{source} is inside {_group(side[source])}, not {degree}")
    return degree


def _passes_gradient(node: fx.Node) -> bool:
    if node.target in (torch.ops.aten.detach.default, torch.ops.aten.sym_size.int):
        return False
    value = node.meta.get("val")  # known for values that are whole
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def _group(degree: int) -> str:
    return f"a group of {degree} ranks"


def _refusal(node: fx.Node, why: str) -> UnsoundGraphError:
    return UnsoundGraphError(f"the rewritten graph is not sound at {node} ({where(node)}): {why}")
