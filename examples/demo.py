"""Train one small GPT-2 twice, on one process and split over several, and compare the losses.

    python examples/demo.py [--data FILE] [--steps 100] [--tp 2]

The model is Hugging Face's GPT2LMHeadModel, unchanged; the text is the source of Python's own
standard library, read as bytes. The ranks talk over NCCL where the machine has a GPU for each, and
over gloo on the CPU otherwise. The end of the text is held out; both models' perplexity on it is
measured with sliding windows. Writes loss.png and result.json into demo-output/, and exits with 1 if
the curves or the perplexities differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, fx, nn

import autoshard
from autoshard.evaluation import perplexity

SEED, BATCH, LENGTH = 0, 8, 128
END = 256  # the token between two files, beside the 256 bytes
OVERLAP = 32  # of the windows in which the perplexity is measured
HELD_OUT = LENGTH + 23 * (LENGTH - OVERLAP) + 1  # tokens: 24 windows
TIMEOUT = 900.0  # seconds for the ranks

# The ranks add the same float32 numbers in another order: sums differ by about 1e-7 of their size,
# and training carries that on. One process whose initial weights are off by one rounding drifts by
# 1e-6 in the first ten steps and by 1e-4 in a hundred; ten times that is the bound. Any all-reduce
# left out moves the losses of the first ten steps by 1e-4 or more.
EARLY = 10
BOUND_EARLY, BOUND = 1e-5, 1e-3

console = Console(highlight=False, soft_wrap=True)


def build_model() -> nn.Module:
    """A GPT-2 of 4 layers with tied embeddings and random weights, the same every time."""
    torch.manual_seed(SEED)
    config = transformers.GPT2Config(
        vocab_size=END + 1, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,  # two runs then draw nothing at random
        bos_token_id=END, eos_token_id=END, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def read_tokens(data: Path | None) -> Tensor:
    """The file's bytes, or those of the standard library's top-level modules."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [data] if data else sorted(stdlib.glob("*.py"))
    numbers = [number for file in files for number in (*file.read_bytes(), END)]
    tokens = torch.tensor(numbers)
    if len(tokens) <= 2 * LENGTH:  # a quarter is held out
        raise SystemExit(f"{data} holds {len(tokens) - 1} bytes; the demo needs {2 * LENGTH} or more")
    return tokens


def parted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What is trained on, and the end of the text, which is not."""
    held = min(HELD_OUT, len(tokens) // 4)
    return tokens[:-held], tokens[-held:]


def batches(tokens: Tensor, steps: int) -> Iterator[Tensor]:
    """The same random windows of the text every time."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator).tolist()
        yield torch.stack([tokens[start : start + LENGTH] for start in starts])


def train(model: nn.Module, tokens: Tensor, steps: int, title: str, show: bool) -> list[float]:
    """An ordinary training loop: it does not know whether the model is split."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    losses: list[float] = []
    with Progress(console=console, disable=not show) as progress:
        task = progress.add_task(title, total=steps)
        for batch in batches(tokens, steps):
            batch = batch.to(device)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"{title}, loss {losses[-1]:.3f}")
    return losses


def evaluate(model: nn.Module, held: Tensor) -> float:
    """Perplexity per byte of the text held out, every byte predicted once."""
    device = next(model.parameters()).device
    return perplexity(model.eval(), held.to(device), window=LENGTH, overlap=OVERLAP).value


def worker(folder: Path, data: Path | None, steps: int) -> None:
    """What torchrun starts on every rank."""
    rank, tp = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= tp else "cpu"
    tokens, held = parted(read_tokens(data))
    example = next(batches(tokens, 1))
    inputs = {"input_ids": example, "labels": example}
    model = autoshard.parallelize(build_model(), tp, inputs, degree="max", device=device)
    start = time.perf_counter()
    losses = train(model, tokens, steps, f"{tp} processes", show=rank == 0)
    result = {
        "losses": losses,
        "seconds": time.perf_counter() - start,
        "layer": layer_as_code(model.graph, "transformer.h.0"),
        "perplexity": evaluate(model, held),
        "device": str(next(model.parameters()).device),
        "elements": sum(p.to_local().numel() for p in model.parameters()),
        "plan": str(model.plan),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def layer_as_code(graph: fx.Graph, layer: str) -> str:
    """The part of a rewritten graph that belongs to one module of the model, a line per node."""
    lines = []
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = stack[-1][0] if stack else ""
        if node.op != "call_function" or not f"{path}.".startswith(f"{layer}."):
            continue
        arguments = [*map(as_text, node.args), *(f"{k}={v!r}" for k, v in node.kwargs.items())]
        lines.append(f"{node.name} = {as_text(node.target)}({', '.join(arguments)})")
    return "\n".join(lines)


def as_text(value: Any) -> str:
    """``aten.addmm``, ``ops.copy``, ``operator.getitem``; anything else as Python shows it."""
    if isinstance(value, torch._ops.OpOverload):
        return str(value).removesuffix(".default")
    if callable(value):
        return f"{value.__module__.rpartition('.')[2].lstrip('_')}.{value.__name__}"
    return repr(value)


def run_ranks(folder: Path, data: Path | None, steps: int, tp: int) -> list[dict[str, Any]]:
    """Start this script on ``tp`` processes of this machine; what each rank reports."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", str(tp), __file__, "--worker", str(folder), "--steps", str(steps),
        *(["--data", str(data)] if data else []),
    ]  # fmt: skip
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, **os.environ}
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait(TIMEOUT)
    finally:
        process.terminate()  # torchrun then stops its ranks
        process.wait()
    if code:
        raise SystemExit(f"the ranks failed (exit code {code})")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(tp)]


