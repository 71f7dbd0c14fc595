"""Causal self-attention in the variant that a spec names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.norms import head_norm
from tests.models.positions import rotation
from tests.models.projections import projection, repeat_heads
from tests.models.spec import Spec


def causal(states: Tensor) -> Tensor:
    """Return the lower triangle of which query sees which key."""
    length = states.size(-2)
    return torch.ones(length, length, dtype=torch.bool, device=states.device).tril()


class Attention(nn.Module):
    """Projections, positions, scores and the weighted sum of values."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.projection = projection(spec)
        self.q_norm = head_norm(spec, spec.heads)
        self.k_norm = head_norm(spec, spec.kv_heads)
        self.rotation = rotation(spec)
        self.dropout = nn.Dropout(spec.dropout)
        self.o_proj = nn.Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.bias)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = self.projection(states)
        query = self.rotation(self.q_norm(query))
        key = self.rotation(self.k_norm(key))
        if self.spec.kernel == "sdpa":
            mixed = self.fused(query, key, value, bias)
        elif self.spec.repeat == "broadcast":
            mixed = self.broadcast(query, key, value, bias)
        else:
            mixed = self.eager(query, key, value, bias)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def fused(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return the attention of scaled_dot_product_attention."""
        grouped = self.spec.repeat == "gqa" and self.spec.group > 1
        if not grouped:
            key, value = repeat_heads(key, self.spec), repeat_heads(value, self.spec)
        if bias is not None:
            bias = bias.masked_fill(~causal(query), float("-inf"))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=bias is None,
            enable_gqa=grouped,
        )

    def eager(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return the attention of matrix products and a softmax."""
        key, value = repeat_heads(key, self.spec), repeat_heads(value, self.spec)
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.spec.head_dim)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~causal(query), torch.finfo(scores.dtype).min)
        return torch.matmul(self.dropout(scores.softmax(dim=-1)), value)

    def broadcast(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return the same, with the query heads grouped by the key head that serves them."""
        groups = (self.spec.kv_heads, self.spec.group)
        query = query.unflatten(1, groups)
        scores = query @ key.unsqueeze(2).transpose(-2, -1) * self.spec.head_dim**-0.5
        if bias is not None:
            scores = scores + bias.unflatten(1, groups)
        scores = scores.masked_fill(~causal(query), float("-inf"))
        weights: Tensor = self.dropout(F.softmax(scores, dim=-1))
        return (weights @ value.unsqueeze(2)).flatten(1, 2)
