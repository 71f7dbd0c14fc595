"""The time of a training step (forward and backward) of one model, for many ways to run it, in one run.

    torchrun --nproc-per-node 2 benchmarks/step.py --preset 3072x8 --out FILE.json --plot FILE.png
    python benchmarks/step.py --preset 1920x12 --only plain,autoshard-compiled,hf-gpt2
    torchrun --nproc-per-node 2 benchmarks/step.py --preset tiny --backend aot_eager   # on a CPU
    python benchmarks/step.py --preset 1920x12 --alone 2       # one GPU as one rank of two
    python benchmarks/step.py --preset 3072x8 --alone 2 --link h200   # and as slow as with its links

All contestants (`benchmarks/contestants.py`) are in memory at once and take turns: in every round each
has one turn, in an order drawn anew, of one step that is not timed and --block steps that are, one
behind the other. So a drift of the machine hits all alike. A turn's time is that of the slowest rank.

First, at a small size in float32, the loss and every gradient of each are compared with the whole
model's; who fails is left out, and the exit status is 1. At full size the losses are compared too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo
import torch._dynamo.utils
import torch._inductor.cudagraph_trees
import torch.distributed as dist

from benchmarks.contestants import (
    CONTESTANTS,
    Agreement,
    Contestant,
    Setting,
    check,
    local,
    make,
    reference,
    that_fit,
)
from benchmarks.kernels import summary, trace
from benchmarks.live_bytes import LiveBytes
from benchmarks.models import Shape
from benchmarks.reporting import draw, table

PRESETS = {
    "1920x12": Shape("gpt", 1920, 20, 12, 1024, 8, 51200),
    "3072x8": Shape("gpt", 3072, 24, 8, 1024, 8, 51200),
    "8192x2": Shape("gpt", 8192, 64, 2, 4096, 2, 51200),
    "tiny": Shape("gpt", 64, 4, 2, 32, 2, 256),
}
SMALL = PRESETS["tiny"]  # where contestants are compared with the whole model
LOSSES = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # how far losses at full size may be apart
PROFILED = 2  # steps

Row = dict[str, Any]
Log = Callable[[str], None]


def meet(cuda: bool) -> None:
    """Wait for this rank's GPU, and for the other ranks."""
    if dist.is_initialized():
        dist.barrier()
    if cuda:
        torch.cuda.synchronize()


def turn(one: Contestant, block: int, cuda: bool) -> tuple[float, float]:
    """Seconds of a step, and those after which the host has enqueued it; on this rank."""
    one.step()
    meet(cuda)
    if not cuda:
        start = time.perf_counter()
        for _ in range(block):
            one.step()
        seconds = (time.perf_counter() - start) / block
        return seconds, seconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start = time.perf_counter()
    first.record()
    for _ in range(block):
        one.step()
    last.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e-3 * first.elapsed_time(last) / block, host / block


def take_turns(
    contestants: dict[str, Contestant], rounds: int, block: int, s: Setting
) -> dict[str, tuple[list[float], list[float]]]:
    """Per contestant the times of its turns and of the host, each that of the slowest rank."""
    order = random.Random(0)  # the same on every rank
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        names = list(contestants)
        order.shuffle(names)
        for name in names:
            times[name].append(turn(contestants[name], block, s.device.type == "cuda"))
            contestants[name].drop_gradients()
    found = {}
    for name, pairs in times.items():
        slowest = torch.tensor(pairs, dtype=torch.float64, device=s.device)
        if dist.is_initialized():
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        steps, host = slowest.t().tolist()
        found[name] = (steps, host)
    return found


def peak_bytes(one: Contestant, s: Setting) -> int | None:
    """The most that this rank holds for this contestant: its parameters, and what a step adds."""
    own = one.parameter_bytes()
    one.drop_gradients()
    if s.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    elif one.compiled:  # its operators cannot be watched
        return None
    else:
        with LiveBytes() as live:
            one.step()
        peak = live.peak
    one.drop_gradients()
    return own + peak


def flops(shape: Shape, family: str) -> int | None:
    """Of the matmuls of forward and backward of a GPT, half of the attention's scores being masked."""
    if family != "gpt":
        return None
    tokens = shape.batch * shape.sequence
    matrices = shape.layers * 12 * shape.hidden**2 + shape.vocabulary * shape.hidden
    return 6 * tokens * (matrices + shape.layers * shape.sequence * shape.hidden)


def all_ranks(value: Any, s: Setting) -> list[Any]:
    """The value of every rank that is there."""
    if s.world == 1 or s.alone:
        return [value]
    found: list[Any] = [None] * s.world
    dist.all_gather_object(found, value)
    return found


