"""Planning: what a model is planned for, and the costs that choose the degrees.

Between the analysis (facts) and ``assign_degrees`` (which carries a decision out): the workload of
the graph, on a machine, at a batch and a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoshard.analysis import Analysis
from autoshard.assignment import Assignment
from autoshard.cost_model.formulas import as_one, one_by_one, seconds
from autoshard.cost_model.hardware import Hardware, at_hand, load
from autoshard.cost_model.lanes import rooms
from autoshard.cost_model.model import OPTIMIZERS, CostModel, Setting
from autoshard.cost_model.search import NoFit
from autoshard.cost_model.work import (
    B,
    Collective,
    Product,
    S,
    SideBySide,
    Unit,
    Workload,
    one_after_other,
)
from autoshard.errors import PlanError
from autoshard.groups import Room
from autoshard.inputs import Inputs
from autoshard.passes.assign_degrees import Request, assign_degrees
from autoshard.passes.workload import input_sizes, workload
from autoshard.plans import Plan, Predicted
from autoshard.tables import folded

BATCH, SEQUENCE = 8, 1024  # planned for where nothing says otherwise


@dataclass(frozen=True)
class Target:
    """What the user asked to plan for; None: found out.

    Attributes:
        hardware: a preset's name, a profile's path, or a ``Hardware``; the GPU at hand, else h100.
        batch, sequence: of one step; those of given example inputs, else 8 and the model's longest.
        memory: bytes that a rank may use; the device's.
        optimizer: whose state is counted.
        checkpoint: ``"layer"`` or None.
        uniform: only the degrees 1 and tp.
    """

    hardware: str | Path | Hardware | None = None
    batch: int | None = None
    sequence: int | None = None
    memory: float | None = None
    optimizer: str = "adamw"
    checkpoint: str | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            sound = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if value is not None and not sound:
                raise ValueError(f"{name}={value!r} must be a positive number")
        if self.memory is not None and not (
            isinstance(self.memory, (int, float))
            and not isinstance(self.memory, bool)
            and self.memory > 0
        ):
            raise ValueError(f"memory={self.memory!r} must be a positive number of bytes")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        if self.checkpoint not in (None, "layer"):
            raise ValueError(f"checkpoint={self.checkpoint!r} must be None or 'layer'")
        if self.hardware is not None:
            load(self.hardware)


def setting_of(target: Target, model: nn.Module, example: Inputs, given: bool) -> Setting:
    """Numbers for everything that the target leaves open.

    Args:
        example: the example inputs.
        given: whether the user gave them; found ones say nothing about the size of a step.
    """
    hardware = at_hand() if target.hardware is None else load(target.hardware)
    batch, sequence = target.batch, target.sequence
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.dim()]
    if given and tensors:
        batch = batch or int(tensors[0].shape[0])
        longest = max((int(t.shape[1]) for t in tensors if t.dim() > 1), default=1)
        sequence = sequence or longest
    return Setting(
        hardware,
        batch or BATCH,
        sequence or _longest(model),
        hardware.memory if target.memory is None else float(target.memory),
        target.optimizer,
        target.checkpoint,
    )


def _longest(model: nn.Module) -> int:
    """The longest sequence that the model says it takes."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "block_size"):
        for holder in (config, model):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return SEQUENCE


