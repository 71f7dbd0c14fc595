"""A rank's graph as a module that can be called, and a rank's share of the parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autoshard import layouts
from autoshard.bindings import bind
from autoshard.capture import Captured
from autoshard.failures import know
from autoshard.groups import Group
from autoshard.parts import groups_drawn
from autoshard.sharded import Sharded

_CODEGEN = threading.Lock()


def rank_module(sharded: Sharded, group: Callable[[int], Group], flat: bool = False) -> fx.GraphModule:
    """The graph with its groups bound: a GraphModule over placeholder values, in order.

    flat: nothing is computed again; every node stands in the one graph.
    """
    nested = None if flat else sharded.nested
    if nested is None:
        return _bound(sharded.graph, {}, group)
    return _bound(nested.graph, nested.bodies, group)


def layered_module(sharded: Sharded, group: Callable[[int], Group]) -> fx.GraphModule:
    """What runs, with its groups bound: over the values of `layered_sources`."""
    runs = sharded.fused or sharded.unfused
    with _CODEGEN:
        graph, bodies = bind(runs.graph), {n: bind(body) for n, body in runs.bodies.items()}
    return _bound(graph, bodies, group)


def _bound(
    graph: fx.Graph, bodies: Mapping[str, fx.Graph], group: Callable[[int], Group]
) -> fx.GraphModule:
    with _CODEGEN:  # naming nodes is not safe among threads
        attributes: dict[str, Any] = {
            name: fx.GraphModule({}, body, class_name="PartOfRankGraph")
            for name, body in bodies.items()
        }
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) not in attributes:
                attributes[str(node.target)] = group(int(str(node.target)[2:]))
        module = fx.GraphModule(attributes, graph, class_name="RankGraph")
    for name in bodies:
        know(getattr(module, name))
    know(module)
    return module


def place_on(sharded: Sharded, device: torch.device) -> None:
    """Devices that the capture wrote into the graphs become the rank's."""
    for node in (n for graph in sharded.graphs for n in graph.nodes):
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map_only(
                torch.device, lambda _: device, (tuple(node.args), dict(node.kwargs))
            )


def local_share(whole: Tensor, stored: tuple[int, layouts.Layout, int], coordinate: int) -> Tensor:
    """The part of a whole parameter that a rank stores."""
    dim, layout, _ = stored
    return layouts.local_part(whole, dim, layout, coordinate)


def whole_tensor(shares: list[Tensor], stored: tuple[int, layouts.Layout, int]) -> Tensor:
    """The whole tensor, in the model's order, from the shares of the ranks of a group."""
    dim, layout, degree = stored
    return layouts.whole(torch.cat(shares, dim), dim, layout, degree)


@dataclass(frozen=True)
class Source:
    """Where a placeholder's value comes from: parameter, buffer or layer by name, input by index."""

    kind: Literal["parameter", "buffer", "constant", "input", "layer"]
    name: str
    index: int = 0


def layered_sources(sharded: Sharded, captured: Captured) -> tuple[Source, ...]:
    """What `layered_module` is called with, in order."""
    if sharded.layered is None:
        return _sources(sharded.runs, captured, {})
    return _sources(sharded.layered.graph, captured, sharded.layered.layers)


def _sources(graph: fx.Graph, captured: Captured, layers: Mapping[str, str]) -> tuple[Source, ...]:
    found = []
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        name = str(node.target)  # the name may differ: "input" is a Python builtin
        if node.name in layers:
            found.append(Source("layer", layers[node.name]))
        elif name in captured.parameters:
            found.append(Source("parameter", captured.parameters[name]))
        elif name in captured.buffers:
            found.append(Source("buffer", captured.buffers[name]))
        elif name in captured.constants:
            found.append(Source("constant", name))
        else:
            found.append(Source("input", name, captured.inputs.index(name)))
    return tuple(found)


def random_groups(sharded: Sharded) -> tuple[int, ...]:
    """Degrees of the groups whose random numbers the graph draws."""
    return tuple(int(str(group.target)[2:]) for group in groups_drawn(sharded.graph.nodes))


def values_of(
    sources: Iterable[Source],
    captured: Captured,
    parameters: Mapping[str, Tensor],
    held: Callable[[str], Any],
    inputs: Sequence[Any],
) -> list[Any]:
    """What a graph is called with, in order. held: gives buffers and layers by name."""
    assert len(inputs) == len(captured.inputs)
    values: list[Any] = []
    for source in sources:
        if source.kind == "parameter":
            values.append(parameters[source.name])
        elif source.kind == "input":
            values.append(inputs[source.index])
        elif source.kind == "constant":
            values.append(captured.constants[source.name])
        else:
            values.append(held(source.name))
    return values


def placeholder_values(
    sharded: Sharded,
    captured: Captured,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: list[Any],
) -> list[Any]:
    """What the rank's graph is called with: parameters and buffers by name, inputs in order."""
    found = _sources(sharded.graph, captured, {})
    return values_of(found, captured, parameters, buffers.__getitem__, inputs)
