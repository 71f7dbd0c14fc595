"""Outline: what each repeated layer of the model computes becomes one call of that layer.

The captured graph is flat. Hooks on a layer, ``fully_shard`` of it and compilation of one layer at a
time need a call of a module that holds the layer's parameters. A layer is the first numbered module on
a path (``transformer.h.0``); its calls are the runs of consecutive nodes that were traced in it. A
parameter that is used in its own layer alone is taken by the layer, every other value is an operand.

Before (layer 0 of GPT-2, at degree 2)::

    layer_norm = aten.layer_norm(dropout, [768], h_0_ln_1_weight, h_0_ln_1_bias)
    ...
    add_7 = aten.add(add_4, dropout_2)
    layer_norm_2 = aten.layer_norm(add_7, [768], h_1_ln_1_weight, h_1_ln_1_bias)

After::

    add_7 = ops.call_layer(transformer_h_0, layer_0, ('ln_1.weight', ...), dropout, expand, tp1, tp2)
    add_14 = ops.call_layer(transformer_h_1, layer_1, ('ln_1.weight', ...), add_7, expand, tp1, tp2)

with the nodes from ``layer_norm`` to ``add_7`` in the graph ``layer_0``. No value changes, nor the
order in which values are computed: ``proof/layered.py`` puts the layers back and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from autoshard import ops
from autoshard.parts import ENTERING, graph_of, operands_of, place_in_model, results_of, unpack
from autoshard.paths import layer_call, layer_of
from autoshard.sharded import Layered, Sharded

OUTSIDE = ("placeholder", "get_attr", "output")


def outline(sharded: Sharded, parameters: Mapping[str, str]) -> Sharded:
    """The rank's graph with its layered form, where the model has numbered layers with parameters.

    Args:
        sharded: the rank's graph; unchanged by this.
        parameters: placeholder -> the parameter's name.
    """
    graph = sharded.runs
    runs = [run for run in _runs(graph) if run.layer is not None]
    owned = _owned(graph, runs, parameters)
    runs = [run for run in runs if any(n in owned for n in run.operands)]
    return replace(sharded, layered=_layered(graph, runs, owned, parameters)) if runs else sharded


@dataclass
class _Run:
    """Consecutive nodes of one call of a layer; None: of no layer."""

    call: tuple[str, ...] | None
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def layer(self) -> str | None:
        return None if self.call is None else self.call[0]

    @property
    def operands(self) -> list[fx.Node]:
        return operands_of(self.nodes)


def _runs(graph: fx.Graph) -> Iterator[_Run]:
    """The graph's calls, cut where another call of a layer begins.

    A node that was traced nowhere, or brings a value into a group, goes with the next layer, if that is
    where it is used first; else it stays with those before it.
    """
    run = _Run(None)
    nodes = [n for n in graph.nodes if n.op not in OUTSIDE]
    order = {node: place for place, node in enumerate(nodes)}
    following: dict[fx.Node, tuple[str, ...] | None] = {}  # the call of the next node that has one
    call = None
    for node in reversed(nodes):
        call = layer_call(node) if _traced(node) else call
        following[node] = call
    for node in nodes:
        call = run.call
        if _traced(node):
            call = layer_call(node)
        elif users := [user for user in node.users if user in order]:
            if following[min(users, key=order.__getitem__)] == following[node]:
                call = following[node]
        if call != run.call:
            yield run
            run = _Run(call)
        run.nodes.append(node)
    yield run


def _traced(node: fx.Node) -> bool:
    return bool(node.meta.get("nn_module_stack")) and node.target not in ENTERING


def _owned(graph: fx.Graph, runs: list[_Run], parameters: Mapping[str, str]) -> dict[fx.Node, str]:
    """Placeholders of parameters that one layer alone uses, and holds: their names in the layer."""
    layer = {node: run.layer for run in runs for node in run.nodes}
    found = {}
    for node in graph.nodes:
        name = parameters.get(node.name) if node.op == "placeholder" else None
        if name is None:
            continue
        own = layer_of(name)
        if own is not None and node.users and {layer.get(user) for user in node.users} == {own}:
            found[node] = name[len(own) + 1 :]
    return found


def _layered(
    graph: fx.Graph, runs: list[_Run], owned: dict[fx.Node, str], parameters: Mapping[str, str]
) -> Layered:
    new, bodies, layers = fx.Graph(), {}, dict[str, str]()
    env: dict[fx.Node, fx.Node] = {}
    modules: dict[str, fx.Node] = {}
    first = {run.nodes[0]: (index, run) for index, run in enumerate(runs)}
    inside = {node for run in runs for node in run.nodes}
    for node in graph.nodes:
        if node.op == "placeholder":
            if node not in owned:
                env[node] = new.node_copy(node)
                env[node].meta = dict(node.meta)
            continue
        if not modules:
            for layer in dict.fromkeys(str(run.layer) for run in runs):
                name = layer.replace(".", "_")  # which has to be one of Python's
                modules[layer] = new.placeholder(name if name.isidentifier() else f"layer_{name}")
                layers[modules[layer].name] = layer
            for attribute in (n for n in graph.nodes if n.op == "get_attr"):  # a layer may use any
                env[attribute] = new.node_copy(attribute)
        if node in first:
            index, run = first[node]
            name = f"layer_{index}"
            own = [n for n in run.operands if n in owned]
            operands = [n for n in run.operands if n not in owned]
            bodies[name] = graph_of(run.nodes, (*own, *operands), alone=True)
            attribute = new.create_node("get_attr", name, name=name)
            names = tuple(owned[n] for n in own)
            given: Any = (modules[str(run.layer)], attribute, names, *(env[n] for n in operands))
            results = results_of(run.nodes)
            call = new.create_node(
                "call_function", ops.call_layer, given, {},
                name=results[0].name if len(results) == 1 else f"{name}_results",
            )  # fmt: skip
            if len(results) == 1:
                env[results[0]] = call
                call.meta = dict(results[0].meta)
            else:
                call.meta = place_in_model(node)
                unpack(call, results, env)
        elif node not in inside and node not in env:
            env[node] = new.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    new.lint()
    taken = {parameters[n.name]: n.name for n in owned}
    return Layered(new, bodies, layers, taken)
