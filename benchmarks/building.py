"""What building a large model takes of a host: peak memory of each rank, beside its share.

    python benchmarks/building.py            # 1.0B parameters in float32 at tp=4: 4 GB of files in /tmp
    python benchmarks/building.py --small    # 52M parameters at tp=2, in seconds

A GPT is built under ``autoshard.meta_parameters()``, split over processes of the CPU, and filled by
``load_weights`` from safetensors, and then by ``init_weights``. Linux: a rank
reads its own memory from /proc/self/status every few milliseconds and once at the end of each stage.

- ``held``: anonymous memory at the end of the stage; ``peak``: the most there was during it. Both
  beyond what the process had after its imports and after a first small model was split (torch.export
  imports much when it is first called). This memory is the rank's own.
- ``mapped``: the most there was of files mapped into memory (the weights), beyond the imports. The
  kernel takes these pages back when it needs them, and ranks of one host share them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autoshard
from autoshard.weights import INDEX
from benchmarks.models import GPT, Shape, tokens

LARGE = Shape("gpt", 2048, 16, 18, sequence=1024, batch=2, vocabulary=51200)
SMALL = Shape("gpt", 512, 8, 8, sequence=128, batch=2, vocabulary=51200)
FIRST = Shape("gpt", 32, 4, 1, sequence=16, batch=2, vocabulary=64)
MIB = 2**20


@dataclass(frozen=True)
class Stage:
    """One stage on one rank: bytes beyond the imports, and seconds."""

    held: int
    peak: int
    mapped: int
    seconds: float


class Peak:
    """Inside, the most anonymous and the most mapped memory of this process."""

    def __init__(self, base: tuple[int, int]) -> None:
        self.base, self.most, self._done = base, (0, 0), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        now = memory()
        self._see(now)
        (anonymous, mapped), (first, files) = self.most, self.base
        seconds = time.perf_counter() - self._start
        self.stage = Stage(now[0] - first, anonymous - first, mapped - files, seconds)

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self._see(memory())

    def _see(self, now: tuple[int, int]) -> None:
        self.most = max(self.most[0], now[0]), max(self.most[1], now[1])


def memory() -> tuple[int, int]:
    """Bytes of this process in memory: anonymous, and of mapped files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, files


def hollow(shape: Shape) -> nn.Module:
    """The model without memory for its parameters."""
    with autoshard.meta_parameters():
        return GPT(shape)


def batch(shape: Shape) -> dict[str, torch.Tensor]:
    """One batch of random tokens."""
    return tokens(shape.vocabulary, shape.batch, shape.sequence)


def write_files(shape: Shape, folder: Path) -> None:
    """Random weights, a file for each layer and one for the rest, and their index."""
    from safetensors.torch import save_file

    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in hollow(shape).named_parameters():
        layer = name.split(".")[1] if name.startswith("layers.") else "rest"
        groups.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    for file, shapes in groups.items():
        save_file({n: torch.rand(s).mul_(0.02) for n, s in shapes.items()}, folder / file)
    places = {name: file for file, shapes in groups.items() for name in shapes}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def rank_main(shape: Shape, folder: Path) -> None:
    """One rank; what it saw goes into a file."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    autoshard.parallelize(GPT(FIRST), world, batch(FIRST), degree="max")
    base = memory()
    stages: dict[str, Stage] = {}
    with Peak(base) as peak:
        tp_model = autoshard.parallelize(hollow(shape), world, batch(shape), degree="max")
    stages["parallelize"] = peak.stage
    with Peak(base) as peak:
        tp_model.load_weights(folder)
    stages["load_weights"] = peak.stage
    torch.manual_seed(0)
    with Peak(base) as peak:
        tp_model.init_weights()
    stages["init_weights"] = peak.stage
    shares = [p.to_local() if isinstance(p, DTensor) else p for p in tp_model.parameters()]
    assert all(bool(s.isfinite().all()) for s in shares)
    result = {
        "rank": rank,
        "share": sum(s.nbytes for s in shares),
        "whole": 4 * sum(p.numel() for p in tp_model.parameters()),
        "largest": 4 * max(p.numel() for p in tp_model.parameters()),
        "stages": {name: asdict(stage) for name, stage in stages.items()},
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run(small: bool, tp: int, folder: Path) -> list[dict[str, Any]]:
    """Start the ranks; what each of them saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--rank", str(folder), *["--small"] * small]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(tp),
              "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
              "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}) for rank in range(tp)
    ]
    try:
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
            time.sleep(0.1)
        if any(r.poll() for r in ranks):
            raise SystemExit(f"a rank failed: {[r.poll() for r in ranks]}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(tp)]


def table(found: list[dict[str, Any]]) -> str:
    """The largest figures of any rank, a row for each stage, in MiB."""
    lines = [f"{'stage':14} {'share':>8} {'held':>8} {'peak':>8} {'mapped':>8} {'seconds':>8}"]
    share = max(f["share"] for f in found)
    for stage in found[0]["stages"]:
        rows = [f["stages"][stage] for f in found]
        most = {key: max(row[key] for row in rows) for key in rows[0]}
        sizes = (share, most["held"], most["peak"], most["mapped"])
        figures = " ".join(f"{size / MIB:8.0f}" for size in sizes)
        lines.append(f"{stage:14} {figures} {most['seconds']:8.1f}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tp", type=int, help="4, or 2 with --small")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--rank", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SMALL if args.small else LARGE
    if args.rank:
        rank_main(shape, args.rank)
        return
    tp = args.tp or (2 if args.small else 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(shape, folder)
        found = run(args.small, tp, folder)
    first = found[0]
    print(
        f"{first['whole'] // 4:,} parameters, {first['whole'] / MIB:,.0f} MiB in float32, the largest "
        f"{first['largest'] / MIB:,.0f} MiB; tp={tp}; MiB, the most of any rank:"
    )
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
