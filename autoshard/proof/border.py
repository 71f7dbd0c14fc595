"""Where values enter the graph, meet, are overwritten, and leave it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from autoshard import ops
from autoshard.layouts import Layout
from autoshard.proof.cuts import layout_positions
from autoshard.proof.held import OUTSIDE, Held
from autoshard.proof.placements import Dim, Split, Unproven, held_by, placed
from autoshard.sharded import SplitOutput


def may_meet(operands: Collection[Held], degree: int) -> None:
    """Operands are finished, and those that a gradient can flow to stand on one side."""
    for held in operands:
        if held.inside == OUTSIDE and held.is_split:
            raise Unproven(f"needs {held.of} in the model's order, it is as it was gathered")
        if not replace(held, weighed=None).is_plain:
            finish = "reduce it first" if held.times is not None else "finish it first"
            raise Unproven(f"needs a finished value, has {held}: {finish}")
    for held in operands:
        if held.inside == OUTSIDE and degree != OUTSIDE and held.gradient:
            raise Unproven(
                f"{held.of} is outside and meets a group of {degree} without copy: its gradient would "
                "be one rank's part of the sum; it needs ops.copy"
            )


@lru_cache(maxsize=1024)
def stored(layout: Layout, size: int, degree: int) -> Dim:
    """What ranks hold of a parameter: every element is on exactly one of them."""
    held = [layout_positions(layout, size, r) for r in range(degree)]
    if not np.array_equal(np.sort(np.concatenate(held)), np.arange(size)):
        raise Unproven(f"is stored as {layout}: not every element by exactly one of {degree} ranks")
    return placed(size, held)


@lru_cache(maxsize=1024)
def given(layout: Layout, size: int, degree: int) -> Dim:
    """What ranks hold of an input that the caller gives as shares: every element is on one of them."""
    held = [layout_positions(layout, size, r) for r in range(degree)]
    if not np.array_equal(np.unique(np.concatenate(held)), np.arange(size)):
        raise Unproven(f"is given as {layout}: not every element by one of {degree} ranks")
    return placed(size, held)


def leaves(known: Held, split: SplitOutput | None, place: int) -> None:
    """An output is the whole value outside, or the share that it is declared to be."""
    if not known.is_plain:
        raise Unproven(f"output {place} is {known}")
    if split is None:
        if known.inside != OUTSIDE:
            raise Unproven(f"output {place} is {known}; it needs a gather or leave")
        if known.is_split:
            raise Unproven(f"output {place} is {known}; it needs the model's order")
        return
    if known.inside != split.degree or not 0 <= split.dim < len(known.dims):
        raise Unproven(f"output {place} is {known}, declared split over {split.degree} ranks")
    shares = [layout_positions(split.layout, split.size, r) for r in range(split.degree)]
    if np.unique(np.concatenate(shares)).size != split.size:
        raise Unproven(f"output {place} is declared as {split.layout}: some elements are on no rank")
    dim = known.dims[split.dim]
    others = [d for i, d in enumerate(known.dims) if i != split.dim]
    equal = isinstance(dim, Split) and dim.classes is None and dim.size == split.size
    equal = equal and all(np.array_equal(held_by(dim, r), share) for r, share in enumerate(shares))
    if not equal or not all(isinstance(d, int) for d in others):
        raise Unproven(f"output {place} is {known}, declared {split.layout} in dimension {split.dim}")


def may_be_overwritten(node: Any) -> None:
    """A sum in place overwrites what it is given: nothing else may use it, nor what it is a view of."""
    target = node.target
    if target in (ops.with_stream, ops.with_autocast):
        target = next(a for a in node.args if isinstance(a, torch._ops.OpOverload))
    makes = target is ops.vocab_embedding or (
        isinstance(target, torch._ops.OpOverload)
        and all(r.alias_info is None for r in target._schema.returns)
    )
    if len(node.users) != 1 or not makes:
        raise Unproven(f"overwrites {node}, which something else uses or which is a view")
