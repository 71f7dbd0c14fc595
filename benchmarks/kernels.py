"""What a GPU did during a step, from torch.profiler: kernels, communication, and how much of it shows.

busy           at least one kernel, copy or fill runs
communication  at least one kernel of a collective runs
exposed        a collective's kernel runs and no other kernel does:  busy − computing
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
COMMUNICATION = re.compile(
    r"nccl|multimem|one_shot|two_shot|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE
)
COLLECTIVE = re.compile(r"^c10d::(?!barrier|monitored)")

Interval = tuple[float, float]


def trace(
    step: Callable[[], Any], meet: Callable[[], Any], steps: int, cuda: bool
) -> list[dict[str, Any]]:
    """The profiler's events of `steps` steps, as in a Chrome trace: times in microseconds.

    meet: waits for the GPU and for the other ranks; called once, behind a step that is not recorded:
    a rank whose profiler starts late would show as communication on the others.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ) as profiler:
            step()
            meet()
            for _ in range(steps):
                profiler.step()
                step()
            if cuda:
                torch.cuda.synchronize()
            profiler.step()
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def is_communication(kernel: str) -> bool:
    """By its name; the compiler names its own kernels after all operators in them."""
    return not kernel.startswith("triton_") and COMMUNICATION.search(kernel) is not None


def summary(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Per step: collectives called, kernels launched, and seconds of the GPU; None without a GPU."""
    computing: list[Interval] = []
    communicating: list[Interval] = []
    called = 0
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") in ON_GPU:
            kind = communicating if is_communication(event["name"]) else computing
            kind.append((event["ts"], event["ts"] + event["dur"]))
        elif event.get("cat") == "cpu_op" and COLLECTIVE.match(event["name"]):
            called += 1
    found: dict[str, Any] = {
        "collectives": called / steps,
        "kernels": None,
        "busy_seconds": None,
        "communication_seconds": None,
        "exposed_communication_seconds": None,
    }
    if computing or communicating:
        busy, alone = covered(computing + communicating), covered(computing)
        found |= {
            "kernels": (len(computing) + len(communicating)) / steps,
            "busy_seconds": 1e-6 * busy / steps,
            "communication_seconds": 1e-6 * covered(communicating) / steps,
            "exposed_communication_seconds": 1e-6 * (busy - alone) / steps,
        }
    return found


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        if last > end:
            total += last - max(first, end)
            end = last
    return total
