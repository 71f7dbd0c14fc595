"""What holds of every model, whatever its plan; checked on simulated ranks.

A model is captured once for a mode and a dtype, and then planned and compared many times.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoshard import Plan, verification
from autoshard.capture import skeleton
from autoshard.exactly import default_dtype, edit_exactly, exactly
from autoshard.passes.assign_degrees import Request
from autoshard.pipeline import Program, analyse_each, rewrite
from autoshard.rank import local_share, whole_tensor
from autoshard.sharded import Sharded
from autoshard.signatures import plan_hash
from autoshard.verification import (
    TOLERANCE,
    boundary_inputs,
    largest_of,
    objective,
    perturbed,
    relative_error,
)
from tests.fuzz.build import build, inputs
from tests.fuzz.spec import Net

Shape = tuple[int, int]  # batch, sequence
Values = tuple[list[Tensor], dict[str, Tensor]]  # outputs, gradients

CAPTURED: Shape = (3, 5)
STEP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


class Broken(AssertionError):
    """A law that does not hold."""

    seen: ClassVar[list[str]] = []  # of this process, also those that do not happen again

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.seen.append(text)


def law(holds: bool, text: str) -> None:
    """Raise with the law's text where it does not hold."""
    if not holds:
        raise Broken(text)


class Subject:
    """A model captured for a mode and a dtype.

    Attributes:
        model: what is compared with, every parameter perturbed.
        programs: number of ranks -> its analysis.
    """

    def __init__(self, spec: Net, training: bool, dtype: torch.dtype, tps: tuple[int, ...]) -> None:
        self.spec, self.training, self.dtype = spec, training, dtype
        self.model = perturbed(build(spec).to(dtype).train(training), seed=0)
        hollow = skeleton(self.model)
        found = analyse_each(hollow, (), inputs_of(spec, CAPTURED), tps, edit_exactly(dtype))
        with self.exactly():
            self.programs: dict[int, Program] = dict(zip(tps, found, strict=True))

    def exactly(self) -> Any:
        """As ``autoshard.verify``: tensors made without a dtype are float64 where the model is."""
        return default_dtype(
            torch.float64 if self.dtype is torch.float64 else torch.get_default_dtype()
        )

    def plan(self, tp: int, request: Request = "max") -> tuple[Plan, Sharded]:
        """Plan, rewrite and prove."""
        with self.exactly():
            return rewrite(self.programs[tp], tp, request)

    def holds(self, shape: Shape) -> bool:
        """Whether the captured graph says that it holds for this shape."""
        captured = next(iter(self.programs.values())).captured
        return captured.holds(pytree.tree_leaves(inputs_of(self.spec, shape)))

    def same_function(self, tp: int, plan: Plan, sharded: Sharded, shape: Shape) -> None:
        """Outputs and the gradient of every parameter are the model's, on every rank."""
        program = self.programs[tp]
        with self.exactly():
            given = boundary_inputs(program, tp, (), inputs_of(self.spec, shape))
            report = verification.compare(self.model, program, sharded, plan, *given, self.dtype)
        if not report.ok:
            limit = rounding(self.model, given[1], self.dtype, tp)
            law(
                report.max_relative_error < limit,
                f"verify: {report}; rounding gives {limit:.1e}; degrees {plan.degrees}; shape {shape}",
            )

    def shares_gather(self, sharded: Sharded, tp: int) -> None:
        """A parameter cut into the ranks' shares and put together again is the parameter."""
        names = self.programs[tp].captured.parameters
        whole = dict(self.model.named_parameters())
        for placeholder, stored in sharded.stored.items():
            value = whole[names[placeholder]].detach()
            shares = [local_share(value, stored, place) for place in range(stored[2])]
            law(
                torch.equal(whole_tensor(shares, stored), value),
                f"gathered: {names[placeholder]} stored as {stored}",
            )

    def deterministic(self, tp: int, plan: Plan, sharded: Sharded) -> str:
        """The same degrees give the same plan and the same graph; returns their hash."""
        first = plan_hash(plan, sharded)
        again = plan_hash(*self.plan(tp, plan.degrees))
        law(first == again, f"deterministic: rewriting twice gives {first[:8]} and {again[:8]}")
        return first


def inputs_of(spec: Net, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a shape."""
    return inputs(spec, batch=shape[0], length=shape[1], seed=seed)


def ran(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> Values:
    """What a copy of the model gives in a dtype, dropout off."""
    model = copy.deepcopy(model).to(dtype)
    with exactly(dtype):
        outputs = pytree.tree_leaves(model(**{n: t.clone() for n, t in batch.items()}))
        objective(outputs).backward()
    return [o.detach() for o in outputs], gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradient by parameter; zeros where there is none."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for n, p in model.named_parameters()
    }


def distance(made: Values, expected: Values) -> dict[str, float]:
    """The relative error of each output and gradient."""
    outputs = {
        str(i): relative_error([a], b, 0.0)
        for i, (a, b) in enumerate(zip(made[0], expected[0], strict=True))
    }
    largest = largest_of(expected[1])
    return outputs | {n: relative_error([made[1][n]], g, largest) for n, g in expected[1].items()}


def rounding(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, ranks: int = 1) -> float:
    """The tolerance, or what rounding does to this very model, where that is more.

    Estimated by the model's own distance, in this dtype (float32 for float64, scaled), from itself
    in higher precision. A sum on one rank is rounded once; of a sum over ranks each rank's part is,
    and where the parts cancel each of them is larger than the sum.
    """
    lower = torch.float32 if dtype is torch.float64 else dtype
    exact = ran(model, batch, torch.float64)
    coarse = ran(model, batch, lower)
    higher = [o.double() for o in coarse[0]], {n: g.double() for n, g in coarse[1].items()}
    errors = [e for e in distance(higher, exact).values() if e == e]
    own = max(errors, default=0.0) * STEP[dtype] / STEP[lower]
    return max(TOLERANCE[dtype], (10 if dtype is lower else 100) * ranks * own)
