"""Paths of modules and parameters: where a node was traced, in which repeated layer that lies."""

from __future__ import annotations

from functools import lru_cache

from torch import fx


@lru_cache(maxsize=65536)
def layer_of(path: str) -> str | None:
    """``transformer.h.0`` for ``transformer.h.0.mlp.c_fc``; None outside numbered layers."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return None


def module_path(node: fx.Node) -> str:
    """The path of the module in whose ``forward`` the node was traced."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path).partition("@")[0]


def layer_call(node: fx.Node) -> tuple[str, ...] | None:
    """The repeated layer that a node was traced in, and which of the layer's calls; None outside."""
    layer = layer_of(module_path(node))
    if layer is None:
        return None
    calls = node.meta["nn_module_stack"].items()  # the key of a second call ends with @1
    return layer, *(str(key) for key, (path, _) in calls if str(path).partition("@")[0] == layer)
