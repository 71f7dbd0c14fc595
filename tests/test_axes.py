"""Axes: products, concatenations, and what it means that two dimensions are the same."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from autoshard.axes import (
    Axis,
    AxisMismatch,
    Size,
    atoms_of,
    concatenation,
    cut,
    divide,
    divide_product,
    factors_of,
    freeze,
    parts_of,
    product,
    product_of,
    ratio,
    same_size,
    unify,
    unify_products,
)

B, S = sympy.symbols("B S", positive=True, integer=True)

numbers = st.lists(st.sampled_from([2, 3, 4, 5]), min_size=1, max_size=5)


def sizes(found: list[Axis]) -> list[object]:
    """Sizes of some axes."""
    return [a.find().size for a in found]


def grouped(factors: list[int], bounds: list[int]) -> list[int]:
    """Products of neighbouring factors, cut at bounds."""
    edges = sorted({0, len(factors), *(b % (len(factors) + 1) for b in bounds)})
    return [math.prod(factors[a:b]) for a, b in pairwise(edges)]


# -- products ------------------------------------------------------------------------------------


def test_atom_becomes_the_product_that_it_is_unified_with() -> None:
    """``unify(768, [12, 64])``: 768 becomes [12, 64]."""
    hidden, heads, width = Axis(768), Axis(12), Axis(64)
    unify(hidden, product([heads, width]))
    assert factors_of(hidden) == [heads, width]
    assert repr(hidden) == "[12·64]"


def test_products_get_a_common_refinement() -> None:
    """``[2·6]`` and ``[4·3]`` become ``[2·2·3]``, of the same three atoms."""
    left, right = product([Axis(2), Axis(6)]), product([Axis(4), Axis(3)])
    unify(left, right)
    assert sizes(factors_of(left)) == [2, 2, 3]
    assert factors_of(left) == factors_of(right)


def test_symbolic_products_are_aligned() -> None:
    """``[B, S·12]`` and ``[B·S, 12]`` become ``[B, S, 12]``."""
    left, right = [Axis(B), Axis(S * 12)], [Axis(B * S), Axis(12)]
    unify_products(left, right)
    assert sizes(factors_of(product(left))) == [B, S, 12]
    assert factors_of(product(left)) == factors_of(product(right))


def test_products_without_common_refinement_do_not_unify() -> None:
    """``[4·6]`` and ``[6·4]`` share no boundary; the error holds what is not aligned."""
    left = [Axis(4), Axis(6)]
    with pytest.raises(AxisMismatch) as caught:
        unify_products(left, [Axis(6), Axis(4)])
    assert left[0] in caught.value.rest and left[1] in caught.value.rest


def test_what_was_aligned_before_a_mismatch_stays() -> None:
    """``[8, 4·6]`` and ``[8, 6·4]``: the 8 is one axis, and not among the rest."""
    left, right = [Axis(8), Axis(4), Axis(6)], [Axis(8), Axis(6), Axis(4)]
    with pytest.raises(AxisMismatch) as caught:
        unify_products(left, right)
    assert left[0].find() is right[0].find()
    assert left[0].find() not in {a.find() for a in caught.value.rest}


@given(numbers, st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_groupings_of_one_product_unify(
    factors: list[int], left_bounds: list[int], right_bounds: list[int]
) -> None:
    """However two products group the same factors, they end as the same atoms in order."""
    left = [Axis(size) for size in grouped(factors, left_bounds)]
    right = [Axis(size) for size in grouped(factors, right_bounds)]
    try:
        unify_products(left, right)
    except AxisMismatch:
        # From the left, 2·6 meets 4·3: aligned only where one boundary divides the other.
        edges = [*accumulate(grouped(factors, left_bounds), int.__mul__)]
        others = [*accumulate(grouped(factors, right_bounds), int.__mul__)]
        merged = sorted({1, *edges, *others})
        assert any(b % a for a, b in pairwise(merged))
        return
    assert factors_of(product(left)) == factors_of(product(right))
    assert product_of([a.size for a in factors_of(product(left))]) == math.prod(factors)


@given(numbers, st.data())
def test_divide_keeps_the_size(factors: list[int], data: st.DataObject) -> None:
    """``divide_product`` gives two axes whose product is the axis, whatever it is made of."""
    axis = product([Axis(size) for size in factors])
    total = math.prod(factors)
    outer = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    try:
        first, rest = divide_product(axis, outer)
    except AxisMismatch:
        assert outer not in [*accumulate(factors, int.__mul__, initial=1)]
        return
    assert first.find().size == outer and rest.find().size == total // outer
    assert factors_of(axis) == [*factors_of(first), *factors_of(rest)]


def test_factors_of_one_element_do_not_count() -> None:
    """``[1·64]`` is 64."""
    width = Axis(64)
    assert product([Axis(1), width]) is width
    assert product([]).size == 1


def test_divide_refuses_what_does_not_divide() -> None:
    """12 is no multiple of 5."""
    with pytest.raises(AxisMismatch):
        divide(Axis(12), 5)


# -- concatenations ------------------------------------------------------------------------------


def test_cut_makes_a_concatenation() -> None:
    """``cut(2304, 768)``: 2304 becomes [768|1536]."""
    fused = Axis(2304)
    before, after = cut(fused, 768)
    assert sizes(before) == [768] and sizes(after) == [1536]
    assert repr(fused) == "[768|1536]"


def test_product_is_cut_through_its_leading_factor() -> None:
    """``[12·64]`` at 256 is ``[4|8]·64``, with one axis of 64."""
    heads, width = Axis(12), Axis(64)
    axis = product([heads, width])
    before, after = cut(axis, 256)
    assert sizes(parts_of(heads)) == [4, 8]
    assert factors_of(before[0])[1] is factors_of(after[0])[1] is width


def test_product_is_not_cut_across_its_inner_factor() -> None:
    """``[12·64]`` has no boundary at 100."""
    with pytest.raises(AxisMismatch):
        cut(product([Axis(12), Axis(64)]), 100)


@given(st.integers(1, 60), st.lists(st.integers(0, 60)))
def test_cuts_in_any_order_give_the_same_parts(size: int, points: list[int]) -> None:
    """The parts lie between the points, and their sizes add up."""
    axis = Axis(size)
    points = [p for p in points if p <= size]
    for point in points:
        before, after = cut(axis, point)
        assert sum(a.size for a in before) == point
        assert sum(a.size for a in after) == size - point
    edges = sorted({0, size, *points})
    assert sizes(parts_of(axis)) == [b - a for a, b in pairwise(edges)]


def test_concatenations_get_a_common_refinement() -> None:
    """``[4|8]`` and ``[6|6]`` become ``[4|2|6]``."""
    left, right = concatenation([Axis(4), Axis(8)]), concatenation([Axis(6), Axis(6)])
    unify(left, right)
    assert sizes(parts_of(left)) == sizes(parts_of(right)) == [4, 2, 6]
    assert [a.find() for a in parts_of(left)] == [a.find() for a in parts_of(right)]


def test_fused_heads_are_seen_through_a_view() -> None:
    """``[q|k|v]`` viewed as heads of 64 is ``[q_heads|k_heads|v_heads]·64``."""
    q, k, v = Axis(768), Axis(256), Axis(256)
    fused = concatenation([q, k, v])
    first, width = divide(fused, 20)
    assert sizes(parts_of(first)) == [12, 4, 4]
    for part, heads in zip((q, k, v), parts_of(first), strict=True):
        assert factors_of(part) == [heads.find(), width.find()]


def test_index_over_equal_parts_is_frozen() -> None:
    """``[q|k|v]`` viewed as ``[3, heads]``: the 3 cannot be split, the parts are one axis."""
    parts = [Axis(64) for _ in range(3)]
    fused = concatenation(parts)
    unify(fused, product([Axis(3), Axis(64)]))
    outer, inner = factors_of(fused)
    assert outer.frozen is not None and inner.frozen is None
    assert {p.find() for p in parts} == {inner}


def test_concatenations_of_different_length_do_not_unify() -> None:
    """Their elements cannot be the same."""
    with pytest.raises(AxisMismatch):
        unify(concatenation([Axis(4), Axis(8)]), concatenation([Axis(4), Axis(9)]))


# -- atoms ---------------------------------------------------------------------------------------


def test_unified_atoms_are_one() -> None:
    """Union-find: what holds for one holds for all."""
    a, b, c = Axis(8), Axis(8), Axis(8)
    unify(a, b)
    unify(b, c)
    assert a.find() is c.find()


def test_atoms_of_different_size_do_not_unify() -> None:
    """The error names both sizes."""
    with pytest.raises(AxisMismatch, match=r"8 and 9|9 and 8"):
        unify(Axis(8), Axis(9))


def test_axis_is_not_part_of_itself() -> None:
    """A square that is its own factor is refused."""
    a = Axis(8)
    with pytest.raises(AxisMismatch):
        unify(a, product([Axis(1), a, Axis(2)]))


@pytest.mark.parametrize("other", ["atom", "product", "concatenation"])
def test_frozen_axis_freezes_what_it_is_unified_with(other: str) -> None:
    """The reason moves to every atom."""
    axis = Axis(12)
    freeze(axis, "softmax")
    target = {
        "atom": Axis(12),
        "product": product([Axis(3), Axis(4)]),
        "concatenation": concatenation([Axis(5), Axis(7)]),
    }[other]
    unify(target, axis)
    assert {a.frozen for a in atoms_of(target)} == {"softmax"}


def test_first_reason_is_kept() -> None:
    """An axis that is frozen twice says why it was the first time."""
    axis = Axis(12)
    freeze(axis, "first")
    freeze(axis, "second")
    assert axis.frozen == "first"


def test_refined_frozen_axis_stays_frozen() -> None:
    """Factors and parts of a frozen axis are frozen."""
    whole, other = Axis(12), Axis(12)
    freeze(whole, "norm")
    freeze(other, "norm")
    divide(whole, 3)
    cut(other, 5)
    assert {a.frozen for a in (*atoms_of(whole), *atoms_of(other))} == {"norm"}


@given(numbers, numbers)
def test_unify_is_symmetric(left: list[int], right: list[int]) -> None:
    """Both orders give the same sizes, or both refuse."""
    outcomes: list[object] = []
    for swap in (False, True):
        a = product([Axis(s) for s in left])
        b = product([Axis(s) for s in right])
        try:
            unify(*((b, a) if swap else (a, b)))
            outcomes.append((sizes(factors_of(a)), sizes(factors_of(b))))
        except AxisMismatch:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (12, 4, 3), (12, 5, None), (B * 12, 12, B), (B * S, S, B), (B, S, None),
        (B * 12, B, 12), (B * S + B, B, S + 1), (B + 1, B, None), (0, 3, 0), (3, 0, None),
    ],
)  # fmt: skip
def test_ratio(a: Size, b: Size, expected: object) -> None:
    """The quotient where one size provably divides the other."""
    assert ratio(a, b) == expected


def test_same_size_sees_through_the_form() -> None:
    """``B·(S + 1)`` is ``B·S + B``."""
    assert same_size(B * (S + 1), B * S + B)
    assert not same_size(B, S) and not same_size(B, 4) and same_size(4, 4)


def test_equal_last_factors_align_whatever_stands_before() -> None:
    """A padded sequence in chunks: heads and their size are the same axes on both sides."""
    left = [Axis(B), Axis(S), Axis(6), Axis(64)]
    right = [Axis(B), Axis(sympy.floor(S / 8)), Axis(8), Axis(6), Axis(64)]
    with pytest.raises(AxisMismatch) as caught:
        unify_products(left, right)
    assert left[0].find() is right[0].find()
    assert left[2].find() is right[3].find() and left[3].find() is right[4].find()
    assert {id(a.find()) for a in caught.value.rest} == {id(a.find()) for a in (left[1], *right[1:3])}


def test_the_larger_of_two_last_factors_is_refined() -> None:
    """``[S, 32]`` and ``[S//8, 8, 4, 8]``: 32 is ``[4·8]``, whatever S//8 is."""
    rows = sympy.floor(S / 8)
    left, right = [Axis(S), Axis(32)], [Axis(rows), Axis(8), Axis(4), Axis(8)]
    with pytest.raises(AxisMismatch) as mismatch:
        unify_products(left, right)
    assert factors_of(left[1]) == [right[2].find(), right[3].find()]
    assert {a.find() for a in mismatch.value.rest} == {left[0], right[0], right[1]}


def test_a_factor_of_one_element_is_nothing() -> None:
    """[x·1] is x: no wrapping without end."""
    part = concatenation([Axis(1), Axis(4), product([Axis(4), Axis(4)])])
    wrapped = Axis(21)
    wrapped.factors = (part, Axis(1))
    unify(wrapped, part)
    assert divide(part, 21)[0] is part.find()
    unify(wrapped, concatenation([Axis(1), Axis(20)]))
    assert sum(a.find().size for a in parts_of(part)) == 21
