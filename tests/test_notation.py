"""How an operator's rule is written, and what a row does to the axes of a call."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from autoshard.axes import Axis
from autoshard.rules.call import Call, bind, shape_of
from autoshard.rules.notation import Operand, apply_row, parse
from autoshard.rules.table import RULES

MARKS = ("", "+", "^", "!", "~")


def call_of(op: Any, *tensors: torch.Tensor | None) -> Call:
    """A call of an operator on tensors that are all parameters."""
    graph = fx.Graph()
    nodes: list[fx.Node | None] = []
    dims: dict[fx.Node, tuple[Axis, ...]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is None:
            nodes.append(None)
            continue
        node = graph.placeholder(f"x{index}")
        node.meta["val"] = tensor
        dims[node] = tuple(Axis(size) for size in tensor.shape)
        nodes.append(node)
    result = graph.call_function(op, tuple(nodes))
    result.meta["val"] = op(*tensors)
    return Call(result, bind(result), dims.__getitem__, shape_of)


def test_row_of_linear() -> None:
    """Marks, leading dimensions and what is added once are read off the text."""
    row = parse("* k+, n k+, n! -> * n")
    assert row.operands == (
        Operand((("k", "+"),), leading=True, added_once=False),
        Operand((("n", ""), ("k", "+")), leading=False, added_once=False),
        Operand((("n", "!"),), leading=False, added_once=True),
    )
    assert row.result == Operand((("n", ""),), leading=True, added_once=False)


def test_row_without_result_dimensions() -> None:
    """A scalar has no letters."""
    assert parse("k+, k+ ->").result == Operand((), leading=False, added_once=False)


@pytest.mark.parametrize(
    "text", ["m k+, k+ n", "m k+, 2 -> m", "mk -> m", "m? -> m", "m++ -> m", ", k -> **"]
)
def test_malformed_row_is_refused(text: str) -> None:
    """An error that quotes the row."""
    with pytest.raises(ValueError, match="row"):
        parse(text)


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.tuples(st.sampled_from(string.ascii_lowercase), st.sampled_from(MARKS))),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_row_reads_back(operands: list[tuple[bool, list[tuple[str, str]]]]) -> None:
    """Whatever is written with letters and marks is read as it was meant."""
    texts = [
        " ".join(["*"] * leading + [letter + mark for letter, mark in letters])
        for leading, letters in operands
    ]
    row = parse(f"{', '.join(texts[:-1])} -> {texts[-1]}")
    for (leading, letters), operand in zip(operands, (*row.operands, row.result), strict=True):
        assert operand.leading == leading
        assert operand.letters == tuple(letters)
        assert operand.added_once == any(mark == "!" for _, mark in letters)


def test_every_row_of_the_table_uses_what_it_binds() -> None:
    """Letters of a result stand in an operand; a summed letter stands twice and not in the result."""
    for name, rule in RULES.items():
        if "->" not in rule.text:
            continue
        row = parse(rule.text)
        letters = [letter for o in row.operands for letter, _ in o.letters]
        result = {letter for letter, _ in row.result.letters}
        summed = {letter for o in row.operands for letter, mark in o.letters if mark == "+"}
        assert result <= set(letters), name
        assert not summed & result, name
        assert all(letters.count(letter) >= 2 for letter in summed), name


def test_linear_unifies_and_sums() -> None:
    """The contracted axis is one, the result has the others, the bias is added once."""
    call = call_of(torch.ops.aten.linear.default, torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(5))
    apply_row(parse("* k+, n k+, n! -> * n"), call)
    x, w, b = (call.operand(name) for name in ("input", "weight", "bias"))
    assert x[2].find() is w[1].find()
    assert [a.find() for a in call.summed] == [x[2].find()]
    assert call.outputs[0] is not None
    assert [a.find() for a in call.outputs[0]] == [x[0].find(), x[1].find(), w[0].find()]
    assert b[0].find() is w[0].find()
    assert call.added_once == [("bias", None)]
    assert call.flops == 2 * 2 * 3 * 4 * 5


def test_operand_that_is_not_given_is_passed_over() -> None:
    """``linear`` without a bias."""
    call = call_of(torch.ops.aten.linear.default, torch.ones(2, 4), torch.ones(5, 4), None)
    apply_row(parse("* k+, n k+, n! -> * n"), call)
    assert call.added_once == [] and ("bias", None) not in call.operands


def test_leading_dimensions_are_broadcast() -> None:
    """A dimension of one element takes the axis of the other operand."""
    call = call_of(torch.ops.aten.matmul.default, torch.ones(1, 3, 4), torch.ones(6, 4, 5))
    apply_row(parse("* m k+, * k+ n -> * m n"), call)
    assert call.outputs[0] is not None
    batch = call.operand("other")[0]
    assert call.outputs[0][0].find() is batch.find()


def test_frozen_letter_is_frozen() -> None:
    """``^`` keeps an axis whole, with the operator's name as the reason."""
    call = call_of(torch.ops.aten.mm.default, torch.ones(3, 4), torch.ones(4, 5))
    apply_row(parse("m k^, k^ n -> m n"), call)
    left, right = call.operand("self"), call.operand("mat2")
    assert left[1].find().frozen and "aten.mm" in str(right[0].find().frozen)
    assert left[0].find().frozen is None and right[1].find().frozen is None


def test_looked_up_letter_is_noted() -> None:
    """``~`` marks the axis whose indices are global numbers."""
    call = call_of(torch.ops.aten.mm.default, torch.ones(3, 4), torch.ones(4, 5))
    apply_row(parse("m k, k n~ -> m n"), call)
    assert call.lookup is call.operand("mat2")[1]
