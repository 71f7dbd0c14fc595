"""What it costs to compare inputs among ranks, on CPU processes: ratios of steps within one run.

    torchrun --nproc-per-node 2 benchmarks/check_inputs.py

Steps (forward and backward) of one model with check_inputs=True and False take turns, in blocks, so
that a slow minute of the machine hits both. Prints the medians, their ratio, and the check alone. The
last lines compare a step with and without what is noted down for the error of a lost rank.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import autoshard
from autoshard.agreement import InputCheck, fingerprint
from benchmarks.models import Shape, build, tokens

SHAPES = [  # kind, hidden, heads, layers, sequence, batch, vocabulary
    Shape("gpt", 64, 4, 2, 32, 2, vocabulary=256),
    Shape("gpt", 256, 4, 2, 128, 4, vocabulary=1024),
    Shape("gpt", 512, 8, 2, 128, 4, vocabulary=8192),
]
BLOCKS, STEPS = 13, 3


def _seconds(step: Callable[[], Any], times: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def _turns(*steps: Callable[[], Any]) -> list[float]:
    """The median seconds of each, which take turns."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(BLOCKS):
        for times, step in zip(found, steps, strict=True):
            times.append(_seconds(step, STEPS))
    return [statistics.median(times[1:]) for times in found]


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Run the benchmark."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world = dist.get_world_size()
    for shape in SHAPES:
        torch.manual_seed(0)
        model = build(shape)
        batch = tokens(shape.vocabulary, shape.batch, shape.sequence)
        tp_model = autoshard.parallelize(model, world, batch, degree="max", check_inputs=False)

        def step(check: bool, tp_model: Any = tp_model, batch: Any = batch) -> None:
            tp_model.__dict__["_input_check"].mode = check
            tp_model(**batch).backward()

        step(True)
        without, compared = _turns(partial(step, False), partial(step, True))
        check: InputCheck = tp_model.__dict__["_input_check"]
        alone, hashed = _turns(
            partial(check.compare, (), batch, True), partial(fingerprint, batch["ids"])
        )
        _say(
            f"{shape.name}: step {1e3 * without:.2f} ms, compared {1e3 * compared:.2f} ms, ratio "
            f"{compared / without:.3f}; the check alone {1e6 * alone:.0f} us, of which the fingerprint "
            f"of {tuple(batch['ids'].shape)} tokens {1e6 * hashed:.0f} us"
        )

        def silent(step: Any = step) -> None:
            with mock.patch("autoshard.ops._line", lambda: None):
                step(False)

        unnamed, named = _turns(silent, partial(step, False))
        _say(f"  noting the line of each copy: ratio {named / unnamed:.3f}")
    for size in (2**10, 2**16, 2**20):
        x = torch.randn(size)
        (seconds,) = _turns(partial(fingerprint, x))
        _say(f"fingerprint of {4 * size / 2**20:g} MiB: {1e6 * seconds:.0f} us")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
