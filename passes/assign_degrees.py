"""Assign degrees: the one pass that decides. Matched axes and a request become a plan.

Before: candidates with the degrees they can take. After: a ``Plan`` for people, and an
``Assignment`` (axis -> pieces) for the rewriting, which decides nothing more.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import fx

from autoshard.analysis import Analysis, Candidate, Found, weights_of
from autoshard.assignment import Assignment, stored_dim, stored_numel
from autoshard.axes import Axis, atoms_of
from autoshard.errors import PlanError
from autoshard.flow import LOSS, Flow, flow, owners
from autoshard.paths import module_path
from autoshard.plans import ParameterShare, Plan, Region, Whole

Request = str | int | Mapping[str, int]


def assign_degrees(analysis: Analysis, tp: int, request: Request) -> tuple[Plan, Assignment]:
    """Decide the degree of each region.

    Args:
        analysis: of the model's graph.
        tp: ranks to split over.
        request: ``"max"``: the largest degree that each region's axes take; a number: the largest
            that also divides it; a mapping: region name -> degree.

    Raises:
        PlanError: a degree that a region cannot take, tied regions with different degrees, a
            region of the mapping that the model does not have.
    """
    assignment = Assignment()
    degrees = [_degree(c, tp, request) for c in analysis.candidates]
    if isinstance(request, Mapping):
        known = {r.name for c in analysis.candidates for r in c.regions}
        for name in request:
            if name not in known and request[name] != 1:
                raise PlanError(
                    f"the plan has a region {name!r} that this model does not have; its regions "
                    f"are {', '.join(sorted(known)[:8])}, ..."
                )
    for candidate, degree in zip(analysis.candidates, degrees, strict=True):
        if degree > 1:
            assignment.cut_all(candidate.splits, degree)
    plan = Plan(
        tp=tp,
        regions=_regions(analysis, assignment, tp, degrees, request),
        parameters=_parameters(analysis, assignment),
        replicated=_replicated(analysis, assignment),
        unknown=tuple(dict.fromkeys(analysis.axes.unknown)),
        sharded_fraction=_sharded_fraction(analysis, assignment, tp),
        fingerprint=fingerprint(analysis.shapes),
    )
    return plan, assignment


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash of parameter names and shapes."""
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _degree(candidate: Candidate, tp: int, request: Request) -> int:
    degrees = candidate.degrees(tp)
    if request == "max":
        return degrees[-1]
    if isinstance(request, int):
        return max(d for d in degrees if request % d == 0)
    assert isinstance(request, Mapping)
    asked = {r.name: request.get(r.name, 1) for r in candidate.regions}
    if len(set(asked.values())) > 1:
        pairs = ", ".join(f"{name}: {degree}" for name, degree in asked.items())
        raise PlanError(f"these regions share an axis and so a degree, but the plan has {pairs}")
    name, degree = next(iter(asked.items()))
    if degree not in degrees:
        raise PlanError(
            f"{name} cannot be split over {degree} ranks at tp={tp}; it takes "
            f"{', '.join(map(str, degrees))}"
        )
    return degree


def _regions(
    analysis: Analysis, assignment: Assignment, tp: int, degrees: list[int], request: Request
) -> tuple[Region, ...]:
    order = {node: i for i, node in enumerate(analysis.graph.nodes)}
    collectives = _collectives(analysis, flow(analysis.graph, analysis.axes, assignment))
    found: list[tuple[int, Region]] = []
    for candidate, degree in zip(analysis.candidates, degrees, strict=True):
        for region in candidate.regions:
            described = _describe(analysis, candidate, region, degree, tp, request)
            described = replace(described, collectives=tuple(collectives[region.name]))
            found.append((order[region.calls[0]], described))
    return tuple(region for _, region in sorted(found, key=lambda pair: pair[0]))


def _collectives(analysis: Analysis, found: Flow) -> dict[str, list[str]]:
    """One line per collective, under the region whose call needs it first."""
    names = [[r.name for r in c.regions] for c in analysis.candidates]
    places = owners(analysis.candidates, [found])
    owner = {node: names[tie][index] for node, (tie, index) in places.items()}
    lines: dict[str, list[str]] = {name: [] for own in names for name in own}
    for (value, _), calls in found.copied.items():
        lines[owner[calls[0]]].append(f"backward all-reduce of the gradient of {value.name}")
    for call, why in found.reduced.items():
        scalars = f"forward all-reduce of per-token scalars, twice ({call.name})"
        lines[owner[call]].append(scalars if why == LOSS else f"forward all-reduce of {call.name}")
    return lines