class Costs:
    """The cost model of an analysed graph, made when it is first asked."""

    def __init__(
        self,
        analysis: Analysis,
        tp: int,
        setting: Setting,
        target: Target,
        change: Callable[[Workload], Workload] = lambda work: work,
    ) -> None:
        self.analysis, self.tp, self.setting, self.target = analysis, tp, setting, target
        self._change = change

    @cached_property
    def model(self) -> CostModel:
        """The workload on the machine."""
        self._check_sizes()
        return CostModel(self._change(workload(self.analysis, self.tp)), self.setting, self.tp)

    def _check_sizes(self) -> None:
        """A size that the capture fixed cannot be planned for another."""
        fixed = input_sizes(self.analysis)
        for symbol, name in ((B, "batch"), (S, "sequence")):
            wanted = getattr(self.target, name)
            if wanted is not None and fixed.get(symbol, wanted) != wanted:
                raise PlanError(
                    f"the graph holds for a {name} of {fixed[symbol]} only, and {name}={wanted} is "
                    f"planned for: pass example_inputs with a {name} of 2 or more"
                )

    def predict(self, degrees: Mapping[str, int]) -> Predicted:
        """One step on one rank at these degrees."""
        return self.model.predict(degrees)

    def unit(self, name: str) -> Unit:
        """The region's work."""
        return next(u for u in self.model.workload.units if u.name == name)

    def formula(self, name: str) -> Any:
        """Seconds of a region as a sympy expression."""
        return self.model.formula(self.unit(name))

    def alternative(self, name: str, degree: int) -> Predicted:
        """One region at a degree, with the all-reduces that it shares with others."""
        unit = self.unit(name)
        found = self.model.of(unit, degree)
        shared = sum(h.seconds.get(degree, 0.0) for h in self.model.hubs if unit.tie in h.users)
        both = (found.step_time + shared, found.exposed_communication_time + shared)
        return replace(found, step_time=both[0], exposed_communication_time=both[1])

    def graph_text(self, nodes: Sequence[str]) -> str:
        """Some nodes of the captured graph, a line each."""
        wanted = set(nodes)
        lines = [n.format_node() for n in self.analysis.graph.nodes if n.name in wanted]
        return "\n".join(f"  {line}" for line in lines if line)

    def choose(self, uniform: bool) -> tuple[dict[str, int], dict[str, str]]:
        """Degree and reason of each region.

        Raises:
            PlanError: not enough memory; the nearest miss and what would fix it.
        """
        try:
            degrees = self.model.choose(uniform)
        except NoFit as miss:
            raise PlanError(self._no_fit(miss)) from None
        return degrees, {u.name: self._reason(u, degrees[u.name]) for u in self.model.workload.units}

    def apart(self) -> Costs:
        """The same where no all-reduce runs under products."""
        return Costs(self.analysis, self.tp, self.setting, self.target, one_after_other)

    def overlap(self, degrees: Mapping[str, int]) -> tuple[bool, str]:
        """Whether all-reduces under the weights' gradients are predicted to win, and by how much."""
        apart = CostModel(one_after_other(self.model.workload), self.setting, self.tp)
        beside, alone = (model.predict(degrees).step_time for model in (self.model, apart))
        times = f"{_time(beside)} a step, {_time(alone)} one after the other"
        if beside < alone:
            return True, times
        return False, f"predicted to win nothing on {self.setting.hardware.name}: {times}"

    def rooms(self, dtype: str) -> dict[int, tuple[Room, ...]]:
        """Degree -> what products of a dtype leave to the sums that they run beside."""
        split = [degree for degree in range(2, self.tp + 1) if self.tp % degree == 0]
        return {degree: rooms(self.setting.hardware, degree, dtype) for degree in split}

    def mechanisms(self, degrees: Mapping[str, int]) -> tuple[str, ...]:
        """What runs as one where the model has several: products side by side, sums that are added."""
        names: dict[tuple[float, float], list[str]] = {}
        sums: dict[str, set[int]] = {}
        left: dict[int, list[str]] = {}
        for unit in self.model.workload.units:
            degree = degrees[unit.name]
            for item in unit.work[degree].backward.items:
                if isinstance(item, Collective) and item.under:
                    room = self._room(item.under[0], degree)
                    if room is not None:
                        left.setdefault(room.left, []).append(unit.name)
                if isinstance(item, SideBySide):
                    one, each, taken = (
                        self.model.evaluate(formula(item), degree)
                        for formula in (as_one, one_by_one, seconds)
                    )
                    if taken == one:
                        names.setdefault((one, each), []).append(unit.name)
            for (value, own), shared in unit.shared.items():
                if not shared.backward and own == degree:
                    sums.setdefault(value, set()).add(degree)
        lines = [
            f"gradients of the weights of one input are one product in {', '.join(folded(found))}: "
            f"{_time(one)}, {_time(each)} one by one"
            for (one, each), found in names.items()
        ]
        of = self.setting.hardware.multiprocessors
        lines += [
            f"products leave {count} of {of} multiprocessors to sums beside them in "
            f"{', '.join(folded(found))}"
            for count, found in left.items()
        ]
        joined = sum(len(degrees) == 1 for degrees in sums.values())
        if joined:
            lines.append(f"results that are added are summed over the ranks once, {joined} times")
        return tuple(lines)

    def _room(self, product: Product, degree: int) -> Room | None:
        """What this product leaves to the sum beside it."""
        columns = self.model.evaluate(product.n, degree)
        found = rooms(self.setting.hardware, degree, product.dtype)
        return next((room for room in reversed(found) if room.columns <= columns), None)

    def _no_fit(self, miss: NoFit) -> str:
        rest, limit = self.model.rest.memory_per_rank, self.setting.memory
        need = miss.bytes + rest
        fixes = [f"more ranks than tp={self.tp}"]
        if not self.setting.checkpoint:
            again = CostModel(self.model.workload, replace(self.setting, checkpoint="layer"), self.tp)
            smaller = min(need, again.predict(again.by_name(miss.degrees)).memory_per_rank)
            fixes.append(f"checkpoint='layer' ({smaller / 2**30:.2f} GiB)")
        if self.setting.batch > 1:
            fixes.append(f"a batch smaller than {self.setting.batch}")
        return (
            f"no choice of degrees fits in memory={limit / 2**30:.2f} GiB a rank: the smallest takes "
            f"{need / 2**30:.2f} GiB ({rest / 2**30:.2f} GiB of it whole on every rank). What would "
            f"help: {', '.join(fixes)}"
        )

    def _reason(self, unit: Unit, degree: int) -> str:
        """What the tie's collectives cost, and what its split saves elsewhere."""
        tied = self.model.ties[unit.tie]
        hubs = [h for h in self.model.hubs if unit.tie in h.users]
        times = {d: sum(self.model.of(u, d).step_time for u in tied) for d in unit.work}
        spent = {
            d: sum(self.model.of(u, d).exposed_communication_time for u in tied)
            + sum(h.seconds.get(d, 0.0) for h in hubs)
            for d in unit.work
        }
        split = [d for d in times if d > 1]
        if not split:
            return "its axes take no other degree"
        other = degree if degree > 1 else min(split, key=lambda d: times[d])
        own = sum(self.model.of(u, other).exposed_communication_time for u in tied)
        saved = max(0.0, times[1] - (times[other] - own))
        sign = ">" if spent[other] > saved else "<"
        text = f"degree {degree}: all-reduce {_time(spent[other])} {sign} saved {_time(saved)}"
        if len(tied) > 1:
            text += f", over {len(tied)} tied regions"
        if degree > 1 and spent[other] > saved:
            text += "; split to fit in memory"
        return text


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if abs(seconds) >= 1e-3 else f"{seconds * 1e6:.0f} us"


def planned(
    analysis: Analysis,
    tp: int,
    request: Request,
    costs: Costs | None,
    uniform: bool = False,
    overlap: bool = True,
) -> tuple[Plan, Assignment]:
    """The plan for a request; ``"auto"``: what the cost model chooses, which must be given then.

    overlap: as ``Plan.overlap``, of other requests.
    """
    reasons: dict[str, str] = {}
    overlap_reason = ""
    if request == "auto":
        assert costs is not None
        request, reasons = costs.choose(uniform)
        overlap, overlap_reason = costs.overlap(request)
    plan, assignment = assign_degrees(analysis, tp, request)

    def again(degrees: Mapping[str, int]) -> Plan:
        return planned(analysis, tp, degrees, costs, overlap=overlap)[0]

    regions = tuple(replace(r, reason=reasons.get(r.name, r.reason)) for r in plan.regions)
    plan = replace(plan, regions=regions, overlap=overlap, overlap_reason=overlap_reason)
    if costs is not None and not overlap:
        costs = costs.apart()
    return replace(plan, _again=again, _costs=costs), assignment
