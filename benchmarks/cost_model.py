"""How good the cost model is: its predictions beside measured times.

    python benchmarks/cost_model.py                 # all that needs no GPU: the paper, H200, choices
    python benchmarks/cost_model.py paper           # Megatron-LM's scaling on V100 (arXiv 1909.08053)
    python benchmarks/cost_model.py shapes FILE     # against times that benchmarks/step_times.py wrote
    python benchmarks/cost_model.py choices FILE    # is the chosen plan the best of those measured?
    python benchmarks/cost_model.py growth          # time to choose, over the number of layers
    python benchmarks/cost_model.py cpu             # calibrates two processes; the order of degrees
    python benchmarks/cost_model.py baseline        # the V100's rate that gives the paper's 39 TFLOP/s

Measured times of two H200 lie in benchmarks/measured/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import autoshard
from autoshard.cost_model.formulas import seconds
from autoshard.cost_model.hardware import load
from autoshard.cost_model.model import CostModel
from autoshard.cost_model.search import Option, search
from autoshard.cost_model.work import Collective, one_after_other
from benchmarks.models import Mixed, Shape, build, tokens

MEASURED = Path(__file__).resolve().parent / "measured"
HERE = Path(__file__).resolve().parent

# hidden, heads, layers, ways, efficiency of the paper in per cent (figure 5, batch 8)
WEAK = [(1536, 16, 40, 1, 100), (1920, 20, 54, 2, 95), (2304, 24, 64, 4, 82), (3072, 32, 72, 8, 77)]
HEADS = [(16, 82), (24, 80), (32, 77)]  # on 8.3B at 8 ways (table 7)
STRONG = [(1, 1.0), (2, 1.64), (4, 2.34), (8, 2.98)]  # of 1.2B (table 8)
BASELINE = 39e12  # FLOP/s of one GPU on 1.2B (section 5.1)
# Left out of every comparison: the host's constants were scaled to it.
FITTED = "gpt-1024x8-4x512"


def on_meta(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """The model without memory."""
    with torch.device("meta"):
        return build(shape).to(dtype)


def paper_plan(hidden: int, heads: int, layers: int, tp: int) -> autoshard.Plan:
    """The paper's GPT-2: unfused attention, dropout, activations checkpointed by layer, fp16."""
    shape = Shape("gpt", hidden, heads, layers, 1024, 8, vocabulary=51200, fused=False, dropout=0.1)
    return autoshard.plan(
        on_meta(shape, torch.float16), tp, tokens(51200, 2, 16), degree="max", hardware="v100",
        batch=8, sequence=1024, checkpoint="layer",
    )  # fmt: skip


def by_the_paper(plan: autoshard.Plan) -> CostModel:
    """The paper's program: no sum runs under products."""
    model = plan.costs.model  # type: ignore[attr-defined]
    return CostModel(one_after_other(model.workload), model.setting, plan.tp)


def flops_rate(plan: autoshard.Plan) -> float:
    """FLOP/s of a rank, what is computed again included."""
    return by_the_paper(plan).predict(plan.degrees).flops_per_rank / step_time(plan)


def step_time(plan: autoshard.Plan) -> float:
    """Predicted, and the all-reduces of the second forward, which the paper repeats and we do not."""
    model = by_the_paper(plan)
    works = [(u.work[plan.degrees[u.name]], plan.degrees[u.name]) for u in model.workload.units]
    works += [(work, 1) for work in model.workload.rest]
    repeated = sum(
        model.evaluate(seconds(item), degree)
        for work, degree in works if work.in_layer
        for item in work.forward.items if isinstance(item, Collective)
    )  # fmt: skip
    return float(model.predict(plan.degrees).step_time + repeated)