def _describe(
    analysis: Analysis, candidate: Candidate, region: Found, degree: int, tp: int, request: Request
) -> Region:
    axes, hints = analysis.axes, analysis.hints
    members = set(region.calls)
    parameters: dict[str, None] = {}
    inputs: dict[str, None] = {}
    for node in region.calls:
        call = axes.calls[node]
        for slot, dims in call.operands.items():
            operand = call.tensor(*slot)
            touched = any(a in candidate.atoms for axis in dims for a in atoms_of(axis))
            if touched and operand.name in analysis.names:
                parameters[analysis.names[operand.name]] = None
            if not touched and operand not in members and slot not in call.added_once:
                if operand in axes.differentiable:
                    inputs[operand.name] = None
    outputs = [
        n.name for n in region.calls if any(u not in members for u in _readers(n)) or not n.users
    ]
    largest = candidate.degrees(tp)[-1]
    sizes = ["·".join(str(a.size) for a in s.atoms) for s in candidate.splits]
    reason = f"{' | '.join(sizes)} divides by {degree}"
    if any(s.paddable for s in candidate.splits) and degree > 1:
        reason = f"{' | '.join(sizes)} rows over {degree} ranks"
        cut = Assignment()
        cut.cut_all(candidate.splits, degree)
        wide = max(c.padded * c.parts for c in cut.cuts.values())
        if wide != candidate.splits[0].atoms[0].size:
            reason += f", padded to {wide}"
    elif degree < tp and request == "max":
        reason = f"{' | '.join(sizes)}: {degree} is the largest divisor of tp={tp} that divides"
    elif degree < largest:
        reason = f"by request (takes up to {largest})"
    return Region(
        name=region.name,
        kind=region.kind,
        degree=degree,
        degrees=candidate.degrees(tp),
        axes=tuple(sizes),
        parameters=tuple(parameters),
        nodes=tuple(n.name for n in region.calls),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        collectives=(),
        tied=tuple(r.name for r in candidate.regions if r is not region),
        flops=sum(hints(axes.calls[n].flops) for n in region.calls),
        reason=reason,
    )


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a value, also one of several results."""
    for user in node.users:
        if user.target is operator.getitem:
            yield from _readers(user)
        else:
            yield user


def _parameters(analysis: Analysis, assignment: Assignment) -> tuple[ParameterShare, ...]:
    dims_of = {analysis.names[n.name]: analysis.axes.dims[n] for n in analysis.axes.parameters}
    found = []
    for name, shape in analysis.shapes.items():
        numel = math.prod(shape)
        dims = dims_of.get(name)
        dim = stored_dim(dims, assignment) if dims is not None else None
        if dims is None or dim is None:
            reason = "" if dims is not None else "not used in the forward"
            if dims is not None:
                reason = _why_whole(dims, analysis, assignment)
            found.append(ParameterShare(name, shape, None, 1, "", numel, 0, reason))
            continue
        layout = assignment.layout(dims[dim])
        cuts = assignment.cuts_in(dims).values()
        degree = max(c.degree for c in cuts)
        local = stored_numel(dims, shape, assignment)
        padded = max(
            c.padded * c.parts if c.padded * c.parts != atom.size else 0
            for atom, c in assignment.cuts_in(dims).items()
        )
        found.append(ParameterShare(name, shape, dim, degree, str(layout), local, padded, ""))
    return tuple(found)


def _why_whole(dims: tuple[Axis, ...], analysis: Analysis, assignment: Assignment) -> str:
    if assignment.cuts_in(dims):
        return "fewer heads than ranks: whole on every rank, each uses its own rows"
    atoms = {a for axis in dims for a in atoms_of(axis)}
    for candidate in analysis.candidates:
        if candidate.atoms & atoms:
            return "its region has degree 1"
    reasons = [a.frozen for axis in dims for a in atoms_of(axis) if a.frozen]
    return reasons[0] if reasons else "no region splits it"


def _replicated(analysis: Analysis, assignment: Assignment) -> tuple[Whole, ...]:
    hints, axes = analysis.hints, analysis.axes
    weights = weights_of(axes)
    found = []
    for node, call in axes.calls.items():
        if not call.flops:
            continue
        every = [dims for dims in (*call.operands.values(), *call.outputs) if dims]
        if any(assignment.cuts_in(dims) for dims in every):
            continue
        # Batch and sequence are no axes to split here: a weight's own axes say why it is whole.
        of_weights = [dims for slot, dims in call.operands.items() if call.tensor(*slot) in weights]
        atoms = tuple(
            a for dims in of_weights or every for axis in dims for a in atoms_of(axis)
            if of_weights or isinstance(a.size, int)
        )  # fmt: skip
        reason = _why_whole(atoms, analysis, assignment)
        name = f"{node.name} in {module_path(node) or 'the model'}"
        found.append(Whole(name, hints(call.flops), reason))
    return tuple(sorted(found, key=lambda w: -w.flops))


def _sharded_fraction(analysis: Analysis, assignment: Assignment, tp: int) -> float:
    """Share f of the matmul FLOPs that run on a shard."""
    hints = analysis.hints
    total = split = 0
    for call in analysis.axes.calls.values():
        flops = hints(call.flops)
        total += flops
        every = (*call.operands.values(), *(d for d in call.outputs if d))
        if any(assignment.cuts_in(dims) for dims in every):
            split += flops
    return split / total if total else 0.0
