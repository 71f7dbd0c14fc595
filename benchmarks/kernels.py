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
from torch.profiler import ProfilerActivity, profile

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
COMMUNICATION = re.compile(
    r"nccl|multimem|one_shot|two_shot|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE
)
COLLECTIVE = re.compile(r"^c10d::(?!barrier|monitored)")

Interval = tuple[float, float]


def trace(step: Callable[[], Any], steps: int, cuda: bool) -> list[dict[str, Any]]:
    """The profiler's events of `steps` steps, as in a Chrome trace: times in microseconds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def summary(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Per step: collectives called, kernels launched, and seconds of the GPU; None without a GPU."""
    computing: list[Interval] = []
    communicating: list[Interval] = []
    called = 0
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") in ON_GPU:
            kind = communicating if COMMUNICATION.search(event["name"]) else computing
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
