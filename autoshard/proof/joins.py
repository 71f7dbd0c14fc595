"""Several tensors in one: concatenations, and slices written over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoshard.proof.moves import Arguments, along, sliced
from autoshard.proof.placements import (
    Array,
    Dim,
    Split,
    Unproven,
    classes_of,
    held_by,
    joint,
    local_size,
    placed,
    size_of,
)


def joined_dims(operands: Sequence[Sequence[Dim]], except_for: int, what: str) -> list[Dim]:
    """The dimensions in which all operands must lie alike; the one excepted is the first's."""
    result = list(operands[0])
    for other in operands[1:]:
        if len(other) != len(result):
            raise Unproven(f"{what} tensors of different dimensions")
        for i, dim in enumerate(other):
            if i == except_for:
                continue
            both = joint(result[i], dim)
            if both is None:
                raise Unproven(f"{what} in dimension {i} of which ranks hold {result[i]} and {dim}")
            result[i] = both
    return result


def concatenated(operands: Sequence[Sequence[Dim]], dim: int) -> tuple[Dim, ...]:
    """Dimensions behind each other: the elements of each operand, numbered after those before."""
    result = joined_dims(operands, dim, "concatenates")
    parts = [o[dim] for o in operands]
    size = sum(map(size_of, parts))
    splits = [p for p in parts if isinstance(p, Split)]
    if not splits:
        result[dim] = size
        return tuple(result)
    offsets = np.cumsum([0, *(size_of(p) for p in parts[:-1])])

    def behind(arrays: Sequence[Array]) -> Array:
        pairs = zip(arrays, offsets, strict=True)
        return np.concatenate([np.where(a < 0, -1, a + o) for a, o in pairs])

    held = [behind([held_by(p, r) for p in parts]) for r in range(len(splits[0].held))]
    result[dim] = placed(size, held, behind([classes_of(p) for p in parts]))
    return tuple(result)


def overwritten(
    model: Arguments, rank: Sequence[Arguments], dims: Sequence[Dim], source: Sequence[Dim]
) -> tuple[Dim, ...]:
    """``slice_scatter``: on each rank the slice replaced is what it holds of the model's slice."""
    dim = along(model, tuple(map(size_of, dims)))
    out = joined_dims([dims, source], dim, "writes")
    axis, part = dims[dim], source[dim]
    chosen = sliced(None, model, tuple(map(size_of, dims)))[0][dim].index
    if chosen.size != size_of(part) or classes_of(part).max(initial=-1) + 1 != chosen.size:
        raise Unproven(f"writes {size_of(part)} elements to {chosen.size}")
    for r, arguments in enumerate(rank):
        if along(arguments, tuple(map(size_of, dims))) != dim:
            raise Unproven("writes along another dimension")
        own = held_by(axis, r)
        here = sliced(None, arguments, tuple(local_size(d, r) for d in dims))[0][dim].index
        inside = np.zeros(own.size, bool)
        inside[here] = True
        if isinstance(axis, Split) and axis.classes is not None:
            raise Unproven("writes to repeated elements")
        if not np.array_equal(own[here], chosen[held_by(part, r)]):
            raise Unproven(f"rank {r} writes to {own[here]}, it holds of the source {part}")
        if np.isin(own[~inside], chosen).any():
            raise Unproven(f"rank {r} leaves elements that the model writes")
    out[dim] = axis
    return tuple(out)
