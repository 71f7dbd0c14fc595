"""Modules from specs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz import spec as specs
from tests.fuzz.spec import Net, Placed
from tests.fuzz.steps import Program, causal
from tests.models.attention import Attention
from tests.models.case import seeded
from tests.models.mlp import mlp
from tests.models.norms import RMSNorm
from tests.models.positions import score_bias
from tests.models.spec import MAX_LENGTH

IGNORED = -100


class Attend(nn.Module):
    """Self-attention with the positions that it adds to its scores."""

    def __init__(self, spec: specs.Attend, hidden: int) -> None:
        super().__init__()
        inner = replace(spec.spec, hidden=hidden)
        self.bias = score_bias(inner)
        self.attention = Attention(inner)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, None if self.bias is None else self.bias(x[..., 0]))
        return out


class Cross(nn.Module):
    """Attention from the stream to other states."""

    def __init__(self, spec: specs.Cross, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        width = spec.heads * spec.head_dim
        self.module = None
        if spec.kernel == "module" and hidden % spec.heads == 0:
            self.module = nn.MultiheadAttention(hidden, spec.heads, bias=spec.bias, batch_first=True)
            return
        self.query = nn.Linear(hidden, width, bias=spec.bias)
        if spec.fused:
            self.both = nn.Linear(hidden, 2 * width, bias=spec.bias)
        else:
            self.key = nn.Linear(hidden, width, bias=spec.bias)
            self.value = nn.Linear(hidden, width, bias=spec.bias)
        self.out = nn.Linear(width, hidden, bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.module is not None:
            found: Tensor = self.module(x, memory, memory, need_weights=False)[0]
            return found
        if self.spec.fused:
            key, value = self.both(memory).chunk(2, -1)
        else:
            key, value = self.key(memory), self.value(memory)
        lanes = [
            t.unflatten(-1, (self.spec.heads, self.spec.head_dim)).transpose(1, 2)
            for t in (self.query(x), key, value)
        ]
        if self.spec.kernel == "sdpa":
            mixed = F.scaled_dot_product_attention(*lanes)
        else:
            scores = lanes[0] @ lanes[1].mT / math.sqrt(self.spec.head_dim)
            mixed = scores.softmax(-1) @ lanes[2]
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Experts(nn.Module):
    """Experts in one weight or as modules; every expert sees every token."""

    def __init__(self, spec: specs.Experts, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        ffn = 2 * spec.ffn if spec.gated else spec.ffn
        self.router = nn.Linear(hidden, spec.experts, bias=False)
        if spec.form == "modules":
            self.ups = nn.ModuleList(nn.Linear(hidden, ffn) for _ in range(spec.experts))
            self.downs = nn.ModuleList(nn.Linear(spec.ffn, hidden) for _ in range(spec.experts))
        else:
            self.up = nn.Parameter(torch.randn(spec.experts, hidden, ffn) / 4)
            self.down = nn.Parameter(torch.randn(spec.experts, spec.ffn, hidden) / 4)

    def act(self, inner: Tensor) -> Tensor:
        """[..., ffn] -> [..., ffn], or from twice that where it is gated."""
        if not self.spec.gated:
            return F.gelu(inner)
        gate, up = inner.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens)
        if self.spec.top:
            best, chosen = scores.topk(min(self.spec.top, self.spec.experts), -1)
            gates = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        else:
            gates = scores.softmax(-1)
        return self.computed(tokens, gates).view_as(x)

    def computed(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """tokens: [t, h], gates: [t, e] -> [t, h]."""
        if self.spec.form == "einsum":
            inner = self.act(torch.einsum("th,ehf->tef", tokens, self.up))
            return torch.einsum("tef,efh,te->th", inner, self.down, gates)
        if self.spec.form == "batched":
            many = tokens.expand(self.spec.experts, -1, -1)
            each = torch.bmm(self.act(torch.bmm(many, self.up)), self.down)
            return (each * gates.t().unsqueeze(-1)).sum(0)
        if self.spec.form == "slices":
            inner = torch.stack([self.act(tokens @ up) for up in self.up.unbind(0)])
            return torch.einsum("etf,efh,te->th", inner, self.down, gates)
        out = torch.zeros_like(tokens)
        for expert in range(self.spec.experts):
            if self.spec.form == "modules":
                made = self.downs[expert](self.act(self.ups[expert](tokens)))
            else:
                made = self.act(tokens @ self.up[expert]) @ self.down[expert]
            out = out + made * gates[:, expert, None]
        return out


class Mix(nn.Module):
    """A causal convolution over the sequence."""

    def __init__(self, spec: specs.Mix, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.entry = nn.Linear(hidden, spec.channels * (2 if spec.gated else 1), bias=spec.bias)
        groups = spec.channels if spec.grouped else 1
        self.conv = nn.Conv1d(
            spec.channels,
            spec.channels,
            spec.kernel,
            groups=groups,
            padding=spec.kernel - 1,
            bias=spec.bias,
        )
        self.exit = nn.Linear(spec.channels, hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        lanes = self.entry(x)
        gate = None
        if self.spec.gated:
            lanes, gate = lanes.chunk(2, -1)
        mixed = F.silu(self.conv(lanes.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        out: Tensor = self.exit(mixed if gate is None else mixed * F.silu(gate))
        return out


def norm(kind: str, size: int) -> nn.Module:
    """The norm of this name."""
    if kind == "none":
        return nn.Identity()
    return nn.LayerNorm(size) if kind == "layer" else RMSNorm(size)


def block(spec: specs.Block, hidden: int) -> nn.Module:
    """The block of a spec."""
    match spec:
        case specs.Attend():
            return Attend(spec, hidden)
        case specs.Feed():
            return mlp(replace(spec.spec, hidden=hidden))
        case specs.Cross():
            return Cross(spec, hidden)
        case specs.Experts():
            return Experts(spec, hidden)
        case specs.Mix():
            return Mix(spec, hidden)
        case specs.Steps():
            return Program(spec, hidden)
    raise TypeError(spec)


class Layer(nn.Module):
    """A block with its norm, dropout and scale."""

    def __init__(self, spec: Placed, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm = norm(spec.norm, hidden)
        self.block = block(spec.block, hidden)
        self.dropout = nn.Dropout(spec.dropout)
        self.scale = nn.Parameter(torch.ones(())) if spec.scaled else None

    def inner(self, x: Tensor, memory: Tensor) -> Tensor:
        """What the block adds."""
        seen = x if self.spec.place == "post" else self.norm(x)
        made = self.block(seen, memory) if isinstance(self.block, Cross) else self.block(seen)
        made = self.dropout(made)
        return made if self.scale is None else made * self.scale

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        made = self.inner(x, memory)
        if self.spec.place == "bare":
            return made
        out: Tensor = self.norm(x + made) if self.spec.place == "post" else x + made
        return out


class Model(nn.Module):
    """The language model; `forward` returns what the spec's head says."""

    def __init__(self, spec: Net) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.hidden
        self.embedding = nn.Embedding(spec.vocabulary, hidden)
        nn.init.normal_(self.embedding.weight, std=0.5)
        if spec.positions == "learned":
            self.places = nn.Parameter(torch.randn(MAX_LENGTH, hidden) / 4)
        if spec.positions == "buffer":
            self.register_buffer("places", torch.randn(MAX_LENGTH, hidden) / 4)
        self.layers = nn.ModuleList()
        self.order: list[int] = []
        for placed in spec.blocks:
            if isinstance(placed.block, specs.Again):
                if self.layers:
                    self.order.append(len(self.layers) - 1 - placed.block.back % len(self.layers))
                continue
            self.order.append(len(self.layers))
            self.layers.append(Layer(placed, hidden))
        self.norm = norm(spec.norm, hidden)
        self.output = nn.Linear(hidden, spec.vocabulary, bias=spec.head_bias)
        if spec.tied:
            self.output.weight = self.embedding.weight
        parameters = list(self.parameters())
        for index in spec.frozen:
            parameters[index % len(parameters)].requires_grad_(False)
        self.embedding.weight.requires_grad_(True)

    def forward(self, ids: Tensor, labels: Tensor) -> object:
        x = self.embedding(ids)
        if self.spec.positions != "none":
            x = x + self.places[: ids.shape[1]]
        memory = x
        waiting: list[Tensor] = []
        for index in self.order:
            layer = self.layers[index]
            if layer.spec.place == "parallel":
                waiting.append(layer.inner(x, memory))
                continue
            x = layer(x, memory)
            for made in waiting:
                x = x + made
            waiting = []
        x = self.norm(sum(waiting, x))
        if self.spec.head == "states":
            return x, memory
        logits = self.output(x)
        if self.spec.softcap:
            logits = 5 * torch.tanh(logits / 5)
        if self.spec.head == "logits":
            return logits
        if self.spec.head == "mean":
            return logits.mean(1)
        loss = self.loss(logits, labels)
        if self.spec.head == "loss":
            return loss
        if self.spec.head == "dict":
            return {"loss": loss, "logits": logits, "states": x}
        return loss, logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy over the labels that are not ignored."""
        if self.spec.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.reshape(-1, self.spec.vocabulary), labels.reshape(-1)
        if self.spec.head == "smooth":
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=0.1)
        if self.spec.head == "weighted":
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
            return (losses * (1 + torch.arange(losses.numel()) % 3)).sum()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def build(spec: Net, *, seed: int = 0) -> Model:
    """The model in train mode, with parameters drawn from the seed."""
    return seeded(lambda: Model(spec), seed)


def inputs(spec: Net, *, batch: int = 3, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and labels, of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(spec.vocabulary, (batch, length), generator=generator)
    labels = torch.randint(spec.vocabulary, (batch, length), generator=generator)
    if batch * length > 2:
        labels[0, 0] = IGNORED
    return {"ids": ids, "labels": labels}


def drops(spec: Net, training: bool) -> bool:
    """Whether dropout draws anything."""
    return (training and any(isinstance(m, nn.Dropout) and m.p for m in build(spec).modules())) or (
        training
        and any(
            isinstance(p.block, specs.Steps) and any(s.op == "dropout" for s in p.block.steps)
            for p in spec.blocks
        )
    )


__all__ = ["IGNORED", "Model", "build", "causal", "drops", "inputs"]
