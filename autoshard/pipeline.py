"""The pipeline: what happens to a model, top to bottom.

capture -> inline -> functionalize -> normalize -> (rearrange_norms) -> restore_causal
-> assign_axes -> match -> (workload -> costs, for degree="auto") -> assign_degrees
-> shard -> checkpoint -> outline -> fuse -> prove
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from autoshard.analysis import Analysis
from autoshard.capture import Captured, capture
from autoshard.parameters import Stored
from autoshard.passes.assign_axes import assign_axes
from autoshard.passes.assign_degrees import Request
from autoshard.passes.checkpoint import checkpoint
from autoshard.passes.decompose_norms import decompose_norms, fuse_unsplit
from autoshard.passes.functionalize import functionalize
from autoshard.passes.fuse import fuse
from autoshard.passes.inline import inline
from autoshard.passes.match import match
from autoshard.passes.match_alone import match_alone
from autoshard.passes.normalize import normalize
from autoshard.passes.outline import outline
from autoshard.passes.prove import placements, prove
from autoshard.passes.rearrange_norms import rearrange_norms
from autoshard.passes.restore_causal import restore_causal
from autoshard.passes.shard import shard
from autoshard.planning import Costs, planned
from autoshard.plans import Plan
from autoshard.progress import Stages
from autoshard.proof.held import Held
from autoshard.sharded import Sharded


@dataclass(frozen=True)
class Program:
    """A model captured for one signature and analysed.

    Attributes:
        captured: the graph with the meaning of its placeholders.
        analysis: axes and candidates.
        seconds: time of each stage.
        reference: the rearranged graph, with nothing else done to it, where the function was changed
            on purpose; None where the model itself is the reference.
    """

    captured: Captured
    analysis: Analysis
    seconds: dict[str, float]
    reference: fx.Graph | None = None


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tp: int,
    edit: Callable[[fx.Graph], None] | None = None,
    pre_norm: bool = False,
    held: Mapping[int, Stored] | None = None,
) -> Program:
    """Capture a model and find what can be split.

    Args:
        model: a skeleton, or a real model.
        args, kwargs: example inputs, on the CPU.
        tp: ranks.
        edit: a function applied to the captured graph first (verification turns dropout off).
        pre_norm: move the norms behind the residual additions to before the sublayers.
        held: number of a flat input -> how it is split, where a rank is given its share of it.
    """
    return next(analyse_each(model, args, kwargs, (tp,), edit, pre_norm, held))


def analyse_each(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tps: Sequence[int],
    edit: Callable[[fx.Graph], None] | None = None,
    pre_norm: bool = False,
    held: Mapping[int, Stored] | None = None,
) -> Iterator[Program]:
    """Capture a model once, and find what can be split over several numbers of ranks."""
    seconds: dict[str, float] = {}
    with Stages(seconds, ("capture",)) as stages, stages.stage("capture"):
        captured = capture(model, args, kwargs)
    if held:
        captured = replace(captured, held={captured.inputs[i]: share for i, share in held.items()})
    if edit is not None:
        edit(captured.graph)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    module = captured.graph.owning_module
    assert module is not None
    for tp in tps:
        graph = captured.graph if tp == tps[-1] else copy.deepcopy(module).graph
        again = dict(seconds)
        yield _analysed(replace(captured, graph=graph), tp, shapes, again, pre_norm)


def _analysed(
    captured: Captured,
    tp: int,
    shapes: dict[str, tuple[int, ...]],
    seconds: dict[str, float],
    pre_norm: bool,
) -> Program:
    graph: fx.Graph = captured.graph
    reference: fx.Graph | None = None
    with Stages(seconds, ("normalize", "axes", "match")) as stages:
        with stages.stage("normalize"):
            graph = inline(graph, captured.differentiable)
            graph = functionalize(graph, captured.parameters)
            graph = normalize(graph, captured.parameters, captured.constants)
            if pre_norm:
                graph = rearrange_norms(graph, captured.parameters, captured.inputs)
                reference = fx.Graph()
                reference.output(reference.graph_copy(graph, {}))
            graph = restore_causal(graph, captured.constants)
        with stages.stage("axes"):
            axes = assign_axes(graph, captured.parameters, captured.inputs, captured.held)
            norms = decompose_norms(graph, axes) if tp > 1 else []
            if norms:
                axes = assign_axes(graph, captured.parameters, captured.inputs, captured.held)
        with stages.stage("match"):
            candidates = match(graph, axes, tp)
            if fuse_unsplit(graph, norms, axes, candidates, tp):
                axes = assign_axes(graph, captured.parameters, captured.inputs, captured.held)
                candidates = match(graph, axes, tp)
            candidates = match_alone(graph, axes, tp, candidates)
    analysis = Analysis(graph, axes, candidates, captured.parameters, shapes)
    return Program(captured, analysis, seconds, reference)


def rewrite(
    program: Program,
    tp: int,
    request: Request,
    keep_split: Collection[int] = (),
    costs: Costs | None = None,
    uniform: bool = False,
    layers_again: bool = False,
    overlap: bool = True,
) -> tuple[Plan, Sharded]:
    """Decide the degrees, write the rank's graph, and prove it.

    Args:
        costs: for ``request="auto"``, and for what the plan says of time and memory.
        uniform: ``"auto"`` takes the degrees 1 and ``tp`` only.
        layers_again: the activations of all layers are computed again (``checkpoint="layer"``), not
            only what the model runs under ``torch.utils.checkpoint``.
        overlap: as ``Plan.overlap``; of ``"auto"`` the cost model says it.
    """
    analysis = program.analysis
    with Stages(program.seconds, ("plan", "shard", "prove")) as stages:
        with stages.stage("plan"):
            plan, assignment = planned(analysis, tp, request, costs, uniform, overlap)
        with stages.stage("shard"):
            sharded = shard(analysis.graph, analysis.axes, assignment, keep_split)
            sharded = checkpoint(sharded, layers_again)
            sharded = fuse(outline(sharded, analysis.names), plan.overlap)
        with stages.stage("prove"):
            held = program.captured.held
            prove(analysis.graph, sharded, _differentiable(analysis), held, analysis.names)
    return plan, sharded


def held_by_ranks(program: Program, sharded: Sharded) -> dict[str, Held]:
    """What each rank holds of every tensor of the rank's graph, as the proof finds it."""
    analysis = program.analysis
    return placements(analysis.graph, sharded, _differentiable(analysis), program.captured.held)


def _differentiable(analysis: Analysis) -> set[str]:
    flows = analysis.axes.differentiable
    return {str(n.target) for n in flows if n.op == "placeholder"}
