"""Lines: shares of a value outside of the graph, as DTensors over the ranks that share it.

An output that leaves as a rank's share becomes a DTensor, and a DTensor that is given as an input
enters as the rank's share. Where fewer parts than ranks are held, ``2/2@2`` over four ranks, the mesh
has two dimensions: ``(Shard, Replicate)``. Gradients follow: ranks that hold the same element are given
parts of its gradient that add up to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from autoshard import ops
from autoshard.compat import as_dtensor, shares, subgroup
from autoshard.errors import AutoshardError
from autoshard.groups import ProcessGroupComm
from autoshard.layouts import Leaf, chunks
from autoshard.mesh import Mesh
from autoshard.parameters import Stored
from autoshard.sharded import SplitOutput


class Lines:
    """The meshes that the ranks' shares of values lie on, made when first needed."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._made: dict[tuple[int, int, int], tuple[DeviceMesh, tuple[Any, ...]]] = {}

    def leave(self, share: Tensor, split: SplitOutput) -> Tensor:
        """The DTensor of which this is the rank's share."""
        # torch.compile warns of a cache.
        of_layout = chunks.__wrapped__ if torch.compiler.is_compiling() else chunks
        found = of_layout(split.layout, split.degree)
        assert found is not None, split
        parts, stride = found
        mesh, marks = self._line(split.degree, parts, stride)
        placements = [Shard(split.dim) if mark else Replicate() for mark in marks]
        shape = torch.Size([*share.shape[: split.dim], split.size, *share.shape[split.dim + 1 :]])
        if torch.is_grad_enabled() and share.requires_grad and parts < split.degree:
            share = ops.shared(share, split.degree // parts)
        return as_dtensor(share, mesh, placements, shape)

    def enter(self, value: DTensor) -> Tensor:
        """The rank's share of an input; gradients flow back."""
        copied = any(p.is_replicate() for p in value.placements)
        if copied and torch.is_grad_enabled() and value.requires_grad:
            grads = [Partial() if p.is_replicate() else p for p in value.placements]
            if not all(p.is_replicate() for p in value.placements):
                return value.to_local(grad_placements=grads)
            return value.to_local()
        # One function of several tensors is faster, and torch.compile cannot follow it.
        return value.to_local() if torch.compiler.is_compiling() else shares([value])[0]

    def stored(self, value: DTensor) -> Stored | None:
        """(dimension, layout, degree) of an input as its placements say; None where it is whole.

        Raises:
            AutoshardError: it lies on other ranks than this model's, or otherwise than its outputs.
        """
        split = [i for i, p in enumerate(value.placements) if not p.is_replicate()]
        if not split:
            return None
        mesh, degree = value.device_mesh, value.device_mesh.size()
        placement = value.placements[split[0]]
        group = self.mesh.group(degree) if degree in self.mesh.degrees else None
        ranks = group.ranks if isinstance(group, ProcessGroupComm) else []
        elsewhere = mesh.mesh.flatten().tolist() != ranks
        if elsewhere or len(split) > 1 or not isinstance(placement, Shard):
            raise AutoshardError(
                f"an input is a DTensor placed {value.placements} on {mesh}: pass it as this model "
                "gave it, or whole, with full_tensor()"
            )
        dim = placement.dim % value.dim()
        parts, stride = mesh.shape[split[0]], math.prod(mesh.shape[split[0] + 1 :])
        return dim, Leaf(value.shape[dim], parts, stride), degree

    def _line(self, degree: int, parts: int, stride: int) -> tuple[DeviceMesh, tuple[bool, ...]]:
        """The mesh of a group whose rank r holds part ``r // stride % parts``, and for each of its
        dimensions whether it is that of the parts."""
        key = degree, parts, stride
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, degree: int, parts: int, stride: int) -> tuple[DeviceMesh, tuple[bool, ...]]:
        mesh = self.mesh
        if parts == degree:
            if mesh.tp_mesh is not None and mesh.tp_mesh.ndim == 1 and degree == mesh.tp:
                return mesh.tp_mesh, (True,)
            group = mesh.group(degree)
            assert isinstance(group, ProcessGroupComm)
            return DeviceMesh.from_group(group.process_group, mesh.device.type), (True,)
        group = mesh.group(degree)
        assert isinstance(group, ProcessGroupComm)
        sizes = [(degree // parts // stride, False), (parts, True), (stride, False)]
        sizes = [(size, mark) for size, mark in sizes if size > 1]
        grid = torch.tensor(group.ranks).view([size for size, _ in sizes])
        groups = [subgroup(line, mesh.device) for line in _through(grid, group.ranks[group.coordinate])]
        names = tuple("parts" if mark else f"copies{i}" for i, (_, mark) in enumerate(sizes))
        made = DeviceMesh.from_group(groups, mesh.device.type, mesh=grid, mesh_dim_names=names)
        return made, tuple(mark for _, mark in sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lines:
        return self


def _through(grid: Tensor, rank: int) -> list[list[int]]:
    """For each dimension of a grid of ranks, those on the line through one of them."""
    place = (grid == rank).nonzero()[0].tolist()
    lines = []
    for dim in range(grid.dim()):
        index: list[Any] = list(place)
        index[dim] = slice(None)
        lines.append(grid[tuple(index)].tolist())
    return lines