def paper() -> None:
    """Weak scaling, the head count, strong scaling."""
    alone = paper_plan(1536, 16, 40, 1)
    base = flops_rate(alone)
    print(f"one V100, 1.2B: {base / 1e12:.1f} TFLOP/s (paper: 39; the constant that it fixes)")
    print("weak scaling, % of one GPU's FLOP/s   predicted  paper")
    for hidden, heads, layers, ways, wanted in WEAK:
        share = 100 * flops_rate(paper_plan(hidden, heads, layers, ways)) / base
        print(f"  hidden {hidden}, {layers} layers, {ways} ways{share:>19.1f}{wanted:>7}", flush=True)
    print("heads of the 8.3B model, 8 ways       predicted  paper")
    for heads, wanted in HEADS:
        share = 100 * flops_rate(paper_plan(3072, heads, 72, 8)) / base
        print(f"  {heads} heads{share:>31.1f}{wanted:>7}", flush=True)
    print("strong scaling of 1.2B, speed-up      predicted  paper")
    for ways, speedup in STRONG:
        plan = alone if ways == 1 else paper_plan(1536, 16, 40, ways)
        faster = step_time(alone) / step_time(plan)
        print(f"  {ways} ways{faster:>33.2f}{speedup:>7}", flush=True)


def baseline() -> None:
    """Bisect the float16 rate of the V100 preset; nothing else of it is fitted."""
    plan = paper_plan(1536, 16, 40, 1)
    model, hardware = plan.costs.model, load("v100")  # type: ignore[attr-defined]
    low, high = 39e12, 130e12
    for _ in range(40):
        middle = (low + high) / 2
        changed = replace(hardware, flops={**hardware.flops, "float16": middle})
        setting = replace(model.setting, hardware=changed)
        found = CostModel(model.workload, setting, 1).predict(plan.degrees)
        low, high = (
            (middle, high) if found.flops_per_rank / found.step_time < BASELINE else (low, middle)
        )
    print(f"flops.float16 = {low:.6e}")


def as_measured(model: CostModel, tp: int) -> CostModel:
    """The program that was measured: all-reduces beside nothing, and no kernels of split classes."""
    passes = {**model.setting.hardware.passes, "vocab_cross_entropy": (23.1, 32.0)}
    setting = replace(model.setting, hardware=replace(model.setting.hardware, passes=passes))
    return CostModel(one_after_other(model.workload), setting, tp)


def shapes(path: Path, hardware: str = "h200") -> None:
    """Forward and backward of GPTs and Llamas, whole and split over two."""
    errors = []
    print(f"{'configuration':26} tp  measured ms  predicted ms   error   of which communication")
    for row in json.loads(path.read_text())["rows"]:
        shape = Shape(**row["shape"])
        plan = autoshard.plan(
            on_meta(shape, torch.bfloat16), row["tp"], tokens(shape.vocabulary, 2, 16), degree="max",
            hardware=hardware, batch=shape.batch, sequence=shape.sequence,
        )  # fmt: skip
        model = plan.costs.model  # type: ignore[attr-defined]
        found = as_measured(model, row["tp"]).predict(plan.degrees)
        error = found.step_time / row["seconds"] - 1
        left_out = shape.name == FITTED
        errors += [] if left_out else [abs(error)]
        print(
            f"{shape.name:26} {row['tp']:>2} {row['seconds'] * 1e3:>12.2f}"
            f" {found.step_time * 1e3:>13.2f} {error:>+7.1%}"
            f" {found.exposed_communication_time * 1e3:>10.2f}"
            + ("  (fitted, not counted)" if left_out else ""),
            flush=True,
        )
    print(f"mean absolute error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}")


