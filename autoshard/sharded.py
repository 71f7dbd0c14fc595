"""The rank's graph, and how its parameters and outputs lie on the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autoshard.layouts import Layout, whole_size


@dataclass(frozen=True)
class SplitOutput:
    """A flat output that leaves a rank as its share: of dimension ``dim``, as ``layout`` says.

    Where several ranks hold an element, the gradients that they are given for it add up to the true
    one.
    """

    dim: int
    layout: Layout
    degree: int

    @property
    def size(self) -> int:
        """Elements of the whole dimension."""
        return whole_size(self.layout)


@dataclass(frozen=True)
class Nested:
    """A graph in which parts are one call each, of ``ops.checkpointed`` with the graph of the part.

    Attributes:
        graph: what is called; the parts are attributes ``checkpoint_0``, ``checkpoint_1``, ...
        bodies: attribute -> the graph of that part, which gives a tuple.
    """

    graph: fx.Graph
    bodies: Mapping[str, fx.Graph]


@dataclass(frozen=True)
class Layered:
    """A graph in which the model's repeated layers are one call each, by ``ops.call_layer``.

    Attributes:
        graph: what is called; the layers' graphs are attributes ``layer_0``, ``layer_1``, ...
        bodies: attribute -> the graph of that call, which begins with the layer's own parameters.
        layers: placeholder -> path of the layer whose module it stands for.
        parameters: name -> placeholder in the flat graph, of those that the layers take themselves.
    """

    graph: fx.Graph
    bodies: Mapping[str, fx.Graph]
    layers: Mapping[str, str]
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Linked:
    """A graph with all the graphs that it calls.

    Attributes:
        graph: of the layers where there are any.
        bodies: attribute -> graph, of layers and of parts that are computed again.
    """

    graph: fx.Graph
    bodies: Mapping[str, fx.Graph]


@dataclass(frozen=True)
class Sharded:
    """The rank's graph.

    Attributes:
        graph: the same on every rank; groups are attributes ``tp<degree>``.
        stored: parameter placeholder -> (dimension, layout, degree) where it is stored split.
        outputs: one entry per flat output, None where it is whole.
        degrees: degrees of the groups that the graph uses.
        nested: the same graph, node for node, with the parts whose activations are computed again as
            graphs of their own; None where there are none.
        layered: the same with every repeated layer as a graph of its own; None where there are none.
        fused: what runs, matmuls and the collectives beside them as one call; None where none are.
    """

    graph: fx.Graph
    stored: Mapping[str, tuple[int, Layout, int]]
    outputs: tuple[SplitOutput | None, ...]
    degrees: tuple[int, ...]
    nested: Nested | None = None
    layered: Layered | None = None
    fused: Linked | None = None

    @property
    def unfused(self) -> Linked:
        """As proven; what runs where nothing is fused."""
        nested = {} if self.nested is None else dict(self.nested.bodies)
        if self.layered is None:
            return Linked(self.runs, nested)
        return Linked(self.layered.graph, {**nested, **self.layered.bodies})

    @property
    def runs(self) -> fx.Graph:
        """The graph without layers, and with nothing fused."""
        return self.graph if self.nested is None else self.nested.graph

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """Every graph that is kept, the flat one first."""
        found = [self.graph]
        for other in (self.nested, self.layered, self.fused):
            if other is not None:
                found += [other.graph, *other.bodies.values()]
        return tuple(found)
