"""Parameters on the ranks: DTensors under the model's own names.

A parameter is stored as this rank's share. Where the share is what ``torch.chunk`` would give, the
DTensor is the model's parameter, split. A fused weight's share is several blocks of rows
(``[q | k | v]``, each split): its DTensor holds the rows in rank order, and ``state_dict`` puts them
back into the model's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from autoshard import layouts
from autoshard.compat import shares
from autoshard.mesh import Mesh
from autoshard.paths import layer_of

Stored = tuple[int, layouts.Layout, int]  # dimension, layout, degree


def make_parameter(whole: Tensor, stored: Stored | None, mesh: Mesh) -> Tensor:
    """This rank's part of a whole parameter on the mesh's device; room for it, if it is on meta."""
    share = whole.detach()
    if share.is_meta:
        shape = list(share.shape)
        if stored is not None:
            coordinate = mesh.group(stored[2]).coordinate
            shape[stored[0]] = layouts.share_size(stored[1], coordinate)
        share = torch.empty(shape, dtype=share.dtype, device=mesh.device)
        return as_dtensor(share, whole.shape, stored, mesh)
    if stored is not None:
        share = layouts.local_part(share, stored[0], stored[1], mesh.group(stored[2]).coordinate)
    share = share.to(mesh.device, copy=True).contiguous()
    return as_dtensor(share, whole.shape, stored, mesh)


def as_dtensor(share: Tensor, shape: torch.Size, stored: Stored | None, mesh: Mesh) -> Tensor:
    """A rank's share as a DTensor of the whole shape; a plain tensor without a mesh."""
    if mesh.tp_mesh is None:
        return share
    placements = mesh.placements(*((stored[2], stored[0]) if stored else (1, None)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        share, mesh.tp_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def local(parameters: Mapping[str, Tensor], together: bool = False) -> dict[str, Tensor]:
    """The shares that the graph computes on; gradients flow back into the DTensors, layer by layer.

    together: they are one layer's, and their gradients come when all of them are there.
    """
    found = dict(parameters)
    if torch.compiler.is_compiling():
        return {n: p.to_local() if isinstance(p, DTensor) else p for n, p in found.items()}
    layers: dict[str, dict[str, DTensor]] = {}
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            layers.setdefault("" if together else _owner(name), {})[name] = parameter
    for layer in layers.values():
        found.update(zip(layer, shares(list(layer.values())), strict=True))
    return found


@cache
def _owner(name: str) -> str:
    """The layer that has the parameter, else the module."""
    path = name.rpartition(".")[0]
    return layer_of(path) or path


@cache
def notice_steps() -> None:
    """Have autograd know that an optimizer wrote into shares, once in a process.

    A backward pass behind the step, of a forward before it, is an error with plain tensors, whose
    versions tell. Operators on DTensors leave the versions of their shares as they are, those of lists
    (``foreach=True``) the DTensors' too.
    """
    register_optimizer_step_post_hook(_written)


def _written(optimizer: Optimizer, *args: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                increment_version(parameter._local_tensor)


def in_model_order(stored: Stored | None) -> bool:
    """Whether the DTensor's rows are in the model's order."""
    return stored is None or layouts.is_contiguous(stored[1], stored[2])


def whole(parameter: Tensor, stored: Stored | None) -> Tensor:
    """The model's own tensor, gathered; every rank calls it."""
    if not isinstance(parameter, DTensor):
        return parameter
    full = parameter.full_tensor()
    if stored is None or in_model_order(stored):
        return full
    return layouts.whole(full, stored[0], stored[1], stored[2])


def to_state(parameter: Tensor, stored: Stored | None) -> Tensor:
    """The parameter as it stands in a state dict: a DTensor in the model's order."""
    if not isinstance(parameter, DTensor) or in_model_order(stored):
        return parameter
    full = whole(parameter, stored).detach()
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def in_ranks_order(value: DTensor, stored: Stored | None) -> DTensor:
    """The inverse of ``to_state`` for what lies as a parameter does: its optimizer's state."""
    if stored is None or in_model_order(stored):
        return value
    dim, layout, degree = stored
    rows = torch.tensor([i for r in range(degree) for i in layouts.indices(layout, r)])
    full = value.full_tensor()
    full = full.index_select(dim, rows.to(full.device))
    return distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)


def from_state(value: Tensor, stored: Stored | None, own: Tensor, mesh: Mesh) -> Tensor:
    """The inverse of ``to_state`` for the parameter `own`; a plain whole tensor is taken too."""
    if isinstance(own, DTensor) and own.device_mesh != mesh.tp_mesh:  # split further, by FSDP2
        if not isinstance(value, DTensor):
            value = value.to(own.device)
            value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
        return in_ranks_order(value, stored)
    if isinstance(value, DTensor):
        if in_model_order(stored):
            return value
        value = value.full_tensor()
    if mesh.tp_mesh is None:
        return value
    return make_parameter(value, stored, mesh)


def agree(tensors: Mapping[str, Tensor], mesh: Mesh) -> list[str]:
    """Give every rank the first rank's values, where they differ; returns the names that did.

    Ranks that built their model from different seeds would split different models.
    """
    if mesh.device_mesh is None:
        return []
    sums = torch.stack([_checksum(t) for t in tensors.values()]) if tensors else torch.zeros(0)
    sums = sums.to(mesh.device)
    different: dict[str, None] = {}
    for dim in reversed(range(mesh.device_mesh.ndim)):
        group = mesh.device_mesh.get_group(dim)
        first = dist.get_global_rank(group, 0)
        expected = sums.clone()
        dist.broadcast(expected, first, group=group)
        unequal = (expected != sums).to(torch.int32)
        dist.all_reduce(unequal, group=group)
        for index, (name, tensor) in enumerate(tensors.items()):
            if unequal[index]:
                different[name] = None
                value = tensor.detach().to(mesh.device).contiguous()
                dist.broadcast(value, first, group=group)
                with torch.no_grad():
                    tensor.copy_(value)
        if different:
            sums = torch.stack([_checksum(t) for t in tensors.values()]).to(mesh.device)
    return list(different)


def _checksum(tensor: Tensor) -> Tensor:
    """A number that two different tensors hardly share: bytes weighted by position."""
    flat = tensor.detach().contiguous().view(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.float64)
    numbers = flat.to(torch.float64) if not flat.is_complex() else flat.abs().to(torch.float64)
    step = max(1, numbers.numel() // 65536)
    sample = numbers[::step]
    weights = torch.arange(1, sample.numel() + 1, dtype=torch.float64, device=sample.device).sqrt()
    return (numbers.sum() + (sample * weights).sum()).cpu()
