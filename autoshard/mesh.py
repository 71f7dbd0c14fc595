"""Where ranks stand: the mesh of the parameters, and the group in which each degree splits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

from autoshard.compat import inherit_timeout, is_nccl
from autoshard.failures import answer_roll_calls
from autoshard.groups import Group, Lane, ProcessGroupComm, Room, SingleGroup
from autoshard.random_streams import RandomStream, group_seed


def tp_mesh_shape(tp: int, degrees: Iterable[int]) -> tuple[int, ...]:
    """The shape of the mesh on which the parameters of one tensor parallel group live.

    `(tp,)` while every degree is 1 or tp, which is what FSDP2 and `loss_parallel` ask for; else
    the prime factors of tp, ascending, so that every divisor of tp is a product of dimensions.
    Raises ValueError for a degree that does not divide tp.
    """
    wrong = [d for d in degrees if d < 1 or tp % d]
    if wrong:
        raise ValueError(f"degrees {wrong} do not divide tp={tp}: use {_divisors(tp)}")
    return (tp,) if set(degrees) <= {1, tp} else _prime_factors(tp)


def dims_of_degree(tp: int, shape: Sequence[int], degree: int) -> tuple[int, ...]:
    """The dimensions of a mesh of `shape` that a split in `degree` parts uses, ascending.

    On a factored mesh these are, for each prime p that divides the degree k times, the last k of
    the dimensions of size p. So a rank's neighbours are in its group, and the groups of a degree
    are parts of the groups of its multiples.

        dims_of_degree(12, (2, 2, 3), 2) == (1,)
        dims_of_degree(12, (2, 2, 3), 6) == (1, 2)

    Raises ValueError where the shape cannot express the degree.
    """
    if degree < 1 or tp % degree:
        raise ValueError(f"degree {degree} does not divide tp={tp}: use {_divisors(tp)}")
    if degree == 1:
        return ()
    if degree == tp:
        return tuple(range(len(shape)))
    dims: list[int] = []
    for prime in sorted(set(shape)):
        places = [dim for dim, size in enumerate(shape) if size == prime]
        power = 0
        while power < len(places) and degree % prime ** (power + 1) == 0:
            power += 1
        dims += places[len(places) - power :]
    if math.prod(shape[dim] for dim in dims) != degree:
        raise ValueError(
            f"a mesh of shape {tuple(shape)} cannot split by {degree}: "
            f"name {degree} among the degrees when the mesh is made"
        )
    return tuple(sorted(dims))


def coordinate(rank_in_tp: int, shape: Sequence[int], dims: Sequence[int]) -> int:
    """The rank's place along `dims`, a number in mixed radix, the first dimension outermost."""
    place = 0
    position = _unravel(rank_in_tp, shape)
    for dim in dims:
        place = place * shape[dim] + position[dim]
    return place


def ranks_of(shape: Sequence[int], dims: Sequence[int]) -> list[list[int]]:
    """The groups that share one split over `dims`: ranks within tp, each group by coordinate."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(shape)):
        position = _unravel(rank, shape)
        others = tuple(x for dim, x in enumerate(position) if dim not in dims)
        groups.setdefault(others, []).append(rank)
    return [sorted(ranks, key=lambda r: coordinate(r, shape, dims)) for ranks in groups.values()]


def _unravel(rank: int, shape: Sequence[int]) -> tuple[int, ...]:
    position: list[int] = []
    for size in reversed(shape):
        rank, place = divmod(rank, size)
        position.insert(0, place)
    return tuple(position)


def _prime_factors(n: int) -> tuple[int, ...]:
    factors, prime = [], 2
    while n > 1:
        while n % prime == 0:
            factors.append(prime)
            n //= prime
        prime += 1
    return tuple(factors)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def init_mesh(
    tp: int, mesh: DeviceMesh | None = None, device: torch.device | str | None = None
) -> DeviceMesh | None:
    """The mesh `("tp",)`, or `("dp", "tp")` where the world is larger than `tp`.

    A `mesh` that is given is checked and returned. Else the whole world is used: the default
    process group, started from torchrun's environment if there is none (NCCL where `device` is a
    GPU, gloo else; the CUDA device is `device`'s or LOCAL_RANK's). Ranks of one tensor parallel
    group are consecutive. `device` is a GPU if there is one, unless "cpu" is asked for.

    Returns None for `tp` 1 in a process that has neither a process group nor torchrun's
    environment: no communication is set up there. Raises ValueError where the number of
    processes does not fit.
    """
    if tp < 1:
        raise ValueError(f"tp={tp} is not a number of ranks: pass tp=1 or more")
    if mesh is not None:
        return _checked(mesh, tp)
    started = dist.is_initialized()
    if not started and "WORLD_SIZE" not in os.environ:
        if tp == 1:
            return None
        raise ValueError(
            f"tp={tp} needs {tp} processes, but this is 1 process without torchrun's environment: "
            f"start with torchrun --nproc-per-node {tp}, or pass tp=1"
        )
    world = dist.get_world_size() if started else int(os.environ["WORLD_SIZE"])
    if tp > world:
        raise ValueError(
            f"tp={tp} is more than the world of {world} processes: "
            f"start with --nproc-per-node {tp}, or pass tp={_either(_divisors(world))}"
        )
    if world % tp:
        raise ValueError(
            f"tp={tp} does not divide the world of {world} processes: start with "
            f"--nproc-per-node a multiple of {tp}, or pass tp={_either(_divisors(world))}"
        )
    device_type = _default_device_type() if device is None else torch.device(device).type
    if not started:
        _start_process_group(device_type, None if device is None else torch.device(device))
    sizes = {"tp": tp} if world == tp else {"dp": world // tp, "tp": tp}
    made = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for dim in sizes:
        inherit_timeout(made.get_group(dim), torch.device(device_type))
    return made


def _checked(mesh: DeviceMesh, tp: int) -> DeviceMesh:
    names = mesh.mesh_dim_names
    if names not in (("tp",), ("dp", "tp")):
        raise ValueError(
            f'the mesh has the dimensions {names}: name them ("tp",) or ("dp", "tp"), '
            f'or pass a slice of it, mesh["tp"]'
        )
    if mesh.size(mesh.ndim - 1) != tp:
        raise ValueError(
            f"tp={tp}, but the mesh's dimension tp has {mesh.size(mesh.ndim - 1)} ranks: "
            f"pass tp={mesh.size(mesh.ndim - 1)}, or no mesh"
        )
    for dim in range(mesh.ndim):
        if bool((mesh.mesh.diff(dim=dim) < 0).any()):
            raise ValueError(
                f"the mesh {mesh.mesh.tolist()} does not number its ranks in ascending order, "
                f"and torch's process groups do: which part of a DTensor a rank holds would be "
                f"ambiguous; sort the ranks along each dimension"
            )
    return mesh


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _default_device_type() -> str:
    """The GPU's if there is one that the process group, if already started, can use."""
    if not torch.cuda.is_available():
        return "cpu"
    if dist.is_initialized() and "nccl" not in dist.get_backend_config():
        return "cpu"
    return "cuda"


