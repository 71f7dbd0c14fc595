"""Collectives and local parts: what each makes of what ranks hold, and of its gradient.

==================== ============================== ===============================================
call                 needs                          gives
==================== ============================== ===============================================
copy                 outside, whole                 inside: its backward sums over the group
reduce               inside, a partial sum, once    outside, whole
leave                inside, whole on every rank    outside: its backward divides by the group
gather               inside, split                  outside: the ranks' elements behind each other
local_part, own_rows inside (or no gradient)        inside: those of its elements, by position
pad_to               inside                         inside, with padding behind
weighed              inside                         inside, each element times ranks / holders
in_order, unpad      outside, gathered              outside: those of its elements, by position
joined               outside, gathered              outside, whole
vocab_embedding      a table of consecutive rows    inside: a partial sum
vocab_cross_entropy  logits of consecutive classes  outside: the loss
==================== ============================== ===============================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from autoshard import ops, shares
from autoshard.proof.cuts import layout_of, layout_positions
from autoshard.proof.held import OUTSIDE, Held
from autoshard.proof.placements import (
    LARGEST,
    Array,
    Dim,
    Split,
    Unproven,
    classes_of,
    held_by,
    local_size,
    placed,
    size_of,
    taken,
)

Arguments = Mapping[str, Any]


def _needs(condition: bool, needed: str) -> None:
    if not condition:
        raise Unproven(f"needs {needed}")


def _inside(x: Held, group: int) -> None:
    _needs(x.inside == group, f"a value inside a group of {group}")


def _dim(x: Held, dim: Any) -> int:
    _needs(isinstance(dim, int) and -len(x.dims) <= dim < len(x.dims), f"a dimension {dim}")
    return int(dim % len(x.dims))


def _with(x: Held, dim: int, new: Dim, inside: int) -> Held:
    return replace(x, dims=(*x.dims[:dim], new, *x.dims[dim + 1 :]), inside=inside)


def _chosen(x: Held, dim: int, positions: list[Array], inside: int) -> Held:
    """Each rank's elements at these positions of what it holds."""
    old = x.dims[dim]
    for rank, index in enumerate(positions):
        bound = local_size(old, rank)
        _needs(index.max(initial=-1) < bound, f"positions below {bound} on rank {rank}")
    return _with(x, dim, taken(old, np.arange(size_of(old)), positions), inside)


def copy(x: Held, group: int) -> Held:
    """Identity; its gradient is summed over the group."""
    _needs(x.is_plain and x.inside == OUTSIDE and not x.is_split, "a whole value outside of all groups")
    return replace(x, inside=group)


def reduce(x: Held, group: int, inplace: bool) -> Held:
    """A sum over the group; its gradient is every rank's own."""
    _inside(x, group)
    _needs(x.times is not None, "a partial sum")
    _needs(abs((x.times or 0) - 1) < 1e-9, "a partial sum that ranks together add once")
    return replace(x, inside=OUTSIDE, times=None)


def leave(x: Held, group: int) -> Held:
    """Identity; its gradient is divided among the group."""
    _inside(x, group)
    _needs(x.is_plain and not x.is_split, "a value that every rank holds whole")
    return replace(x, inside=OUTSIDE)


def gather(x: Held, dim: int, group: int) -> Held:
    """The ranks' elements behind each other; each rank's gradient is that of its own."""
    _inside(x, group)
    if x.stacked:
        ready = x.stacked == 1 and replace(x, stacked=0).is_plain
        _needs(dim == 0 and ready, "shares that are stacked")
        sizes = {tuple(local_size(d, r) for d in x.dims) for r in range(group)}
        _needs(len(sizes) == 1, "shares of one size")
        return replace(x, stacked=group, inside=OUTSIDE)
    _needs(x.is_plain, "a finished value")
    dim = _dim(x, dim)
    others = [d for i, d in enumerate(x.dims) if i != dim]
    _needs(not any(isinstance(d, Split) for d in others), f"a value split along dimension {dim} alone")
    held = [held_by(x.dims[dim], r) for r in range(group)]
    _needs(len({h.size for h in held}) == 1, "shares of one size")
    old = x.dims[dim]
    return _with(x, dim, placed(size_of(old), [np.concatenate(held)], classes_of(old)), OUTSIDE)


