"""With any one collective taken out of the graph, the comparison must fail."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from autoshard import ops, shares
from autoshard.capture import skeleton
from autoshard.exactly import edit_exactly
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.plans import Plan
from autoshard.sharded import Sharded
from autoshard.verification import Report, boundary_inputs, compare, perturbed
from tests.models import huggingface

COLLECTIVES = (ops.copy, ops.reduce, ops.leave, ops.gather, ops.scatter)

# gather and scatter change the shape; what they are given stands in for what they give.
RESHAPING = (ops.gather, ops.scatter)

SUBJECTS = [("gpt2", 2), ("llama-kv2", 4), ("t5", 2), ("bloom", 4)]
FAST = ("gpt2",)


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


@lru_cache(maxsize=1)
def subject(name: str, tp: int) -> Subject:
    """The case's model, split as far as it goes."""
    case = huggingface.case(name)
    model = perturbed(case.build(case.attention[0]).double(), seed=0)
    inputs = case.inputs(model, batch=2, length=6)
    program = analyse(skeleton(model), (), inputs, tp, edit=edit_exactly(torch.float64))
    plan, sharded = rewrite(program, tp, "max")
    _, inputs = boundary_inputs(program, tp, (), inputs)
    return Subject(model, program, plan, sharded, inputs)


def collectives(graph: fx.Graph) -> list[fx.Node]:
    """The graph's collectives, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in COLLECTIVES]


def without(graph: fx.Graph, index: int) -> tuple[fx.Graph, str]:
    """A copy of the graph in which one collective is the identity, and that one's name."""
    made = copy_of(graph)
    node = collectives(made)[index]
    node.replace_all_uses_with(node.args[0])
    name = f"{node.target.__name__} {node.name}"  # type: ignore[union-attr]
    made.erase_node(node)
    return made, name


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A graph of its own, with the same nodes."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def noticed(subject: Subject, graph: fx.Graph) -> bool:
    """Whether the comparison fails, or cannot even be made."""
    try:
        return not subject.compare(graph).ok
    except (RuntimeError, IndexError, ValueError):
        return True
