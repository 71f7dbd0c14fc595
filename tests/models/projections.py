"""Ways from hidden states to the heads of queries, keys and values.

Each returns queries [batch, head, position, feature], and keys and values with key heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.spec import Spec


class Separate(nn.Module):
    """One weight each."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.q_proj = nn.Linear(spec.hidden, spec.heads * spec.head_dim, bias=spec.bias)
        self.k_proj = nn.Linear(spec.hidden, spec.kv_heads * spec.head_dim, bias=spec.bias)
        self.v_proj = nn.Linear(spec.hidden, spec.kv_heads * spec.head_dim, bias=spec.bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(states).view(shape).transpose(1, 2)
        key = self.k_proj(states).view(shape).transpose(1, 2)
        value = self.v_proj(states).view(shape).transpose(1, 2)
        return query, key, value


class Split(nn.Module):
    """One weight whose output is split into all queries, all keys and all values."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.sizes = [count * spec.head_dim for count in (spec.heads, spec.kv_heads, spec.kv_heads)]
        self.qkv_proj = nn.Linear(spec.hidden, sum(self.sizes), bias=spec.bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = states.shape
        query, key, value = self.qkv_proj(states).split(self.sizes, dim=-1)
        query = query.view(batch, length, self.spec.heads, self.spec.head_dim)
        key = key.view(batch, length, self.spec.kv_heads, self.spec.head_dim)
        value = value.view(batch, length, self.spec.kv_heads, self.spec.head_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class Unbind(nn.Module):
    """One weight whose output is viewed as three times the heads and unbound."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.head_dim = spec.head_dim
        self.qkv = nn.Linear(spec.hidden, 3 * spec.heads * spec.head_dim, bias=spec.bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = states.shape
        qkv = self.qkv(states).view(batch, length, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value


class PerHead(nn.Module):
    """One weight whose output has query, key and value side by side within each head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.query_key_value = nn.Linear(spec.hidden, 3 * spec.heads * spec.head_dim, bias=spec.bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*states.shape[:-1], -1, 3 * self.head_dim)
        qkv = self.query_key_value(states).view(shape).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        return query, key, value


class PerGroup(nn.Module):
    """One weight whose output has, for each key head, its queries, its key and its value."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.kv_heads * (spec.group + 2) * spec.head_dim
        self.query_key_value = nn.Linear(spec.hidden, width, bias=spec.bias)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = states.shape
        fused: Tensor = self.query_key_value(states)
        qkv = fused.view(batch, length, -1, self.spec.group + 2, self.spec.head_dim)
        query = qkv[:, :, :, :-2].flatten(2, 3)
        key = qkv[:, :, :, -2]
        value = qkv[:, :, :, -1]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def projection(spec: Spec) -> nn.Module:
    """Return the module that the spec names."""
    kinds = {
        "separate": Separate,
        "split": Split,
        "unbind": Unbind,
        "per_head": PerHead,
        "per_group": PerGroup,
    }
    return kinds[spec.projection](spec)


def repeat_heads(states: Tensor, spec: Spec) -> Tensor:
    """Repeat each key head for its group of query heads."""
    if spec.group == 1:
        return states
    if spec.repeat == "interleave":
        return torch.repeat_interleave(states, spec.group, dim=1)
    batch, kv_heads, length, head_dim = states.shape
    states = states[:, :, None].expand(batch, kv_heads, spec.group, length, head_dim)
    return states.reshape(batch, kv_heads * spec.group, length, head_dim)