def local_part(x: Held, dim: int, layout: str, group: int) -> Held:
    """Those of a rank's elements that a layout gives it."""
    _needs(x.is_plain, "a finished value")
    if x.inside == OUTSIDE:
        _needs(not x.is_split, "a whole value")
        _needs(not x.gradient, "a copy before it: its gradient must be summed over the group")
    else:
        _inside(x, group)
    dim = _dim(x, dim)
    parts = [layout_positions(layout_of(layout), local_size(x.dims[dim], r), r) for r in range(group)]
    return _chosen(x, dim, parts, group)


def own_rows(x: Held, dim: int, group: int, rows: int, size: int) -> Held:
    """The share without its padding."""
    _inside(x, group)
    _needs(x.is_plain, "a finished value")
    kept = [np.arange(max(0, min(rows, size - r * rows))) for r in range(group)]
    return _chosen(x, _dim(x, dim), kept, group)


def pad_to(x: Held, dim: int, size: int) -> Held:
    """Padding behind what a rank holds; no gradient comes from it."""
    _needs(x.is_plain and x.inside != OUTSIDE, "a finished value inside a group")
    dim = _dim(x, dim)
    old = x.dims[dim]
    if isinstance(old, int):
        _needs(size == old, f"no padding, or a value split along dimension {dim}")
        return x
    _needs(all(size >= h.size for h in old.held), f"no more than {size} elements on each rank")
    held = [np.concatenate([h, np.full(size - h.size, -1)]) for h in old.held]
    return _with(x, dim, placed(old.size, held, old.classes), x.inside)


def weighed(x: Held, dim: int, layout: str, group: int) -> Held:
    """Each element times the number of ranks over that of those that hold it."""
    _inside(x, group)
    _needs(x.is_plain, "a finished value")
    _needs(isinstance(dim, int) and 0 <= dim < len(x.dims), f"a dimension {dim}")
    tree = layout_of(layout)
    parts = [layout_positions(tree, size_of(x.dims[dim]), r) for r in range(group)]
    holders = Counter(int(i) for part in parts for i in part)
    factors = tuple(np.array([group / holders[int(i)] for i in part]) for part in parts)
    for rank, own in enumerate(factors):
        here = local_size(x.dims[dim], rank)
        _needs(own.size == here, f"factors for {here} elements on rank {rank}")
    return replace(x, weighed=(dim, factors))


def _gathered(x: Held) -> None:
    _needs(x.inside == OUTSIDE and x.is_plain, "a gathered value")


def in_order(x: Held, dim: int, layout: str, degree: int) -> Held:
    """Of shares behind each other, the first of each element, in the order of elements."""
    _gathered(x)
    dim = _dim(x, dim)
    size = size_of(x.dims[dim])
    parts = [layout_positions(layout_of(layout), size, r) for r in range(degree)]
    behind = np.concatenate(parts)
    _needs(behind.size == local_size(x.dims[dim], 0), f"shares of {behind.size} elements")
    elements, first = np.unique(behind, return_index=True)
    _needs(elements.size == size, "a layout that leaves no element out")
    return _chosen(x, dim, [first], OUTSIDE)


def unpad(x: Held, dim: int, padded: int, rows: int, size: int) -> Held:
    """Shares behind each other without the padding of each."""
    _gathered(x)
    dim = _dim(x, dim)
    kept = np.arange(local_size(x.dims[dim], 0))
    if padded != rows:
        _needs(0 < rows < padded and kept.size % padded == 0, f"shares of {padded} elements or more")
        kept = kept.reshape(-1, padded)[:, :rows].ravel()
    _needs(kept.size >= size, f"at least {size} elements")
    return _chosen(x, dim, [kept[:size]], OUTSIDE)


def joined(x: Held, dims: tuple[int, ...], texts: tuple[str, ...], degree: int) -> Held:
    """The whole of a tensor that was cut along several dimensions, from the stacked shares."""
    _needs(x.stacked == degree and x.inside == OUTSIDE, f"the stacked shares of {degree} ranks")
    split = [i for i, d in enumerate(x.dims) if isinstance(d, Split)]
    _needs(split == list(dims), f"shares that are cut along {list(dims)}")
    sizes = [size_of(x.dims[d]) for d in dims]
    _needs(int(np.prod(sizes)) <= LARGEST, "fewer elements")
    found = np.zeros(sizes, bool)
    for rank in range(degree):
        places = [
            layout_positions(layout_of(text), size, rank)
            for text, size in zip(texts, sizes, strict=True)
        ]
        for dim, place in zip(dims, places, strict=True):
            old = x.dims[dim]
            same = isinstance(old, Split) and old.classes is None
            same = same and np.array_equal(held_by(old, rank), place)
            _needs(same, f"what the layout says along dimension {dim}")
        found[np.ix_(*places)] = True
    _needs(bool(found.all()), "shares that leave no element out")
    return replace(x, dims=tuple(map(size_of, x.dims)), stacked=0)


