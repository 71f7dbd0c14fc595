"""Measure: what the cost model's constants are fitted to, on the machine at hand.

Products over a grid of shapes, attention, operators bound by memory, the time that Python and the
launch of an operator take, and all-reduces over sizes and group sizes. Every time is the median of
several, in seconds. Run by ``autoshard calibrate``, alone or under torchrun.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoshard import ops
from autoshard.compat import shares
from autoshard.groups import Group, ProcessGroupComm
from autoshard.progress import each
from autoshard.random_streams import RandomStream

# [m, n, k] of a transformer's products: tokens by hidden by ffn, whole and split.
GRID = [
    (m, n, k)
    for m in (512, 2048, 8192)
    for n in (128, 512, 1024, 2304, 4096, 8192, 16384)
    for k in (128, 512, 1024, 2304, 4096, 8192, 16384)
    if m * n * k <= 2**40
]
SMALL_GRID = [(m, n, k) for m in (64, 256, 1024) for n in (64, 256, 1024) for k in (64, 256, 1024)]
ATTENTION = [  # batch, heads, sequence, head size
    (8, 16, 512, 64), (4, 16, 1024, 64), (2, 32, 2048, 128), (1, 32, 4096, 128), (8, 12, 1024, 128),
    (2, 8, 4096, 64), (16, 16, 512, 128), (4, 64, 1024, 64),
]  # fmt: skip
SMALL_ATTENTION = [(2, 4, 128, 64), (2, 8, 256, 64), (1, 4, 512, 64)]
NUMELS = [2**e for e in range(12, 29, 2)]
SMALL_NUMELS = [2**e for e in range(12, 23, 2)]
COLLECTIVE_NUMELS = [2**e for e in range(10, 28)]
SMALL_COLLECTIVE_NUMELS = [2**e for e in range(8, 24, 2)]


def measure(device: torch.device, dtype: torch.dtype, degrees: tuple[int, ...] = ()) -> dict[str, Any]:
    """All measurements. Every rank of the default process group calls it, where there is one.

    Args:
        device: of this rank.
        dtype: of the products.
        degrees: group sizes to measure all-reduces over; the world must have as many ranks.
    """
    gpu = device.type == "cuda"
    clock = _Clock(device)
    groups = [_group(degree) for degree in degrees]
    gemms = [(m, n, k, clock.of_device(_gemm(m, n, k, device, dtype))) for m, n, k in _shown(
        GRID if gpu else SMALL_GRID, "products")]  # fmt: skip
    attention = []
    for shape in _shown(ATTENTION if gpu else SMALL_ATTENTION, "attention"):
        for how in ("causal", "full", "masked"):
            forward, both = (
                clock.of_device(_attention(shape, how, grad, device, dtype)) for grad in (False, True)
            )
            attention.append((*shape, how, forward, both - forward))
    memory = [(n, clock.of_device(_add(n, device, dtype))) for n in _shown(
        NUMELS if gpu else SMALL_NUMELS, "memory")]  # fmt: skip
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "memory": torch.cuda.get_device_properties(device).total_memory if gpu else _host_memory(),
        "versions": _versions(gpu),
        "dtype": str(dtype).removeprefix("torch."),
        "itemsize": dtype.itemsize,
        "gemms": gemms,
        "attention": attention,
        "passes": memory,
        "operators": _operators(device, dtype, clock, groups[-1] if groups else None),
        "host": _host(device, dtype, groups[-1] if groups else None),
        "collectives": _collectives(device, dtype, groups, clock),
        "overlap": _overlap(device, dtype, groups[-1], clock) if groups else 0.0,
    }


class _Clock:
    """The median time of a call: of the host, or of the device alone (replayed as a CUDA graph)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, call: Callable[[], Any], budget: float = 0.02, rounds: int = 5) -> float:
        for _ in range(2):
            call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        once = max(time.perf_counter() - start, 1e-6)
        repeat = self.agreed(max(1, min(50, int(budget / once / rounds))))
        times = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            self.wait()
            times.append((time.perf_counter() - start) / repeat)
        return statistics.median(times)

    def of_device(self, call: Callable[[], Any], count: int = 10) -> float:
        """Without the host's time; several calls in a row, so that the device is as warm as at work."""
        if self.device.type != "cuda":
            return self(call)
        try:
            replay = self._graph(call, count)
        except RuntimeError:  # it cannot be captured
            return self(call)
        return self(replay, budget=0.1, rounds=3) / count

    def _graph(self, call: Callable[[], Any], count: int) -> Callable[[], None]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(count):
                call()
        return graph.replay

    def agreed(self, count: int) -> int:
        """The same number on all ranks, for calls that communicate."""
        if not dist.is_initialized():
            return count
        found = torch.tensor(count, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)


