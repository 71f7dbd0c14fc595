"""Norms of the hidden states and of the heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.spec import Spec


class RMSNorm(nn.Module):
    """Divide by the root of the mean of squares over the last dimension."""

    def __init__(self, *shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight * (states * torch.rsqrt(variance + self.eps))


def norm(spec: Spec, size: int) -> nn.Module:
    """Return the norm over a last dimension of this size."""
    if spec.norm == "rms":
        return RMSNorm(size)
    return nn.LayerNorm(size, bias=spec.bias)


def head_norm(spec: Spec, heads: int) -> nn.Module:
    """Return the norm of heads laid out as [batch, head, position, feature]."""
    if spec.qk_norm == "none":
        return nn.Identity()
    if spec.qk_norm == "shared":
        return norm(spec, spec.head_dim)
    return RMSNorm(heads, 1, spec.head_dim)
