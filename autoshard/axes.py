"""Axes: what the dimensions of tensors are made of.

A dimension is a term. An *atom* is one indivisible axis; a *product* ``[heads, head_dim]`` is an
ordered tuple of factors, the last varying fastest; a *concatenation* ``[q | k | v]`` is a tuple of
parts lying behind each other. Saying that two dimensions are the same axis *unifies* their terms
(union-find on atoms, the common refinement on products and concatenations), so that a fact found
at one operator holds wherever the axis goes::

    unify(768, [12, 64])       768 becomes [12, 64]
    unify([B, S·12], [B·S, 12])  both become [B, S, 12]
    cut(2304, 768)             2304 becomes [768 | 1536]

Sizes are ints, or sympy expressions in the graph's symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

Size: TypeAlias = Any  # an int, or a sympy expression in the graph's symbols


class AxisMismatch(Exception):
    """Two terms have no common refinement. The caller freezes what could not be aligned.

    Attributes:
        rest: the axes that could not be aligned, where that is less than everything.
    """

    def __init__(self, message: str, rest: Sequence[Axis] = ()) -> None:
        super().__init__(message)
        self.rest = tuple(rest)


class Axis:
    """A term: an atom until a link, factors or parts are bound to it.

    Attributes:
        size: number of elements.
        frozen: why the axis cannot be split, or None. Kept on atoms.
    """

    __slots__ = ("_link", "factors", "frozen", "parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.factors: tuple[Axis, ...] | None = None
        self.parts: tuple[Axis, ...] | None = None
        self.frozen: str | None = None
        self._link: Axis | None = None

    def find(self) -> Axis:
        """The representative of this axis's class."""
        axis = self
        while axis._link is not None:
            if axis._link._link is not None:
                axis._link = axis._link._link
            axis = axis._link
        return axis

    @property
    def is_atom(self) -> bool:
        """Whether nothing is known of this (representative) axis but its size."""
        return self.factors is None and self.parts is None

    def __repr__(self) -> str:
        axis = self.find()
        if axis.factors is not None:
            return "[" + "·".join(map(repr, axis.factors)) + "]"
        if axis.parts is not None:
            return "[" + "|".join(map(repr, axis.parts)) + "]"
        return f"{axis.size}"


@lru_cache(maxsize=65536)
def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


@lru_cache(maxsize=65536)
def ratio(a: Size, b: Size) -> Size | None:
    """``a / b`` where b provably divides a, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    if sympy.denom(quotient) != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def product_of(sizes: Sequence[Size]) -> Size:
    """The product of sizes, an int where all are."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def factors_of(axis: Axis) -> list[Axis]:
    """The axis as an ordered product of representatives, each an atom or a concatenation."""
    axis = axis.find()
    if axis.factors is None:
        return [] if axis.size == 1 else [axis]
    return [f for factor in axis.factors for f in factors_of(factor)]


def parts_of(axis: Axis) -> list[Axis]:
    """The axis as an ordered concatenation of representatives, each an atom or a product."""
    axis = axis.find()
    if axis.parts is None:
        return [axis]
    return [p for part in axis.parts for p in parts_of(part)]


def atoms_of(axis: Axis) -> Iterator[Axis]:
    """All atoms in the axis, in order, with repetitions."""
    axis = axis.find()
    for term in axis.factors or axis.parts or ():
        yield from atoms_of(term)
    if axis.is_atom and axis.size != 1:
        yield axis


def freeze(axis: Axis, reason: str) -> None:
    """Mark every atom of the axis as one that must stay whole. The first reason is kept."""
    for atom in atoms_of(axis):
        if atom.frozen is None:
            atom.frozen = reason


def product(factors: Sequence[Axis]) -> Axis:
    """The axis that is the ordered product of factors."""
    factors = [f for f in factors if f.find().size != 1]
    if len(factors) == 1:
        return factors[0]
    axis = Axis(product_of([f.find().size for f in factors]))
    if factors:
        axis.factors = tuple(factors)
    return axis


def concatenation(parts: Sequence[Axis]) -> Axis:
    """The axis that is the ordered concatenation of parts."""
    parts = [p for p in parts if p.find().size != 0] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    axis = Axis(sum((p.find().size for p in parts[1:]), parts[0].find().size))
    axis.parts = tuple(parts)
    return axis


