"""`benchmarks.models.GPT` split by what others offer: Megatron-core's layers, and PyTorch's DTensors.

Each is built from the whole model on every rank, and keeps its parameters' names, so that gradients
can be compared with the model's own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.by_hand import share
from benchmarks.models import GPT, GPTBlock


class QKV(nn.Module):
    """A fused linear as three: DTensors split `[q | k | v]` in one only across their borders."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights, biases = fused.weight.detach().chunk(3), fused.bias.detach().chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.add_module(name, linear)


class UnfusedBlock(nn.Module):
    """`GPTBlock` with q, k and v apart, each rank having some of the heads."""

    def __init__(self, block: GPTBlock) -> None:
        super().__init__()
        self.size = block.qkv.in_features // block.heads
        self.ln_1, self.ln_2, self.proj, self.fc, self.out = (
            block.ln_1, block.ln_2, block.proj, block.fc, block.out,
        )  # fmt: skip
        self.qkv = QKV(block.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, h] -> [B, S, h]."""
        batch, length, _ = x.shape
        y = self.ln_1(x)
        q, k, v = (
            linear(y).view(batch, length, -1, self.size).transpose(1, 2)
            for linear in (self.qkv.q, self.qkv.k, self.qkv.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, -1))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class UntiedGPT(nn.Module):
    """`GPT` with its output as a module of its own, which parallelize_module can name."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.tokens, self.positions, self.norm = model.tokens, model.positions, model.norm
        self.layers = nn.ModuleList(UnfusedBlock(cast(GPTBlock, block)) for block in model.layers)
        self.head = nn.Linear(1, 1, bias=False, device="meta")
        self.head.weight = model.tokens.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [B, S] -> the mean loss, a DTensor."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def by_dtensors(model: GPT, device: torch.device) -> nn.Module:
    """Colwise, rowwise, and the vocabulary split; the step must run within `loss_parallel()`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    made = UntiedGPT(model)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(made, mesh, {"tokens": RowwiseParallel(input_layouts=Replicate()), "head": head})
    made.head.weight = made.tokens.weight  # tied: both lie by rows
    for layer in made.layers:
        columns = {name: ColwiseParallel() for name in ("qkv.q", "qkv.k", "qkv.v", "fc")}
        parallelize_module(
            layer, mesh, {**columns, "proj": RowwiseParallel(), "out": RowwiseParallel()}
        )
    return made


def by_megatron(model: GPT, device: torch.device) -> nn.Module:
    """Megatron-core's own linears, embedding and loss in the model's structure.

    Raises ImportError where there is no Megatron-core.
    """
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    world = dist.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(world, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    weight = model.tokens.weight
    config = ModelParallelConfig(
        tensor_model_parallel_size=world, params_dtype=weight.dtype, gradient_accumulation_fusion=False
    )
    common: dict[str, Any] = {"config": config, "init_method": lambda t: t}
    vocabulary, hidden = weight.shape

    class Column(ColumnParallelLinear):  # type: ignore[misc]
        def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
            return cast(Tensor, super().forward(x, weight)[0])

    class Row(RowParallelLinear):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, super().forward(x)[0])

    def filled(made: nn.Module, name: str, whole: nn.Module) -> nn.Module:
        made = made.to(device)
        with torch.no_grad():
            for kind, parameter in made.named_parameters():
                source = whole.get_parameter(kind)
                parameter.copy_(share(f"{name}.{kind}", source, dist.get_rank(), world))
        return made

    class Block(nn.Module):
        def __init__(self, block: GPTBlock) -> None:
            super().__init__()
            self.size = block.qkv.in_features // block.heads
            self.ln_1, self.ln_2 = block.ln_1, block.ln_2
            for name, kind in (("qkv", Column), ("proj", Row), ("fc", Column), ("out", Row)):
                whole = cast(nn.Linear, block.get_submodule(name))
                sizes = whole.in_features, whole.out_features
                if kind is Column:
                    made = Column(*sizes, bias=True, gather_output=False, **common)
                else:
                    made = Row(*sizes, bias=True, input_is_parallel=True, skip_bias_add=False, **common)
                self.add_module(name, filled(made, name, whole))

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = (
                t.view(batch, length, -1, self.size).transpose(1, 2)
                for t in self.qkv(self.ln_1(x)).chunk(3, dim=-1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).reshape(batch, length, -1))
            return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))

    class Megatron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            embedding = VocabParallelEmbedding(vocabulary, hidden, **common)
            self.tokens = filled(embedding, "tokens", model.tokens)
            self.positions, self.norm = model.positions, model.norm
            self.layers = nn.ModuleList(Block(cast(GPTBlock, block)) for block in model.layers)
            self.head = Column(
                hidden, vocabulary, bias=False, gather_output=False, skip_weight_param_allocation=True,
                **common,
            )  # fmt: skip

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            for layer in self.layers:
                x = layer(x)
            logits = self.head(self.norm(x), self.tokens.weight).flatten(0, 1)
            losses = vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.reshape(-1, 1))
            return cast(Tensor, losses).mean()

    return Megatron()