def failure(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def attempt(action: Callable[[], Any], s: Setting) -> tuple[Any, str | None]:
    """The action's result; where it failed on any rank, None and why, on all ranks."""
    result, reason = None, None
    try:
        result = action()
    except Exception as error:
        reason = failure(error)
        if not isinstance(error, ImportError):
            traceback.print_exc()
    reasons = [r for r in all_ranks(reason, s) if r is not None]
    return (None, reasons[0]) if reasons else (result, None)


def checked(names: Sequence[str], s: Setting, log: Log) -> tuple[dict[str, Row], dict[str, Contestant]]:
    """Each contestant at a small size against the whole model.

    Returns:
        For each name ``right`` and ``agreement``, or ``left_out``; and the contestants that are to be
        measured at just this size.
    """
    layers = min(SMALL.layers, s.shape.layers)
    small = replace(s, shape=replace(SMALL, layers=layers), dtype=torch.float32)
    families = set() if s.alone else {CONTESTANTS[n].family for n in names}
    expected = {family: reference(family, small) for family in families}
    found: dict[str, Row] = {}
    kept: dict[str, Contestant] = {}
    for name in names:
        entry = CONTESTANTS[name]
        if s.alone or not entry.checked:
            found[name] = {"right": None}
            continue

        def examined(name: str = name, family: str = entry.family) -> tuple[Contestant, Agreement]:
            made = make(name, small)
            return made, check(made, small, expected[family])

        before = graphs()
        result, reason = attempt(examined, s)
        if reason is not None:
            found[name] = {"left_out": reason}
            log(f"left out: {name}: {reason}")
            continue
        made, agreement = result
        found[name] = {"right": agreement.ok, "agreement": asdict(agreement)}
        if not agreement.ok:
            found[name]["left_out"] = (
                f"loss off by {agreement.loss_error:.1e}, the gradient of {agreement.worst} by "
                f"{agreement.gradient_error:.1e}, of {agreement.tolerance:g} allowed"
            )
        elif small == s:
            kept[name] = made
            found[name] |= since(before)
        log(f"checked: {name}: {found[name].get('left_out', 'as the whole model')}")
        del result, made
        if small != s:
            torch._dynamo.reset()
            gc.collect()
    return found, kept


def measured(name: str, one: Contestant, s: Setting) -> Row:
    """Memory and kernels of a contestant; kernels of the rank that waits least for the others."""
    cuda = s.device.type == "cuda"
    # The memory of CUDA graphs is set aside when they are recorded, not in a step.
    peak = None if name.endswith("-graphs") else peak_bytes(one, s)
    kernels = summary(trace(one.step, partial(meet, cuda), PROFILED, cuda), PROFILED)
    one.drop_gradients()
    ranks = all_ranks({"peak_bytes": peak} | kernels, s)
    least = min(ranks, key=lambda r: r["communication_seconds"] or 0.0)
    return {**least, "peak_bytes": None if peak is None else max(r["peak_bytes"] for r in ranks)}


def run(s: Setting, names: Sequence[str], rounds: int, block: int) -> list[Row]:
    """A row for each contestant."""

    def log(text: str) -> None:
        if s.rank == 0:
            print(text, file=sys.stderr, flush=True)

    verdicts, kept = checked(names, s, log)
    rows = {n: {"name": n, "family": CONTESTANTS[n].family, **verdicts[n]} for n in names}
    ready: dict[str, Contestant] = {}
    for name in (n for n in names if "left_out" not in rows[n]):

        def first(name: str = name) -> tuple[Contestant, float]:
            made = kept.get(name) or make(name, s)
            loss = local(made.step()).item()
            made.step()
            made.drop_gradients()
            return made, loss

        start, before = time.perf_counter(), graphs()
        result, reason = attempt(first, s)
        if reason is not None:
            rows[name]["left_out"] = reason
            log(f"left out: {name}: {reason}")
            gc.collect()
            continue
        ready[name], rows[name]["loss"] = result
        rows[name]["ready_seconds"] = time.perf_counter() - start
        rows[name] |= {kind: n + rows[name].get(kind, 0) for kind, n in since(before).items()}
        if s.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # of the whole model that it was made from
        log(f"ready: {name}, after {rows[name]['ready_seconds']:.1f} s")
    for name, (steps, host) in take_turns(ready, rounds, block, s).items():
        low, _, high = statistics.quantiles(
            steps * 2 if len(steps) == 1 else steps, n=4, method="inclusive"
        )
        rows[name] |= {
            "seconds": statistics.median(steps),
            "quartiles": [low, high],
            "turns": steps,
            "host_seconds": statistics.median(host),
        }
    for name, one in ready.items():
        row = rows[name]
        row |= measured(name, one, s)
        busy, count = row["busy_seconds"], flops(s.shape, row["family"])
        row["busy_share"] = None if busy is None else busy / row["seconds"]
        ranks = 1 if name.startswith("plain") else s.world
        row["flops_per_second"] = None if count is None else count / ranks / row["seconds"]
    compare_losses(rows, s.dtype)
    return list(rows.values())


def graphs() -> dict[str, int]:
    """Graphs that torch.compile has made in this process, and breaks between them."""
    counted = torch._dynamo.utils.counters
    return {
        "graphs": counted["stats"]["unique_graphs"],
        "graph_breaks": sum(counted["graph_break"].values()),
    }


def since(before: dict[str, int]) -> dict[str, int]:
    """What `graphs` counted since then."""
    return {kind: now - before[kind] for kind, now in graphs().items()}


def compare_losses(rows: dict[str, Row], dtype: torch.dtype) -> None:
    """At full size: whose loss is not that of the whole model of its family is not right."""
    for row in rows.values():
        whole = rows.get("plain" if row["family"] == "gpt" else row["family"], {}).get("loss")
        if row.get("right") and whole is not None and "loss" in row:
            row["right"] = abs(row["loss"] - whole) <= LOSSES[dtype] * abs(whole)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="3072x8")
    for name in ("hidden", "heads", "layers", "batch", "sequence", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="in place of the preset's")
    parser.add_argument("--only", help=f"contestants, by comma: {', '.join(CONTESTANTS)}")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contestant")
    parser.add_argument("--block", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--connections", type=int, help="CUDA_DEVICE_MAX_CONNECTIONS; Megatron asks for 1"
    )
    parser.add_argument("--alone", type=int, metavar="N", help="be one of N ranks, the others missing")
    parser.add_argument("--link", metavar="PROFILE", help="alone: collectives take this machine's time")
    parser.add_argument("--cpu", action="store_true", help="although there is a GPU")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--plot", type=Path, help="a file for a picture of them; needs matplotlib")
    return parser.parse_args(arguments)


