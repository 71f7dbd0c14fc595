"""Ranks as threads of one process, so that split graphs can be run and checked without GPUs.

CPU only: there each thread runs its own backward pass, while all CUDA backward passes of a
process share one thread per device and would wait for each other for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from autoshard.groups import Group, Lane, ReduceOp, SingleGroup
from autoshard.mesh import coordinate, dims_of_degree, ranks_of, tp_mesh_shape
from autoshard.random_streams import RandomStream, group_seed

T = TypeVar("T")

TIMEOUT = 120.0  # seconds that a rank waits for the others


class RankAborted(RuntimeError):
    """This rank stopped because another one failed, ended or did not come."""


class _World:
    """What the threads share: one condition variable, the meetings, and who has ended."""

    def __init__(self, timeout: float) -> None:
        self.changed = threading.Condition()
        self.timeout = timeout
        self.ended: set[int] = set()
        self.meetings: dict[tuple[int, ...], _Meeting] = {}

    def meeting(self, ranks: tuple[int, ...]) -> _Meeting:
        with self.changed:
            return self.meetings.setdefault(ranks, _Meeting(self, ranks))

    def leave(self, *ranks: int) -> None:
        """These ranks, having returned or raised, will come to no more meetings."""
        with self.changed:
            self.ended.update(ranks)
            self.changed.notify_all()


class _Meeting:
    """Where the ranks of one group exchange what they brought, again and again."""

    def __init__(self, world: _World, ranks: tuple[int, ...]) -> None:
        self.world = world
        self.ranks = ranks
        self.brought: dict[int, tuple[str, Tensor]] = {}
        self.last: list[tuple[str, Tensor]] = []
        self.round = 0

    def exchange(self, rank: int, what: str, x: Tensor) -> list[Tensor]:
        """What every rank of the meeting brought, in the order of `ranks`; not to be changed."""
        if x.device.type != "cpu":
            raise ValueError(f"the simulator runs on the CPU only, got a tensor on {x.device}")
        mine = x.detach().clone(memory_format=torch.contiguous_format)
        with self.world.changed:
            this_round = self.round
            self.brought[rank] = (what, mine)
            if len(self.brought) == len(self.ranks):
                self.last = [self.brought[r] for r in self.ranks]
                self.brought = {}
                self.round += 1
                self.world.changed.notify_all()
            elif not self.world.changed.wait_for(
                lambda: self.round > this_round or self._hopeless(), self.world.timeout
            ):
                raise TimeoutError(f"{self._waiting(what)} for {self.world.timeout:g} s")
            if self.round == this_round:
                raise RankAborted(f"{self._waiting(what)}, which had ended")
            everyone = self.last
        calls = [f"{name} of {tuple(y.shape)} {y.dtype}" for name, y in everyone]
        if len(set(calls)) > 1:
            listed = "; ".join(f"rank {r}: {c}" for r, c in zip(self.ranks, calls, strict=True))
            raise RuntimeError(f"the ranks of one group disagree: {listed}")
        return [y for _, y in everyone]

    def _hopeless(self) -> bool:
        missing = set(self.ranks) - self.brought.keys()
        return not missing.isdisjoint(self.world.ended)

    def _waiting(self, what: str) -> str:
        missing = [r for r in self.ranks if r not in self.brought]
        return f"{what} among ranks {list(self.ranks)} waited for ranks {missing}"


class ThreadGroup:
    """A group among the threads of `run_ranks`. Sums run in the order of the coordinates."""

    def __init__(self, meeting: _Meeting, rank: int, stream: RandomStream) -> None:
        self._meeting = meeting
        self._rank = rank
        self.stream = stream
        self.degree: int = len(meeting.ranks)
        self.coordinate: int = meeting.ranks.index(rank)

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """The same bits on every rank."""
        first, *others = self._meeting.exchange(self._rank, f"all_reduce({op})", x)
        with torch.no_grad():
            result = x.detach() if inplace and x.is_contiguous() else torch.empty_like(first)
            result.copy_(first)
            for other in others:
                result = result.add_(other) if op == "sum" else _maximum_(result, other)
        return result

    def start_all_reduce(self, x: Tensor, lane: Lane | None = None) -> Callable[[], Tensor]:
        """The sum is there when this returns."""
        y = self.all_reduce(x, inplace=True)
        return lambda: y

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Copies of every rank's tensor."""
        return [y.clone() for y in self._meeting.exchange(self._rank, "all_gather", x)]

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadGroup:
        return self

    def __repr__(self) -> str:
        return f"ThreadGroup(degree={self.degree}, coordinate={self.coordinate})"


def _maximum_(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y, out=x)


class RankContext:
    """What a simulated rank knows: its `rank` of `tp`, and its groups.

    Groups have the coordinates and members that `autoshard.mesh.Mesh` gives to the same
    `degrees`; without `degrees`, to a mesh factored into all prime factors.
    """

    def __init__(self, world: _World, rank: int, tp: int, shape: tuple[int, ...], seed: int) -> None:
        self.rank = rank
        self.tp = tp
        self._world = world
        self._shape = shape
        self._seed = seed
        self._groups: dict[int, Group] = {}

    def group(self, degree: int) -> Group:
        """The group among which `degree` splits; the same object every time."""
        if degree not in self._groups:
            dims = dims_of_degree(self.tp, self._shape, degree)
            place = coordinate(self.rank, self._shape, dims)
            stream = RandomStream(group_seed(self._seed, 0, degree, place))
            if degree == 1:
                self._groups[degree] = SingleGroup(stream)
            else:
                ranks = next(g for g in ranks_of(self._shape, dims) if self.rank in g)
                meeting = self._world.meeting(tuple(ranks))
                self._groups[degree] = ThreadGroup(meeting, self.rank, stream)
        return self._groups[degree]


def run_ranks(
    fn: Callable[[RankContext], T],
    tp: int,
    seed: int = 0,
    *,
    degrees: tuple[int, ...] | None = None,
    timeout: float = TIMEOUT,
) -> list[T]:
    """Runs `fn` once per rank, each in a thread of its own, and returns the results by rank.

    `degrees` are those of the plan (they decide which ranks form a group, as in `Mesh`). The
    caller's grad mode holds in the threads. Every rank needs leaf tensors of its own: autograd
    would sum the ranks' gradients into a shared one, and hide a missing all-reduce. Random
    operators must draw from a group's stream, since the threads share the default generator.

    When a rank raises, the others are stopped at their next collective, and the exception of
    the lowest rank that failed by itself is raised, with a note that names the rank.
    """
    world = _World(timeout)
    shape = _shape(tp, degrees)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    grad = torch.is_grad_enabled()

    def work(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                results[rank] = fn(RankContext(world, rank, tp, shape, seed))
        except BaseException as error:
            errors[rank] = error
        finally:
            world.leave(rank)

    threads = [threading.Thread(target=work, args=(r,), name=f"rank {r}") for r in range(tp)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        world.leave(*range(tp))
        for thread in threads:
            thread.join()
        raise
    if errors:
        own = [r for r in sorted(errors) if not isinstance(errors[r], RankAborted)]
        rank = own[0] if own else min(errors)
        error = errors[rank]
        error.add_note(f"raised on simulated rank {rank} of {tp}")
        raise error
    return [results[rank] for rank in range(tp)]


def _shape(tp: int, degrees: tuple[int, ...] | None) -> tuple[int, ...]:
    if degrees is None:
        degrees = tuple(d for d in range(1, tp + 1) if tp % d == 0)
    return tp_mesh_shape(tp, degrees)
