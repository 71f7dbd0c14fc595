"""What the analysis finds out about a graph: facts, no decisions.

Axes        the axes of every weight-dependent value
Candidate   axes that can be split, and the regions of the graph that they run through
Analysis    both, with the graph
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from autoshard.axes import Axis, Size
from autoshard.layouts import Layout
from autoshard.rules import Call
from autoshard.rules.call import Dims

# What every symbolic size counts as when candidates are ranked: traced sizes are tiny.
NOMINAL = 1024
CHECKPOINT = "checkpoint"  # node.meta: which call of torch.utils.checkpoint it was traced in
WHOLE = "whole"  # node.meta in a rank's graph: what the value that it has its share of was traced as
AUTOCAST = "autocast"  # node.meta: device type, dtype, enabled, cache_enabled


@dataclass(eq=False)
class Axes:
    """The result of the walk.

    Attributes:
        calls: each weight-dependent operator and the axes of its operands and results.
        dims: the axes of each weight-dependent tensor (parameters included).
        outputs: the axes of the graph's outputs that depend on parameters.
        parameters: the placeholders of parameters.
        unknown: operators without a rule, with their place.
        differentiable: values that a gradient can flow through.
        inputs: the placeholders of the model's inputs.
        held: inputs that ranks are given their shares of -> (dimension, layout, degree).
    """

    calls: dict[fx.Node, Call] = field(default_factory=dict)
    dims: dict[fx.Node, Dims] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    parameters: list[fx.Node] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    differentiable: set[fx.Node] = field(default_factory=set)
    inputs: frozenset[fx.Node] = frozenset()
    held: dict[fx.Node, tuple[int, Layout, int]] = field(default_factory=dict)


def weights_of(axes: Axes) -> set[fx.Node]:
    """Parameters, and what is computed from parameters alone (a transposed weight)."""
    found = set(axes.parameters)
    for node in axes.calls:
        if all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True, eq=False)
class Split:
    """Axes that are cut together, the first outermost: ``heads``, or ``kv_heads`` and ``group``."""

    atoms: tuple[Axis, ...]
    paddable: bool = False

    def parts(self, degree: int) -> tuple[int, ...] | None:
        """Into how many parts each axis is cut at this degree; None where it does not divide."""
        if self.paddable:
            return (degree,)
        parts, missing = [], degree
        for atom in self.atoms:
            assert isinstance(atom.size, int)
            parts.append(math.gcd(atom.size, missing))
            missing //= parts[-1]
        return tuple(parts) if missing == 1 else None


@dataclass(eq=False)
class Found:
    """A region as found in the graph."""

    name: str
    kind: str
    calls: list[fx.Node]


@dataclass(eq=False)
class Candidate:
    """Axes with one degree: tied by a concatenation or a shared class.

    Attributes:
        splits: the axes; several where they lie behind each other in one dimension.
        regions: the parts of the graph that they run through.
        flops: of the matmuls on them, at the traced sizes.
    """

    splits: list[Split]
    calls: list[fx.Node]
    flops: int
    regions: list[Found] = field(default_factory=list)

    @property
    def atoms(self) -> set[Axis]:
        """All axes of the candidate."""
        return {a for s in self.splits for a in s.atoms}

    def degrees(self, tp: int) -> tuple[int, ...]:
        """The divisors of tp that all axes can take."""
        return tuple(
            d for d in range(1, tp + 1)
            if tp % d == 0 and all(s.parts(d) is not None for s in self.splits)
        )  # fmt: skip


def splittable(candidates: Iterable[Candidate], tp: int) -> set[Axis]:
    """The axes of the candidates that take any degree beside 1."""
    return {atom for c in candidates if c.degrees(tp) != (1,) for atom in c.atoms}


class Hints:
    """Sizes of symbols as they were traced, or a nominal one for all."""

    def __init__(self, graph: fx.Graph, nominal: int | None = None) -> None:
        self.symbols: dict[Any, int] = {}
        self.nominal = nominal
        for node in graph.nodes:
            value = node.meta.get("val")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, torch.Tensor):
                    for size in item.shape:
                        self._learn(size)
        self._known: dict[Size, int] = {}

    def _learn(self, size: Any) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            if size.node.expr not in self.symbols and size.node.has_hint():
                self.symbols[size.node.expr] = self.nominal or size.node.hint

    def __call__(self, size: Size) -> int:
        """The number that a size stands for."""
        if isinstance(size, int):
            return size
        if size not in self._known:
            value = sympy.sympify(size).subs(self.symbols)
            self._known[size] = int(value) if value.is_number else 1
        return self._known[size]

    def numel(self, dims: Iterable[Axis]) -> int:
        """Elements of a tensor with these axes."""
        return math.prod(self(a.find().size) for a in dims)


@dataclass(frozen=True)
class Analysis:
    """A graph and what the passes found out about it."""

    graph: fx.Graph
    axes: Axes
    candidates: tuple[Candidate, ...]
    names: Mapping[str, str]
    """Placeholder of a parameter -> the parameter's name."""
    shapes: Mapping[str, tuple[int, ...]]
    """Name -> shape of all parameters of the model, used or not."""

    @cached_property
    def hints(self) -> Hints:
        """The traced sizes of the graph's symbols."""
        return Hints(self.graph)