def join_missing(world: int, link: str | None) -> None:
    """Be the first of so many ranks, the others missing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if link is not None:
        from benchmarks.pretended import register

        register(link)
    backend = "fake" if link is None else "pretended"
    dist.init_process_group(backend, store=FakeStore(), rank=0, world_size=world)


def setting(given: argparse.Namespace) -> Setting:
    """The shape asked for, on this rank."""
    changes = {
        n: getattr(given, n) for n in ("hidden", "heads", "layers", "batch", "sequence", "vocabulary")
    }
    shape = replace(PRESETS[given.preset], **{n: v for n, v in changes.items() if v is not None})
    if changes["hidden"] and not changes["heads"]:
        shape = replace(shape, heads=max(1, shape.hidden // 128))
    cuda = torch.cuda.is_available() and not given.cpu
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if given.alone:
        join_missing(given.alone, given.link)
    elif "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    dtype = torch.bfloat16 if cuda else torch.float32
    if not dist.is_initialized():
        return Setting(shape, device, dtype, given.backend)
    return Setting(
        shape,
        device,
        dtype,
        given.backend,
        dist.get_rank(),
        dist.get_world_size(),
        alone=given.alone is not None,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where a contestant computes something else than the model."""
    given = options(arguments)
    if given.connections is not None:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(given.connections)  # before CUDA starts
    s = setting(given)
    names = given.only.split(",") if given.only else that_fit(s.world)
    wrong = [name for name in names if name not in that_fit(s.world)]
    if wrong:
        raise SystemExit(
            f"{wrong[0]} is not for {s.world} ranks: choose of {', '.join(that_fit(s.world))}"
        )
    torch._dynamo.config.recompile_limit = 1024  # layers and contestants share code
    torch._dynamo.config.accumulated_recompile_limit = 1024
    rows = run(s, names, given.rounds, given.block)
    document = {
        "device": torch.cuda.get_device_name() if s.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tp": s.world,
        "alone": s.alone,
        "link": given.link,
        "dtype": str(s.dtype).removeprefix("torch."),
        "backend": s.backend,
        "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        "rounds": given.rounds,
        "block": given.block,
        "shape_name": f"{s.shape.hidden}x{s.shape.layers}-{s.shape.batch}x{s.shape.sequence}",
        "shape": vars(s.shape),
        "rows": rows,
    }
    if s.rank == 0:
        if given.out:
            given.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{document['shape_name']}, tp={s.world}, {document['dtype']} on {document['device']}")
        print(table(rows), flush=True)
        if given.plot:
            draw(document, given.plot)
    return int(any(row.get("right") is False for row in rows))


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():
        # NCCL's communicators end when no CUDA graph holds their calls any more.
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch._inductor.cudagraph_trees.reset_cudagraph_trees()
        gc.collect()
        dist.destroy_process_group()
    raise SystemExit(status)
