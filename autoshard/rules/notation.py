"""Rows: how an operator's rule is written.

``"* k+, n k+, n! -> * n"`` reads: the first operand has any leading dimensions and ``k``, the second
``n`` and ``k``, the third ``n``. A letter is an axis; equal letters are unified.

===== =========================================================================================
mark  meaning
===== =========================================================================================
``+``  summed: the axis is contracted away; split, it leaves a partial sum
``^``  frozen: the operator needs the axis whole
``!``  on an operand: added once, after the reduction, however the summed axis is split
``~``  looked up: the operand's indices along the axis are global numbers
``*``  any leading dimensions, broadcast against each other
===== =========================================================================================

An optional operand that is not given is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autoshard import axes
from autoshard.axes import Axis
from autoshard.rules.call import Call
from autoshard.rules.views import frozen


@dataclass(frozen=True)
class Operand:
    """One operand of a row: letters with their marks, leading dimensions, added once."""

    letters: tuple[tuple[str, str], ...]
    leading: bool
    added_once: bool


@dataclass(frozen=True)
class Row:
    """A parsed row."""

    text: str
    operands: tuple[Operand, ...]
    result: Operand


@lru_cache(maxsize=1024)
def parse(text: str) -> Row:
    """Parse one row.

    Raises:
        ValueError: a malformed row.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"a rule's row needs '->': {text!r}")
    return Row(text, tuple(_operand(part, text) for part in left.split(",")), _operand(right, text))


def _operand(text: str, row: str) -> Operand:
    letters: list[tuple[str, str]] = []
    leading = added_once = False
    for word in text.split():
        if word == "*":
            leading = True
            continue
        if not word[0].isalpha() or len(word) > 2 or word[1:] not in ("", "+", "^", "!", "~"):
            raise ValueError(f"{word!r} is no axis in the row {row!r}")
        added_once |= word[1:] == "!"
        letters.append((word[0], word[1:]))
    return Operand(tuple(letters), leading, added_once)


def apply_row(row: Row, call: Call) -> None:
    """Unify and mark the axes of a call as its row says; set the result's axes and the FLOPs."""
    bound: dict[str, Axis] = {}
    leading = []
    slots = iter(call.tensors())
    for pattern in row.operands:
        slot = next(slots, None)
        if slot is None:
            break
        dims = call.operand(*slot)
        if pattern.added_once:
            call.added_once.append(slot)
        count = len(pattern.letters)
        if count and len(dims) < count and not pattern.added_once:
            frozen(call)  # a vector where the row has a matrix
            return
        named = dims[max(0, len(dims) - count) :] if count else ()
        if pattern.leading:
            leading.append(dims[: len(dims) - count])
        for axis, (letter, mark) in zip(reversed(named), reversed(pattern.letters), strict=False):
            if axis.find().size == 1 and (letter in bound or mark == "!"):
                continue  # broadcast
            if letter in bound and bound[letter].find().size != 1:
                call.unify(bound[letter], axis)
            else:
                bound[letter] = axis
            if mark == "^":
                call.freeze((axis,), "needs this axis whole")
            if mark == "~":
                call.lookup = axis
    shape = call.shape()
    stars = call.broadcast(leading, shape[: len(shape) - len(row.result.letters)])
    call.outputs = [stars + tuple(bound[letter] for letter, _ in row.result.letters)]
    summed = {letter for o in row.operands for letter, mark in o.letters if mark == "+"}
    call.summed = [bound[letter] for letter in sorted(summed) if letter in bound]
    if summed:
        sizes = [a.find().size for a in (*stars, *bound.values())]
        call.flops = 2 * axes.product_of(sizes)