def _bind(atom: Axis, target: Axis) -> None:
    if atom is target:
        return
    if any(a is atom for a in atoms_of(target)):
        raise AxisMismatch(f"axis of {atom.size} contains itself")
    atom._link = target
    if atom.frozen is not None:
        freeze(target, atom.frozen)


def _essential(axis: Axis) -> Axis:
    """The axis without factors of one element: ``[x·1]`` is x."""
    axis = axis.find()
    while axis.factors is not None and len(factors_of(axis)) == 1:
        axis = factors_of(axis)[0].find()
    return axis


def unify(a: Axis, b: Axis) -> None:
    """Make a and b the same axis, refining both as far as needed.

    Raises:
        AxisMismatch: no common refinement exists. What was unified before the failure stays.
    """
    a, b = _essential(a), _essential(b)
    if a is b:
        return
    if a.is_atom and b.is_atom:
        # An op demands equal sizes, also where the symbols differ: keep the concrete one.
        if isinstance(a.size, int) and isinstance(b.size, int) and a.size != b.size:
            raise AxisMismatch(f"{a.size} and {b.size}")
        _bind(*((a, b) if not isinstance(a.size, int) else (b, a)))
    elif a.is_atom or b.is_atom:
        _bind(*((a, b) if a.is_atom else (b, a)))
    elif a.factors is not None and b.factors is not None:
        unify_products(factors_of(a), factors_of(b))
    elif a.parts is not None and b.parts is not None:
        _unify_concatenations(parts_of(a), parts_of(b))
    elif a.factors is not None:
        _unify_product_with_concatenation(a, b)
    else:
        _unify_product_with_concatenation(b, a)


def unify_products(left: Sequence[Axis], right: Sequence[Axis]) -> None:
    """Align two ordered products from the left; the larger of two factors is refined."""
    xs, ys = list(left), list(right)
    while xs and ys:
        x, y = xs.pop(0).find(), ys.pop(0).find()
        if same_size(x.size, y.size):
            unify(x, y)
        elif ratio(x.size, y.size) is not None:
            first, rest = divide(x, y.size)
            unify(first, y)
            xs[:0] = factors_of(rest)
        elif ratio(y.size, x.size) is not None:
            first, rest = divide(y, x.size)
            unify(first, x)
            ys[:0] = factors_of(rest)
        else:
            left, right = _from_the_right([x, *xs], [y, *ys])
            raise AxisMismatch(f"{x.size} and {y.size}", [*left, *right])
    if xs or ys:
        raise AxisMismatch(f"left over: {xs or ys}", [*xs, *ys])


def _from_the_right(left: list[Axis], right: list[Axis]) -> tuple[list[Axis], list[Axis]]:
    """Unify last factors, the larger refined; what is left of both.

    Two products of one size have their last factors in common, whatever stands before:
    ``[S', 768]`` and ``[S'//8, 8, 12, 64]`` have ``[12, 64]``.
    """
    while left and right:
        x, y = left.pop().find(), right.pop().find()
        if same_size(x.size, y.size):
            unify(x, y)
        elif (outer := ratio(x.size, y.size)) is not None:
            first, rest = divide_product(x, outer)
            unify(rest, y)
            left.append(first)
        elif (outer := ratio(y.size, x.size)) is not None:
            first, rest = divide_product(y, outer)
            unify(rest, x)
            right.append(first)
        else:
            return [*left, x], [*right, y]
    return left, right