def _start_process_group(device_type: str, device: torch.device | None) -> None:
    if device_type != "cuda":
        dist.init_process_group("gloo")
        return
    index = None if device is None else device.index
    cuda = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if index is None else index)
    torch.cuda.set_device(cuda)
    dist.init_process_group("nccl", device_id=cuda)


class Mesh:
    """Where this rank stands, for a plan that uses the given `degrees`.

    device_mesh: what `init_mesh` returned. None: one process, without communication.
    degrees: all that the plan uses, the same on every rank; 1 and tp are always there.
    seed: of the random streams; `torch.initial_seed()` of the first rank if not given.
    device: of one process without a mesh; a GPU if there is one, where not given.
    rooms: degree -> what products leave to sums beside them; of NCCL's groups alone.

    All ranks of the world construct it together: it creates process groups. It is built from
    `device_mesh`; raises ValueError for degrees that do not divide tp, or that need more process
    groups where `device_mesh` is only a part of the world.
    """

    def __init__(
        self,
        device_mesh: DeviceMesh | None,
        degrees: Iterable[int],
        seed: int | None = None,
        device: torch.device | str | None = None,
        rooms: Mapping[int, Sequence[Room]] = MappingProxyType({}),
    ) -> None:
        self.device_mesh = device_mesh
        self.tp: int = 1 if device_mesh is None else device_mesh.size(device_mesh.ndim - 1)
        self.degrees = tuple(sorted({1, self.tp, *degrees}))
        self.shape = tp_mesh_shape(self.tp, self.degrees)
        self.tp_rank = 0
        self.dp_rank = 0
        self.device = torch.device(_default_device_type() if device is None else device)
        self.tp_mesh: DeviceMesh | None = None
        if device_mesh is not None:
            self.tp_rank = device_mesh.get_local_rank("tp")
            if device_mesh.ndim == 2:
                self.dp_rank = device_mesh.get_local_rank("dp")
            self.device = torch.device(device_mesh.device_type)
            self.tp_mesh = self._make_tp_mesh(device_mesh)
            answer_roll_calls()
        if self.device.type == "cuda" and (device_mesh is not None or self.device.index is None):
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.seed = self._agree_on(torch.initial_seed() % 2**63 if seed is None else seed)
        self._groups = {
            degree: self._make_group(degree, rooms.get(degree, ())) for degree in self.degrees
        }

    def _make_tp_mesh(self, device_mesh: DeviceMesh) -> DeviceMesh:
        if len(self.shape) == 1:
            return device_mesh["tp"]
        if device_mesh.size() != dist.get_world_size():
            raise ValueError(
                f"degrees {list(self.degrees)} need process groups of their own, which a mesh of "
                f"{device_mesh.size()} of the world's {dist.get_world_size()} ranks cannot make: "
                f"use degrees 1 and {self.tp} only, or a mesh of the whole world"
            )
        names = tuple(f"tp{dim}" for dim in range(len(self.shape)))
        ranks = device_mesh.mesh.view(-1, *self.shape)
        whole = DeviceMesh(device_mesh.device_type, ranks, mesh_dim_names=("dp", *names))
        for name in names:
            inherit_timeout(whole.get_group(name), self.device)
        return whole[names]

    def _make_group(self, degree: int, rooms: Sequence[Room]) -> Group:
        dims = dims_of_degree(self.tp, self.shape, degree)
        place = coordinate(self.tp_rank, self.shape, dims)
        stream = RandomStream(group_seed(self.seed, self._replica(), degree, place))
        if self.device_mesh is None or self.tp_mesh is None or degree == 1:
            return SingleGroup(stream)
        if degree == self.tp:
            process_group = self.device_mesh.get_group("tp")
        elif len(dims) == 1:
            process_group = self.tp_mesh.get_group(dims[0])
        else:
            process_group = self._new_process_group(dims)
        if not is_nccl(process_group, self.device):
            rooms = ()
        return ProcessGroupComm(process_group, stream, self._make_lanes(process_group, dims, rooms))

    def _make_lanes(
        self, process_group: dist.ProcessGroup, dims: Sequence[int], rooms: Sequence[Room]
    ) -> list[Lane]:
        """The first is the group's own; others have process groups whose kernels are as small."""
        assert self.device_mesh is not None
        found: list[Lane] = []
        for room in rooms:
            of = torch.cuda.get_device_properties(self.device).multi_processor_count
            if not found:
                found.append(Lane(room, process_group, of))
            elif self.device_mesh.size() == dist.get_world_size():
                options = dist.ProcessGroupNCCL.Options()
                options.config.min_ctas = options.config.max_ctas = room.multiprocessors
                found.append(Lane(room, self._new_process_group(dims, options), of))
        return found

    def _new_process_group(self, dims: Sequence[int], options: Any = None) -> dist.ProcessGroup:
        """This rank's group over `dims`; every rank creates those of all ranks, in one order."""
        assert self.device_mesh is not None
        for tp_ranks in self.device_mesh.mesh.view(-1, self.tp).tolist():
            for members in ranks_of(self.shape, dims):
                made = dist.new_group(
                    [tp_ranks[member] for member in members],
                    backend=None if options is None else "nccl",
                    pg_options=options,
                )
                if isinstance(made, dist.ProcessGroup):
                    mine = made
                    inherit_timeout(made, self.device)
        return mine

    def tp_ranks(self) -> list[int]:
        """The ranks in the world of this tensor parallel group, by rank within it."""
        if self.device_mesh is None:
            return [0]
        ranks: list[int] = self.device_mesh.mesh.view(-1, self.tp)[self.dp_rank].tolist()
        return ranks

    def _replica(self) -> int:
        """A number that differs between tensor parallel groups: `dp_rank`, where the mesh is the
        whole world, else (the mesh does not know all groups) the first of the group's ranks."""
        if self.device_mesh is None or self.device_mesh.size() == dist.get_world_size():
            return self.dp_rank
        return min(self.tp_ranks())

    def _agree_on(self, seed: int) -> int:
        """The seed that the first rank of the mesh has."""
        if self.device_mesh is None:
            return seed
        value = torch.tensor([seed], device=self.device)
        for dim in reversed(range(self.device_mesh.ndim)):
            first = dist.get_global_rank(self.device_mesh.get_group(dim), 0)
            dist.broadcast(value, first, group=self.device_mesh.get_group(dim))
        return int(value.item())

    def group(self, degree: int) -> Group:
        """The group among which `degree` splits; the same object every time."""
        if degree not in self._groups:
            raise ValueError(
                f"degree {degree} is not among the degrees {list(self.degrees)} of this mesh"
            )
        return self._groups[degree]

    def placements(self, degree: int, dim: int | None) -> tuple[Placement, ...]:
        """How a DTensor on `tp_mesh` says "dimension `dim` is split in `degree` parts".

        None for `dim`, or degree 1: it is replicated.
        """
        dims = dims_of_degree(self.tp, self.shape, degree)
        return tuple(
            Shard(dim) if dim is not None and place in dims else Replicate()
            for place in range(len(self.shape))
        )

    def manual_seed(self, seed: int) -> None:
        """Starts all random streams anew; call it on every rank with the same `seed`."""
        self.seed = seed
        for degree, group in self._groups.items():
            group.stream.manual_seed(group_seed(seed, self._replica(), degree, group.coordinate))

    def random_state(self) -> dict[str, Tensor]:
        """Where each stream stands, as bytes, by replica, degree and coordinate."""
        return {
            f"{self._replica()}.{degree}.{group.coordinate}": group.stream.packed(self.device)
            for degree, group in self._groups.items()
        }

    def load_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `random_state` was taken."""
        for degree, group in self._groups.items():
            packed = state[f"{self._replica()}.{degree}.{group.coordinate}"]
            group.stream.unpack(packed, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        return self

    def __repr__(self) -> str:
        return (
            f"Mesh(tp={self.tp}, shape={self.shape}, degrees={list(self.degrees)}, "
            f"tp_rank={self.tp_rank}, dp_rank={self.dp_rank}, device={self.device})"
        )
