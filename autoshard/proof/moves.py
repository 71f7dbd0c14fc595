"""Operators that only move elements: what the rank's call moves, beside what the model's call moves.

Each call is described twice, with the model's sizes and arguments and with a rank's, by the same few
lines per operator: which elements of which operand's dimension stand in each dimension of the result.
Applied to what the rank holds, both must name the same elements; so a bound that is off by one, or two
segments in the wrong order, name others and are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoshard.proof.placements import (
    Array,
    Dim,
    Split,
    Unproven,
    local_size,
    placed,
    size_of,
    taken,
)

aten = torch.ops.aten
Arguments = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Taken:
    """A result's dimension: these elements of one of the operand's; of none where it is new."""

    source: int | None
    index: Array


Result = tuple[Taken, ...]


def moves(target: Any) -> str | None:
    """The family of an operator that only moves elements; members of one family may stand for each
    other, since what each one moves is compared."""
    return next((name for name, members in FAMILIES.items() if target in members), None)


def moved(
    model: tuple[Any, Arguments], rank: Sequence[tuple[Any, Arguments]], dims: Sequence[Dim]
) -> list[tuple[Dim, ...]]:
    """What ranks hold of the results of a move.

    Args:
        model: the model's operator and arguments.
        rank: the same on each rank.
        dims: the operand's dimensions.

    Raises:
        Unproven: the rank's call does not move what the model's moves.
    """
    shape = tuple(map(size_of, dims))
    whole = _described(model, shape)
    ranks = [_described(call, tuple(local_size(d, r) for d in dims)) for r, call in enumerate(rank)]
    if any(len(results) != len(whole) for results in ranks):
        raise Unproven(f"gives {len(ranks[0])} results, the model's call {len(whole)}")
    return [_result(result, [results[i] for results in ranks], dims) for i, result in enumerate(whole)]


def _result(whole: Result, ranks: Sequence[Result], dims: Sequence[Dim]) -> tuple[Dim, ...]:
    for rank, result in enumerate(ranks):
        if [t.source for t in result] != [t.source for t in whole]:
            raise Unproven(f"drops or adds other dimensions on rank {rank} than in the model")
    out: list[Dim] = []
    for place, entry in enumerate(whole):
        local = [result[place].index for result in ranks]
        if entry.source is None:
            out.append(placed(entry.index.size, local, entry.index))
            continue
        dim = dims[entry.source]
        if isinstance(dim, int) and all(np.array_equal(entry.index, i) for i in local):
            out.append(entry.index.size)
            continue
        out.append(taken(dim, entry.index, local))
    gone = set(range(len(dims))) - {t.source for t in whole}
    if any(size_of(dims[i]) != 1 or isinstance(dims[i], Split) for i in gone):
        raise Unproven("drops a dimension of more than one element")
    return tuple(out)


def _described(call: tuple[Any, Arguments], shape: Shape) -> list[Result]:
    target, arguments = call
    return DESCRIPTIONS[moves(target)](target, arguments, shape)


def _all(shape: Shape) -> list[Taken]:
    return [Taken(i, np.arange(n)) for i, n in enumerate(shape)]


def along(arguments: Arguments, shape: Shape) -> int:
    """The dimension that a call is about."""
    dim = arguments.get("dim", 0)
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        raise Unproven(f"has no dimension {dim}")
    return dim % len(shape)


def sliced(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    """``x[..., start:end:step]``."""
    dim = along(arguments, shape)
    bounds = slice(arguments.get("start"), arguments.get("end"), arguments.get("step", 1))
    result = _all(shape)
    result[dim] = Taken(dim, np.arange(*bounds.indices(shape[dim])))
    return [tuple(result)]


def _split(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    dim = along(arguments, shape)
    size = shape[dim]
    if target is aten.chunk.default:
        given: Any = max(1, -(-size // arguments["chunks"]))
    else:
        given = arguments.get("split_sizes", arguments.get("split_size"))
    if isinstance(given, int):
        given = [min(given, size - begin) for begin in range(0, size, given)]
    if sum(given) != size:
        raise Unproven(f"splits {size} elements in {list(given)}")
    results, begin = [], 0
    for count in given:
        result = _all(shape)
        result[dim] = Taken(dim, np.arange(begin, begin + count))
        results.append(tuple(result))
        begin += count
    return results


def _squeeze(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    chosen = arguments.get("dim", range(len(shape)))
    chosen = {d % len(shape) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    return [tuple(t for i, t in enumerate(_all(shape)) if not (i in chosen and shape[i] == 1))]


def _expand(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    sizes = list(arguments["size"])
    new = len(sizes) - len(shape)
    if new < 0:
        raise Unproven(f"expands {list(shape)} to {sizes}")
    result = [Taken(None, np.zeros(n, np.int64)) for n in sizes[:new]]
    for i, (before, after) in enumerate(zip(shape, sizes[new:], strict=True)):
        if after in (-1, before):
            result.append(Taken(i, np.arange(before)))
        elif before == 1:
            result.append(Taken(i, np.zeros(after, np.int64)))
        else:
            raise Unproven(f"expands {list(shape)} to {sizes}")
    return [tuple(result)]


def _repeat(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    times = list(arguments["repeats"])
    new = len(times) - len(shape)
    if new < 0:
        raise Unproven(f"repeats {list(shape)} {times} times")
    result = [Taken(None, np.zeros(n, np.int64)) for n in times[:new]]
    old = zip(shape, times[new:], strict=True)
    result += [Taken(i, np.tile(np.arange(n), t)) for i, (n, t) in enumerate(old)]
    return [tuple(result)]


def _repeat_interleave(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    if arguments.get("dim") is None:
        raise Unproven("repeats the flattened tensor")
    dim, repeats = along(arguments, shape), arguments["repeats"]
    size = arguments.get("output_size")
    if size is not None and size != shape[dim] * repeats:
        raise Unproven(f"repeats {shape[dim]} elements {repeats} times to {size}")
    result = _all(shape)
    result[dim] = Taken(dim, np.repeat(np.arange(shape[dim]), repeats))
    return [tuple(result)]


FAMILIES: dict[str, tuple[Any, ...]] = {
    "slice": (aten.slice.Tensor,),
    "split": (
        aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
    ),
    "squeeze": (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    "expand": (aten.expand.default, aten.broadcast_to.default),
    "repeat": (aten.repeat.default,),
    "repeat_interleave": (aten.repeat_interleave.self_int,),
    "reshape": (
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default,
        aten.reshape_as.default, aten.flatten.using_ints, aten.unflatten.int,
    ),
    "cat": (aten.cat.default, aten.concat.default, aten.concatenate.default),
    "slice_scatter": (aten.slice_scatter.default,),
}  # fmt: skip

DESCRIPTIONS: dict[str | None, Callable[[Any, Arguments, Shape], list[Result]]] = {
    "slice": sliced,
    "split": _split,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
}
