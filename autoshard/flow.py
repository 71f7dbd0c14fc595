"""Flow: which values are inside a group of ranks, and where collectives stand at its border.

A value is *whole* (the same on every rank, its gradient whole) or *inside* a group of d ranks (a
share of its split axes; its gradient is a partial sum). Whole values enter through ``copy`` where a
gradient can flow; inside values leave through ``reduce`` where a split axis was summed. Read off the
axes and the cuts alone: the rewriting and the plan's counts both follow it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from autoshard.analysis import Axes, Candidate
from autoshard.assignment import Assignment, stored_dim
from autoshard.rules import Call

LOOKUP, LOSS, SUM = "lookup", "loss", "sum"


@dataclass(eq=False)
class Flow:
    """Where values stand.

    Attributes:
        inside: value -> ranks of the group that it is inside of; whole values are not in it.
        degree: call -> ranks of the group that it runs in, 1 not included.
        copied: (whole value, degree) -> the calls that a ``copy`` of it is made for, one for all.
        reduced: call whose result is all-reduced -> why: ``sum``, ``lookup`` (of a table's rows), or
            ``loss`` (of scalars per token).
    """

    inside: dict[fx.Node, int] = field(default_factory=dict)
    degree: dict[fx.Node, int] = field(default_factory=dict)
    copied: dict[tuple[fx.Node, int], list[fx.Node]] = field(default_factory=dict)
    reduced: dict[fx.Node, str] = field(default_factory=dict)


def flow(graph: fx.Graph, axes: Axes, assignment: Assignment) -> Flow:
    """Walk the graph once, in its order."""
    found = Flow()
    inside = found.inside
    for node in graph.nodes:
        if node in axes.calls:
            _call(node, axes.calls[node], axes, assignment, found)
        elif node.op == "placeholder":
            if node in axes.held or (
                node in axes.dims and stored_dim(axes.dims[node], assignment) is not None
            ):
                inside[node] = assignment.degree(axes.dims[node])
        elif node.target is operator.getitem and node.args[0] in inside:
            inside[node] = inside[node.args[0]]
    return found


def owners(candidates: Sequence[Candidate], flows: Iterable[Flow]) -> dict[fx.Node, tuple[int, int]]:
    """Call -> the region that it belongs to, as the numbers of the candidate and of its region.

    What stays inside a group without a split axis belongs to what it reads.
    """
    owner = {
        node: (tie, index)
        for tie, candidate in enumerate(candidates)
        for index, region in enumerate(candidate.regions)
        for node in region.calls
    }
    for found in flows:
        for node in found.degree:
            sources = [s for n in node.all_input_nodes for s in (n, *n.all_input_nodes)]
            known = [owner[n] for n in sources if n in owner]
            if known:
                owner.setdefault(node, known[0])
    return owner


def _call(node: fx.Node, call: Call, axes: Axes, assignment: Assignment, found: Flow) -> None:
    every = [*call.operands.values(), *(d for d in call.outputs if d is not None)]
    # A value inside a group may hold no split axis (one key head for all queries): its gradient is a
    # partial sum all the same, so what is computed from it stays inside. A call whose own axes are
    # split over another group is of that group: the value leaves its own before it enters there.
    degree = max(1, *(assignment.degree(dims) for dims in every))
    if degree == 1:
        degree = max(1, *(found.inside.get(n, 1) for n in node.all_input_nodes))
    if degree == 1:
        return
    found.degree[node] = degree
    summed = bool(assignment.cuts_in(call.summed))
    for slot in call.operands:
        operand = call.tensor(*slot)
        after = summed and slot in call.added_once
        here = found.inside.get(operand) == degree
        if operand in axes.differentiable and not here and not after:
            found.copied.setdefault((operand, degree), []).append(node)
    if call.lookup is not None and assignment.cuts_in([call.lookup]):
        found.reduced[node] = LOOKUP if ("indices", None) in call.operands else LOSS
    elif summed:
        found.reduced[node] = SUM
    else:
        found.inside[node] = degree
