"""Where ranks stand: mesh shapes, coordinates, process groups, placements, errors."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from autoshard.groups import ProcessGroupComm, SingleGroup
from autoshard.mesh import Mesh, coordinate, dims_of_degree, init_mesh, ranks_of, tp_mesh_shape
from autoshard.random_streams import group_seed
from autoshard.simulate import run_ranks
from tests.distributed import run_distributed

# Arithmetic


@pytest.mark.parametrize(
    ("tp", "degrees", "shape"),
    [
        (1, [1], (1,)),
        (8, [], (8,)),
        (8, [1, 8], (8,)),
        (8, [1, 4], (2, 2, 2)),
        (12, [6, 12], (2, 2, 3)),
        (7, [1, 7], (7,)),
    ],
)
def test_mesh_is_factored_only_where_a_degree_needs_it(
    tp: int, degrees: list[int], shape: tuple[int, ...]
) -> None:
    """One dimension while all degrees are 1 or tp; else the prime factors, ascending."""
    assert tp_mesh_shape(tp, degrees) == shape


def test_degrees_use_the_last_dimensions_of_each_prime() -> None:
    """The examples of the docstring, and the ranks that they put together."""
    assert dims_of_degree(12, (2, 2, 3), 2) == (1,)
    assert dims_of_degree(12, (2, 2, 3), 6) == (1, 2)
    assert dims_of_degree(12, (2, 2, 3), 3) == (2,)
    assert dims_of_degree(12, (2, 2, 3), 4) == (0, 1)
    assert dims_of_degree(12, (12,), 12) == (0,)
    assert dims_of_degree(12, (12,), 1) == ()
    assert ranks_of((2, 2, 3), (2,)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert ranks_of((2, 2, 3), (1,)) == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert [coordinate(rank, (2, 2, 3), (1, 2)) for rank in range(12)] == [*range(6), *range(6)]


@given(st.integers(1, 48), st.data())
def test_every_divisor_is_expressible(tp: int, data: st.DataObject) -> None:
    """Groups are a partition in `degree`s, ordered by coordinate, nested in those of multiples."""
    divisors = [d for d in range(1, tp + 1) if tp % d == 0]
    degrees = data.draw(st.lists(st.sampled_from(divisors), min_size=1))
    shape = tp_mesh_shape(tp, degrees)
    assert math.prod(shape) == tp
    groups = {}
    for degree in degrees:
        dims = dims_of_degree(tp, shape, degree)
        groups[degree] = ranks_of(shape, dims)
        assert sorted(itertools.chain(*groups[degree])) == list(range(tp))
        for ranks in groups[degree]:
            assert [coordinate(rank, shape, dims) for rank in ranks] == list(range(degree))
    for small, large in itertools.product(degrees, degrees):
        if large % small == 0:
            for ranks in groups[small]:
                assert any(set(ranks) <= set(others) for others in groups[large])


@pytest.mark.parametrize("degree", [0, 3, 16])
def test_degrees_that_do_not_divide_are_named(degree: int) -> None:
    """The error says what would fit."""
    with pytest.raises(ValueError, match=rf"\[{degree}\] do not divide tp=8: use \[1, 2, 4, 8\]"):
        tp_mesh_shape(8, [1, degree])
    with pytest.raises(ValueError, match=f"degree {degree} does not divide tp=8"):
        dims_of_degree(8, (2, 2, 2), degree)
    with pytest.raises(ValueError, match=r"shape \(8,\) cannot split by 4"):
        dims_of_degree(8, (8,), 4)


# One process


def test_one_rank_needs_no_process_group() -> None:
    """tp=1 in a plain script: nothing is started, parameters have no mesh."""
    assert init_mesh(1) is None
    mesh = Mesh(None, [1], seed=3)
    assert not dist.is_initialized()
    assert isinstance(mesh.group(1), SingleGroup)
    assert (mesh.tp, mesh.tp_rank, mesh.dp_rank, mesh.tp_mesh) == (1, 0, 0, None)
    assert mesh.device == torch.device("cpu")
    assert mesh.placements(1, 0) == (Replicate(),)


def test_device_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is given; of GPUs without a number the current one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("cpu", "meta", "cuda:1", "cuda"):
        found = "cuda:3" if name == "cuda" else name
        assert Mesh(None, [], device=name).device == torch.device(found)
        assert Mesh(None, [], device=torch.device(name)).device == torch.device(found)


def test_seed_of_the_mesh() -> None:
    """torch's own seed unless one is given; manual_seed starts the streams anew."""
    torch.manual_seed(11)
    default, given_seed, other = Mesh(None, []), Mesh(None, [], seed=11), Mesh(None, [], seed=12)
    draws = [mesh.group(1).stream.run(torch.rand, 4) for mesh in (default, given_seed, other)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    other.manual_seed(11)
    assert torch.equal(other.group(1).stream.run(torch.rand, 4), draws[0])
    torch.manual_seed(-1)  # torch reads it as 2**64 - 1
    assert Mesh(None, []).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("tp", "world", "message"),
    [
        (0, None, "tp=0 is not a number of ranks"),
        (-2, 4, "tp=-2 is not a number of ranks"),
        (4, None, "tp=4 needs 4 processes, but this is 1 .* --nproc-per-node 4, or pass tp=1"),
        (8, 4, "tp=8 is more than the world of 4 .* --nproc-per-node 8, or pass tp=1, 2 or 4"),
        (3, 4, "tp=3 does not divide the world of 4 .* a multiple of 3, or pass tp=1, 2 or 4"),
        (2, 1, "tp=2 is more than the world of 1 .* --nproc-per-node 2, or pass tp=1"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tp: int, world: int | None, message: str
) -> None:
    """Both numbers and the fix; no process group is left behind."""
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        init_mesh(tp)
    assert not dist.is_initialized()


# A world of which this process is one rank, and the others are pretended


@pytest.fixture
def pretend() -> Iterator[Callable[[int, int], None]]:
    """Starts a process group without processes: pretend(rank, world)."""

    def start(rank: int, world: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 7, 23])
def test_groups_of_a_factored_mesh(pretend: Callable[[int, int], None], rank: int) -> None:
    """Each degree's process group has the ranks, and the rank in it, that the arithmetic says."""
    pretend(rank, 24)
    degrees = [1, 2, 3, 4, 6, 12]
    device_mesh = init_mesh(12, device="cpu")
    mesh = Mesh(device_mesh, degrees)
    assert (mesh.dp_rank, mesh.tp_rank) == divmod(rank, 12)
    assert mesh.shape == (2, 2, 3)
    assert device_mesh is not None and device_mesh.mesh_dim_names == ("dp", "tp")
    assert mesh.tp_mesh is not None
    assert mesh.tp_mesh.mesh_dim_names == ("tp0", "tp1", "tp2")
    assert mesh.tp_mesh.mesh.flatten().tolist() == [12 * mesh.dp_rank + r for r in range(12)]
    for degree in degrees[1:]:
        dims = dims_of_degree(12, mesh.shape, degree)
        ranks = next(g for g in ranks_of(mesh.shape, dims) if mesh.tp_rank in g)
        group = mesh.group(degree)
        assert isinstance(group, ProcessGroupComm)
        members = dist.get_process_group_ranks(group.process_group)
        assert members == [12 * mesh.dp_rank + r for r in ranks]
        assert group.degree == degree
        assert group.coordinate == coordinate(mesh.tp_rank, mesh.shape, dims)


@pytest.mark.parametrize("ranks", [[3, 1, 2, 0], [[2, 3], [0, 1]], [[0, 2], [3, 1]]])
def test_a_mesh_in_another_order_is_refused(
    pretend: Callable[[int, int], None], ranks: list[Any]
) -> None:
    """torch's process groups sort their ranks: a coordinate would not be the rank in its group."""
    pretend(1, 4)
    names = ("dp", "tp")[-torch.tensor(ranks).ndim :]
    given_mesh = DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=names)
    with pytest.raises(ValueError, match="ascending order"):
        init_mesh(4 if len(names) == 1 else 2, mesh=given_mesh)


