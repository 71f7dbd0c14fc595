"""Rules of a user's own operators, and the page that lists all rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoshard
from autoshard.rules import RULES, rule_for
from autoshard.rules.document import rules_document

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rules.md"


@torch.library.custom_op("autoshard_test::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """A user's operator: a product with a row."""
    return x * weight


@scaled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).flatten(0, -2).sum(0)


scaled.register_autograd(_backward, setup_context=_context)
OP = torch.ops.autoshard_test.scaled.default


class Model(nn.Module):
    """An MLP with the operator in its middle, and one without it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.ones(16))
        self.other = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 8] -> [n, 8]."""
        out: Tensor = self.down(scaled(self.up(x), self.gain))
        return out + self.other(x)


INPUT = (torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture
def registered() -> Iterator[None]:
    """With the rule, and afterwards as before."""
    autoshard.register_rule(OP, "* h, h -> * h")
    yield
    del RULES["autoshard_test.scaled.default"]
    rule_for.cache_clear()


def test_without_a_rule_its_operands_stay_whole() -> None:
    """Right, reported, and not split."""
    plan = autoshard.plan(Model(), 2, INPUT, degree="max", strict=False)
    assert any("autoshard_test" in line for line in plan.unknown)
    shares = {p.name: p for p in plan.parameters}
    assert shares["other.0.weight"].dim == 0
    assert shares["up.weight"].dim != 0 and shares["gain"].dim is None
    with pytest.raises(autoshard.UnknownOperatorError, match="autoshard_test"):
        autoshard.plan(Model(), 2, INPUT, degree="max", strict=True)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("tp", [2, 4])
def test_with_a_rule_it_is_split(tp: int) -> None:
    """In one line; the gradient of its own weight is right too."""
    report = autoshard.verify(Model(), tp, INPUT)
    assert report.ok, report
    assert report.plan.sharded_fraction == 1.0
    assert {p.name for p in report.plan.parameters if p.dim is not None} >= {"gain", "up.weight"}


@pytest.mark.usefixtures("registered")
def test_what_cannot_be_registered() -> None:
    """Twice, a packet instead of an overload, a row without an arrow."""
    with pytest.raises(ValueError, match="has the rule"):
        autoshard.register_rule(OP, "* h, h -> * h")
    with pytest.raises(ValueError, match="no overload"):
        autoshard.register_rule(torch.ops.autoshard_test.scaled, "* -> *")
    with pytest.raises(ValueError, match="needs '->'"):
        autoshard.register_rule(torch.ops.aten.erfinv.default, "* h")


def test_the_page_is_the_table(update_golden: bool) -> None:
    """docs/rules.md lists every row (`make golden` writes it)."""
    if update_golden:
        PAGE.write_text(rules_document())
    assert PAGE.read_text() == rules_document()


@torch.library.custom_op("autoshard_test::scaled_dot_product_attention", mutates_args=())
def attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of another library, in which ``is_causal`` says nothing."""
    scores = query @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ value


@torch.library.custom_op("autoshard_test::alias", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """PyTorch's alias gives its operand; this one does not."""
    return x * 2


@torch.library.custom_op("autoshard_test::lift_fresh_copy", mutates_args=())
def shifted(x: Tensor) -> Tensor:
    """Nor is this one a copy."""
    return x + 1


attended.register_fake(lambda query, *others: torch.empty_like(query))
for operator in (doubled, shifted):
    operator.register_fake(torch.empty_like)


class OfAnother(nn.Module):
    """Operators of another library that have the names of PyTorch's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.up, self.down = name, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, S, 8] -> [n, S, 8]."""
        y = self.up(x)
        if self.name == "attention":
            places = torch.arange(x.shape[1])
            y = attended(y, y, y, places[None] <= places[:, None])
        else:
            y = doubled(y) if self.name == "alias" else shifted(y)
        out: Tensor = self.down(y)
        return out


@pytest.mark.parametrize("name", ["attention", "alias", "copy"])
def test_a_name_of_pytorchs_is_not_pytorchs_operator(name: str) -> None:
    """Nothing is known of it but that it is there: its mask stays, its result is not its operand."""
    torch.manual_seed(0)
    model = OfAnother(name)
    split = autoshard.parallelize(model, 1, (torch.randn(2, 5, 8),))
    for length in (5, 7):
        x = torch.randn(2, length, 8)
        with torch.no_grad():
            torch.testing.assert_close(split(x), model(x))