def differences(one: list[float], ranks: list[dict[str, Any]]) -> Tensor:
    """How far the ranks' losses are from those of one process, at each step."""
    curves = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64)
    return (curves - torch.tensor(one, dtype=torch.float64)).abs().amax(0)


def same(difference: Tensor) -> bool:
    """Whether rounding explains the differences (a loss that is no number is not explained)."""
    return bool((difference[:EARLY] <= BOUND_EARLY).all() and (difference <= BOUND).all())


def same_perplexity(one: float, ranks: list[dict[str, Any]]) -> bool:
    """Whether the ranks' is that of one process: its logarithm is a loss, and has the losses' bound."""
    return all(abs(math.log(rank["perplexity"] / one)) <= BOUND for rank in ranks)


def show_losses(one: list[float], split: list[float], difference: Tensor, tp: int) -> None:
    """The curves side by side."""
    console.print(f"\n[bold]losses[/]\n  step   1 process   {tp} processes   difference")
    every = max(1, len(one) // 12)
    for step in sorted({*range(0, len(one), every), len(one) - 1}):
        console.print(f"{step + 1:6d}{one[step]:12.6f}{split[step]:14.6f}{difference[step]:13.1e}")


def draw(one: list[float], split: list[float], tp: int, path: Path) -> None:
    """Both curves as a PNG, the second dashed over the first."""
    try:
        import matplotlib
    except ImportError:
        console.print(f"{path} is not drawn: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(one, linewidth=3, alpha=0.5, label="1 process")
    axes.plot(split, linestyle="--", color="black", linewidth=1, label=f"{tp} processes")
    axes.set(xlabel="step", ylabel="loss", title="GPT-2, whole and split")
    axes.legend()
    figure.savefig(path, dpi=120)
    console.print(f"curves: {path}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="train on this file instead")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tp", type=int, default=2, help="processes to split over")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.worker:
        worker(args.worker, args.data, args.steps)
        return 0
    (tokens, held), model = parted(read_tokens(args.data)), build_model()
    whole = sum(p.numel() for p in model.parameters())
    console.print(f"{type(model).__name__}, {whole:,} parameters; {len(tokens):,} bytes of text")
    console.print(f"{len(held):,} more bytes, the end of it, are held out")
    if torch.cuda.device_count() >= args.tp:
        model.to("cuda")
    torch.set_num_threads(1)  # as each rank has
    start = time.perf_counter()
    one = train(model, tokens, args.steps, "1 process", show=True)
    seconds = time.perf_counter() - start
    alone = evaluate(model, held)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(Path(folder), args.data, args.steps, args.tp)
    console.print("\n[bold]the plan[/]")
    console.print(ranks[0]["plan"], markup=False)
    console.print("\n[bold]layer 0 as every rank runs it[/]")
    console.print(ranks[0]["layer"], markup=False)
    split, difference = ranks[0]["losses"], differences(one, ranks)
    show_losses(one, split, difference, args.tp)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(
        json.dumps(
            {"one": one, "split": split, "perplexity": [alone, *(r["perplexity"] for r in ranks)]}
        )
    )
    draw(one, split, args.tp, args.out / "loss.png")
    console.print("\n[bold]parameters[/]")
    for number, rank in enumerate(ranks):
        share = f"{rank['elements']:,} of {whole:,} elements ({rank['elements'] / whole:.1%})"
        console.print(f"  rank {number} on {rank['device']}: {share}")
    took = f"{seconds:.0f} s on one process, {ranks[0]['seconds']:.0f} s on {args.tp}"
    console.print(f"\ntraining took {took}")
    first = f"{difference[:EARLY].max():.1e} in the first {EARLY} steps (bound {BOUND_EARLY:.0e})"
    console.print(f"largest difference {first}, {difference.max():.1e} in all (bound {BOUND:.0e})")
    console.print(
        f"perplexity per byte of the text held out, windows of {LENGTH} with {OVERLAP} of overlap: "
        f"{alone:.5f} on one process, {ranks[0]['perplexity']:.5f} on {args.tp}"
    )
    right = same(difference) and same_perplexity(alone, ranks)
    console.print(f"[bold]{'the same training' if right else 'NOT the same training'}[/]")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