def divide(axis: Axis, outer: Size) -> tuple[Axis, Axis]:
    """Refine the axis into the product ``[outer, rest]``; both factors.

    A concatenation whose parts are all multiples of the rest becomes
    ``[part1/rest | part2/rest | ...]·rest``: fused QKV seen as ``[q_heads|k_heads|v_heads]·head_dim``.
    """
    axis = axis.find()
    inner = ratio(axis.size, outer)
    if inner == 1:
        return axis, Axis(1)
    if inner is None:
        raise AxisMismatch(f"{axis.size} is not a multiple of {outer}")
    if axis.is_atom:
        first, rest = Axis(outer), Axis(inner)
        first.frozen = rest.frozen = axis.frozen
        axis.factors = (first, rest)
        return first, rest
    if axis.parts is not None:
        counts = [ratio(p.size, inner) for p in parts_of(axis)]
        if None in counts:
            raise AxisMismatch(f"parts {axis!r} are not multiples of {inner}")
        firsts: list[Axis] = []
        rests: list[Axis] = []
        for part in parts_of(axis):
            first, rest = divide_product(part, ratio(part.size, inner) or 1)
            firsts.append(first)
            rests.append(rest)
        for rest in rests[1:]:
            unify(rests[0], rest)
        first = Axis(outer) if all(c == 1 for c in counts) else concatenation(firsts)
        if all(c == 1 for c in counts):
            first.frozen = "an index over the parts of a concatenation"
        axis.parts = None
        axis.factors = (first, rests[0])
        return first, rests[0]
    return divide_product(axis, outer)


def divide_product(axis: Axis, outer: Size) -> tuple[Axis, Axis]:
    """Like divide, for any axis: the leading factors of size ``outer``, and the others."""
    axis = axis.find()
    if outer == 1:
        return Axis(1), axis
    if same_size(axis.size, outer):
        return axis, Axis(1)
    if axis.factors is None:
        return divide(axis, outer)
    leading: list[Axis] = []
    rest = factors_of(axis)
    missing = outer
    while missing != 1:
        x = rest.pop(0)
        left = ratio(missing, x.size)
        if left is not None:
            leading.append(x)
            missing = left
            continue
        first, second = divide(x, missing)
        leading.append(first)
        rest.insert(0, second)
        missing = 1
    return product(leading), product(rest)


def cut(axis: Axis, at: int) -> tuple[list[Axis], list[Axis]]:
    """Refine the axis into a concatenation with a boundary at ``at``; the parts on either side.

    A product is cut through its leading factor: ``[12·64]`` at 256 is ``[4|8]·64``.
    """
    axis = axis.find()
    if at == 0 or same_size(axis.size, at):
        return ([], [axis]) if at == 0 else ([axis], [])
    before: list[Axis] = []
    after: list[Axis] = []
    position: Size = 0
    for part in parts_of(axis):
        end = position + part.size
        if end <= at:
            before.append(part)
        elif position >= at:
            after.append(part)
        else:
            first, second = _cut_part(part, at - position)
            before.append(first)
            after.append(second)
        position = end
    if axis.parts is not None:
        axis.parts = (*before, *after)
    return before, after


def _cut_part(part: Axis, at: int) -> tuple[Axis, Axis]:
    if not isinstance(part.size, int):
        raise AxisMismatch("a cut through a dimension of symbolic size")
    if part.is_atom:
        first, second = Axis(at), Axis(part.size - at)
        first.frozen = second.frozen = part.frozen
        part.parts = (first, second)
        return first, second
    assert part.factors is not None
    outer, *rest = factors_of(part)
    inner = product_of([f.size for f in rest])
    count = ratio(at, inner)
    if not isinstance(count, int):
        raise AxisMismatch(f"a cut at {at} through {part!r}")
    before, after = cut(outer, count)
    return product([concatenation(before), *rest]), product([concatenation(after), *rest])


def _unify_concatenations(left: list[Axis], right: list[Axis]) -> None:
    while left and right:
        x, y = left.pop(0).find(), right.pop(0).find()
        if same_size(x.size, y.size):
            unify(x, y)
        elif not (isinstance(x.size, int) and isinstance(y.size, int)):
            raise AxisMismatch(f"{x.size} and {y.size}")
        elif x.size > y.size:
            before, after = cut(x, y.size)
            left[:0] = [*before, *after]
            right.insert(0, y)
        else:
            before, after = cut(y, x.size)
            right[:0] = [*before, *after]
            left.insert(0, x)
    if left or right:
        raise AxisMismatch("concatenations of different length")


def _unify_product_with_concatenation(whole: Axis, parts: Axis) -> None:
    outer, *rest = factors_of(whole)
    first, inner = divide(parts, outer.size)
    unify(outer, first)
    unify_products(rest, factors_of(inner))
