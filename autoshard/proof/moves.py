"""Operators that only move elements: what the rank's call moves, beside what the model's call moves.

Each call is described twice, with the model's sizes and arguments and with a rank's, by the same few
lines per operator: which elements of which operand's dimension stand in each dimension of the result.
Applied to what the rank holds, both must name the same elements; so a bound that is off by one, or two
segments in the wrong order, name others and are seen.
"""

from __future__ import annotations

import math
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
    classes_of,
    divided,
    held_by,
    joint,
    local_size,
    merged,
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
    ranks = [
        _described(call, tuple(local_size(d, r) for d in dims)) for r, call in enumerate(rank)
    ]
    if any(len(results) != len(whole) for results in ranks):
        raise Unproven(f"gives {len(ranks[0])} results, the model's call {len(whole)}")
    return [
        _result(result, [results[i] for results in ranks], dims) for i, result in enumerate(whole)
    ]


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


def _along(arguments: Arguments, shape: Shape) -> int:
    dim = arguments.get("dim", 0)
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        raise Unproven(f"has no dimension {dim}")
    return dim % len(shape)


def _slice(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    dim = _along(arguments, shape)
    bounds = slice(arguments.get("start"), arguments.get("end"), arguments.get("step", 1))
    result = _all(shape)
    result[dim] = Taken(dim, np.arange(*bounds.indices(shape[dim])))
    return [tuple(result)]


def _split(target: Any, arguments: Arguments, shape: Shape) -> list[Result]:
    dim = _along(arguments, shape)
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
    dim, repeats = _along(arguments, shape), arguments["repeats"]
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
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
}


# -- the same elements in another shape --------------------------------------------------------------


def reshaped(
    whole: Sequence[int], rank: Sequence[Sequence[int]], dims: Sequence[Dim]
) -> tuple[Dim, ...]:
    """What ranks hold of a view of these sizes, whole and on each rank.

    Dimensions are grouped where the products of sizes before and after are equal: within a group the
    elements before are those after, in order, in the model; and on the ranks if their products over
    the group are equal too.
    """
    before = [size_of(d) for d in dims]
    if math.prod(before) != math.prod(whole):
        raise Unproven(f"views {before} as {list(whole)}")
    if any(len(sizes) != len(whole) for sizes in rank):
        raise Unproven(f"views as {list(rank[0])} where the model views as {list(whole)}")
    if all(isinstance(d, int) for d in dims):
        if any(tuple(sizes) != tuple(whole) for sizes in rank):
            raise Unproven(f"views the whole {before} as {list(rank[0])}, not as {list(whole)}")
        return tuple(whole)
    result: list[Dim] = []
    for old, new in _groups(before, whole):
        for r, sizes in enumerate(rank):
            given = math.prod(local_size(dims[i], r) for i in old)
            if given != math.prod(sizes[j] for j in new):
                raise Unproven(
                    f"views {given} elements of rank {r} as {[sizes[j] for j in new]}"
                    f" (in the model {[before[i] for i in old]} as {[whole[j] for j in new]})"
                )
        if not new:
            continue
        product = merged([dims[i] for i in old]) if old else 1
        sizes_of_ranks = [[sizes[j] for j in new] for sizes in rank]
        if len(new) == 1 and isinstance(product, Split):
            result.append(product)
        else:
            result.extend(divided(product, [whole[j] for j in new], sizes_of_ranks))
    return tuple(result)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    if 0 in before:
        raise Unproven("a view of no elements")
    while i < len(before) or j < len(after):
        if i < len(before) and before[i] == 1:
            groups.append(([i], []))
            i += 1
        elif j < len(after) and after[j] == 1:
            groups.append(([], [j]))
            j += 1
        else:
            old, new = [i], [j]
            while math.prod(before[k] for k in old) != math.prod(after[k] for k in new):
                if math.prod(before[k] for k in old) < math.prod(after[k] for k in new):
                    old.append(old[-1] + 1)
                else:
                    new.append(new[-1] + 1)
            groups.append((old, new))
            i, j = old[-1] + 1, new[-1] + 1
    return groups


def view_sizes(target: Any, arguments: Arguments, shape: Shape, other: Shape | None) -> list[int]:
    """The sizes that a view asks for, -1 worked out."""
    if other is not None:
        sizes = list(other)
    elif target is aten.flatten.using_ints:
        rank = max(len(shape), 1)
        start, end = arguments["start_dim"] % rank, arguments["end_dim"] % rank
        sizes = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
    elif target is aten.unflatten.int:
        dim = _along(arguments, shape)
        new = _worked_out(list(arguments["sizes"]), shape[dim])
        sizes = [*shape[:dim], *new, *shape[dim + 1 :]]
    else:
        given = arguments["size"] if "size" in arguments else arguments["shape"]
        sizes = _worked_out(list(given), math.prod(shape))
    return sizes


def _worked_out(sizes: list[int], count: int) -> list[int]:
    if sizes.count(-1) == 1:
        rest = math.prod(n for n in sizes if n != -1)
        if not rest or count % rest:
            raise Unproven(f"views {count} elements as {sizes}")
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count or min(sizes, default=0) < 0:
        raise Unproven(f"views {count} elements as {sizes}")
    return sizes


# -- several operands --------------------------------------------------------------------------------


def joined_dims(
    operands: Sequence[Sequence[Dim]], except_for: int, what: str
) -> list[Dim]:
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
    dim = _along(model, tuple(map(size_of, dims)))
    out = joined_dims([dims, source], dim, "writes")
    axis, part = dims[dim], source[dim]
    chosen = _slice(None, model, tuple(map(size_of, dims)))[0][dim].index
    if chosen.size != size_of(part) or classes_of(part).max(initial=-1) + 1 != chosen.size:
        raise Unproven(f"writes {size_of(part)} elements to {chosen.size}")
    for r, arguments in enumerate(rank):
        if _along(arguments, tuple(map(size_of, dims))) != dim:
            raise Unproven("writes along another dimension")
        own = held_by(axis, r)
        here = _slice(None, arguments, tuple(local_size(d, r) for d in dims))[0][dim].index
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
