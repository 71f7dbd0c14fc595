"""What a rewritten graph knows of its rank: a group of ranks that share one split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from autoshard import failures, pending
from autoshard.compat import all_reduce, leave_multiprocessors, start_all_reduce
from autoshard.random_streams import RandomStream

ReduceOp = Literal["sum", "max"]
T = TypeVar("T")

_functional = torch.ops._c10d_functional
# torch 2.13 gave all_gather_into_tensor this name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_numbered: WeakValueDictionary[int, ProcessGroupComm] = WeakValueDictionary()
_numbers = itertools.count()


def numbered(number: int) -> ProcessGroupComm:
    """The group of this `number`: what is compiled holds numbers, not objects."""
    return _numbered[number]


def _wait(x: Tensor) -> Tensor:
    return cast(Tensor, _functional.wait_tensor(x))


class Group(Protocol):
    """The ranks among which something is split in `degree` parts, seen from one of them.

    Every rank of the group calls the same methods in the same order with tensors of one shape.
    None of them is differentiable: `autoshard.ops` says what the gradient of each is.
    """

    @property
    def degree(self) -> int:
        """The number of parts, which is the number of ranks in the group."""

    @property
    def coordinate(self) -> int:
        """Which part this rank holds, 0 .. degree - 1."""

    @property
    def stream(self) -> RandomStream:
        """The random draws that belong to this coordinate."""

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """The sum or maximum of every rank's `x`, elementwise, contiguous.

        `x` is unchanged and the result is a new tensor, unless `inplace` is set: then a
        contiguous `x` is overwritten and returned, which saves one copy.
        """

    def start_all_reduce(self, x: Tensor, lane: Lane | None = None) -> Callable[[], Tensor]:
        """Begin to sum the contiguous `x`, which is given up; what is called gives the sum.

        lane: one of the group's, where products run beside it that leave it room.
        """

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, by coordinate."""


class SingleGroup:
    """Degree 1: nothing is split, nothing moves."""

    degree = 1
    coordinate = 0

    def __init__(self, stream: RandomStream) -> None:
        self.stream = stream

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """`x` itself."""
        return x

    def start_all_reduce(self, x: Tensor, lane: Lane | None = None) -> Callable[[], Tensor]:
        """`x` itself."""
        return lambda: x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """`[x]`."""
        return [x]

    def __deepcopy__(self, memo: dict[int, Any]) -> SingleGroup:
        return self

    def __repr__(self) -> str:
        return "SingleGroup()"


class Room(NamedTuple):
    """What products leave to a sum that they run beside.

    columns: of the first product, from which on this is the best.
    covers: of all products, that take as long as the sum: those behind them leave no room.
    multiprocessors: that the sum's kernel takes.
    left: that products leave alone.
    """

    columns: int
    covers: int
    multiprocessors: int
    left: int


class Lane(NamedTuple):
    """Where a sum runs beside products that leave it room.

    process_group: whose collectives are as small as what is left to them.
    of: how many multiprocessors the GPU has.
    """

    room: Room
    process_group: dist.ProcessGroup
    of: int

    def leave(self) -> None:
        """Products that this thread enqueues from now on leave room."""
        leave_multiprocessors(self.room.left, self.of)

    def take_back(self) -> None:
        """They leave none."""
        leave_multiprocessors(0, self.of)


class ProcessGroupComm:
    """A group on a `torch.distributed` process group (NCCL, gloo), whose ranks are coordinates.

    A copy of a module shares its groups with the module: a communicator cannot be copied. Within
    torch.compile functional collectives are used: torch 2.11 compiles an all-reduce in place,
    inside an autograd.Function, to one whose gradient is zero.

    lanes: for sums that run beside products, by rising columns, the first from 0 and on this process
        group; none: the products leave the sum no room.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, stream: RandomStream, lanes: Sequence[Lane] = ()
    ) -> None:
        self.process_group = process_group
        self.lanes = tuple(lanes)
        self._name: str = process_group.group_name
        self.number = next(_numbers)
        _numbered[self.number] = self
        self.ranks: list[int] = dist.get_process_group_ranks(process_group)
        self.stream = stream
        self.degree: int = process_group.size()
        self.coordinate: int = process_group.rank()

    def _note(self, collective: str, x: Tensor, on: dist.ProcessGroup | None = None) -> None:
        """On a GPU Python only enqueues: somebody else has to see whether it ends."""
        if x.is_cuda:
            pending.note(collective, self.ranks, on or self.process_group, x.get_device())

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """One all-reduce."""
        if x.requires_grad:
            x = x.detach()
        if torch.compiler.is_compiling():
            return _wait(_functional.all_reduce(x.contiguous(), op, self._name))
        if not (inplace and x.is_contiguous()):
            x = x.clone(memory_format=torch.contiguous_format)
        try:
            all_reduce(x, op, self.process_group)
        except RuntimeError as error:
            raise failures.explanation_of(error, "all-reduce", self.ranks) from error
        self._note("all-reduce", x)
        return x

    def start_all_reduce(self, x: Tensor, lane: Lane | None = None) -> Callable[[], Tensor]:
        """One all-reduce, on NCCL's own stream; waiting lets the current stream wait."""
        if torch.compiler.is_compiling():
            y = _functional.all_reduce(x, "sum", self._name)
            return lambda: _wait(y)
        group = self.process_group if lane is None else lane.process_group
        try:  # a context manager takes as long as all of the rest
            work = start_all_reduce(x, group)
        except RuntimeError as error:
            raise failures.explanation_of(error, "all-reduce", self.ranks) from error

        def wait() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise failures.explanation_of(error, "all-reduce", self.ranks) from error
            self._note("all-reduce", x, group)
            return x

        return wait

    def lane(self, columns: int) -> Lane | None:
        """The one for products of which the first has so many columns; None where there are none."""
        return next((lane for lane in reversed(self.lanes) if lane.room.columns <= columns), None)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """One all-gather into one buffer, of which the results are views."""
        x = x.detach().contiguous()
        if torch.compiler.is_compiling():
            flat = _functional.all_gather_into_tensor(x.view(-1), self.degree, self._name)
            return list(_wait(flat).view(self.degree, *x.shape).unbind())
        buffer = x.new_empty((self.degree * x.numel(),))
        with failures.explained("all-gather", self.ranks):
            _all_gather(buffer, x.view(-1), group=self.process_group)
        self._note("all-gather", x)
        return list(buffer.view(self.degree, *x.shape).unbind())

    def broadcast(self, x: Tensor) -> None:
        """Overwrite the contiguous `x` with that of coordinate 0."""
        with failures.explained("broadcast", self.ranks):
            dist.broadcast(x, self.ranks[0], group=self.process_group)
        self._note("broadcast", x)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, pickled, by coordinate: for reports, not for steps."""
        found: list[Any] = [None] * self.degree
        with failures.explained("all-gather of objects", self.ranks):
            dist.all_gather_object(found, value, group=self.process_group)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroupComm:
        return self

    def __repr__(self) -> str:
        return f"ProcessGroupComm(degree={self.degree}, coordinate={self.coordinate})"
