"""What several ranks hold alike, and whether they still do: parameters, buffers, random streams."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from autoshard import layouts
from autoshard.agreement import fingerprint
from autoshard.compat import shares
from autoshard.errors import RanksDifferError
from autoshard.mesh import Mesh, coordinate, dims_of_degree
from autoshard.parameters import Stored
from autoshard.random_streams import RandomStream


@dataclass(frozen=True)
class _Replica:
    """One thing that this rank holds, and which ranks of tp hold the same, first holders first."""

    name: str
    tensor: Tensor
    holders: list[list[int]]
    stream: RandomStream | None = None

    def take(self, value: Tensor, device: torch.device) -> None:
        """Replace it by another rank's `value`, which is flat."""
        if self.stream is not None:
            self.stream.unpack(value, device)
        else:
            self.tensor.copy_(value.view_as(self.tensor))


@torch.no_grad()
def check_replicas(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored | None], mesh: Mesh, repair: bool
) -> tuple[str, ...]:
    """Compare what ranks of a tensor parallel group must hold alike; every rank calls it.

    tensors: parameters and buffers by name. stored: how each is split. Costs one pass over what this
    rank holds, one all-gather of 16 bytes for each tensor, and one wait for the device; for each
    tensor that differs an all-gather of the ranks' copies, one at a time.

    Returns one line for each thing that differed and was repaired from its first holder; raises
    RanksDifferError with these lines, on every rank, where `repair` is not set.
    """
    if mesh.tp == 1:
        return ()
    group = mesh.group(mesh.tp)
    replicas = [*_tensors(tensors, stored, mesh), *_streams(mesh)]
    prints_here = torch.stack([fingerprint(r.tensor).to(mesh.device) for r in replicas])
    sizes_here = torch.tensor([r.tensor.numel() for r in replicas], device=mesh.device)
    here = torch.stack([prints_here, sizes_here], 1)
    table = torch.stack(group.all_gather(here)).tolist()  # [tp][replica][print, elements]
    ranks = mesh.tp_ranks()
    lines = []
    for index, replica in enumerate(replicas):
        prints = [row[index][0] for row in table]
        differing = [h for h in replica.holders if len({prints[r] for r in h}) > 1]
        if not differing:
            continue
        sizes = [row[index][1] * replica.tensor.itemsize for row in table]
        everyone = _gathered(replica.tensor, sizes, mesh)
        for holders in differing:
            first, *rest = holders
            others = [r for r in rest if prints[r] != prints[first]]
            far = [] if replica.stream else [_distance(everyone[r], everyone[first]) for r in others]
            lines.append(
                f"{replica.name}: rank {', '.join(str(ranks[r]) for r in others)} differs from rank "
                f"{ranks[first]}" + (f", by at most {max(far):.3g}" if far else "")
            )
            if repair and mesh.tp_rank in others:
                replica.take(everyone[first], mesh.device)
    if lines and not repair:
        raise RanksDifferError(
            f"{len(lines)} replicas have drifted apart:\n  " + "\n  ".join(lines) + "\nA parameter was "
            "changed on one rank only, ranks got different inputs (check_inputs=True), or a random "
            "operator outside the model decided on an update. check_replicas(repair=True) takes the "
            "first holder's values everywhere"
        )
    return tuple(lines)


def _tensors(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored | None], mesh: Mesh
) -> Iterator[_Replica]:
    known: dict[str, list[list[int]]] = {}
    for name, tensor in tensors.items():
        share = stored.get(name)
        own = shares([tensor])[0] if isinstance(tensor, DTensor) else tensor
        if (key := str(share)) not in known:
            known[key] = _holders([_held(share, rank, mesh) for rank in range(mesh.tp)])
        yield _Replica(name, own.detach(), known[key])


def _streams(mesh: Mesh) -> Iterator[_Replica]:
    for degree in mesh.degrees:
        stream = mesh.group(degree).stream
        places = [_place(rank, degree, mesh) for rank in range(mesh.tp)]
        name = "the random stream of " + (f"degree {degree}" if degree > 1 else "what is not split")
        yield _Replica(name, stream.packed(mesh.device), _holders(places), stream)


def _place(rank: int, degree: int, mesh: Mesh) -> int:
    return coordinate(rank, mesh.shape, dims_of_degree(mesh.tp, mesh.shape, degree))


def _held(share: Stored | None, rank: int, mesh: Mesh) -> Hashable:
    """The elements that a rank of tp stores, as something to compare."""
    if share is None:
        return ()
    return layouts.indices(share[1], _place(rank, share[2], mesh))


def _holders(held: Sequence[Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for rank, what in enumerate(held):
        groups.setdefault(what, []).append(rank)
    return [ranks for ranks in groups.values() if len(ranks) > 1]


def _gathered(tensor: Tensor, sizes: Sequence[int], mesh: Mesh) -> list[Tensor]:
    """Every rank's tensor, flat, by rank of tp; `sizes` in bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).to(mesh.device)
    padded = F.pad(data, (0, max(sizes) - data.numel()))
    everyone = mesh.group(mesh.tp).all_gather(padded)
    return [e[:size].clone().view(tensor.dtype) for e, size in zip(everyone, sizes, strict=True)]


def _distance(one: Tensor, other: Tensor) -> float:
    """``max|a - b|``; nan where one is not a number."""
    if one.shape != other.shape:
        return float("inf")
    kind = torch.complex128 if one.is_complex() else torch.float64
    return float((one.to(kind) - other.to(kind)).abs().max())
