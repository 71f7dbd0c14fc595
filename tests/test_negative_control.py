"""With any one collective taken out of the graph, the comparison must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autoshard import ops
from autoshard.capture import skeleton
from autoshard.exactly import edit_exactly
from autoshard.groups import Group, ReduceOp
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.plans import Plan
from autoshard.sharded import Sharded
from autoshard.simulate import ThreadGroup
from autoshard.verification import Report, boundary_inputs, compare, perturbed
from tests.models import huggingface

SUBJECTS = [
    ("gpt2", 2),
    pytest.param("llama-kv2", 4, marks=pytest.mark.slow),
    pytest.param("t5", 2, marks=pytest.mark.slow),
    pytest.param("bloom", 4, marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Subject:
    """A model and its rewritten graph."""

    model: nn.Module
    program: Program
    plan: Plan
    sharded: Sharded
    inputs: dict[str, Any]

    def compare(self, graph: fx.Graph) -> Report:
        """The comparison that ``verify`` makes, with this graph on the ranks."""
        sharded = replace(self.sharded, graph=graph)
        return compare(self.model, self.program, sharded, self.plan, (), self.inputs)


@cache
def subject(name: str, tp: int) -> Subject:
    """The case's model, split as far as it goes."""
    case = huggingface.case(name)
    model = perturbed(case.build(case.attention[0]).double(), seed=0)
    inputs = case.inputs(model, batch=2, length=6)
    program = analyse(skeleton(model), (), inputs, tp, edit=edit_exactly(torch.float64))
    plan, sharded = rewrite(program, tp, "max")
    _, inputs = boundary_inputs(program, tp, (), inputs)
    return Subject(model, program, plan, sharded, inputs)


class Silent:
    """A group that exchanges nothing: each rank has only what it brings itself."""

    def __init__(self, group: Group) -> None:
        self.degree, self.coordinate, self.stream = group.degree, group.coordinate, group.stream

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """The tensor itself."""
        return x.clone()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The own tensor in every place."""
        return [x] * self.degree


def identity(x: Tensor, *args: Any) -> Tensor:
    """What the collective is given."""
    return x


def silent_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """The own share in the place of every share."""
    return ops.gather(x, dim, Silent(group))


def silent_cross_entropy(*args: Any) -> Tensor:
    """The loss over the own classes alone."""
    silent: list[Any] = [Silent(a) if isinstance(a, ThreadGroup) else a for a in args]
    return ops.vocab_cross_entropy(*silent)


SILENT: dict[Any, Callable[..., Tensor]] = {
    ops.copy: identity,
    ops.reduce: identity,
    ops.leave: identity,
    ops.gather: silent_gather,
    ops.vocab_cross_entropy: silent_cross_entropy,
}


def collectives(graph: fx.Graph) -> list[fx.Node]:
    """The graph's collectives, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in SILENT]


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A graph of its own, with the same nodes."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def without(graph: fx.Graph, index: int) -> tuple[fx.Graph, str]:
    """A copy of the graph in which one collective is silent, and the name of that one."""
    made = copy_of(graph)
    node = collectives(made)[index]
    name = f"{node.target.__name__} at {node.name}"  # type: ignore[union-attr]
    node.target = SILENT[node.target]
    return made, name


@pytest.mark.parametrize(("name", "tp"), SUBJECTS)
def test_every_collective_is_needed(name: str, tp: int) -> None:
    """Each one in turn made silent: outputs or gradients come out wrong."""
    tried = subject(name, tp)
    graph = tried.sharded.graph
    kinds = {node.target for node in collectives(graph)}
    assert {ops.copy, ops.reduce, ops.vocab_cross_entropy} <= kinds
    unnoticed = []
    for index in range(len(collectives(graph))):
        made, removed = without(graph, index)
        if tried.compare(made).max_relative_error < 1e-6:
            unnoticed.append(removed)
    assert not unnoticed, f"nothing changes without {unnoticed}"


@pytest.mark.parametrize(("name", "tp"), SUBJECTS)
def test_nothing_else_communicates(name: str, tp: int) -> None:
    """What is made silent are all the collectives that the graph has."""
    functions = {f for f in vars(ops).values() if callable(f)}
    graph = subject(name, tp).sharded.graph
    called = {n.target for n in graph.nodes if n.op == "call_function"} & functions
    assert called - set(SILENT) <= {ops.vocab_embedding, ops.with_stream}


@pytest.mark.parametrize(("name", "tp"), SUBJECTS)
def test_untouched_graph_passes(name: str, tp: int) -> None:
    """The copy that the control works on is the right one."""
    tried = subject(name, tp)
    report = tried.compare(copy_of(tried.sharded.graph))
    assert report.ok, report


def test_missing_copy_leaves_outputs_right() -> None:
    """Only the comparison of gradients notices it: outputs alone would not do."""
    tried = subject("gpt2", 2)
    graph = tried.sharded.graph
    index = next(i for i, n in enumerate(collectives(graph)) if n.target is ops.copy)
    report = tried.compare(without(graph, index)[0])
    assert max(report.outputs.values()) < 1e-10 and not report.ok
    assert max(report.gradients.values()) > 1e-3
