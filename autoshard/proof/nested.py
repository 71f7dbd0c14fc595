"""A graph with parts that are computed again is the proven one: the parts put back, node for node.

Nothing is known here of how parts are chosen. What is asked is that the calls in their order are those
of the proven graph, on the same operands, and that a part computed a second time computes the same:
its random numbers come from streams that are set back, nothing that it reads is overwritten, and it
writes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from autoshard import ops
from autoshard.errors import UnsoundGraphError
from autoshard.memory import Overwritten
from autoshard.proof.arguments import writes
from autoshard.proof.steps import proven_call
from autoshard.sharded import Nested

DRAWN: dict[Any, int] = {ops.with_stream: 0, ops.with_autocast: 1}  # which argument is the group


def same_as_flat(nested: Nested, flat: fx.Graph) -> None:
    """Raises UnsoundGraphError at the first call that is another one than in the flat graph."""
    _Comparison(nested, flat).run()


class _Comparison:
    def __init__(self, nested: Nested, flat: fx.Graph) -> None:
        self.nested = nested
        self.expected: Iterator[fx.Node] = iter(flat.nodes)
        self.overwritten = Overwritten(flat)
        self.reduced_in_place = {
            n.args[0] for n in flat.nodes if n.target is ops.reduce and n.args[2:] == (True,)
        }

    def run(self) -> None:
        """Both graphs in step; a part is walked where it is called."""
        env: dict[Any, Any] = {}  # -> the flat graph's node, or a part's results
        for node in self.nested.graph.nodes:
            if node.op == "get_attr" and node.target in self.nested.bodies:
                continue
            if node.target is ops.checkpointed:
                env[node] = self._part(node, env)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), list):
                source, place = node.args
                env[node] = env[source][place]
            else:
                env[node] = self._step(node, env)
        if next(self.expected, None) is not None:
            raise UnsoundGraphError(
                "the graph with parts computed again is shorter than the proven one"
            )

    def _step(self, node: fx.Node, env: dict[Any, Any]) -> fx.Node:
        return proven_call(node, env, self.expected, "parts computed again")

    def _part(self, call: fx.Node, env: dict[Any, Any]) -> list[Any]:
        arguments: Any = call.args
        attribute, streams, *operands = arguments
        body = self.nested.bodies[str(attribute.target)]
        placeholders = [n for n in body.nodes if n.op == "placeholder"]
        if len(placeholders) != len(operands):
            raise UnsoundGraphError(f"{call} has {len(operands)} operands for {len(placeholders)}")
        inner = {p: env[o] for p, o in zip(placeholders, operands, strict=True)}
        for operand in inner.values():
            if operand in self.reduced_in_place:
                raise UnsoundGraphError(f"{call} reads {operand}, of which a sum takes the memory")
        set_back = {env[s] for s in streams}
        for node in body.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results: Any = node.args[0]
                return [inner[r] for r in results]
            proven = inner[node] = self._step(node, inner)
            drawn = DRAWN.get(proven.target)
            if drawn is not None and proven.args[drawn] not in {None, *set_back}:
                raise UnsoundGraphError(f"{call} draws from a stream that is not set back ({node})")
            if writes(proven) or self.overwritten.reads(proven):
                raise UnsoundGraphError(f"{call} runs again with what is overwritten ({node})")
        raise UnsoundGraphError(f"{call} gives nothing")
