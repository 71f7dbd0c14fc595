"""Signatures: what a graph is captured for, and what was made of the capture.

One `ParallelModule` has a graph for each signature that it was called with: kinds of inputs, mode, the
forms of caches. Shapes are no part of it: a graph says itself for which it holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autoshard import caches
from autoshard.caches import LEAVES, Given, Traced
from autoshard.capture import Captured
from autoshard.pipeline import Program
from autoshard.plans import Plan
from autoshard.random_streams import RandomStream
from autoshard.rank import Source
from autoshard.sharded import Sharded


@dataclass(frozen=True, eq=False)
class Compiled:
    """One rewritten graph: what it was captured for, and the module that runs it.

    Attributes:
        key: what it was captured for, shapes aside (`key_of`).
        module: runs it, layer by layer, over the values of its `sources`.
        streams: what it draws random numbers from.
    """

    key: Any
    program: Program
    sharded: Sharded
    module: fx.GraphModule
    sources: tuple[Source, ...]
    streams: tuple[RandomStream, ...]
    traced: Traced

    @property
    def captured(self) -> Captured:
        """The captured graph."""
        return self.program.captured


def key_of(given: Given, training: bool, part: str | None = None) -> tuple[Any, list[Any]]:
    """What a graph is captured for, shapes aside, and the flat inputs.

    part: of the model alone, by the name of the method that gives it.
    """
    flat: list[Any] = [*given.args, *given.kwargs.values()]
    spec: Any = len(given.args), *given.kwargs
    if not all(isinstance(x, LEAVES) for x in flat):
        flat, spec = pytree.tree_flatten((given.args, given.kwargs))
    return (part, spec, given.forms, training, tuple([_kind(leaf) for leaf in flat])), flat


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    if isinstance(leaf, DTensor):
        return leaf.dtype, leaf.dim(), leaf.placements, leaf.device_mesh
    return leaf.dtype, leaf.dim()


def shapes_of(flat: list[Any]) -> tuple[tuple[int, ...] | None, ...]:
    """Of flat inputs; None for what is no tensor."""
    return tuple([tuple(x.shape) if isinstance(x, Tensor) else None for x in flat])


def example_of(given: Tensor) -> Tensor:
    """What a graph is captured with: no values are read, so none are gathered."""
    if isinstance(given, DTensor):
        return torch.empty(given.shape, dtype=given.dtype)
    return given.detach().to("cpu")


def outputs_to_keep(
    program: Program, training: bool, logits: str, found: Traced | None = None
) -> tuple[int, ...]:
    """The flat outputs that leave as shares.

    Beside a loss in train mode, nobody reads them whole. Caches that a call in eval mode is given hold
    a rank's heads only: the next call takes them as they are.
    """
    output = next(n for n in reversed(program.analysis.graph.nodes) if n.op == "output")
    values = list(output.args[0])
    loss = any(
        isinstance(v, fx.Node) and v in program.analysis.axes.dims and v.meta["val"].dim() == 0
        for v in values
    )
    if logits == "sharded" or (logits == "auto" and training and loss):
        return tuple(range(len(values)))
    return () if found is None or training or logits == "whole" else caches.positions(found)


def plan_hash(plan: Plan, sharded: Sharded | None = None) -> str:
    """What must be the same on all ranks: the plan and the rewritten graph."""
    graphs = () if sharded is None else sharded.graphs
    graph = [n.format_node() for g in graphs for n in g.nodes]
    text = f"{plan.tp} {plan.fingerprint} {sorted(plan.degrees.items())} {graph}"
    return hashlib.sha256(text.encode()).hexdigest()


def degrees_of(plan: Plan, program: Program) -> dict[str, int]:
    """Region of another signature -> its degree in the plan that was made for the first one."""
    return {
        r.name: plan.degrees.get(r.name, _tied_degree(plan, program, r.name))
        for c in program.analysis.candidates for r in c.regions
    }  # fmt: skip


def _tied_degree(plan: Plan, program: Program, name: str) -> int:
    """The degree of a region that the plan does not know, from the parameters that it shares."""
    by_parameter = {p: r.degree for r in plan.regions for p in r.parameters}
    for candidate in program.analysis.candidates:
        if any(r.name == name for r in candidate.regions):
            for region in candidate.regions:
                if region.name in plan.degrees:
                    return plan.degrees[region.name]
            for region in candidate.regions:
                for node in region.calls:
                    for operand in node.all_input_nodes:
                        parameter = program.captured.parameters.get(operand.name)
                        if parameter in by_parameter:
                            return by_parameter[parameter]
    return 1
