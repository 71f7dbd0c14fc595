"""A rank's graph as a module that can be called, and a rank's share of the parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autoshard import layouts, ops
from autoshard.bindings import bind
from autoshard.capture import Captured
from autoshard.failures import know
from autoshard.groups import Group
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
    """What runs, with its groups bound: over the values of `sources`."""
    runs = sharded.fused or sharded.unfused
    return _bound(bind(runs.graph), {n: bind(body) for n, body in runs.bodies.items()}, group)


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


def sources(sharded: Sharded, captured: Captured) -> tuple[Source, ...]:
    """What the graph of layers is called with (the graph itself, where there are none), in order."""
    layers = {} if sharded.layered is None else sharded.layered.layers
    graph = sharded.runs if sharded.layered is None else sharded.layered.graph
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
    groups: list[Any] = [n.args[0] for n in sharded.graph.nodes if n.target is ops.with_stream]
    groups += [n.args[1] for n in sharded.graph.nodes if n.target is ops.with_autocast and n.args[1]]
    return tuple(dict.fromkeys(int(str(group.target)[2:]) for group in groups))


def placeholder_values(
    sharded: Sharded,
    captured: Captured,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: list[Any],
) -> list[Any]:
    """What the rank's graph is called with: parameters and buffers by name, inputs in order."""
    given = dict(zip(captured.inputs, inputs, strict=True))
    values = []
    for node in sharded.graph.nodes:
        if node.op != "placeholder":
            break
        name = str(node.target)  # the name may differ: "input" is a Python builtin
        if name in captured.parameters:
            values.append(parameters[captured.parameters[name]])
        elif name in captured.buffers:
            values.append(buffers[captured.buffers[name]])
        elif name in captured.constants:
            values.append(captured.constants[name])
        else:
            values.append(given[name])
    return values
