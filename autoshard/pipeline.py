"""The pipeline: what happens to a model, top to bottom.

capture -> inline -> functionalize -> normalize -> assign_axes -> match
-> (workload -> costs, for degree="auto") -> assign_degrees -> shard -> prove
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from autoshard.analysis import Analysis
from autoshard.capture import Captured, capture
from autoshard.passes.assign_axes import assign_axes
from autoshard.passes.assign_degrees import Request
from autoshard.passes.functionalize import functionalize
from autoshard.passes.inline import inline
from autoshard.passes.match import match
from autoshard.passes.normalize import normalize
from autoshard.passes.prove import prove
from autoshard.passes.shard import shard
from autoshard.planning import Costs, planned
from autoshard.plans import Plan
from autoshard.progress import Stages
from autoshard.sharded import Sharded


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
    edit: Callable[[fx.Graph], None] | None = None,
) -> Program:
    """Capture a model and find what can be split.

    Args:
        model: a skeleton, or a real model.
        args, kwargs: example inputs, on the CPU.
        tp: ranks.
        edit: a function applied to the captured graph first (verification turns dropout off).
    """
    seconds: dict[str, float] = {}
    with Stages(seconds, ("capture", "normalize", "axes", "match")) as stages:
        with stages.stage("capture"):
            captured = capture(model, args, kwargs)
        if edit is not None:
            edit(captured.graph)
        with stages.stage("normalize"):
            graph = inline(captured.graph, captured.differentiable)
            graph = functionalize(graph, captured.parameters)
            graph = normalize(graph, captured.parameters, captured.constants)
        with stages.stage("axes"):
            axes = assign_axes(graph, captured.parameters, captured.inputs)
        with stages.stage("match"):
            candidates = match(graph, axes, tp)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    analysis = Analysis(graph, axes, candidates, captured.parameters, shapes)
    return Program(captured, analysis, seconds)


def rewrite(
    program: Program,
    tp: int,
    request: Request,
    keep_split: Collection[int] = (),
    costs: Costs | None = None,
    uniform: bool = False,
) -> tuple[Plan, Sharded]:
    """Decide the degrees, write the rank's graph, and prove it.

    Args:
        costs: for ``request="auto"``, and for what the plan says of time and memory.
        uniform: ``"auto"`` takes the degrees 1 and ``tp`` only.
    """
    analysis = program.analysis
    with Stages(program.seconds, ("plan", "shard", "prove")) as stages:
        with stages.stage("plan"):
            plan, assignment = planned(analysis, tp, request, costs, uniform)
        with stages.stage("shard"):
            sharded = shard(analysis.graph, analysis.axes, assignment, keep_split)
        with stages.stage("prove"):
            flows = analysis.axes.differentiable
            inputs = {str(n.target) for n in flows if n.op == "placeholder"}
            prove(analysis.graph, sharded, inputs)
    return plan, sharded
