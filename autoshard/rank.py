"""A rank's graph as a module that can be called, and a rank's share of the parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autoshard import layouts
from autoshard.capture import Captured
from autoshard.failures import know
from autoshard.groups import Group
from autoshard.sharded import Sharded

_CODEGEN = threading.Lock()


def rank_module(sharded: Sharded, group: Callable[[int], Group], flat: bool = False) -> fx.GraphModule:
    """The graph with its groups bound: a GraphModule over placeholder values, in order.

    flat: nothing is computed again; every node stands in the one graph.
    """
    graph = sharded.graph if flat else sharded.runs
    bodies = {} if flat or sharded.nested is None else sharded.nested.bodies
    with _CODEGEN:  # naming nodes is not safe among threads
        attributes: dict[str, Any] = {
            name: fx.GraphModule({}, body, class_name="CheckpointedGraph")
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
    nested = sharded.nested
    inner = () if nested is None else (nested.graph, *nested.bodies.values())
    for node in (n for graph in (sharded.graph, *inner) for n in graph.nodes):
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