def choices(path: Path, hardware: str = "h200") -> None:
    """The chosen plan's measured time beside all measured plans."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        groups.setdefault(json.dumps(row["mixed"]), []).append(row)
    for key, rows in groups.items():
        hidden, widths, vocabulary, batch, sequence = json.loads(key)
        with torch.device("meta"):
            model = Mixed(hidden, tuple(widths), vocabulary).bfloat16()
        plan = autoshard.plan(
            model, 2, tokens(vocabulary, 2, 16), hardware=hardware, batch=batch, sequence=sequence
        )
        # The table of tokens was measured whole.
        best = min(rows, key=lambda r: r["seconds"])
        named = {name: row for row in rows for name in [tuple(row["degrees"].items())]}
        degrees = {**plan.degrees, "tokens": 1}
        chosen = next(row for k, row in named.items() if dict(k) == degrees)
        whole = next(r for r in rows if set(r["degrees"].values()) == {1})
        split = next(r for r in rows if {d for n, d in r["degrees"].items() if n != "tokens"} == {2})
        ratios = [r["seconds"] / best["seconds"] for r in (chosen, whole, split)]
        print(
            f"hidden {hidden}, MLPs {widths}, vocabulary {vocabulary}: best of {len(rows)} measured "
            f"{best['seconds'] * 1e3:.2f} ms; chosen {ratios[0]:.2f}x, all 1 {ratios[1]:.2f}x, "
            f"all 2 {ratios[2]:.2f}x"
        )


def growth() -> None:
    """Seconds of the decision over the number of layers, memory binding."""
    print("layers  seconds to choose (attention and MLP of each, 4 degrees, memory binding)")
    for layers in (72, 250, 500, 1000):
        options = []
        for kind in range(2 * layers):
            seconds, size = (1.0, 8.0) if kind % 2 else (1.7, 5.0)
            options.append(
                tuple(
                    Option(d, seconds * (1 / d + 0.3 * (d > 1) * d**0.5), size / d)
                    for d in (1, 2, 4, 8)
                )
            )
        limit = 0.4 * sum(o[0].bytes for o in options)
        start = time.perf_counter()
        search(options, [], limit)
        print(f"{layers:>6}  {time.perf_counter() - start:.3f}", flush=True)
    print("layers  seconds to capture and analyse, then of the workload and the choice")
    for layers in (12, 24, 48, 72):
        shape = Shape("gpt", 3072, 24, layers, 1024, 8, vocabulary=51200)
        start = time.perf_counter()
        plan = autoshard.plan(
            on_meta(shape, torch.bfloat16), 8, tokens(51200, 2, 16), degree="max", hardware="h200",
            batch=8, sequence=1024,
        )  # fmt: skip
        captured = time.perf_counter() - start
        start = time.perf_counter()
        plan.costs.choose(False)  # type: ignore[attr-defined]
        print(f"{layers:>6}  {captured:.1f}, {time.perf_counter() - start:.2f}", flush=True)


def cpu() -> None:
    """Calibrate two gloo processes, then compare the order of degrees 1 and 2 with measured steps."""
    with tempfile.TemporaryDirectory() as folder:
        profile, measured = Path(folder) / "here.json", Path(folder) / "steps.json"
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        subprocess.run([*torchrun, "-m", "autoshard", "calibrate", "--out", str(profile)], check=True)
        step = [str(HERE / "step_times.py"), "--out", str(measured), "--part", "cpu"]
        subprocess.run([*torchrun, *step], check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(measured.read_text())["rows"]
        for whole, split in zip(rows[::2], rows[1::2], strict=True):
            shape = Shape(**whole["shape"])
            times = []
            for tp in (1, 2):
                plan = autoshard.plan(
                    on_meta(shape, torch.float32), tp, tokens(shape.vocabulary, 2, 16), degree="max",
                    hardware=str(profile), batch=shape.batch, sequence=shape.sequence,
                )  # fmt: skip
                times.append(plan.predicted.step_time)
            seen = [whole["seconds"], split["seconds"]]
            right = (times[0] < times[1]) == (seen[0] < seen[1])
            print(
                f"{shape.name:24} measured {seen[0] * 1e3:.1f}, {seen[1] * 1e3:.1f} ms; predicted "
                f"{times[0] * 1e3:.1f}, {times[1] * 1e3:.1f} ms at degree 1, 2: "
                + ("the order is right" if right else "the order is WRONG")
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = ("paper", "shapes", "choices", "growth", "cpu", "baseline", "all")
    parser.add_argument("part", nargs="?", choices=parts, default="all")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--hardware", default="h200")
    options = parser.parse_args(arguments)
    part = options.part
    if part in ("all", "paper"):
        paper()
    if part in ("all", "shapes"):
        shapes(options.file or MEASURED / "h200-x2-shapes.json", options.hardware)
    if part in ("all", "choices"):
        choices(options.file or MEASURED / "h200-x2-choices.json", options.hardware)
    if part in ("all", "growth"):
        growth()
    if part == "cpu":
        cpu()
    if part == "baseline":
        baseline()


if __name__ == "__main__":
    main()
