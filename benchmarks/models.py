"""Plain single-GPU models for the benchmarks: a GPT, a Llama, and a stack of unlike MLPs.

Written as anyone would write them, with nothing of parallelism in them. Sizes are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """One configuration.

    Attributes:
        kind: ``gpt`` or ``llama``.
        hidden, heads, layers, vocabulary: of the model.
        sequence, batch: of one step.
        ffn: width of the MLP; 4 hidden for a GPT, 8/3 hidden for a Llama where not given.
        kv_heads: of a Llama; heads where not given.
        fused: one attention kernel; else scores, softmax and product as separate operators.
        dropout: probability.
    """

    kind: str
    hidden: int
    heads: int
    layers: int
    sequence: int
    batch: int
    vocabulary: int = 32000
    ffn: int = 0
    kv_heads: int = 0
    fused: bool = True
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """In one word."""
        return f"{self.kind}-{self.hidden}x{self.layers}-{self.batch}x{self.sequence}"


class GPTBlock(nn.Module):
    """Pre-norm attention with fused QKV, then an MLP with GELU."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.fused, self.dropout = s.heads, s.fused, s.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(s.hidden), nn.LayerNorm(s.hidden)
        self.qkv = nn.Linear(s.hidden, 3 * s.hidden)
        self.proj = nn.Linear(s.hidden, s.hidden)
        self.fc = nn.Linear(s.hidden, s.ffn or 4 * s.hidden)
        self.out = nn.Linear(s.ffn or 4 * s.hidden, s.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, h] -> [B, S, h]."""
        batch, length, hidden = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(hidden, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (hidden // self.heads) ** -0.5
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~mask, torch.finfo(x.dtype).min)
            y = F.dropout(scores.softmax(-1), self.dropout, self.training) @ v
        y = self.proj(y.transpose(1, 2).reshape(batch, length, hidden))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """Learned positions, output embedding tied to the input's, the loss inside."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.dropout = s.dropout
        self.tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.positions = nn.Embedding(s.sequence, s.hidden)
        self.layers = nn.ModuleList(GPTBlock(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.hidden)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [B, S] -> the mean loss."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class LlamaBlock(nn.Module):
    """RMS norms, grouped rotary attention, a gated MLP."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = s.heads, s.kv_heads or s.heads, s.hidden // s.heads
        ffn = s.ffn or -(-8 * s.hidden // 3 // 256) * 256
        self.norm_1, self.norm_2 = nn.RMSNorm(s.hidden), nn.RMSNorm(s.hidden)
        self.q = nn.Linear(s.hidden, s.heads * self.size, bias=False)
        self.k = nn.Linear(s.hidden, self.kv_heads * self.size, bias=False)
        self.v = nn.Linear(s.hidden, self.kv_heads * self.size, bias=False)
        self.o = nn.Linear(s.heads * self.size, s.hidden, bias=False)
        self.gate = nn.Linear(s.hidden, ffn, bias=False)
        self.up = nn.Linear(s.hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, h], cos and sin: [S, head size] -> [B, S, h]."""
        batch, length, _ = x.shape
        h = self.norm_1(x)
        q = self.q(h).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(h).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(h).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [B, heads, S, head size]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Llama(nn.Module):
    """Rotary positions, untied output, the loss inside."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.size = s.hidden // s.heads
        self.tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(LlamaBlock(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden)
        self.head = nn.Linear(s.hidden, s.vocabulary, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [B, S] -> the mean loss."""
        x = self.tokens(ids)
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        steps = torch.arange(0, self.size, 2, device=ids.device, dtype=torch.float32)
        angles = places[:, None] * 10000.0 ** (-steps / self.size)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class MLP(nn.Module):
    """A residual MLP of one width."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, h] -> [B, S, h]."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mixed(nn.Module):
    """MLPs of unlike width on one residual stream, and a small head: small and large layers mixed."""

    def __init__(self, hidden: int, widths: tuple[int, ...], vocabulary: int = 1000) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(MLP(hidden, ffn) for ffn in widths)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [B, S] -> the mean loss."""
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def build(shape: Shape) -> nn.Module:
    """The model of a configuration."""
    return GPT(shape) if shape.kind == "gpt" else Llama(shape)


def tokens(vocabulary: int, batch: int, sequence: int, device: str = "cpu") -> dict[str, Tensor]:
    """One batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, sequence), generator=generator).to(device)
    return {"ids": ids, "labels": ids.roll(-1, 1)}
