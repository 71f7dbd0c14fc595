"""A process group whose other ranks are not there, and whose collectives take the time that they would.

For a machine of one GPU, where nothing can be sent. A collective runs one kernel on as many
multiprocessors as NCCL takes, which reads the tensor and writes it elsewhere once, paced so that alone
it lasts what a machine's profile says:

    seconds = latency + 2 (d-1)/d bytes / bus          of an all-reduce; half the bytes of an all-gather

It stands where NCCL's kernel would: on the current stream, or, of an asynchronous call, on a stream of
its own which the current one waits for in `wait()`. So what can run beside it does, and what is slowed
by it is. The tensors keep the rank's own values. What it does not have: the other rank, which is never
late, and the traffic of what that one writes into this GPU.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import Work
from triton.language.extra.cuda import globaltimer

from autoshard.cost_model.hardware import Link, load

CHANNELS = 24  # multiprocessors of a collective
TILE = 2048  # of 4 bytes


@triton.jit(do_not_specialize=["count", "pause"])  # type: ignore[untyped-decorator]
def pretended_all_reduce(x, elsewhere, count, pause, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read `x` and write it elsewhere, a channel's tiles `pause` nanoseconds apart."""
    start = globaltimer()
    channel, channels = tl.program_id(0), tl.num_programs(0)
    due = start
    for tile in range(channel, tl.cdiv(count, TILE), channels):
        at = tile * TILE + tl.arange(0, TILE)
        tl.store(elsewhere + at, tl.load(x + at, mask=at < count), mask=at < count)
        due += pause
        while globaltimer() < due:
            pass


class _Done(Work):
    """Ended when the stream gets there."""

    def __init__(self, tensors: list[Tensor], end: torch.cuda.Event | None = None) -> None:
        super().__init__()
        self.tensors, self.end = tensors, end  # held while another stream uses them

    def wait(self, timeout: timedelta | None = None) -> bool:
        """The current stream waits."""
        if self.end is not None:
            torch.cuda.current_stream().wait_event(self.end)
        self.tensors = []
        return True


class PretendedGroup(dist.ProcessGroup):
    """This rank's side of a group of ``size`` ranks."""

    def __init__(self, rank: int, size: int, link: Link) -> None:
        super().__init__(rank, size)
        self.link = link
        self.stream = torch.cuda.Stream()
        self.elsewhere = torch.empty(0, dtype=torch.int32, device="cuda")
        self.kernel: Any = None  # compiled: Triton's own launch costs the host ten times as much

    def _set_group_name(self, name: str) -> None:
        self._name = name  # a group without a C++ backend keeps none

    @property
    def group_name(self) -> str:
        """By which functional collectives find it."""
        return self._name

    def _send(self, x: Tensor, share: float, asynchronous: bool) -> Work:
        current = torch.cuda.current_stream()
        if not asynchronous:
            self._run(x, share)
            return _Done([])
        begin, end = torch.cuda.Event(), torch.cuda.Event()
        begin.record(current)
        self.stream.wait_event(begin)
        torch.cuda.set_stream(self.stream)
        self._run(x, share)
        torch.cuda.set_stream(current)
        end.record(self.stream)
        return _Done([x], end)

    def _run(self, x: Tensor, share: float) -> None:
        count = x.nbytes // 4
        if self.elsewhere.numel() < count:
            self.elsewhere = torch.empty(count, dtype=torch.int32, device="cuda")
        seconds = self.link.latency + share * x.nbytes / self.link.bandwidth
        tiles = -(-max(1, count) // TILE)
        pause = int(1e9 * seconds / -(-tiles // CHANNELS))
        grid = (min(CHANNELS, tiles),)
        if self.kernel is None:
            words = torch.empty(0, dtype=torch.int32, device="cuda")
            self.kernel = pretended_all_reduce[grid](words, self.elsewhere, 0, 0, TILE, num_warps=16)
        self.kernel[*grid, 1, 1](x.detach(), self.elsewhere, count, pause, TILE)

    def _ratio(self) -> float:
        return (self.size() - 1) / self.size()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """`sum` and `max` of one tensor: it stays what it is."""
        return self._send(tensors[0], 2 * self._ratio(), opts is None or opts.asyncOp)

    def _allgather_base(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        output.view(self.size(), -1).copy_(x.view(1, -1))
        return self._send(output, self._ratio(), opts is None or opts.asyncOp)

    def _reduce_scatter_base(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        output.copy_(x.view(self.size(), *output.shape)[self.rank()])
        return self._send(x, self._ratio(), opts is None or opts.asyncOp)

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> Work:
        """Of objects, while a model is split: not part of a step."""
        for output in outputs[0]:
            output.copy_(tensors[0])
        return _Done([])

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Nothing: not part of a step."""
        return _Done([])

    def barrier(self, opts: Any = None) -> Work:
        """Nobody to wait for."""
        return _Done([])

    def getBackendName(self) -> str:
        """As PyTorch calls it."""
        return "pretended"


def register(profile: str, device: str = "cuda") -> None:
    """Make ``init_process_group("pretended")`` possible, with the links of a machine's profile."""
    machine = load(profile)

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> PretendedGroup:
        return PretendedGroup(rank, size, machine.link(size))

    dist.Backend.register_backend("pretended", create, devices=[device])
