"""Operators that compute: what a rank's call gives, by the operator's row and what it is given.

The row is asked about one call at a time, with axes made for it alone, so nothing that was concluded
elsewhere about the graph is believed. It says which dimensions of operands and results are one axis,
which axes the operator needs whole, and which are summed. Then:

- on each rank, an axis holds the same elements in every operand that has it;
- an axis that is needed whole, or looked up, or that no result has, is whole;
- a result's dimensions hold what their axes hold;
- where a summed axis is not whole, the result is a partial sum: element k is added by every rank that
  holds it. If that is c times for every k, the sum over ranks is c times the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from autoshard.axes import Axis
from autoshard.proof.placements import (
    LARGEST,
    Dim,
    Split,
    Unproven,
    classes_of,
    divided,
    held_by,
    joint,
    local_size,
    merged,
    size_of,
)
from autoshard.rules import Call, rule_for

Slot = tuple[str, int | None]
Factors = tuple[npt.NDArray[np.float64], ...]  # per rank, what each element was multiplied with


@dataclass(frozen=True)
class Given:
    """What is held of one operand: its dimensions, and which of them was weighed, with what."""

    dims: tuple[Dim, ...]
    weighed: tuple[int, Factors] | None = None


@dataclass(frozen=True)
class Computed:
    """What ranks hold of a call's results.

    Attributes:
        outputs: dimensions of each result; None for what is no tensor.
        times: the sum over ranks is this many times the original; None where it is no partial sum.
        sizes: a size that an argument says -> what it must be on each rank.
    """

    outputs: tuple[tuple[Dim, ...] | None, ...]
    times: float | None
    groups: tuple[Dim, ...] = ()


def computed(
    node: fx.Node,
    arguments: Mapping[str, Any],
    operands: Mapping[Slot, Given],
    shape_of: Callable[[torch.Tensor], tuple[int, ...]],
    degree: int,
) -> Computed:
    """What ranks hold of the results of the model's call ``node``, made on what they hold.

    Args:
        arguments: the model's, by name.
        operands: what ranks hold of each tensor.
        shape_of: sizes, with numbers for symbols.
        degree: ranks of the group.

    Raises:
        Unproven: the ranks' results are no placement of the model's.
    """
    rule = rule_for(node.target)
    if rule is None:
        raise Unproven("has no row in the table of operators, so it needs its operands whole")
    call = Call(
        node,
        dict(arguments),
        lambda n: tuple(Axis(size) for size in shape_of(n.meta["val"])),
        shape_of,
    )
    rule.apply(call)
    lent = rule.text == "like_first"  # the operands after the first lend a dtype or a device only
    shares: dict[Axis, Dim] = {}
    weighed: dict[Axis, Factors] = {}
    seen: set[Axis] = set()
    for slot in call.tensors():
        if slot not in operands or (lent and seen):
            continue
        dims, given = call.operand(*slot), operands[slot]
        if len(dims) != len(given.dims):
            raise Unproven(f"{_name(slot)} has {len(given.dims)} dimensions, not {len(dims)}")
        for place, (axis, dim) in enumerate(zip(dims, given.dims, strict=True)):
            atoms = _atoms(axis)
            parts = [dim] if len(atoms) == 1 else divided(dim, [a.size for a in atoms])
            for atom, part in zip(atoms, parts, strict=True):
                _meet(shares, atom, part, f"dimension {place} of {_name(slot)}")
            seen.update(atoms)
            if given.weighed is not None and given.weighed[0] == place:
                if len(atoms) != 1 or atoms[0] in weighed:
                    raise Unproven("a weighed dimension that is no axis of its own")
                weighed[atoms[0]] = given.weighed[1]
    outputs = [None if d is None else [_atoms(a) for a in d] for d in call.outputs]
    in_results = {a for d in outputs if d is not None for atoms in d for a in atoms}
    summed = [a for axis in call.summed for a in _atoms(axis)]
    looked_up = set() if call.lookup is None else set(_atoms(call.lookup))
    for axis, share in shares.items():
        if not isinstance(share, Split):
            continue
        if axis.frozen is not None or axis in looked_up:
            why = axis.frozen or "rows are looked up by their numbers in the whole table"
            raise Unproven(f"needs whole what is held {share}: {why}")
        if axis not in in_results and axis not in summed:
            raise Unproven(f"needs whole what is held {share}, no result has it")
    if any(axis not in summed for axis in weighed):
        raise Unproven("a weighed dimension is not summed over")
    split = [a for a in summed if isinstance(shares.get(a), Split) or a in weighed]
    result = [None if d is None else tuple(_product(shares, atoms) for atoms in d) for d in outputs]
    if not split:
        return Computed(tuple(result), None, _groups(call, shares))
    for slot in call.added_once:
        if slot in operands:
            raise Unproven(f"every rank adds {_name(slot)} to its part of the sum, which is added once")
    if any(isinstance(dim, Split) for dims in result for dim in dims or ()):
        raise Unproven("sums over one split axis and keeps another")
    times = _times([shares[a] for a in split], [weighed.get(a) for a in split], degree)
    if call.averaged:
        every = [shares[a] for a in summed if a in shares]
        local = {math.prod(local_size(d, r) for d in every) for r in range(degree)}
        if len(local) != 1:
            raise Unproven("a mean over different numbers of elements on the ranks")
        times *= math.prod(map(size_of, every)) / local.pop()
    return Computed(tuple(result), times, _groups(call, shares))


def _meet(shares: dict[Axis, Dim], axis: Axis, dim: Dim, what: str) -> None:
    if size_of(dim) != axis.size:
        raise Unproven(f"{what} is of {size_of(dim)} elements, not {axis.size}")
    if axis not in shares:
        shares[axis] = dim
        return
    both = joint(shares[axis], dim)
    if both is None:
        raise Unproven(
            f"{what} is held {_said(dim)}, but the same axis of another operand {_said(shares[axis])}"
        )
    shares[axis] = both


def _said(dim: Dim) -> str:
    return f"whole ({dim})" if isinstance(dim, int) else str(dim)


def _atoms(axis: Axis) -> list[Axis]:
    """The axis as an ordered product of atoms; those of one element left out, unless all are."""
    axis = axis.find()
    if axis.is_atom:
        return [axis]
    if axis.parts is not None:
        raise Unproven("sees a concatenation in one dimension")
    found = [a for f in axis.factors or () for a in _atoms(f)]
    return [a for a in found if a.size != 1] or found[:1]


def _product(shares: Mapping[Axis, Dim], atoms: Sequence[Axis]) -> Dim:
    return merged([shares.get(a, a.size) for a in atoms])


def _name(slot: Slot) -> str:
    return slot[0] if slot[1] is None else f"{slot[0]}[{slot[1]}]"


def _times(dims: Sequence[Dim], weights: Sequence[Factors | None], degree: int) -> float:
    """How often ranks together add each element of the summed axes; it must be the same for all."""
    if math.prod(map(size_of, dims)) > LARGEST:
        raise Unproven("sums over several split axes, too large to be proven")
    whole = _outer([_counted(classes_of(d), None, d) for d in dims])
    local = np.zeros_like(whole)
    for r in range(degree):
        held = [held_by(d, r) for d in dims]
        if any((h < 0).any() for h in held):
            raise Unproven("sums over padding")
        factors = [None if w is None else w[r] for w in weights]
        local += _outer([_counted(h, f, d) for h, f, d in zip(held, factors, dims, strict=True)])
    ratio = local / whole
    if not ratio.size or np.abs(ratio - ratio[0]).max() > 1e-9:
        low, high = (ratio.min(), ratio.max()) if ratio.size else (0, 0)
        raise Unproven(f"ranks add some elements {low:g} times, others {high:g} times")
    return float(ratio[0])


def _counted(classes: Any, factors: Any, dim: Dim) -> npt.NDArray[np.float64]:
    count = int(classes_of(dim).max(initial=-1)) + 1
    return np.bincount(classes, factors, count).astype(np.float64)


def _outer(vectors: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    result = np.ones(1)
    for vector in vectors:
        result = np.multiply.outer(result, vector).ravel()
    return result


def _groups(call: Call, shares: Mapping[Axis, Dim]) -> tuple[Dim, ...]:
    """Of a convolution: its groups, and its kernel."""
    if "groups" not in call.arguments:
        return ()
    x, weight = call.operand("input"), call.operand("weight")
    channels = _atoms(x[len(x) - len(weight) + 1])
    inner = set(_atoms(weight[1]))
    outer = [a for a in channels if a not in inner]
    return (
        _product(shares, outer) if outer else 1,
        *(_product(shares, _atoms(axis)) for axis in weight[2:]),
    )
