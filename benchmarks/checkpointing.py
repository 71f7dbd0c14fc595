"""What activation checkpointing saves and costs: bytes and the time of a step, with and without.

    python benchmarks/checkpointing.py                                   # one process
    torchrun --nproc-per-node 2 benchmarks/checkpointing.py [--hidden 4096 --layers 8 ...]

One line for each way: what lives between the forward and the backward beside parameters and inputs, the
most that lives in a step beside them, both per rank, and the median time of a step. On a GPU the bytes
are the allocator's; on the CPU those of the tensors that operators make (``live_bytes.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autoshard
from benchmarks.live_bytes import LiveBytes
from benchmarks.models import Shape, build, tokens


def bytes_of(model: nn.Module, batch: dict[str, Tensor], cuda: bool) -> tuple[int, int]:
    """Bytes between forward and backward, and the most in the step, beside what was there before."""
    model.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(**batch)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        loss = model(**batch)
        kept = live.now
        loss.backward()
    return kept, live.peak


def seconds_of(model: nn.Module, batch: dict[str, Tensor], steps: int, cuda: bool) -> float:
    """The median time of a step."""
    times = []
    for _ in range(steps + 2):
        model.zero_grad(set_to_none=True)
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        model(**batch).backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("gpt", "llama"), default="gpt")
    for name, value in [("hidden", 256), ("heads", 8), ("layers", 6), ("sequence", 256), ("batch", 4)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", help="a file for the figures, as JSON")
    given = parser.parse_args()
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    shape = Shape(
        given.kind, given.hidden, given.heads, given.layers, given.sequence, given.batch,
        given.vocabulary, dropout=given.dropout,
    )  # fmt: skip
    batch = tokens(shape.vocabulary, shape.batch, shape.sequence)
    there = {name: value.to(device) for name, value in batch.items()}
    rows: list[dict[str, Any]] = []
    for checkpoint in (None, "layer"):
        torch.manual_seed(0)
        with torch.device(device):
            model = build(shape).to(torch.bfloat16 if cuda else torch.float32)
        split = autoshard.parallelize(
            model, world, batch, degree="max", device=device, checkpoint=checkpoint, check_inputs=False
        )
        del model
        seconds = seconds_of(split, there, given.steps, cuda)
        kept, peak = bytes_of(split, there, cuda)
        rows.append({"checkpoint": checkpoint, "kept": kept, "peak": peak, "seconds": seconds})
        if int(os.environ.get("RANK", "0")) == 0:
            print(
                f"{shape.name} tp={world} checkpoint={checkpoint}: {kept / 2**20:.1f} MiB kept, "
                f"{peak / 2**20:.1f} MiB at most, {1e3 * seconds:.1f} ms", flush=True,
            )  # fmt: skip
        del split
    if given.out and int(os.environ.get("RANK", "0")) == 0:
        name = torch.cuda.get_device_name() if cuda else "cpu"
        document = {"device": name, "ranks": world, "torch": torch.__version__, "shape": vars(shape)}
        Path(given.out).write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
