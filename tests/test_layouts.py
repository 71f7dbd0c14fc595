"""Which elements of a dimension a rank holds: shares, and back to the whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoshard import axes
from autoshard.assignment import Assignment
from autoshard.axes import Axis
from autoshard.layouts import (
    Concat,
    Layout,
    Leaf,
    Product,
    indices,
    is_contiguous,
    is_disjoint,
    is_split,
    leaves,
    local_part,
    parse,
    share_size,
    whole,
    whole_size,
)
from autoshard.shares import pad_to

# Digits of a rank's coordinate, as (base, stride): degree 4 is one digit of 4 or two of 2.
DIGITS: dict[int, list[list[tuple[int, int]]]] = {
    1: [[]],
    2: [[(2, 1)]],
    3: [[(3, 1)]],
    4: [[(4, 1)], [(2, 2), (2, 1)]],
    6: [[(6, 1)], [(2, 3), (3, 1)]],
    8: [[(8, 1)], [(2, 4), (4, 1)], [(4, 2), (2, 1)], [(2, 4), (2, 2), (2, 1)]],
}


@dataclass(frozen=True)
class Cut:
    """A layout and the number of ranks that it is for."""

    layout: Layout
    degree: int


@st.composite
def trees(draw: st.DrawFn, digits: list[tuple[int, int]], depth: int, even: bool) -> Layout:
    """A tree in which each digit cuts at most one axis of a product."""
    kind = draw(st.sampled_from(["leaf", "product", "concat"] if depth else ["leaf"]))
    if kind == "leaf":
        base, stride = draw(st.sampled_from([*digits, (1, 1)]))
        size = draw(st.integers(1, 4)) * base
        if base > 1 and not even:
            size += draw(st.integers(0, base - 1))
        return Leaf(size, base, stride if base > 1 else 1)
    count = draw(st.integers(2, 3))
    if kind == "concat":
        return Concat(tuple(draw(trees(digits, depth - 1, even)) for _ in range(count)))
    places = [draw(st.integers(0, count - 1)) for _ in digits]
    return Product(
        tuple(
            draw(trees([d for d, p in zip(digits, places, strict=True) if p == i], depth - 1, even))
            for i in range(count)
        )
    )


@st.composite
def cuts(draw: st.DrawFn, even: bool = False) -> Cut:
    """A layout over some ranks."""
    degree = draw(st.sampled_from(sorted(DIGITS)))
    return Cut(draw(trees(draw(st.sampled_from(DIGITS[degree])), 2, even)), degree)


def elements(size: int) -> Tensor:
    """A tensor whose middle dimension of this size tells its elements apart."""
    return torch.arange(2 * size * 3).view(2, size, 3)


def flat(layout: Layout) -> Layout:
    """The layout as its text can say it: a product in a product is one product."""
    if isinstance(layout, Leaf):
        return layout
    if isinstance(layout, Concat):
        parts = [flat(p) for p in layout.parts]
        return Concat(tuple(q for p in parts for q in (p.parts if isinstance(p, Concat) else (p,))))
    factors = [flat(f) for f in layout.factors]
    return Product(tuple(g for f in factors for g in (f.factors if isinstance(f, Product) else (f,))))


@given(cuts())
def test_shares_of_all_ranks_are_the_whole(cut: Cut) -> None:
    """``local_part`` on every rank, then ``whole``, is the identity."""
    x = elements(whole_size(cut.layout))
    shares = [local_part(x, 1, cut.layout, r) for r in range(cut.degree)]
    assert torch.equal(whole(torch.cat(shares, 1), 1, cut.layout, cut.degree), x)


@given(cuts())
def test_share_is_its_indices(cut: Cut) -> None:
    """What a rank holds, how much that is, and where it lies agree."""
    x = elements(whole_size(cut.layout))
    for rank in range(cut.degree):
        held = indices(cut.layout, rank)
        share = local_part(x, 1, cut.layout, rank)
        assert len(held) == share_size(cut.layout, rank) == share.shape[1]
        assert torch.equal(share, x[:, list(held)])


@given(cuts())
def test_layout_reads_back(cut: Cut) -> None:
    """``parse(str(x)) == x``, up to brackets that say nothing."""
    assert parse(str(cut.layout)) == flat(cut.layout)
    assert str(parse(str(cut.layout))) == str(flat(cut.layout))


@given(cuts())
def test_contiguous_shares_need_no_order(cut: Cut) -> None:
    """Where the shares in rank order are the whole, ``is_contiguous`` may say so, else not."""
    x = elements(whole_size(cut.layout))
    joined = torch.cat([local_part(x, 1, cut.layout, r) for r in range(cut.degree)], 1)
    if is_contiguous(cut.layout, cut.degree):
        assert torch.equal(joined, x)
    elif cut.degree > 1 and is_split(cut.layout):
        assert joined.shape != x.shape or not torch.equal(joined, x)


@given(cuts())
def test_disjoint_shares_hold_everything_once(cut: Cut) -> None:
    """``is_disjoint``: no element is held by two ranks."""
    held = [i for r in range(cut.degree) for i in indices(cut.layout, r)]
    assert set(held) == set(range(whole_size(cut.layout)))
    assert is_disjoint(cut.layout, cut.degree) == (len(held) == len(set(held)))


@given(cuts())
def test_gradient_of_share_is_its_place(cut: Cut) -> None:
    """The gradients of all shares add up to how many ranks hold each element."""
    x = elements(whole_size(cut.layout)).double().requires_grad_()
    total = sum(local_part(x, 1, cut.layout, r).sum() for r in range(cut.degree))
    assert isinstance(total, Tensor)
    total.backward()
    assert x.grad is not None
    held = [i for r in range(cut.degree) for i in indices(cut.layout, r)]
    counts = torch.bincount(torch.tensor(held), minlength=x.shape[1]).double()
    assert torch.equal(x.grad, counts.view(1, -1, 1).expand_as(x))


@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
def test_uneven_vocabulary_is_cut_like_chunk(size: int, degree: int) -> None:
    """Each rank holds ``ceil(size / degree)`` rows, the last ones fewer or none."""
    layout = Leaf(size, degree)
    x = elements(size)
    pieces = list(x.chunk(degree, 1)) if degree > 1 else [x]
    pieces += [x[:, :0]] * (degree - len(pieces))
    for rank, piece in enumerate(pieces):
        assert torch.equal(local_part(x, 1, layout, rank), piece)
    assert is_contiguous(layout, degree) and is_disjoint(layout, degree)


def _product(sizes: list[int], digits: list[tuple[int, int]], places: list[int]) -> Product:
    factors = [Leaf(size) for size in sizes]
    for (base, stride), place in zip(digits, places, strict=True):
        if factors[place].parts == 1 and place:
            factors[place] = Leaf(base * factors[place].size, base, stride)
    return Product(tuple(factors))


@given(st.data())
def test_symbolic_size_is_any_size(data: st.DataObject) -> None:
    """A layout with a symbolic axis (-1) gives what the one with its true size gives."""
    degree = data.draw(st.sampled_from([2, 3, 4, 6, 8]))
    digits = data.draw(st.sampled_from(DIGITS[degree]))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    places = [data.draw(st.integers(1, len(sizes) - 1)) for _ in digits]
    true = _product(sizes, digits, places)
    at = data.draw(st.integers(0, len(sizes) - 1))
    leaf = true.factors[at]
    assert isinstance(leaf, Leaf)
    if leaf.parts > 1:
        at, leaf = 0, Leaf(sizes[0])
    symbolic = Product(
        tuple(replace(leaf, size=-1) if i == at else f for i, f in enumerate(true.factors))
    )
    x = elements(whole_size(true))
    shares = [local_part(x, 1, symbolic, r) for r in range(degree)]
    for rank, share in enumerate(shares):
        assert torch.equal(share, local_part(x, 1, true, rank))
    assert torch.equal(whole(torch.cat(shares, 1), 1, symbolic, degree), x)
    assert parse(str(symbolic)) == symbolic


def test_two_symbolic_sizes_side_by_side() -> None:
    """Batch and sequence folded into one dimension with the heads can be sliced by heads."""
    assignment = Assignment()
    heads = Axis(4)
    assignment.cut(heads, 2, 2, 1, False)
    folded = axes.product([Axis(sympy.Symbol("s0")), Axis(sympy.Symbol("s1")), heads])
    layout = assignment.layout(folded)
    x = elements(2 * 3 * 4)
    shares = [local_part(x, 1, layout, r) for r in range(2)]
    assert torch.equal(shares[1], x.unflatten(1, (6, 4))[:, :, 2:].flatten(1, 2))
    assert torch.equal(whole(torch.cat(shares, 1), 1, layout, 2), x)


@pytest.mark.parametrize("text", ["12/2", "12/2·64 | 12/2·64", "2/2@4·(4/4 | 1 | 1)·64", "?·4/2"])
def test_text_of_layout(text: str) -> None:
    """The notation that graphs and plans show."""
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", ["", "a", "4)", "4 ·"])
def test_wrong_text_is_refused(text: str) -> None:
    """No layout is guessed from something else."""
    with pytest.raises(ValueError):
        parse(text)


def test_fused_weight_over_two_ranks() -> None:
    """Of a fused QKV weight each rank holds three blocks of rows."""
    layout = parse("4/2·3 | 4/2·3 | 4/2·3")
    assert indices(layout, 0) == (*range(6), *range(12, 18), *range(24, 30))
    assert not is_contiguous(layout, 2) and is_disjoint(layout, 2)
    assert [leaf.parts for leaf in leaves(layout)] == [2, 1, 2, 1, 2, 1]


def test_assignment_gives_the_layout_of_an_axis() -> None:
    """Cut atoms carry their parts, uncut neighbours are merged, sizes agree with the layout."""
    heads, width, kv = Axis(4), Axis(8), Axis(2)
    fused = axes.concatenation(
        [axes.product([heads, width]), axes.product([kv, Axis(2), Axis(4)]), Axis(6)]
    )
    assignment = Assignment()
    assignment.cut(heads, 4, 4, 1, False)
    assignment.cut(kv, 4, 2, 2, False)
    layout = assignment.layout(fused)
    assert str(layout) == "4/4·8 | 2/2@2·8 | 6"
    assert assignment.size(fused) == share_size(layout, 0) == 8 + 8 + 6
    assert assignment.degree([fused]) == 4 and assignment.degree([width]) == 1


@pytest.mark.parametrize(
    ("size", "parts", "rows", "padded"),
    [(203, 4, 51, 51), (50257, 4, 12565, 12672), (50304, 4, 12576, 12576), (4095, 2, 2048, 2048)],
)
def test_vocabulary_is_padded(size: int, parts: int, rows: int, padded: int) -> None:
    """Large vocabularies that do not divide well compute on a multiple of 128 rows."""
    axis, assignment = Axis(size), Assignment()
    assignment.cut(axis, parts, parts, 1, True)
    cut = assignment.cuts[axis]
    assert (cut.rows, cut.padded) == (rows, padded)
    assert share_size(assignment.layout(axis), 0) == rows


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_padding_is_behind_the_rows(dim: int) -> None:
    """Copies of the last one, in any dimension; none where none is missing; no gradient."""
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    size = x.shape[dim]
    assert pad_to(x, dim, size) is x
    y = pad_to(x, dim, size + 2)
    assert torch.equal(y.narrow(dim, 0, size), x)
    assert torch.equal(
        y.narrow(dim, size, 2), x.narrow(dim, size - 1, 1).expand_as(y.narrow(dim, size, 2))
    )
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