def test_a_mesh_of_strided_ranks(pretend: Callable[[int, int], None]) -> None:
    """A tensor parallel group need not be neighbours."""
    pretend(4, 8)
    strided = DeviceMesh("cpu", torch.arange(8).view(4, 2).t(), mesh_dim_names=("dp", "tp"))
    mesh = Mesh(init_mesh(4, mesh=strided), [2])
    assert (mesh.dp_rank, mesh.tp_rank) == (0, 2)
    for degree, ranks, place in ((2, [4, 6], 0), (4, [0, 2, 4, 6], 2)):
        group = mesh.group(degree)
        assert isinstance(group, ProcessGroupComm)
        assert dist.get_process_group_ranks(group.process_group) == ranks
        assert group.coordinate == place


def test_placements_say_which_dimensions_split(pretend: Callable[[int, int], None]) -> None:
    """Shard on the degree's mesh dimensions, Replicate elsewhere."""
    pretend(0, 8)
    mesh = Mesh(init_mesh(8, device="cpu"), [2, 4])
    whole = Replicate()
    assert mesh.placements(1, 0) == mesh.placements(8, None) == (whole, whole, whole)
    assert mesh.placements(2, 1) == (whole, whole, Shard(1))
    assert mesh.placements(4, 0) == (whole, Shard(0), Shard(0))
    assert mesh.placements(8, 0) == (Shard(0), Shard(0), Shard(0))
    assert Mesh(init_mesh(8, device="cpu"), [8]).placements(8, 1) == (Shard(1),)


