"""Two graphs in step: a call of one is the next call of the other, on the same operands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from autoshard.errors import UnsoundGraphError
from autoshard.proof.arguments import same


def proven_call(
    node: fx.Node, env: Mapping[Any, Any], expected: Iterator[fx.Node], among: str
) -> fx.Node:
    """The next expected call, which `node` is.

    Args:
        env: node -> the node of the other graph that it is.
        among: what the node stands among, for the error.

    Raises:
        UnsoundGraphError: it is another operator, has other operands, or none was expected.
    """
    proven = next(expected, None)
    given = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    if (
        proven is None
        or (node.op, node.target) != (proven.op, proven.target)
        or not same(given, (proven.args, proven.kwargs))
    ):
        raise UnsoundGraphError(f"{node} among {among} is not the proven {proven}")
    return proven
