"""Plans: which parts of a model are split, how far, and why. Printable, savable, comparable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from autoshard.errors import PlanError

FORMAT = 1


@dataclass(frozen=True)
class Predicted:
    """What the cost model says of one step of forward and backward on one rank.

    Times in seconds: ``step_time`` is the sum of compute (matrix products, attention), memory
    traffic (what is bound by memory), exposed communication (what no product hides of collectives)
    and launch (where Python and the launches take longer than the device). Memory in bytes.
    """

    step_time: float
    compute_time: float
    exposed_communication_time: float
    memory_traffic_time: float
    launch_time: float
    flops_per_rank: float
    memory_per_rank: float
    parameter_memory: float
    gradient_memory: float
    optimizer_memory: float
    activation_memory: float

    def __add__(self, other: Predicted) -> Predicted:
        mine, theirs = vars(self), vars(other)
        return Predicted(**{name: value + theirs[name] for name, value in mine.items()})


class Costs(Protocol):
    """What a plan knows of time and memory."""

    def mechanisms(self, degrees: Mapping[str, int]) -> tuple[str, ...]:
        """What runs as one where the model has several, a line each."""

    def predict(self, degrees: Mapping[str, int]) -> Predicted:
        """One step on one rank."""

    def formula(self, name: str) -> Any:
        """Seconds of a region, as a sympy expression."""

    def alternative(self, name: str, degree: int) -> Predicted:
        """One region at a degree."""

    def graph_text(self, nodes: Sequence[str]) -> str:
        """Some nodes of the captured graph as lines."""


@dataclass(frozen=True)
class Region:
    """A part of the model that is split inside.

    Attributes:
        name: the path of the module that holds it.
        kind: ``embedding``, ``attention``, ``mlp`` or ``loss``.
        degree: over how many ranks it is split.
        degrees: the degrees it can take, ascending.
        axes: what is split: ``("12 heads...",)`` as sizes, e.g. ``("12",)`` or ``("2·4",)``.
        parameters: names of its parameters that are split.
        nodes: names of its nodes in the captured graph.
        inputs: names of the replicated values that enter it.
        outputs: names of the values that leave it.
        collectives: one line per collective of forward and backward.
        tied: other regions that share an axis or a parameter with it, and so its degree.
        flops: multiply-adds (times two) of its matmuls in the forward, whole, at the traced sizes.
        reason: why it has this degree.
    """

    name: str
    kind: str
    degree: int
    degrees: tuple[int, ...]
    axes: tuple[str, ...]
    parameters: tuple[str, ...]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    collectives: tuple[str, ...]
    tied: tuple[str, ...]
    flops: int
    reason: str


@dataclass(frozen=True)
class ParameterShare:
    """How one parameter lies on the ranks.

    Attributes:
        name: its (first) name in the model.
        shape: its whole shape.
        dim: the split dimension, or None where every rank holds it whole.
        degree: over how many ranks it is split (1: whole).
        layout: the split dimension in words, e.g. ``12/2·64 | 12/2·64 | 12/2·64``.
        local_numel: elements on the rank that holds most.
        padded: rows of the split dimension over all ranks while computing (a vocabulary), or 0.
        reason: why it stays whole, or ``""``.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    degree: int
    layout: str
    local_numel: int
    padded: int
    reason: str

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        result = 1
        for size in self.shape:
            result *= size
        return result