def _shown(items: list[Any], what: str) -> Any:
    return each(items, len(items), f"measuring {what}")


def _gemm(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x = torch.randn(m, k, device=device, dtype=dtype)
    w = torch.randn(n, k, device=device, dtype=dtype)
    return lambda: F.linear(x, w)


def _attention(
    shape: tuple[int, int, int, int], how: str, grad: bool, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=grad) for _ in range(3))
    mask: Tensor | None = None
    if how == "masked":
        mask = torch.zeros(shape[0], 1, shape[2], shape[2], device=device, dtype=dtype)
    out_grad = torch.randn(shape, device=device, dtype=dtype)

    def call() -> Any:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=how == "causal")
        return torch.autograd.grad(out, (q, k, v), out_grad) if grad else out

    return call


def _add(numel: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    x = torch.randn(numel, device=device, dtype=dtype)
    y = torch.randn(numel, device=device, dtype=dtype)
    return lambda: x + y


# Operators whose kernels are far from the speed of a plain copy, forward or backward.
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda x, w: F.layer_norm(x, x.shape[-1:], w, w),
    "rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w),
    "softmax": lambda x, w: x.softmax(-1),
    "dropout": lambda x, w: F.dropout(x, 0.1),
    "gelu": lambda x, w: F.gelu(x, approximate="tanh"),
    "broadcast": lambda x, w: x * w,
    "cross_entropy": lambda x, w: F.cross_entropy(
        x, torch.arange(len(x), device=x.device) % x.shape[1]
    ),
    "embedding": lambda x, w: F.embedding(torch.arange(8192, device=x.device) % len(x), x),
}
SHAPES = {
    "cross_entropy": [(8192, 32000), (8192, 16000)],
    "vocab_cross_entropy": [(32768, 32000), (16384, 32000)],
    "embedding": [(32000, 1024), (32000, 4096)],
}


def _operators(
    device: torch.device, dtype: torch.dtype, clock: _Clock, group: Group | None
) -> list[tuple[str, int, int, float, float]]:
    """Name, rows, columns, seconds forward and backward."""
    found = []
    operators = dict(OPERATORS)
    if group is not None:
        operators["vocab_cross_entropy"] = partial(_vocab_cross_entropy, group=group)
    for name, op in operators.items():
        shapes = SHAPES.get(name, [(32768, 1024), (32768, 4096), (8192, 8192)])
        for rows, columns in _shown(shapes, name):
            if device.type == "cpu":
                rows, columns = rows // 8, columns // 8
            x = torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)
            w = torch.ones(columns, device=device, dtype=dtype, requires_grad=True)
            grad = torch.ones_like(op(x, w))
            wanted = (x, w) if name.endswith("norm") else (x,)

            # What communicates is not captured.
            timed = clock if name.startswith("vocab") else clock.of_device
            forward = timed(lambda op=op, x=x, w=w: op(x, w))  # type: ignore[misc]
            backward = timed(partial(_gradient, op, x, w, wanted, grad)) - forward
            found.append((name, rows, columns, forward, backward))
    return found


def _gradient(op: Any, x: Tensor, w: Tensor, wanted: tuple[Tensor, ...], grad: Tensor) -> Any:
    return torch.autograd.grad(op(x, w), wanted, grad)


def _vocab_cross_entropy(x: Tensor, w: Tensor, group: Group) -> Tensor:
    rows = x.shape[1]
    target = torch.arange(len(x), device=x.device) % (rows * group.degree)
    return ops.vocab_cross_entropy(x, target, group, rows * group.degree, rows)


def _one_attention(y: Tensor) -> Tensor:
    q = y.view(1, 1, 64, 64)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).view(64, 64)


