"""Measured times of steps (forward and backward), for `benchmarks/cost_model.py` to compare with.

    torchrun --nproc-per-node 2 benchmarks/step_times.py --out FILE --part shapes
    torchrun --nproc-per-node 2 benchmarks/step_times.py --out FILE --part choices

shapes: GPTs and Llamas, whole (every rank alone) and split over all ranks. choices: models that mix
small and large layers, every plan of their kinds of region. Times are medians in seconds; the file is
written after every line, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn

import autoshard
from benchmarks.models import Mixed, Shape, build, tokens

SHAPES = [
    Shape("gpt", 1024, 16, 8, 512, 4),
    Shape("gpt", 1024, 16, 8, 1024, 8),
    Shape("gpt", 2048, 16, 6, 1024, 8),
    Shape("gpt", 3072, 24, 4, 1024, 8),
    Shape("gpt", 4096, 32, 4, 2048, 2),
    Shape("gpt", 8192, 64, 2, 1024, 2),
    Shape("gpt", 8192, 64, 2, 4096, 1),
    Shape("llama", 1024, 16, 8, 2048, 4, kv_heads=4),
    Shape("llama", 2048, 16, 6, 512, 16, kv_heads=4),
    Shape("llama", 4096, 32, 3, 4096, 2, kv_heads=8),
    Shape("llama", 8192, 64, 2, 2048, 2, kv_heads=8),
]
SMALL = [
    Shape("gpt", 64, 4, 2, 32, 2, vocabulary=256),
    Shape("llama", 64, 4, 2, 32, 2, 256, kv_heads=2),
]

CPU = [  # small and large layers
    Shape("gpt", 64, 4, 2, 32, 2, vocabulary=256),
    Shape("gpt", 128, 4, 2, 64, 2, vocabulary=512),
    Shape("gpt", 1024, 8, 2, 128, 4, vocabulary=8192),
    Shape("gpt", 1536, 8, 1, 256, 4, vocabulary=8192),
]

# hidden, widths of the MLPs, vocabulary, batch, sequence
MIXED = [
    (4096, (256,) * 6 + (32768,), 1000, 4, 1024),
    (2048, (128,) * 8 + (16384,) * 2, 1000, 8, 1024),
    (1024, (64,) * 6 + (16384,), 512, 8, 1024),
    (4096, (1024, 16384) * 2, 32000, 2, 1024),
]
SMALL_MIXED = [(64, (16, 512), 64, 2, 32)]


def timed(model: nn.Module, batch: dict[str, torch.Tensor], seconds: float, cuda: bool) -> float:
    """The median of a step's time, on this rank."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).backward()

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    times: list[float] = []
    for _ in range(4):
        step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    count = torch.tensor([max(5, min(30, int(seconds / (time.perf_counter() - start))))])
    if dist.is_initialized():
        count = count.cuda() if cuda else count
        dist.broadcast(count, 0)
    for _ in range(int(count)):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(model: nn.Module, batch: Any, tp: int, degree: Any, device: torch.device) -> dict[str, Any]:
    """Split, run, free; the time and the peak memory."""
    cuda = device.type == "cuda"
    degrees = degree if isinstance(degree, dict) else None
    plan = None
    if degrees is not None:
        plan = autoshard.plan(model, tp, batch, degree="max")
        for name, value in degrees.items():
            plan = plan.with_degree(name, value)
    split = autoshard.parallelize(model, tp, batch, degree="max", plan=plan, device=device)
    there = {k: v.to(device) for k, v in batch.items()}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(split, there, 1.0, cuda)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    del split, there
    if cuda:
        torch.cuda.empty_cache()
    return {"seconds": seconds, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--part", choices=("shapes", "choices", "cpu"), required=True)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    world = dist.get_world_size()
    dtype = torch.bfloat16 if cuda else torch.float32
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if rank == 0:
            name = torch.cuda.get_device_name() if cuda else "cpu"
            document = {"device": name, "ranks": world, "torch": torch.__version__, "rows": rows}
            Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n")
            print(row, flush=True)

    if arguments.part != "choices":
        chosen = CPU if arguments.part == "cpu" else SMALL if arguments.small else SHAPES
        for shape in chosen:
            batch = tokens(shape.vocabulary, shape.batch, shape.sequence)
            torch.manual_seed(0)
            with torch.device(device):
                model = build(shape).to(dtype)
            for tp in (1, world):
                note({"shape": vars(shape), "tp": tp} | run(model, batch, tp, "max", device))
            del model
    else:
        for hidden, widths, vocabulary, size, length in SMALL_MIXED if arguments.small else MIXED:
            batch = tokens(vocabulary, size, length)
            torch.manual_seed(0)
            with torch.device(device):
                model = Mixed(hidden, widths, vocabulary).to(dtype)
            made = autoshard.plan(model, world, batch, degree="max")
            kinds: dict[Any, list[str]] = {}
            for region in made.regions:
                kinds.setdefault((region.kind, region.axes), []).append(region.name)
            for degrees in product((1, world), repeat=len(kinds)):
                if degrees[0] > 1:  # the small table of tokens stays whole
                    continue
                chosen = {n: d for names, d in zip(kinds.values(), degrees, strict=True) for n in names}
                row = {"mixed": [hidden, widths, vocabulary, size, length], "degrees": chosen}
                note(row | run(model, batch, world, chosen, device))
            del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
