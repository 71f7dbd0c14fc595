"""Models that run parts of themselves under autocast, no_grad or activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard import ops
from autoshard.analysis import AUTOCAST
from autoshard.capture import capture
from autoshard.errors import CaptureError
from autoshard.passes.inline import inline

TOKENS = torch.arange(16).view(2, 8)


class Parts(nn.Module):
    """An embedding, an MLP and a loss; what stands around them is given."""

    def __init__(self, around: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.around, self.dropout = around, dropout
        self.table, self.norm = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 32))

    def mlp(self, x: Tensor) -> Tensor:
        """x: [b, s, 32] -> [b, s, 32]."""
        out: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return out

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """ids, labels: [b, s] -> the loss, and what the MLP gave."""
        x = self.table(ids)
        if self.around == "checkpoint":
            y = checkpoint(self.mlp, x, use_reentrant=False)
            return F.cross_entropy(self.head(x + y).flatten(0, 1), labels.flatten()), y
        if self.around == "no_grad":
            with torch.no_grad():
                gate = (x * self.scale).sigmoid()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    other = self.up(x).relu()
            y = self.down(F.gelu(self.up(self.norm(x))) + other) * gate
            return F.cross_entropy(self.head(x + y).flatten(0, 1), labels.flatten()), y
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.dropout(self.mlp(x), self.dropout, self.training)
            with torch.autocast("cpu", enabled=False):
                z = y.float() * self.scale + x
            loss = F.cross_entropy(self.head(z).flatten(0, 1), labels.flatten())
        return loss, y


@pytest.mark.parametrize("around", ["checkpoint", "no_grad", "autocast"])
def test_computes_the_same(around: str) -> None:
    """In float64, where autocast casts nothing; and at tp=1 bit for bit with the casts."""
    model = Parts(around)
    report = autoshard.verify(model, 2, (TOKENS, TOKENS))
    assert report.ok, report
    assert report.plan.sharded_fraction == 1
    tp_model = autoshard.parallelize(model, 1, (TOKENS, TOKENS))
    for each in (model, tp_model):
        each(TOKENS, TOKENS)[0].backward()
    torch.testing.assert_close(
        [p.grad for p in tp_model.parameters()], [p.grad for p in model.parameters()], rtol=0, atol=0
    )


def test_casts_are_the_models_own() -> None:
    """Two ranks, in bfloat16 where the model says so: the same dtypes, and values to its precision."""
    report = autoshard.verify(Parts("autocast"), 2, (TOKENS, TOKENS), dtype=torch.float32)
    assert 1e-5 < report.max_relative_error < 2e-2  # bfloat16 has eight bits


def test_random_operators_are_cast_too() -> None:
    """Dropout under autocast: the numbers of one process, from the same seed."""
    model = Parts("autocast", dropout=0.5)
    tp_model = autoshard.parallelize(model, 1, (TOKENS, TOKENS))
    calls = [n for n in tp_model.graph.nodes if n.target is ops.with_autocast and n.args[1] is not None]
    assert [str(n.args[2]) for n in calls] == ["aten.dropout.default"]
    tp_model(TOKENS, TOKENS)[0].backward()


def test_the_innermost_autocast_counts() -> None:
    """Each operator keeps what it was traced under."""
    model = Parts("autocast")
    captured = capture(model, (TOKENS, TOKENS), {})
    graph = inline(captured.graph, captured.differentiable)
    found = {n.name: n.meta.get(AUTOCAST) for n in graph.nodes if n.op == "call_function"}
    modes = {name: mode and mode[1:3] for name, mode in found.items()}
    assert modes["embedding"] is None
    assert modes["gelu"] == modes["cross_entropy_loss_1"] == (torch.bfloat16, True)
    assert modes["mul"] is not None and modes["mul"][1] is False


class Other(nn.Module):
    """A nested graph of a kind that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        """x: [n, 4]."""
        return torch.cond(x.sum() > 0, lambda y: self.linear(y), lambda y: y - 1, (x,))


def test_an_unknown_nested_graph_is_refused_by_name() -> None:
    """With its place."""
    with pytest.raises(CaptureError, match="cond"):
        autoshard.verify(Other(), 2, (torch.ones(3, 4),))
