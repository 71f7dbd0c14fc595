"""Parts of a graph that become one call each: what they take and give, and their own graphs.

Of the nodes of a part, in order, operands are what they use from outside, results what is used outside.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from autoshard import ops, shares

ENTERING = (ops.copy, shares.local_part, shares.pad_to)  # named after what they are made of


def operands_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """In the order of use."""
    own = set(nodes)
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))


def results_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """In the order of the nodes."""
    own = set(nodes)
    return [node for node in nodes if not own.issuperset(node.users)]


def groups_drawn(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The groups from whose streams nodes draw random numbers: attributes ``tp<degree>``, each once."""
    drawn: list[Any] = []
    for node in nodes:
        if node.target is ops.with_stream:
            drawn.append(node.args[0])
        elif node.target is ops.with_autocast and node.args[1] is not None:
            drawn.append(node.args[1])
    return tuple(dict.fromkeys(drawn))


def graph_of(nodes: Sequence[fx.Node], operands: Sequence[fx.Node], alone: bool = False) -> fx.Graph:
    """The part's own graph: operands, in the order that is given, -> a tuple of its results.

    alone: a single result is given as it is.
    """
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for operand in operands:
        env[operand] = graph.create_node("placeholder", operand.name, name=operand.name)
        env[operand].meta = dict(operand.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    results = tuple(env[r] for r in results_of(nodes))
    graph.output(results[0] if alone and len(results) == 1 else results)
    return graph


def place_in_model(node: fx.Node) -> dict[str, Any]:
    """What of a node's ``meta`` says where in the model it was traced."""
    return {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}


def unpack(call: fx.Node, results: Sequence[fx.Node], env: dict[fx.Node, fx.Node]) -> None:
    """Take the results out of the tuple that a call gives, under their own names; noted in `env`."""
    for place, result in enumerate(results):
        env[result] = call.graph.create_node(
            "call_function", operator.getitem, (call, place), {}, name=result.name
        )
        env[result].meta = dict(result.meta)
