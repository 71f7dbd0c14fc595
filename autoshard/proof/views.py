"""The same elements in another shape: views on a rank beside the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from autoshard.proof.moves import Arguments, Shape, along
from autoshard.proof.placements import Dim, Split, Unproven, divided, local_size, merged, size_of

aten = torch.ops.aten


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
        dim = along(arguments, shape)
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
