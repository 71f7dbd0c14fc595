"""Sequence parallelism written out by hand for `benchmarks.models.GPT`: is it worth building?

As Korthikanti et al. (arXiv 2205.05198, section 4.2.2): what is whole on every rank between matmuls,
norms, residuals and biases, is computed for each rank's part of the tokens alone. An all-reduce becomes
a reduce-scatter behind a row-parallel product and an all-gather before the next column-parallel one.
On GPUs that see each other's memory both run inside of their matmul (`torch.ops.symm_mem`).

Tokens are rows, [B·S, h], of which each rank has as many, in order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.by_hand import VocabCrossEntropy, own_part
from benchmarks.models import GPT, GPTBlock


def in_matmuls() -> str | None:
    """The group's name, where collectives can run inside of matmuls: NCCL's ranks on one host."""
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    if dist.get_backend() != "nccl" or dist.get_world_size() > torch.cuda.device_count():
        return None
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    return group.group_name


def gathered(x: Tensor) -> Tensor:
    """[t, n] of each rank -> [t world, n]."""
    if torch.compiler.is_compiling():
        whole = functional.all_gather_tensor(x, 0, dist.group.WORLD)
        return cast(Tensor, functional.wait_tensor(whole))
    whole = x.new_empty(x.shape[0] * dist.get_world_size(), x.shape[1])
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def scattered(x: Tensor) -> Tensor:
    """[T, n] -> the sum over the ranks of this rank's tokens, [T / world, n]."""
    if torch.compiler.is_compiling():
        part = functional.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD)
        return cast(Tensor, functional.wait_tensor(part))
    part = x.new_empty(x.shape[0] // dist.get_world_size(), x.shape[1])
    dist.reduce_scatter_tensor(part, x.contiguous())
    return part


def gather_matmul(x: Tensor, weight: Tensor, name: str | None) -> tuple[Tensor, Tensor]:
    """x: [t, n], weight: [n, m] -> x of all ranks, and that by the weight. name: of `in_matmuls`."""
    if name is None:
        whole = gathered(x)
        return whole, whole @ weight
    whole, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), [weight], 0, name)
    return whole, y


def matmul_scatter(x: Tensor, weight: Tensor, name: str | None) -> Tensor:
    """x: [T, n], weight: [n, m] -> this rank's tokens of the sum of x weight."""
    if name is None:
        return scattered(x @ weight)
    y = torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), weight, "sum", 0, name)
    return cast(Tensor, y)


class _Column(torch.autograd.Function):
    """y = x W + b of all tokens; the gathered x is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, name: str | None
    ) -> Tensor:
        whole, y = gather_matmul(x, weight.t(), name)
        ctx.save_for_backward(whole, weight)
        ctx.has_bias, ctx.name = bias is not None, name
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        whole, weight = ctx.saved_tensors
        dx = matmul_scatter(dy, weight, ctx.name)
        return dx, dy.t() @ whole, dy.sum(0) if ctx.has_bias else None, None


class _Row(torch.autograd.Function):
    """This rank's tokens of y = the sum over the ranks of x W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name = name
        return matmul_scatter(x, weight.t(), name)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        whole, dx = gather_matmul(dy, weight, ctx.name)
        return dx, whole.t() @ x, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return scattered(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return gathered(dy)


class _Summed(torch.autograd.Function):
    """Parameters that each rank uses for its tokens: their gradients are one sum at the end."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in grads])
        return tuple(p.view_as(g).clone() for p, g in zip(parts, grads, strict=True))


class SequenceBlock(nn.Module):
    """This rank's heads, its part of the MLP and its tokens, under the names of `GPTBlock`."""

    def __init__(self, block: GPTBlock) -> None:
        super().__init__()
        self.size, self.name = block.qkv.in_features // block.heads, in_matmuls()
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        for name in ("qkv", "proj", "fc", "out"):
            self.add_module(name, own_part(name, block.get_submodule(name)))

    def shared(self) -> list[nn.Parameter]:
        """What is whole on every rank."""
        found = (self.ln_1.weight, self.ln_1.bias, self.ln_2.weight, self.ln_2.bias, self.proj.bias)
        return [*found, self.out.bias]

    def forward(self, x: Tensor, batch: int, *shared: Tensor) -> Tensor:
        """x: [t, h], this rank's tokens -> [t, h]; shared: the values of `shared()`."""
        w_1, b_1, w_2, b_2, proj, out = shared
        y = F.layer_norm(x, (x.shape[1],), w_1, b_1, self.ln_1.eps)
        y = cast(Tensor, _Column.apply(y, self.qkv.weight, self.qkv.bias, self.name))
        heads = y.shape[1] // 3 // self.size
        q, k, v = (t.view(batch, -1, heads, self.size).transpose(1, 2) for t in y.chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
        x = x + (cast(Tensor, _Row.apply(y.flatten(1), self.proj.weight, self.name)) + proj)
        y = F.layer_norm(x, (x.shape[1],), w_2, b_2, self.ln_2.eps)
        y = cast(Tensor, _Column.apply(y, self.fc.weight, self.fc.bias, self.name))
        y = F.gelu(y, approximate="tanh")
        return x + (cast(Tensor, _Row.apply(y, self.out.weight, self.name)) + out)


class SequenceGPT(nn.Module):
    """`GPT` on this rank of all, with its part of the tokens between matmuls.

    Raises ValueError for a vocabulary or a number of heads that the ranks do not divide.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        world = dist.get_world_size()
        vocabulary, heads = model.tokens.num_embeddings, cast(GPTBlock, model.layers[0]).heads
        if vocabulary % world or heads % world:
            raise ValueError(f"{world} ranks do not divide vocabulary {vocabulary} and {heads} heads")
        self.name = in_matmuls()
        self.tokens = own_part("tokens", model.tokens)
        self.positions, self.norm = model.positions, model.norm
        self.layers = nn.ModuleList(SequenceBlock(cast(GPTBlock, b)) for b in model.layers)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [B, S] -> the mean loss; the ranks divide B·S."""
        blocks = [cast(SequenceBlock, layer) for layer in self.layers]
        shared = [p for block in blocks for p in block.shared()]
        shared = [*shared, self.positions.weight, self.norm.weight, self.norm.bias]
        *values, positions, weight, bias = cast(tuple[Tensor, ...], _Summed.apply(*shared))
        rank, rows = dist.get_rank(), self.tokens.weight.shape[0]
        local = ids.flatten() - rank * rows
        elsewhere = (local < 0) | (local >= rows)
        x = F.embedding(local.masked_fill(elsewhere, 0), self.tokens.weight)
        x = cast(Tensor, _Scatter.apply(x.masked_fill(elsewhere.unsqueeze(-1), 0)))
        places = torch.arange(rank * x.shape[0], (rank + 1) * x.shape[0], device=ids.device)
        x = x + F.embedding(places % ids.shape[1], positions)
        each = len(values) // len(blocks)
        for place, layer in enumerate(self.layers):
            x = layer(x, ids.shape[0], *values[place * each : (place + 1) * each])
        x = F.layer_norm(x, (x.shape[1],), weight, bias, self.norm.eps)
        logits = cast(Tensor, _Column.apply(x, self.tokens.weight, None, self.name))
        losses = VocabCrossEntropy.apply(logits, labels.flatten())
        return cast(Tensor, losses).mean()