@dataclass(frozen=True)
class Whole:
    """A matmul that every rank computes whole, and why."""

    name: str
    flops: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Which regions are split over how many ranks.

    Attributes:
        tp: ranks that the model is split over.
        regions: all regions found, in the order of the graph.
        parameters: how each parameter lies on the ranks.
        replicated: matmuls that stay whole on every rank, largest first, with the reason.
        unknown: operators without a rule that met a weight-dependent value, with their place.
        sharded_fraction: share of the forward's matmul FLOPs that run on a shard, 0 to 1.
        fingerprint: hash of the model's parameter names and shapes.
        overlap: whether the all-reduce of an input's gradient runs under the gradients of the weights
            that it was multiplied by.
        overlap_reason: why.
    """

    tp: int
    regions: tuple[Region, ...]
    parameters: tuple[ParameterShare, ...] = ()
    replicated: tuple[Whole, ...] = ()
    unknown: tuple[str, ...] = ()
    sharded_fraction: float = 0.0
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    overlap: bool = True
    overlap_reason: str = ""
    _again: Callable[[Mapping[str, int]], Plan] | None = field(default=None, repr=False, compare=False)
    _costs: Costs | None = field(default=None, repr=False, compare=False)

    @property
    def degrees(self) -> dict[str, int]:
        """Region name -> degree."""
        return {region.name: region.degree for region in self.regions}

    @property
    def predicted(self) -> Predicted:
        """What the cost model says of one step of forward and backward on one rank.

        Raises:
            PlanError: a plan read from a file, which has not met its model.
        """
        return self.costs.predict(self.degrees)

    def cost_formula(self, name: str) -> Any:
        """Seconds of a region in batch ``B``, sequence ``S``, degree ``d`` and hardware constants.

        Returns:
            A sympy expression; its symbols' numbers are in ``autoshard.cost_model.formulas``.

        Raises:
            PlanError: no such region, or a plan read from a file.
        """
        return self.costs.formula(self.region(name).name)

    @property
    def has_costs(self) -> bool:
        """Whether it has met its model: one read from a file has not."""
        return self._costs is not None

    @property
    def costs(self) -> Costs:
        """What the plan's predictions come from.

        Raises:
            PlanError: a plan read from a file.
        """
        if self._costs is None:
            raise PlanError("a plan read from a file knows no costs: pass it to plan(model, plan=...)")
        return self._costs

    @property
    def parameter_numel_per_rank(self) -> int:
        """Elements of parameters on the rank that holds most."""
        return sum(p.local_numel for p in self.parameters)

    def region(self, name: str) -> Region:
        """The region of this name.

        Raises:
            PlanError: no such region; lists the nearest names.
        """
        for region in self.regions:
            if region.name == name:
                return region
        import difflib

        names = [r.name for r in self.regions]
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:8]
        raise PlanError(f"no region {name!r} in this plan; the nearest names are {', '.join(near)}")

    def with_degree(self, name: str, degree: int) -> Plan:
        """Another plan in which the region, and all that are tied to it, have this degree.

        Raises:
            PlanError: no such region, or it cannot take this degree.
        """
        region = self.region(name)
        if degree not in region.degrees:
            raise PlanError(
                f"{name} cannot be split over {degree} ranks at tp={self.tp}: its axes have sizes "
                f"{', '.join(region.axes)}, which take the degrees "
                f"{', '.join(map(str, region.degrees))}"
            )
        changed = {name, *region.tied}
        degrees = {n: degree if n in changed else d for n, d in self.degrees.items()}
        note = f"{name}: degree {degree} by request"
        if region.tied:
            note += f"; so also {', '.join(region.tied)}, which share its axis"
        if self._again is not None:
            plan = self._again(degrees)
        else:
            regions = tuple(
                replace(r, degree=degrees[r.name], reason="by request") if r.name in changed else r
                for r in self.regions
            )
            plan = replace(self, regions=regions)
        return replace(plan, notes=(*self.notes, note))

    def save(self, path: str | Path) -> None:
        """Write the degrees, and what the model must look like, as JSON."""
        document = {
            "autoshard_plan": FORMAT,
            "tp": self.tp,
            "fingerprint": self.fingerprint,
            "overlap": self.overlap,
            "regions": {r.name: {"kind": r.kind, "degree": r.degree} for r in self.regions},
        }
        Path(path).write_text(json.dumps(document, indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a saved plan. It is checked against the model when it is used.

        Raises:
            PlanError: not a plan; names the file and the field.
        """
        try:
            document: Any = json.loads(Path(path).read_text())
        except ValueError as error:
            raise PlanError(f"{path} is no JSON: {error}") from None
        if not isinstance(document, dict) or document.get("autoshard_plan") != FORMAT:
            raise PlanError(f"{path} is no plan of format {FORMAT}: field 'autoshard_plan'")
        tp, regions = document.get("tp"), document.get("regions")
        if not isinstance(tp, int) or tp < 1:
            raise PlanError(f"{path}: field 'tp' must be a positive integer, is {tp!r}")
        if not isinstance(regions, dict):
            raise PlanError(f"{path}: field 'regions' must map names to degrees")
        found = []
        for name, entry in regions.items():
            degree = entry.get("degree") if isinstance(entry, dict) else None
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1 or tp % degree:
                raise PlanError(
                    f"{path}: field 'regions.{name}.degree' must divide tp={tp}, is {degree!r}"
                )
            found.append(
                Region(name, str(entry.get("kind", "")), degree, (degree,), (), (), (), (), (), (),
                       (), 0, f"read from {Path(path).name}")
            )  # fmt: skip
        overlap = document.get("overlap", True)
        if not isinstance(overlap, bool):
            raise PlanError(f"{path}: field 'overlap' must be true or false, is {overlap!r}")
        return Plan(
            tp, tuple(found), fingerprint=str(document.get("fingerprint", "")), overlap=overlap,
            overlap_reason=f"read from {Path(path).name}",
        )  # fmt: skip

    def __str__(self) -> str:
        from autoshard.tables import plan_table

        return plan_table(self)
