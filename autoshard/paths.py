"""Paths of modules and parameters: which repeated layer they lie in."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=65536)
def layer_of(path: str) -> str | None:
    """``transformer.h.0`` for ``transformer.h.0.mlp.c_fc``; None outside numbered layers."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return None
