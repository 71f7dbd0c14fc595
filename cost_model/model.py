"""The cost model: seconds and bytes of a workload on a machine, at given degrees.

One step is a forward and a backward pass on one rank. Formulas are sympy expressions
(``formulas.py``); numbers come from them by ``lambdify``, once per kind of work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import sympy

from autoshard.cost_model import formulas
from autoshard.cost_model.formulas import COMMUNICATION, COMPUTE, MEMORY
from autoshard.cost_model.hardware import Hardware
from autoshard.cost_model.search import Hub, Option, search
from autoshard.cost_model.work import (
    Attention,
    Collective,
    D,
    Item,
    Phase,
    Product,
    Size,
    Unit,
    Work,
    Workload,
    again,
)  # fmt: skip
from autoshard.plans import Predicted

Expr: TypeAlias = Any

# Optimizer -> (states in the parameter's dtype, further bytes per element).
OPTIMIZERS: dict[str, tuple[int, int]] = {
    "none": (0, 0),
    "sgd": (0, 0),
    "momentum": (1, 0),
    "adamw": (2, 0),
    "adamw-mixed": (0, 12),  # a float32 copy and two float32 moments beside bf16 weights
    "adafactor": (0, 0),  # a row and a column per matrix
}


@dataclass(frozen=True)
class Setting:
    """What a model is planned for.

    Attributes:
        hardware: the machine.
        batch, sequence: of one step.
        memory: bytes that a rank may use.
        optimizer: a key of ``OPTIMIZERS``.
        checkpoint: ``"layer"``: activations are computed again, layer by layer; None: kept.
    """

    hardware: Hardware
    batch: int
    sequence: int
    memory: float
    optimizer: str = "adamw"
    checkpoint: str | None = None


class CostModel:
    """A workload on a machine."""

    def __init__(self, workload: Workload, setting: Setting, tp: int) -> None:
        self.workload, self.setting, self.tp = workload, setting, tp
        self._known: dict[tuple[int, int], Predicted] = {}  # equal regions share one Work
        self._constants: dict[int, dict[str, float]] = {}  # by degree

    @cached_property
    def ties(self) -> list[list[Unit]]:
        """The regions of each tie, by its number."""
        found: dict[int, list[Unit]] = {}
        for unit in self.workload.units:
            found.setdefault(unit.tie, []).append(unit)
        return [found[tie] for tie in range(len(found))]

    def predict(self, degrees: Mapping[str, int]) -> Predicted:
        """One step, every region at its degree."""
        total = self.rest
        for unit in self.workload.units:
            total = total + self.of(unit, degrees[unit.name])
        for hub in self.hubs:
            used = {degrees[self.ties[tie][0].name] for tie in hub.users}
            seconds = sum(s for d, s in hub.seconds.items() if d in used)
            total = total + _only(seconds, exposed_communication_time=seconds)
        return total

    @cached_property
    def rest(self) -> Predicted:
        """What every rank does whole, and what a step costs beside its operators."""
        host = dict(self.setting.hardware.host).get("step", (0.0, 0.0))
        total = _only(sum(host), launch_time=sum(host))
        for work in self.workload.rest:
            total = total + self._work(work, 1)
        if self.setting.checkpoint:
            kept = self._number(self.workload.boundaries, 1)
            total = total + _only(0.0, memory_per_rank=kept, activation_memory=kept)
        return total

    def of(self, unit: Unit, degree: int) -> Predicted:
        """A region at a degree, without what it shares with others."""
        return self._work(unit.work[degree], degree)

    def formula(self, unit: Unit) -> Expr:
        """Seconds of a region in ``B``, ``S``, ``d`` and hardware constants.

        One expression for all degrees above 1 where they have the same collectives, by cases else;
        with what it shares with other regions.
        """
        cases: list[tuple[Expr, list[int]]] = []
        for degree in unit.work:
            found = self._seconds(unit.work[degree])
            shared = (s.collective for (_, d), s in unit.shared.items() if d == degree)
            found += sum((formulas.seconds(c) for c in shared), 0)
            same = next((c for c in cases if c[0] == found), None)
            if same is None:
                cases.append((found, [degree]))
            else:
                same[1].append(degree)
        if len(cases) == 1:
            return cases[0][0]
        pieces = [(e, sympy.Or(*(sympy.Eq(D, d) for d in ds))) for e, ds in cases[:-1]]
        return sympy.Piecewise(*pieces, (cases[-1][0], True))

    def evaluate(self, formula: Expr, degree: int) -> float:
        """A formula's number at this setting."""
        return self._number(formula, degree)

    def choose(self, uniform: bool = False) -> dict[str, int]:
        """The degrees of least predicted time that fit in memory; exact.

        Args:
            uniform: only 1 and ``tp``.

        Raises:
            NoFit: nothing fits; see ``search``.
        """
        options = []
        for members in self.ties:
            own = []
            for degree in members[0].work:
                between = degree not in (1, self.tp)
                if uniform and between:
                    continue
                parts = [self.of(u, degree) for u in members]
                # At equal cost 1 and tp are preferred: they keep the mesh one-dimensional.
                seconds = sum(p.step_time for p in parts) * (1 + 1e-9 * between)
                own.append(Option(degree, seconds, sum(p.memory_per_rank for p in parts)))
            options.append(tuple(own))
        limit = self.setting.memory - self.rest.memory_per_rank
        return self.by_name(search(options, self.hubs, limit))

    def by_name(self, degrees: Sequence[int]) -> dict[str, int]:
        """Degrees of ties as those of regions."""
        return {u.name: degrees[u.tie] for u in self.workload.units}

    @cached_property
    def hubs(self) -> list[Hub]:
        """What regions of several ties share: values that enter them, sums of their results."""
        users: dict[str, set[int]] = {}
        costs: dict[str, dict[int, float]] = {}
        for unit in self.workload.units:
            for (value, degree), one in unit.shared.items():
                users.setdefault(value, set()).add(unit.tie)
                items = Phase((one.collective,), (("collective", 1),))
                costs.setdefault(value, {})[degree] = self._phase(items, one.backward, degree)[0]
        # Of the same regions: paid together, so the search settles one.
        hubs: dict[frozenset[int], Counter[int]] = {}
        for value, ties in users.items():
            hubs.setdefault(frozenset(ties), Counter()).update(costs[value])
        return [Hub(ties, dict(seconds)) for ties, seconds in hubs.items()]

    # -- numbers -------------------------------------------------------------------------------

    def _work(self, work: Work, degree: int) -> Predicted:
        key = id(work), degree
        if key not in self._known:
            self._known[key] = self._predicted(work, degree)
        return self._known[key]

    def _predicted(self, work: Work, degree: int) -> Predicted:
        phases = self._phases(work)
        times = [self._phase(phase, backward, degree) for phase, backward in phases]
        step, compute, memory, communication = (sum(t[i] for t in times) for i in range(4))
        flops = sum(self._flops(phase, degree) for phase, _ in phases)
        states, extra = OPTIMIZERS[self.setting.optimizer]
        elements = [(size, self._number(count, degree)) for size, count in work.parameters]
        parameters = sum(size * count for size, count in elements)
        optimizer = sum((states * size + extra) * count for size, count in elements)
        kept = self._number(work.saved, degree)
        if self.setting.checkpoint and work.in_layer:
            kept /= max(1, self.workload.layers)  # one layer at a time
            kept += sum(self._number(size, degree) for size in _sums(work.forward))
        kept += self._number(work.gradients, degree)
        return Predicted(
            step_time=step,
            compute_time=compute,
            exposed_communication_time=communication,
            memory_traffic_time=memory,
            launch_time=step - compute - memory - communication,
            flops_per_rank=flops,
            memory_per_rank=2 * parameters + optimizer + kept,
            parameter_memory=parameters,
            gradient_memory=parameters,
            optimizer_memory=optimizer,
            activation_memory=kept,
        )

    def _phases(self, work: Work) -> list[tuple[Phase, bool]]:
        """The phases of a step, and which is the backward."""
        repeated = [(again(work.forward), False)] if self.setting.checkpoint and work.in_layer else []
        return [(work.forward, False), *repeated, (work.backward, True)]

    def _phase(self, phase: Phase, backward: bool, degree: int) -> tuple[float, float, float, float]:
        """The phase's time; and of the device: compute, memory traffic, communication."""
        parts = [self._call(f, degree) for f in _parts(phase)]
        device = sum(parts)
        host = self._call(_host(phase, backward), degree)
        return max(device, host), parts[0], parts[1], parts[2]

    def _flops(self, phase: Phase, degree: int) -> float:
        return self._number(_phase_flops(phase), degree)

    def _seconds(self, work: Work) -> Expr:
        return sum(formulas.phase_time(phase, backward) for phase, backward in self._phases(work))

    def _number(self, size: Any, degree: int) -> float:
        if isinstance(size, (int, float)):
            return float(size)
        return self._call(_compiled(sympy.sympify(size)), degree)

    def _call(self, function: Any, degree: int) -> float:
        names, call = function
        values: dict[str, float] = {"B": self.setting.batch, "S": self.setting.sequence, "d": degree}
        if degree not in self._constants:
            self._constants[degree] = formulas.constants(self.setting.hardware, degree)
        values |= self._constants[degree]
        return float(call(*(0.0 if _is_free(name, values) else values[name] for name in names)))