def consecutive(x: Held, dim: int, group: int, total: int, rows: int) -> None:
    """Rank r's first elements must be r·rows, r·rows + 1, ... below (r + 1)·rows and the total."""
    _inside(x, group)
    _needs(x.is_plain, "a finished value")
    size = size_of(x.dims[dim])
    _needs(size == total, f"the true size {size}, not {total}")
    _needs(rows * group >= total, f"at least {total} rows, {group} times {rows} are fewer")
    for rank in range(group):
        wanted = np.arange(rank * rows, max(rank * rows, min((rank + 1) * rows, total)))
        old = x.dims[dim]
        held = held_by(old, rank)
        _needs(isinstance(old, int) or old.classes is None, "rows that are all different")
        if not np.array_equal(held[: wanted.size], wanted):
            raise Unproven(
                f"needs rows {rank * rows}..{(rank + 1) * rows - 1} of {total} on rank {rank}, which "
                f"holds {x.dims[dim]}"
            )
    others = [d for i, d in enumerate(x.dims) if i != dim]
    _needs(not any(isinstance(d, Split) for d in others), "its other dimensions whole")


def embedded(arguments: Arguments, model: fx.Node, said: Arguments) -> Held:
    """``vocab_embedding``: rows that other ranks hold are zero, so the ranks' sum is the lookup."""
    weight, ids = arguments["weight"], arguments["ids"]
    group = arguments["group"]
    _needs(weight.of is said["weight"], f"the rows of {said['weight']}, has those of {weight.of}")
    _needs(ids.of is said["indices"], f"the ids {said['indices']}, has {ids.of}")
    _needs(not ids.is_split and ids.is_plain, "whole ids")
    _needs(ids.inside in (OUTSIDE, group), f"ids outside, or inside a group of {group}")
    _same(arguments, said, "padding_idx")
    _needs(not said["scale_grad_by_freq"] and not said["sparse"], "a plain lookup")
    consecutive(weight, 0, group, arguments["vocab"], arguments["rows"])
    dims = (*ids.dims, *weight.dims[1:])
    return Held(model, dims, group, weight.gradient, times=1.0)


def loss(arguments: Arguments, model: fx.Node, said: Arguments) -> Held:
    """``vocab_cross_entropy``: the whole logits' loss; its gradient is that of the own classes."""
    logits, target, group = arguments["logits"], arguments["target"], arguments["group"]
    _needs(logits.of is said["self"], f"the logits {said['self']}, has {logits.of}")
    for name, value in (("target", target), ("weight", arguments["weight"])):
        of = value.of if isinstance(value, Held) else value
        _needs(of is said[name], f"the {name} {said[name]}, has {of}")
        if isinstance(value, Held):
            whole = value.is_plain and not value.is_split and value.inside == OUTSIDE
            _needs(whole and not value.gradient, f"a whole {name} without gradient")
    for name in ("reduction", "ignore_index", "label_smoothing"):
        _same(arguments, said, name)
    wanted = 1 if len(logits.dims) > 1 else 0
    _needs(arguments["class_dim"] == wanted, f"classes in dimension {wanted}")
    result = model.meta["val"].dtype
    _needs(logits.cast in (None, result), f"logits cast to {result}")
    whole = replace(logits, cast=None)
    consecutive(whole, wanted, group, arguments["vocab"], arguments["rows"])
    return Held(model, (), OUTSIDE, logits.gradient)


def _same(arguments: Arguments, said: Arguments, name: str) -> None:
    _needs(arguments[name] == said[name], f"{name} {said[name]} as in the model, has {arguments[name]}")


SIMPLE: dict[Any, Callable[..., Held]] = {
    ops.copy: copy,
    ops.reduce: reduce,
    ops.leave: leave,
    ops.gather: gather,
    shares.local_part: local_part,
    shares.own_rows: own_rows,
    shares.pad_to: pad_to,
    shares.weighed: weighed,
    shares.in_order: in_order,
    shares.unpad: unpad,
    shares.joined: joined,
}

LOOKUPS: dict[Any, tuple[Any, Callable[[Arguments, fx.Node, Arguments], Held]]] = {
    ops.vocab_embedding: (torch.ops.aten.embedding.default, embedded),
    ops.vocab_cross_entropy: (torch.ops.aten.cross_entropy_loss.default, loss),
}
