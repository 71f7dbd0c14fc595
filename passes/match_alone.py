"""Match alone: matmuls that no region covers are split over their contraction, one by one.

A matmul whose axes are needed whole elsewhere (a projection before a norm, a pooler) has
whole operands. Each rank can take its part of the columns of a whole operand for nothing, so at this
one use the contraction is an axis of its own::

    out[n] = sum over k of x[k] w[n, k]          k in w/2 of the ranks' parts: a partial sum

It costs an all-reduce of the result, and one of the operand's gradient. Where that buys few FLOPs (a
router, whose result is narrow; the second half of an adapter, whose operand is) the matmul stays whole.

Before: ``norm(linear(x, w))`` whole. After: one candidate more, a region of one call; ``x`` at this
use and ``w`` have a fresh axis for k.
"""

from __future__ import annotations

import math

from torch import fx

from autoshard.analysis import NOMINAL, Axes, Candidate, Found, Hints, Split, splittable
from autoshard.axes import Axis, atoms_of, unify
from autoshard.paths import module_path
from autoshard.rules import Call, rule_for
from autoshard.rules.call import Dims

# FLOPs per communicated element, against those of a square matmul as wide as the wider side: neither
# the result nor the operand is narrower than a seventh of the other.
WORTH = 1 / 4


def match_alone(
    graph: fx.Graph, axes: Axes, tp: int, candidates: tuple[Candidate, ...]
) -> tuple[Candidate, ...]:
    """The candidates, and one for each matmul that is worth splitting alone.

    Args:
        graph: the analysed graph.
        axes: its analysis; contractions that are found get axes of their own in it.
        tp: number of ranks.
        candidates: what ``match`` found.
    """
    nominal, traced = Hints(graph, NOMINAL), Hints(graph)
    taken = splittable(candidates, tp)
    names = {region.name for candidate in candidates for region in candidate.regions}
    found: list[Candidate] = []
    for weight in axes.parameters:
        calls = [axes.calls[n] for n in weight.users if n in axes.calls]
        every = len(calls) == len(weight.users) and all(_is_alone(c, weight, taken) for c in calls)
        if not calls or not every:
            continue
        if not all(_is_worth_it(c, weight, axes, nominal) for c in calls):
            continue
        own = [_alone(c) for c in calls]
        dims = [_dims(c, weight) for c in own]
        for other in dims[1:]:
            for a, b in zip(dims[0], other, strict=True):
                unify(a, b)
        axis = _contraction(own, tp)
        if axis is None:
            continue
        axes.calls.update({c.node: c for c in own})
        axes.dims[weight] = dims[0]
        nodes = [c.node for c in own]
        name = base = module_path(nodes[0])
        while name in names or not name:
            name = f"{base}.{nodes[0].name}".lstrip(".")
        names.add(name)
        flops = sum(traced(c.flops) for c in own)
        found.append(Candidate([Split((axis,))], nodes, flops, [Found(name, "mlp", nodes)]))
    return (*_without({n for c in found for n in c.calls}, candidates), *found)


def _without(nodes: set[fx.Node], candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Regions that cannot be split at all give up the calls that can be alone."""
    for candidate in candidates:
        candidate.calls = [n for n in candidate.calls if n not in nodes]
        for region in candidate.regions:
            region.calls = [n for n in region.calls if n not in nodes]
        candidate.regions = [r for r in candidate.regions if r.calls]
    return tuple(c for c in candidates if c.regions)


def _is_alone(call: Call, weight: fx.Node, taken: set[Axis]) -> bool:
    """Whether the call sums over a dimension of the weight, and nothing in it is split."""
    if not call.flops or rule_for(call.node.target) is None:
        return False
    slots = [*call.operands.values(), *(dims for dims in call.outputs if dims is not None)]
    if any(taken & set(atoms_of(a)) for dims in slots for a in dims):
        return False
    summed = {a.find() for a in call.summed}
    return any(
        call.tensor(*slot) is weight and slot not in call.added_once
        and summed & {a.find() for a in dims}
        for slot, dims in call.operands.items()
    )  # fmt: skip


def _is_worth_it(call: Call, weight: fx.Node, axes: Axes, hints: Hints) -> bool:
    """FLOPs per element of the result, and of the operand whose gradient is summed: a square matmul
    over k has k."""
    operands = {call.tensor(*slot): dims for slot, dims in call.operands.items()}
    result = call.outputs[0] or ()
    elements = hints.numel(result) + sum(
        hints.numel(dims)
        for operand, dims in operands.items()
        if operand in axes.differentiable and operand is not weight
    )
    others = {a.find() for o, dims in operands.items() if o is not weight for a in dims}
    own = {a.find() for a in operands[weight]} - others  # out[n] = sum over k of x[k] w[n, k]: n
    width = max(hints.numel(call.summed), hints.numel(a for a in result if a.find() in own))
    return hints(call.flops) >= WORTH * width * elements


def _dims(call: Call, operand: fx.Node) -> Dims:
    return next(dims for slot, dims in call.operands.items() if call.tensor(*slot) is operand)


def _alone(call: Call) -> Call:
    """The call with axes that it shares with no other."""

    def fresh(node: fx.Node) -> Dims:
        return tuple(Axis(size) for size in call.shape_of(node.meta["val"]))

    alone = Call(call.node, call.arguments, fresh, call.shape_of)
    rule = rule_for(call.node.target)
    assert rule is not None
    rule.apply(alone)
    for slot in alone.tensors():
        alone.operand(*slot)
    return alone


def _contraction(alone: list[Call], tp: int) -> Axis | None:
    """The axis that every call sums, and none keeps; of several the one of the largest degree."""
    kept = {a for c in alone for dims in c.outputs if dims for axis in dims for a in atoms_of(axis)}
    best: Axis | None = None
    degree = 1
    for axis in _summed(alone[0]):
        everywhere = all(axis in _summed(c) for c in alone) and axis not in kept
        if everywhere and isinstance(axis.size, int) and axis.frozen is None:
            if math.gcd(axis.size, tp) > degree:
                best, degree = axis, math.gcd(axis.size, tp)
    return best


def _summed(call: Call) -> list[Axis]:
    return [atom for axis in call.summed for atom in atoms_of(axis)]
