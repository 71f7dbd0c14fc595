"""A graph in which layers are one call each is the one that was proven: the layers put back, in step.

Nothing is known here of how calls are cut. What is asked is that the calls in their order are those of
the graph without layers, on the same operands, and that a layer is given the parameters that it names.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from autoshard import ops
from autoshard.errors import UnsoundGraphError
from autoshard.proof.steps import proven_call
from autoshard.sharded import Layered


def same_as_one(layered: Layered, graph: fx.Graph, parameters: Mapping[str, str]) -> None:
    """Raises UnsoundGraphError at the first call that is another one than in `graph`.

    Args:
        parameters: placeholder of `graph` -> the parameter's name.
    """
    _Comparison(layered, graph, parameters).run()


class _Comparison:
    def __init__(self, layered: Layered, graph: fx.Graph, parameters: Mapping[str, str]) -> None:
        self.layered = layered
        given = [n for n in graph.nodes if n.op == "placeholder"]
        self.placeholders = {n.name: n for n in given}
        self.by_parameter = {parameters[n.name]: n for n in given if n.name in parameters}
        self.attributes = {n.target: n for n in graph.nodes if n.op == "get_attr"}
        elsewhere = ("placeholder", "get_attr")
        self.expected: Iterator[fx.Node] = (n for n in graph.nodes if n.op not in elsewhere)

    def run(self) -> None:
        """Both graphs in step; a layer is walked where it is called."""
        env: dict[Any, Any] = {}  # -> a node of the graph, a layer's path, or a layer's results
        for node in self.layered.graph.nodes:
            if node.op == "placeholder" and node.name in self.layered.layers:
                env[node] = self.layered.layers[node.name]
            elif node.op == "placeholder":
                env[node] = self.placeholders[node.name]
            elif node.op == "get_attr" and node.target in self.layered.bodies:
                continue
            elif node.op == "get_attr":
                env[node] = self.attributes[node.target]
            elif node.target is ops.call_layer:
                env[node] = self._layer(node, env)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):
                source, place = node.args
                env[node] = env[source][place]
            else:
                env[node] = self._step(node, env)
        if next(self.expected, None) is not None:
            raise UnsoundGraphError("the graph of layers is shorter than the proven one")

    def _step(self, node: fx.Node, env: dict[Any, Any]) -> fx.Node:
        return proven_call(node, env, self.expected, "layers")

    def _layer(self, call: fx.Node, env: dict[Any, Any]) -> Any:
        arguments: Any = call.args
        module, attribute, names, *operands = arguments
        body = self.layered.bodies[str(attribute.target)]
        placeholders = [n for n in body.nodes if n.op == "placeholder"]
        own = [self.by_parameter.get(f"{env[module]}.{name}") for name in names]
        if None in own:
            raise UnsoundGraphError(f"{call} asks {env[module]} for {names[own.index(None)]}")
        values = [*own, *(env[o] for o in operands)]
        if len(placeholders) != len(values):
            raise UnsoundGraphError(f"{call} has {len(values)} values for {len(placeholders)}")
        inner: dict[Any, Any] = dict(zip(placeholders, values, strict=True))
        for node in body.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: inner[n])
            if node.op != "placeholder":
                inner[node] = self._step(node, inner)
        raise UnsoundGraphError(f"{call} gives nothing")
