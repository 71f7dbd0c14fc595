"""A decoder-only language model composed from a spec."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.attention import Attention
from tests.models.mlp import mlp
from tests.models.norms import norm
from tests.models.positions import score_bias
from tests.models.spec import MAX_LENGTH, Spec

IGNORED = -100


class PreNormBlock(nn.Module):
    """Each part sees normed states and adds to the residual stream."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.attention_norm = norm(spec, spec.hidden)
        self.attention = Attention(spec)
        self.mlp_norm = norm(spec, spec.hidden)
        self.mlp = mlp(spec)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        states = states + self.dropout(self.attention(self.attention_norm(states), bias))
        states = states + self.dropout(self.mlp(self.mlp_norm(states)))
        return states


class PostNormBlock(nn.Module):
    """The sums of the residual stream are normed."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.attention = Attention(spec)
        self.attention_norm = norm(spec, spec.hidden)
        self.mlp = mlp(spec)
        self.mlp_norm = norm(spec, spec.hidden)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        states = self.attention_norm(states + self.dropout(self.attention(states, bias)))
        states = self.mlp_norm(states + self.dropout(self.mlp(states)))
        return states


class ParallelBlock(nn.Module):
    """Attention and MLP see the same normed states and add to the residual stream together."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.norm = norm(spec, spec.hidden)
        self.attention = Attention(spec)
        self.mlp = mlp(spec)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        normed = self.norm(states)
        mixed = self.dropout(self.attention(normed, bias))
        out: Tensor = mixed + self.dropout(self.mlp(normed)) + states
        return out


BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock, "parallel": ParallelBlock}


class RandomTransformer(nn.Module):
    """The language model; `forward` returns the loss and the logits."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.hidden)
        self.positions = nn.Embedding(MAX_LENGTH, spec.hidden) if spec.positions == "learned" else None
        self.score_bias = score_bias(spec)
        self.blocks = nn.ModuleList(BLOCKS[spec.block](spec) for _ in range(spec.layers))
        self.norm = nn.Identity() if spec.block == "post" else norm(spec, spec.hidden)
        self.output = nn.Linear(spec.hidden, spec.vocabulary, bias=spec.bias and not spec.tied)
        nn.init.normal_(self.embedding.weight, std=0.3)
        if spec.tied:
            self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.embedding(ids)
        if self.positions is not None:
            states = states + self.positions(torch.arange(ids.size(1), device=ids.device))
        bias = None if self.score_bias is None else self.score_bias(ids)
        for block in self.blocks:
            states = block(states, bias)
        logits = self.output(self.norm(states))
        return self.loss(logits, labels), logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over the labels that are not ignored."""
        if self.spec.shift:
            logits = logits[:, :-1].contiguous()
            labels = labels[:, 1:].contiguous()
        return F.cross_entropy(
            logits.view(-1, self.spec.vocabulary), labels.view(-1), ignore_index=IGNORED
        )
