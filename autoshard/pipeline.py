"""The pipeline: what happens to a model, top to bottom.

capture -> normalize -> assign_axes -> match -> assign_degrees -> shard -> merge -> check
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import nn

from autoshard.capture import Captured, capture
from autoshard.passes.assign_axes import assign_axes
from autoshard.passes.assign_degrees import Analysis, Request, assign_degrees
from autoshard.passes.check import check
from autoshard.passes.match import match
from autoshard.passes.normalize import normalize
from autoshard.passes.shard import Sharded, shard
from autoshard.plans import Plan


@dataclass(frozen=True)
class Program:
    """A model captured for one signature and analysed.

    Attributes:
        captured: the graph with the meaning of its placeholders.
        analysis: axes and candidates.
        seconds: time of each stage.
    """

    captured: Captured
    analysis: Analysis
    seconds: dict[str, float]


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tp: int,
    edit: Any = None,
) -> Program:
    """Capture a model and find what can be split.

    Args:
        model: a skeleton, or a real model.
        args, kwargs: example inputs, on the CPU.
        tp: ranks.
        edit: a function applied to the captured graph first (verification turns dropout off).
    """
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    captured = capture(model, args, kwargs)
    clock("capture")
    if edit is not None:
        edit(captured.graph)
    graph = normalize(captured.graph, captured.parameters, captured.constants)
    clock("normalize")
    axes = assign_axes(graph, captured.parameters, captured.inputs)
    clock("axes")
    candidates = match(graph, axes, tp)
    clock("match")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    analysis = Analysis(graph, axes, candidates, captured.parameters, shapes)
    return Program(captured, analysis, seconds)


def rewrite(
    program: Program, tp: int, request: Request, keep_split: Collection[int] = ()
) -> tuple[Plan, Sharded]:
    """Decide the degrees and write the rank's graph."""
    clock = _Clock(program.seconds)
    plan, assignment = assign_degrees(program.analysis, tp, request)
    clock("plan")
    sharded = shard(program.analysis.graph, program.analysis.axes, assignment, keep_split)
    clock("shard")
    inputs = {n.name for n in program.analysis.axes.differentiable if n.op == "placeholder"}
    check(sharded, inputs)
    clock("check")
    return plan, sharded


def request_of(plan: Plan) -> Mapping[str, int]:
    """The request that gives this plan again."""
    return plan.degrees


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, perf_counter()

    def __call__(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] = now - self.last
        self.last = now
