"""Which values of a captured graph share memory, and which operators write.

The traced (fake) tensors keep their storages: two values share memory exactly when their traces did.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from autoshard.compat import storage_key
from autoshard.rules.call import op_name

SELF = ("to", "type_as", "contiguous")  # give the very operand where nothing is to be done
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def storage(value: Any) -> int | None:
    """What is equal for values that share memory; None for what is no tensor."""
    traced = value.meta.get("val") if isinstance(value, fx.Node) else None
    return storage_key(traced) if isinstance(traced, Tensor) else None


def written(node: fx.Node) -> fx.Node | None:
    """The operand that an operator writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            return value if isinstance(value, fx.Node) else None
    return None


class Overwritten:
    """Which values of a graph change after a node has read them, so that it must not run again.

    Memory made in the graph changes until its last write; that of buffers and inputs in the next call.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        self._last: dict[int | None, float] = {}
        for node in graph.nodes:
            target = written(node)
            if target is not None:
                self._last[storage(target)] = self._place[node]
        for node in graph.nodes:
            if node.op == "placeholder" and storage(node) in self._last:
                self._last[storage(node)] = math.inf
        self._last.pop(None, None)

    def reads(self, node: fx.Node) -> bool:
        """Whether a value that the node reads or gives is written after it."""
        values = (node, *node.all_input_nodes)
        return any(self._last.get(storage(v), -1) > self._place[node] for v in values)


def is_off(node: fx.Node) -> bool:
    """A dropout that does nothing: it gives its very operand, though its trace is another tensor."""
    return op_name(node) in DROPOUTS and not (node.args[1] and node.args[2])


def very_operand(value: Any) -> Any:
    """The tensor that a value is: ``to`` its own dtype and ``contiguous`` give the very operand."""
    while isinstance(value, fx.Node) and op_name(value) in SELF:
        source = value.args[0]
        if storage(source) is None or storage(source) != storage(value):
            break
        value = source
    return value
