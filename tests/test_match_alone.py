"""Matmuls that no region covers, norms over all heads, and other forms of the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoshard
from autoshard import pipeline
from autoshard.plans import Plan

TOKENS = torch.arange(24).view(2, 12)


def verified(model: nn.Module, tp: int, *inputs: Any) -> Plan:
    """The plan of a split model that computes the same."""
    report = autoshard.verify(model, tp, inputs)
    assert report.ok, report
    return report.plan


class Transform(nn.Module):
    """A projection between norms, a router with two outputs, and a pooler that shares its weight."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.first, self.last = nn.Linear(32, 32), nn.LayerNorm(32)
        self.router = nn.Linear(32, 2)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.pooler = self.first if shared else nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids: [b, s] -> [b, s, 32], [b, 32]."""
        x = self.norm(self.table(ids))
        x = self.last(F.gelu(self.first(x)))
        gate = self.router(x).softmax(-1)
        y = self.down(F.gelu(self.up(x))) * gate[..., :1]
        return self.norm(x + y), torch.tanh(self.pooler(x[:, 0]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_matmul_between_norms_is_split_over_its_contraction(tp: int, shared: bool) -> None:
    """Every matmul but the router; each with one all-reduce each way, its bias added once."""
    plan = verified(Transform(shared), tp, TOKENS)
    assert [w.name.split(" ")[0] for w in plan.replicated] == ["linear_1"]
    first = plan.region("first")
    assert first.degree == tp and first.parameters == ("first.weight",)
    assert [line.split(" ")[0] for line in first.collectives].count("forward") == 1 + shared


def test_alone_takes_any_degree_or_none() -> None:
    """As any region."""
    plan = verified(Transform(), 4, TOKENS)
    for degree in (1, 2):
        other = plan.with_degree("first", degree)
        report = autoshard.verify(Transform(), 4, (TOKENS,), plan=other)
        assert report.ok and report.plan.region("first").degree == degree, report


class BothWays(nn.Module):
    """One weight, summed over its first dimension and over its second."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [b, s] -> [b, s, 32]."""
        x = self.norm(self.table(ids))
        out: Tensor = self.norm(F.linear(self.norm(x @ self.weight), self.weight) + x)
        return out


def test_a_weight_that_is_used_both_ways_stays_whole() -> None:
    """No dimension of it is summed by both matmuls."""
    plan = verified(BothWays(), 2, TOKENS)
    assert next(p for p in plan.parameters if p.name == "weight").degree == 1


class OddHeads(nn.Module):
    """Attention with three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(64, 24), nn.LayerNorm(24)
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [b, s] -> [b, s, 24]."""
        x = self.norm(self.table(ids))
        q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.norm(x + self.out(y.transpose(1, 2).flatten(2)))
        return out


def test_projections_of_heads_that_do_not_divide_are_split_alone() -> None:
    """Each call is in one region; the attention's own products stay whole."""
    plan = verified(OddHeads(), 2, TOKENS)
    nodes = [n for r in plan.regions for n in r.nodes]
    assert len(nodes) == len(set(nodes))
    assert {plan.region(name).degree for name in ("q", "k", "v", "out")} == {2}
    assert [w.name.split(" ")[0] for w in plan.replicated] == ["scaled_dot_product_attention"]


class Normed(nn.Module):
    """Attention whose queries and keys are normalized over all heads, or head by head."""

    heads = 4

    def __init__(self, norm: Callable[[int], nn.Module], per_head: bool = False) -> None:
        super().__init__()
        self.per_head = per_head
        self.table, self.before = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))
        width = 32 // self.heads if per_head else 32
        self.q_norm, self.k_norm = norm(width), norm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [b, s] -> [b, s, 32]."""
        x = self.before(self.table(ids))
        q, k, v = self.q(x), self.k(x), self.v(x)
        if not self.per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.before(x + self.out(y.transpose(1, 2).flatten(2)))
        return out


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "without weights": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "rms_norm": lambda n: nn.RMSNorm(n, eps=1e-6),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("per_head", [False, True])
def test_norms_of_queries_and_keys(norm: str, per_head: bool) -> None:
    """Attention is split by heads; only a norm over all of them is written out."""
    plan = verified(Normed(NORMS[norm], per_head=per_head), 4, TOKENS)
    assert plan.sharded_fraction == 1
    attention = next(r for r in plan.regions if r.kind == "attention")
    assert attention.degree == 4
    assert ("mean" in attention.nodes) == (not per_head)


def test_a_norm_is_fused_where_nothing_is_split() -> None:
    """At tp=1; and where the heads do not divide."""
    tp_model = autoshard.parallelize(Normed(nn.LayerNorm), 1, (TOKENS,))
    assert sum("layer_norm" in n.name for n in tp_model.graph.nodes) == 4
    program = pipeline.analyse(Normed(nn.LayerNorm), (TOKENS,), {}, 3)
    assert sum("layer_norm" in n.name for n in program.analysis.graph.nodes) == 4


def test_a_norm_in_low_precision_is_written_out_in_float32() -> None:
    """As the fused kernel computes it."""
    model = Normed(nn.LayerNorm).bfloat16()
    graph = pipeline.analyse(model, (TOKENS,), {}, 2).analysis.graph
    values = {n.name: n.meta["val"].dtype for n in graph.nodes if "rsqrt" in n.name or "mean" in n.name}
    assert len(values) == 6 and set(values.values()) == {torch.float32}
    report = autoshard.verify(Normed(nn.LayerNorm), 2, (TOKENS,), dtype=torch.bfloat16)
    assert max(report.outputs.values()) < 0.02  # bfloat16 has eight bits


class Loss(nn.Module):
    """A loss by ``nll_loss`` of ``log_softmax``."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [b, s] -> []."""
        scores = F.log_softmax(self.head(self.table(ids)).flatten(0, 1), -1, dtype=torch.float32)
        return F.nll_loss(scores, labels.flatten(), ignore_index=3)


def test_the_negative_likelihood_of_a_log_softmax_is_split_over_the_vocabulary() -> None:
    """Nothing gathers the logits."""
    plan = verified(Loss(), 4, TOKENS, TOKENS)
    assert plan.region("head").kind == "loss" and plan.region("head").degree == 4
    assert plan.sharded_fraction == 1


class Patches(nn.Module):
    """Patches of an image by a convolution, as a vision encoder's first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [b, 3, 8, 8] -> [b, 4, 32]."""
        x = self.norm(self.conv(pixels).flatten(2).transpose(1, 2).reshape(-1, 4, 32))
        if pixels.shape[2] != 8 or pixels.shape[3] != 8:
            raise ValueError("images of 8 x 8")
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


def test_patches_are_a_product() -> None:
    """Three channels cannot be split over two ranks; four rows of a patch can."""
    plan = verified(Patches(), 4, torch.randn(2, 3, 8, 8))
    assert plan.sharded_fraction == 1
    assert plan.region("conv").axes == ("4",)