def test_a_mesh_of_a_part_of_the_world(pretend: Callable[[int, int], None]) -> None:
    """Fine while no group has to be made; its streams differ from those of the other parts."""
    pretend(5, 8)
    pipeline = DeviceMesh("cpu", torch.arange(8).view(2, 4), mesh_dim_names=("pp", "tp"))
    with pytest.raises(ValueError, match=r'name them \("tp",\) or \("dp", "tp"\).*mesh\["tp"\]'):
        init_mesh(4, mesh=pipeline)
    with pytest.raises(ValueError, match="tp=2, but the mesh's dimension tp has 4 ranks"):
        init_mesh(2, mesh=pipeline["tp"])
    part = init_mesh(4, mesh=pipeline["tp"])
    mesh = Mesh(part, [4], seed=0)
    assert mesh.group(4).stream.seed == group_seed(0, 4, 4, 1)
    with pytest.raises(ValueError, match=r"4 of the world's 8 ranks cannot .* 1 and 4"):
        Mesh(part, [2])
    with pytest.raises(ValueError, match=r"degree 2 is not among the degrees \[1, 4\]"):
        mesh.group(2)


def test_ranks_of_one_group_draw_what_the_simulator_draws(
    pretend: Callable[[int, int], None],
) -> None:
    """Seeds have the key (seed, data-parallel rank, degree, coordinate)."""
    pretend(6, 8)
    mesh = Mesh(init_mesh(4, device="cpu"), [2], seed=5)
    simulated = run_ranks(lambda ctx: ctx.group(2).stream.seed, 4, seed=5)
    assert mesh.group(2).stream.seed == group_seed(5, 1, 2, 0)
    assert simulated[2] == group_seed(5, 0, 2, 0)
    mesh.manual_seed(6)
    assert mesh.seed == 6
    assert mesh.group(2).stream.seed == group_seed(6, 1, 2, 0)


# Processes


def start_from_the_environment() -> dict[str, Any]:
    """What each rank of a world of 4 with tp=2 finds."""
    assert not dist.is_initialized()
    torch.manual_seed(100 + int(os.environ["RANK"]))
    device_mesh = init_mesh(2, device="cpu")
    mesh = Mesh(device_mesh, [2])
    assert dist.get_backend() == "gloo"
    assert mesh.device_mesh is device_mesh is not None
    assert mesh.group(2) is mesh.group(2)
    rank = torch.tensor(dist.get_rank())
    return {
        "names": device_mesh.mesh_dim_names,
        "place": (mesh.dp_rank, mesh.tp_rank, mesh.group(2).coordinate),
        "members": [int(x) for x in mesh.group(2).all_gather(rank)],
        "seed": mesh.seed,
        "outside": mesh.group(1).stream.run(torch.rand, 4).tolist(),
        "inside": mesh.group(2).stream.run(torch.rand, 4).tolist(),
    }


@pytest.mark.slow
def test_a_larger_world_is_data_parallel() -> None:
    """tp=2 of 4 processes: neighbours form a group, all ranks use the first rank's seed."""
    ranks = run_distributed(start_from_the_environment, 4, process_group=False)
    assert [r["names"] for r in ranks] == [("dp", "tp")] * 4
    assert [r["place"] for r in ranks] == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    assert [r["members"] for r in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["seed"] for r in ranks] == [100] * 4
    outside = [r["outside"] for r in ranks]
    assert outside[0] == outside[1] != outside[2] == outside[3]
    assert len({tuple(r["inside"]) for r in ranks}) == 4


def gather_on_every_degree() -> dict[int, tuple[list[int], list[float]]]:
    """Each degree's group, and its slice of a DTensor, on a factored mesh."""
    mesh = Mesh(init_mesh(4, device="cpu"), [2, 4])
    found = {}
    for degree in (2, 4):
        group = mesh.group(degree)
        place = torch.tensor(mesh.tp_rank)
        assert mesh.tp_mesh is not None
        sharded = distribute_tensor(torch.arange(8.0), mesh.tp_mesh, mesh.placements(degree, 0))
        assert isinstance(sharded, DTensor)
        local = sharded.to_local()
        own = torch.arange(8.0).chunk(degree)[group.coordinate]
        assert torch.equal(local, own)
        assert torch.equal(torch.cat(group.all_gather(local)), torch.arange(8.0))
        assert torch.equal(sharded.full_tensor(), torch.arange(8.0))
        found[degree] = [int(x) for x in group.all_gather(place)], local.tolist()
    return found


@pytest.mark.slow
def test_coordinates_are_those_of_the_parameters() -> None:
    """A DTensor's local part is that of the group's coordinate, and gathers come in its order."""
    found = run_distributed(gather_on_every_degree, 4)
    for rank, by_degree in enumerate(found):
        half = rank % 2
        assert by_degree[2] == ([rank - half, rank - half + 1], [4.0 * half + i for i in range(4)])
        assert by_degree[4] == ([0, 1, 2, 3], [2.0 * rank, 2.0 * rank + 1])


# The helper that runs them


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise KeyError("of rank one")
    dist.barrier()


def never_end() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


@pytest.mark.slow
def test_run_distributed_reports_failures_and_leaves_nothing() -> None:
    """A rank's traceback arrives; a rank that hangs is killed."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2:.*fail_on_one_rank.*of rank one"):
        run_distributed(fail_on_one_rank, 2)
    with pytest.raises(TimeoutError, match=r"ranks \[.*1\] of 2 had not ended after 5 s"):
        run_distributed(never_end, 2, timeout=5)
    assert not multiprocessing.active_children()
