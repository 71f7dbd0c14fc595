"""Mixtures of experts, in the forms that models write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoshard

HIDDEN, FFN, EXPERTS = 32, 64, 4
TOKENS = torch.arange(24).view(2, 12)


class Experts(nn.Module):
    """Top-2 of four experts and a shared one; ``form`` says how the experts are computed."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.table, self.norm = nn.Embedding(64, HIDDEN), nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, FFN) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, HIDDEN) / 4)
        self.shared = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
        self.last = nn.LayerNorm(HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [b, s] -> [b, s, 16]."""
        x = self.norm(self.table(ids))
        tokens = x.flatten(0, 1)
        scores = self.router(tokens)
        if self.form == "sigmoid":
            gates = scores.sigmoid()
        elif self.form == "soft":
            gates = scores.softmax(-1)
        else:
            best, chosen = scores.topk(2, -1)
            gates = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        computed = {"loop": self.loop, "sorted": self.sorted}.get(self.form, self.batched)
        y = computed(tokens, gates)
        out: Tensor = self.last(x + y.view_as(x) + self.shared(x))
        return out

    def batched(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """tokens: [t, h], gates: [t, e] -> [t, h]."""
        inner = F.gelu(torch.einsum("th,ehf->etf", tokens, self.up))
        each = torch.einsum("etf,efh->eth", inner, self.down)
        return (each * gates.t().unsqueeze(-1)).sum(0)

    def loop(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """The same, expert by expert, added into a result."""
        out = torch.zeros_like(tokens)
        rows = torch.arange(tokens.shape[0])
        for expert in range(EXPERTS):
            inner = F.gelu(tokens @ self.up[expert])
            out.index_add_(0, rows, (inner @ self.down[expert]) * gates[:, expert, None])
        return out

    def sorted(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """The same, each expert on its own tokens, as many as the data say."""
        weights, chosen = gates.topk(2, -1)
        order = chosen.flatten().argsort()
        counts = F.one_hot(chosen.flatten(), EXPERTS).sum(0).tolist()
        parts = tokens[order // 2].split(counts)
        each = [F.gelu(part @ self.up[e]) @ self.down[e] for e, part in enumerate(parts)]
        scaled = torch.cat(each) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // 2, scaled)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("form", ["sigmoid", "soft", "top2", "loop", "sorted"])
def test_experts_are_split(form: str, tp: int) -> None:
    """All but the router. Experts in one weight are split by experts: their sum is all-reduced once."""
    report = autoshard.verify(Experts(form), tp, (TOKENS,))
    assert report.ok, report
    shares = {p.name: p for p in report.plan.parameters}
    assert shares["up"].degree == shares["down"].degree == tp
    assert {w.name.split(" ")[0] for w in report.plan.replicated} <= {"linear"}  # the router
    assert shares["router.weight"].degree == 1 or form == "sigmoid"  # whose experts are independent
    if form not in ("loop", "sorted"):
        assert shares["up"].dim == shares["down"].dim == 0
    else:
        assert (shares["up"].dim, shares["down"].dim) == (2, 1)
