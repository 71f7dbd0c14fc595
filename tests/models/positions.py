"""Positions that enter attention: rotations of the heads and biases of the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.models.spec import Spec

BUCKETS = 8
MAX_DISTANCE = 16


class Rotary(nn.Module):
    """Rotates the first half of each head against the second."""

    inverse: Tensor

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        inverse = base ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        self.register_buffer("inverse", inverse, persistent=False)

    def angles(self, states: Tensor) -> Tensor:
        """Return the angles [position, half a head]."""
        steps = torch.arange(states.size(-2), device=states.device).to(self.inverse.dtype)
        return torch.outer(steps, self.inverse)

    def forward(self, states: Tensor) -> Tensor:
        angles = self.angles(states)
        angles = torch.cat((angles, angles), dim=-1)
        first, second = states.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return states * angles.cos() + rotated * angles.sin()


class Interleaved(Rotary):
    """Rotates each even feature against the odd one after it."""

    def forward(self, states: Tensor) -> Tensor:
        angles = self.angles(states)
        cos, sin = angles.cos(), angles.sin()
        even, odd = states[..., ::2], states[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return pairs.flatten(-2)


class ALiBi(nn.Module):
    """Lowers the scores by the distance times a slope per head."""

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.size(1), device=ids.device)
        distance = (steps[None, :] - steps[:, None]).to(self.slopes.dtype)
        return (self.slopes[:, None, None] * distance).unsqueeze(0)


class Relative(nn.Module):
    """Adds to the scores what a table holds for the bucket of the distance."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, heads)

    def buckets(self, distance: Tensor) -> Tensor:
        """Return a bucket for each near distance, and shared ones for the far."""
        exact = BUCKETS // 2
        scale = (BUCKETS - exact) / math.log(MAX_DISTANCE / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return torch.where(distance < exact, distance, far.clamp(max=BUCKETS - 1))

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.size(1), device=ids.device)
        distance = (steps[:, None] - steps[None, :]).clamp(min=0)
        values: Tensor = self.table(self.buckets(distance))
        return values.permute(2, 0, 1).unsqueeze(0)


def rotation(spec: Spec) -> nn.Module:
    """Return what rotates queries and keys."""
    if spec.positions == "rotary":
        return Rotary(spec.head_dim)
    if spec.positions == "interleaved":
        return Interleaved(spec.head_dim)
    return nn.Identity()


def score_bias(spec: Spec) -> nn.Module | None:
    """Return what the layers share of the scores [1, head, query, key], if anything."""
    if spec.positions == "alibi":
        return ALiBi(spec.heads)
    if spec.positions == "relative":
        return Relative(spec.heads)
    return None