def _host(device: torch.device, dtype: torch.dtype, group: Group | None) -> dict[str, list[float]]:
    """Seconds of Python and launch per node of a graph, forward and backward, on tiny tensors.

    ``step`` is what one backward pass costs beside its nodes.
    """
    clock = _Clock(device)
    x = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
    ones = torch.ones(64, device=device, dtype=dtype, requires_grad=True)
    nodes: dict[str, Callable[[Tensor], Tensor]] = {
        # of what models are made of: an activation, a norm, a sum, a copy
        "kernel": lambda y: (F.layer_norm(F.gelu(y), (64,), ones, ones) + x).contiguous().clone(),
        "view": lambda y: y.transpose(0, 1),
        "product": lambda y: F.linear(y, w, ones),
        "attention": _one_attention,
    }
    parts = {"kernel": 4}
    if group is not None:
        nodes["collective"] = lambda y: ops.reduce(ops.copy(y, group), group)
    found = {}
    for name, node in nodes.items():
        times = {}
        for count in (20, 220):

            def chain(node: Any = node, count: int = count) -> Tensor:
                y = x
                for _ in range(count):
                    y = node(y)
                return y

            grad = torch.ones_like(x)
            forward = clock(chain)
            both = clock(lambda chain=chain, grad=grad: torch.autograd.grad(chain(), (x,), grad))  # type: ignore[misc]
            times[count] = forward, both - forward
        slope = [(times[220][i] - times[20][i]) / 200 for i in range(2)]
        found[name] = [value / parts.get(name, 1) for value in slope]
        if name == "kernel":
            found["step"] = [0.0, max(0.0, times[20][1] - 20 * slope[1])]
    if isinstance(group, ProcessGroupComm):
        found["parameter"] = _unwrapping(device, dtype, group, clock)
    return found


def _unwrapping(
    device: torch.device, dtype: torch.dtype, group: ProcessGroupComm, clock: _Clock, count: int = 50
) -> list[float]:
    """Seconds per parameter that is a DTensor, forward and backward."""
    mesh = DeviceMesh.from_group(group.process_group, device.type)
    parameters: list[Any] = [
        torch.nn.Parameter(DTensor.from_local(torch.zeros(8, 8, device=device, dtype=dtype), mesh))
        for _ in range(count)
    ]

    def unwrap() -> list[Tensor]:
        for p in parameters:
            p.grad = None
        return shares(parameters)

    grads = [torch.ones(8, 8, device=device, dtype=dtype) for _ in range(count)]
    forward = clock(unwrap)
    both = clock(lambda: torch.autograd.backward(unwrap(), grads))
    return [forward / count, (both - forward) / count]


def _group(degree: int) -> ProcessGroupComm:
    """The group of neighbouring ranks that this rank is in."""
    world = range(0, dist.get_world_size(), degree)
    groups = [dist.new_group(list(range(first, first + degree))) for first in world]
    return ProcessGroupComm(groups[dist.get_rank() // degree], RandomStream(0))


def _collectives(
    device: torch.device, dtype: torch.dtype, groups: list[ProcessGroupComm], clock: _Clock
) -> list[tuple[str, int, int, float]]:
    """Kind, ranks, bytes, seconds."""
    found = []
    for group in groups:
        numels = COLLECTIVE_NUMELS if device.type == "cuda" else SMALL_COLLECTIVE_NUMELS
        for numel in _shown(numels, f"all-reduces over {group.degree}"):
            x = torch.zeros(numel, device=device, dtype=dtype)
            seconds = clock(lambda x=x, group=group: group.all_reduce(x, inplace=True))  # type: ignore[misc]
            found.append(("all_reduce", group.degree, numel * dtype.itemsize, seconds))
    return found


def _overlap(
    device: torch.device, dtype: torch.dtype, group: ProcessGroupComm, clock: _Clock
) -> float:
    """How much of the shorter one is hidden where a weight's gradient and an all-reduce run at once.

    Less than 0 where both together take longer than one after the other.
    """
    tokens, hidden = (8192, 3072) if device.type == "cuda" else (512, 256)
    gemm = _gemm(hidden, 2 * hidden, tokens, device, dtype)
    x = torch.zeros(tokens, hidden, device=device, dtype=dtype)

    def both() -> None:
        wait = group.start_all_reduce(x)
        gemm()
        wait()

    product, collective = clock(gemm), clock(lambda: group.all_reduce(x, inplace=True))
    hidden_seconds = product + collective - clock(both)
    return min(1.0, hidden_seconds / min(product, collective))


def _versions(gpu: bool) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    if gpu:
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _host_memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