def _sums(forward: Phase) -> list[Size]:
    """Bytes of what is all-reduced: each sum, or the residual that it is added to, is kept."""
    return [i.bytes for i in forward.items if isinstance(i, Collective) and i.kind == "all_reduce"]


def _is_free(name: str, values: Mapping[str, float]) -> bool:
    """A kind of node that costs the host nothing on this machine."""
    return name.startswith("host_") and name not in values


def _only(seconds: float, **fields: float) -> Predicted:
    zero = dict.fromkeys(Predicted.__dataclass_fields__, 0.0)
    return Predicted(**(zero | {"step_time": seconds} | fields))


@lru_cache(maxsize=4096)
def _parts(phase: Phase) -> list[Any]:
    kinds: dict[str, list[Item]] = {COMPUTE: [], MEMORY: [], COMMUNICATION: []}
    for item in phase.items:
        kinds[formulas.kind_of(item)].append(item)
    return [_compiled(formulas.device(items)) for items in kinds.values()]


@lru_cache(maxsize=4096)
def _host(phase: Phase, backward: bool) -> Any:
    return _compiled(formulas.host(phase, backward))


@lru_cache(maxsize=4096)
def _phase_flops(phase: Phase) -> Expr:
    return sum(
        (
            item.flops * (sympy.Rational(5, 2) if isinstance(item, Attention) and item.backward else 1)
            for item in phase.items
            if isinstance(item, (Product, Attention))
        ),
        start=sympy.Integer(0),
    )


@lru_cache(maxsize=4096)
def _compiled(formula: Expr) -> tuple[tuple[str, ...], Any]:
    """A formula as a function of its symbols, by name."""
    symbols = sorted(sympy.sympify(formula).free_symbols, key=lambda s: s.name)
    return tuple(s.name for s in symbols), sympy.lambdify(symbols, formula, modules="math", cse=True)
