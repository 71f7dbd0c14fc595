"""Train one GPT-2 whole on one GPU and split over all that torchrun was given, and compare.

    torchrun --nproc-per-node 2 examples/train_two_gpus.py [--steps 20] [--hidden 1024] [--layers 8]

In float32 and in bfloat16: losses side by side, the calls of one step that communicate,
milliseconds per step and peak memory. Without GPUs it runs over gloo on the CPU.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import autoshard

BATCHES = 4  # different ones, in turn: the model learns them by heart


@dataclass(frozen=True)
class Run:
    """One training: its losses, and what a step costs."""

    losses: list[float]
    milliseconds: float
    mebibytes: float


def build(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """Hugging Face's GPT-2, unchanged, with the same random weights every time."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=options.vocabulary, n_positions=options.length, n_embd=options.hidden,
        n_layer=options.layers, n_head=options.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


def train(model: nn.Module, batches: list[Tensor], steps: int, device: torch.device) -> Run:
    """An ordinary training loop, measured."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses: list[float] = []
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(steps):
        batch = batches[step % len(batches)]
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())  # waits for the GPU
        times.append(time.perf_counter() - start)
    usual = sorted(times[1:] or times)[len(times[1:]) // 2]
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return Run(losses, 1000 * usual, memory)


def collectives(model: nn.Module, batch: Tensor) -> dict[str, int]:
    """The calls of one forward and backward that communicate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks, about outputs that are no tensors
        with CommDebugMode() as calls:
            model(input_ids=batch, labels=batch).loss.backward()
    return {str(op): number for op, number in calls.get_comm_counts().items()}


def compare(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    """Both trainings in one dtype, printed on the first rank."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.length)
    batches = [
        torch.randint(options.vocabulary, shape, generator=generator).to(device)
        for _ in range(BATCHES)
    ]
    whole: Run | None = None
    if rank == 0:
        whole = train(build(options, dtype).to(device), batches, options.steps, device)
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    inputs = {"input_ids": batches[0], "labels": batches[0]}
    model = autoshard.parallelize(build(options, dtype), tp, inputs, degree="max", device=device)
    elements = sum(p.to_local().numel() for p in model.parameters())
    split = train(model, batches, options.steps, device)
    calls = collectives(model, batches[0])
    if whole is None:
        return
    every = sum(p.numel() for p in model.parameters())
    print(f"\n{dtype}, {elements:,} of {every:,} parameter elements on rank 0")
    print(f"{'step':>6}{'one':>12}{f'tp={tp}':>12}{'difference':>14}")
    for step in sorted({*range(0, options.steps, max(1, options.steps // 10)), options.steps - 1}):
        a, b = whole.losses[step], split.losses[step]
        print(f"{step + 1:6d}{a:12.6f}{b:12.6f}{abs(a - b):14.1e}")
    print(f"ms per step (median): {whole.milliseconds:.1f} on one, {split.milliseconds:.1f} split")
    if device.type == "cuda":
        print(f"peak MiB: {whole.mebibytes:,.0f} on one, {split.mebibytes:,.0f} on rank 0")
    print(f"calls of one forward and backward that communicate: {calls}")


def main() -> None:
    """The command line, on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (
        ("steps", 20), ("layers", 8), ("hidden", 1024), ("heads", 16), ("vocabulary", 50257),
        ("batch", 8), ("length", 512),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    if dist.get_rank() == 0:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        if gpus:
            versions += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        name = torch.cuda.get_device_name(device) if gpus else "CPU"
        print(f"{dist.get_world_size()} ranks, {name}; {versions}")
    for dtype in (torch.float32, torch.bfloat16):
        compare(options, dtype, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
