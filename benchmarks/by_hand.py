"""Megatron-LM's tensor parallelism written out by hand for `benchmarks.models.GPT`: the baseline.

Split over all ranks of the world (arXiv 1909.08053, section 3): QKV and the MLP's first matrix by
columns, the others by rows, the embedding and the loss over the vocabulary. `f` is the identity forward
and an all-reduce backward, `g` the other way round. With ``overlap`` the input gradient's all-reduce of
a column linear runs under its weight gradient's GEMM, as in Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import GPT, GPTBlock

COLUMNS = ("fc.weight", "fc.bias", "q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias",
           "tokens.weight")  # fmt: skip
ROWS = ("proj.weight", "out.weight")

Column = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def share(name: str, whole: Tensor, rank: int, world: int) -> Tensor:
    """A rank's part of a parameter of `GPT`, a view: rows, columns, heads of q, k and v, or it all."""
    last = ".".join(name.split(".")[-2:])
    if last.startswith("qkv."):
        return whole.unflatten(0, (3, -1)).chunk(world, 1)[rank].flatten(0, 1)
    if last in COLUMNS:
        return whole.chunk(world, 0)[rank]
    return whole.chunk(world, 1)[rank] if last in ROWS else whole


def all_reduced(x: Tensor, op: str = "sum") -> Tensor:
    """Over all ranks, in place; a new tensor within torch.compile."""
    if torch.compiler.is_compiling():
        return functional.wait_tensor(functional.all_reduce(x, op, dist.group.WORLD))
    dist.all_reduce(x, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return x


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return all_reduced(dy.contiguous())


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return all_reduced(x)
        ctx.mark_dirty(x)
        return all_reduced(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class _Overlapped(torch.autograd.Function):
    """A column linear: dx = sum over ranks of dy W, under dW = dyᵀ x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight
        running = dist.all_reduce(dx, async_op=True)
        rows = dy.flatten(0, -2)
        dweight = rows.t() @ x.flatten(0, -2)
        dbias = rows.sum(0) if ctx.has_bias else None
        running.wait()
        return dx, dweight, dbias


class VocabCrossEntropy(torch.autograd.Function):
    """-log softmax(z)[y] for each token, z's classes split over the ranks; as Megatron-LM, in float32.

    What is kept is the rank's part of the softmax.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        z = logits.to(torch.float32, copy=True)
        width = z.shape[1]
        local = labels - dist.get_rank() * width
        elsewhere = (local < 0) | (local >= width)
        local = local.masked_fill(elsewhere, 0).unsqueeze(1)
        z = z.sub_(all_reduced(z.amax(1), "max").unsqueeze(1))
        picked = all_reduced(z.gather(1, local).squeeze(1).masked_fill(elsewhere, 0))
        softmax = z.exp_()
        total = all_reduced(softmax.sum(1))
        softmax.div_(total.unsqueeze(1))
        ctx.save_for_backward(softmax, local, elsewhere)
        ctx.dtype = logits.dtype
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        dz, local, elsewhere = ctx.saved_tensors
        dz.scatter_add_(1, local, -(~elsewhere).to(dz.dtype).unsqueeze(1))
        return dz.mul_(dloss.unsqueeze(1)).to(ctx.dtype), None


def f(x: Tensor) -> Tensor:
    """x -> x; its gradient is summed over the ranks."""
    return cast(Tensor, _F.apply(x))


def g(x: Tensor) -> Tensor:
    """The ranks' sum of x, in x's memory."""
    return cast(Tensor, _G.apply(x))


def _column(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(f(x), weight, bias)


def _overlapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, _Overlapped.apply(x, weight, bias))


class HandBlock(nn.Module):
    """This rank's heads and its part of the MLP, under the names of `GPTBlock`."""

    def __init__(self, block: GPTBlock, column: Column) -> None:
        super().__init__()
        self.size = block.qkv.in_features // block.heads
        self.column = column
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        for name in ("qkv", "proj", "fc", "out"):
            self.add_module(name, own_part(name, block.get_submodule(name)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, h], whole -> [B, S, h], whole."""
        batch, length, _ = x.shape
        y = self.column(self.ln_1(x), self.qkv.weight, self.qkv.bias)
        q, k, v = (t.view(batch, length, -1, self.size).transpose(1, 2) for t in y.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        x = x + (g(F.linear(y, self.proj.weight)) + self.proj.bias)
        y = F.gelu(self.column(self.ln_2(x), self.fc.weight, self.fc.bias), approximate="tanh")
        return x + (g(F.linear(y, self.out.weight)) + self.out.bias)


class HandGPT(nn.Module):
    """`GPT` on this rank of all; takes the model's own parameters, split ones as copies.

    Raises ValueError for a vocabulary or a number of heads that the ranks do not divide.
    """

    def __init__(self, model: GPT, overlap: bool = False) -> None:
        super().__init__()
        world = dist.get_world_size()
        vocabulary, heads = model.tokens.num_embeddings, cast(GPTBlock, model.layers[0]).heads
        if vocabulary % world or heads % world:
            raise ValueError(f"{world} ranks do not divide vocabulary {vocabulary} and {heads} heads")
        self.column = _overlapped if overlap else _column
        self.tokens = own_part("tokens", model.tokens)
        self.positions, self.norm = model.positions, model.norm
        self.layers = nn.ModuleList(HandBlock(cast(GPTBlock, b), self.column) for b in model.layers)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [B, S] -> the mean loss."""
        rows = self.tokens.weight.shape[0]
        local = ids - dist.get_rank() * rows
        elsewhere = (local < 0) | (local >= rows)
        x = F.embedding(local.masked_fill(elsewhere, 0), self.tokens.weight)
        x = g(x.masked_fill(elsewhere.unsqueeze(-1), 0))
        x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.column(self.norm(x), self.tokens.weight, None)
        losses = VocabCrossEntropy.apply(logits.flatten(0, 1), labels.flatten())
        return cast(Tensor, losses).mean()


def own_part(name: str, module: nn.Module) -> nn.Module:
    """The module with copies of this rank's part of its parameters; its sizes are no longer true."""
    for kind, whole in list(module.named_parameters()):
        part = share(f"{name}.{kind}", whole.detach(), dist.get_rank(), dist.get_world_size())
        setattr(module, kind, nn.Parameter(part.clone()))
    return module
