"""Data parallel copies of a parallel module: FSDP2 by layer, or whole copies with averaged gradients.

The world has dp x tp ranks, and ``tp_model.mesh`` both dimensions (arXiv 1909.08053, section 5.2: the
paper's hybrid). Each copy gets a batch of its own; the gradient of a step is the mean over the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

from autoshard import failures
from autoshard.layers import Layer
from autoshard.module import ParallelModule

BUCKET = 64 * 2**20  # bytes that are summed at a time


def fully_shard(tp_model: ParallelModule, **options: Any) -> ParallelModule:
    """Let the data parallel copies share the parameters: FSDP2, a unit for each repeated layer.

    Args:
        tp_model: what ``parallelize`` gave; changed in place. Before the optimizer is made.
        options: of ``torch.distributed.fsdp.fully_shard``, the same for all units; ``mesh`` is the
            dimension ``dp`` of ``tp_model.mesh``.

    Raises:
        ValueError: there is one copy only, or the plan has degrees between 1 and tp: their parameters
            lie on a mesh of several tensor parallel dimensions, of which FSDP2 takes one.
    """
    mesh, tp = tp_model.mesh, tp_model.plan.tp
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is None or "dp" not in names:
        raise ValueError(f"fully_shard needs several copies: a world of dp x {tp} ranks with dp > 1")
    between = {n: d for n, d in tp_model.plan.degrees.items() if d not in (1, tp)}
    if between:
        name, degree = next(iter(between.items()))
        raise ValueError(
            f"{name} is split {degree} ways and tp is {tp}: a parameter then lies on more than one "
            "tensor parallel dimension, and FSDP2 takes one. Plan with degree='max' or an int, give "
            f"{name} degree 1 or {tp}, or keep whole copies with autoshard.average_gradients"
        )
    options.setdefault("mesh", mesh["dp"])
    for layer in [module for module in tp_model.modules() if isinstance(module, Layer)]:
        fsdp.fully_shard(layer, **options)
    fsdp.fully_shard(tp_model, **options)
    return tp_model


def average_gradients(tp_model: ParallelModule) -> None:
    """After a backward pass, give every copy the mean of the copies' gradients. Every rank calls it.

    For copies that are whole (plain replication), any plan. A parameter without a gradient on some of
    the copies counts as zero there; one without a gradient on all keeps none. Of accumulated gradients
    it is called once, before clipping.
    """
    mesh = tp_model.mesh
    if mesh is None or "dp" not in (mesh.mesh_dim_names or ()):
        return
    group = mesh.get_group("dp")
    copies, ranks = group.size(), dist.get_process_group_ranks(group)
    parameters = [p for p in tp_model.parameters() if p.requires_grad]
    device = torch.device(mesh.device_type)
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    with failures.explained("all-reduce of gradients", ranks):
        dist.all_reduce(has, group=group)
    for parameter, count in zip(parameters, has.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    shares = [_share(p.grad) for p in parameters if p.grad is not None]
    for bucket in _buckets(shares):
        flat = torch.cat([share.reshape(-1) for share in bucket])
        with failures.explained("all-reduce of gradients", ranks):
            dist.all_reduce(flat, group=group)
        flat /= copies
        for share, mean in zip(bucket, flat.split([s.numel() for s in bucket]), strict=True):
            share.copy_(mean.view_as(share))


def _share(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, together no larger than BUCKET where that is possible."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
