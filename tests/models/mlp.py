"""The MLP in the variant that a spec names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.spec import Spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Plain(nn.Module):
    """Two weights with an activation between them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.up_proj = nn.Linear(spec.hidden, spec.ffn, bias=spec.bias)
        self.down_proj = nn.Linear(spec.ffn, spec.hidden, bias=spec.bias)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.up_proj(states)))
        return out


class Gated(nn.Module):
    """An activated gate times another projection."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_proj = nn.Linear(spec.hidden, spec.ffn, bias=spec.bias)
        self.up_proj = nn.Linear(spec.hidden, spec.ffn, bias=spec.bias)
        self.down_proj = nn.Linear(spec.ffn, spec.hidden, bias=spec.bias)

    def forward(self, states: Tensor) -> Tensor:
        gate = self.activation(self.gate_proj(states))
        out: Tensor = self.down_proj(gate * self.up_proj(states))
        return out


class FusedGated(nn.Module):
    """The same with gate and projection in one weight."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_up_proj = nn.Linear(spec.hidden, 2 * spec.ffn, bias=spec.bias)
        self.down_proj = nn.Linear(spec.ffn, spec.hidden, bias=spec.bias)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(states).chunk(2, dim=-1)
        out: Tensor = self.down_proj(up * self.activation(gate))
        return out


def mlp(spec: Spec) -> nn.Module:
    """Return the module that the spec names."""
    kinds = {"plain": Plain, "gated": Gated, "fused": FusedGated}
    return kinds[spec.mlp](spec)
