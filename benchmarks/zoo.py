"""Every architecture of transformers' auto classes: is the split model right, and how much is split?

    python benchmarks/zoo.py [--only NAME ...] [--part K/N] [--workers N] [--write]

Each architecture is verified in train mode with labels, at tp = 2 and 4 with ``degree="max"``, with
each attention implementation that it has, in a process of its own with a time limit. ``--write``
keeps what was found in ``benchmarks/measured/zoo.json`` and writes ``docs/models.md`` from it; with
``--only`` or ``--part``, the other architectures keep what was found before.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

import autoshard
from autoshard import Report, progress
from autoshard.errors import AutoshardError, CaptureError
from autoshard.inputs import normalized_inputs
from autoshard.paths import layer_of
from autoshard.verification import verify_each
from benchmarks.tiny_models import LEFT_OUT, Architecture, architectures, attentions, build

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "measured" / "zoo.json"
PAGE = HERE.parent / "docs" / "models.md"
DEGREES = (2, 4)
LIMIT = 300.0  # seconds for one architecture with one attention, at both degrees
SPLIT = 0.9  # of the FLOPs of matmuls on shards: a model counts as split
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}

Result = dict[str, Any]


def examine(architecture: Architecture, attention: str) -> Result:
    """What is found about one architecture with one attention, at each degree."""
    torch.manual_seed(0)
    model, inputs = build(architecture, attention)
    model.train()
    found: Result = {"tp": {}}
    reports = verify_each(model, DEGREES, *normalized_inputs(model, inputs))
    for index, tp in enumerate(DEGREES):
        try:
            report = next(reports)
        except Exception as error:  # of an unknown kind: ours to mend
            known = isinstance(error, AutoshardError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
            captured = not isinstance(error, CaptureError)
            verdict = "refused" if known else "failed"
            failure = {"verdict": verdict, "captured": captured, "why": _line(why)}
            found["tp"] |= dict.fromkeys(DEGREES[index:], failure)
            break
        found["tp"][tp] = _summary(report)
    return found


def _summary(report: Report) -> Result:
    plan, seconds = report.plan, report.seconds
    layers: Counter[str] = Counter()
    for region in plan.regions:
        if (layer := layer_of(region.name)) is not None:
            layers[layer] += len(region.collectives)
    whole = sorted(plan.replicated, key=lambda w: -w.flops)
    return {
        "verdict": "right" if report.ok else "wrong",
        "error": report.max_relative_error,
        "worst": report.worst,
        "split": round(plan.sharded_fraction, 4),
        "collectives": max(layers.values(), default=0),
        "whole": [[w.name, w.reason] for w in whole[:3]],
        "unknown": len(plan.unknown),
        "capture": round(seconds["capture"], 2),
        "after": round(sum(seconds.values()) - seconds["capture"], 2),
    }


def _child(architecture: Architecture, attention: str, answer: Connection) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        answer.send(examine(architecture, attention))
    except BaseException as error:  # a model that cannot be built
        answer.send({"tp": {}, "why": f"{type(error).__name__}: {error}"})


def examined(architecture: Architecture, attention: str) -> Result:
    """The same in a process of its own, killed at the limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    start = time.perf_counter()
    child = context.Process(target=_child, args=(architecture, attention, there))
    child.start()
    there.close()
    try:
        found: Result = here.recv() if here.poll(LIMIT) else {"tp": {}, "why": f"over {LIMIT:.0f} s"}
    except EOFError:
        found = {"tp": {}, "why": "the process died"}
    child.join(1)
    child.kill()
    child.join()
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def run(chosen: list[Architecture], workers: int) -> dict[str, Result]:
    """Architecture -> attention -> what was found."""
    jobs = [(a, attention) for a in chosen for attention in attentions(a)]
    results: dict[str, Result] = {a.name: {"kind": a.kind, "class": a.class_name} for a in chosen}
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda job: examined(*job), jobs)
        for (architecture, attention), result in progress.each(
            zip(jobs, found, strict=True), len(jobs), "architectures"
        ):
            results[architecture.name][attention] = json.loads(json.dumps(result))
            line = "  ".join(f"tp={tp} {_brief(r)}" for tp, r in result["tp"].items())
            print(f"{architecture.name:32} {attention:5}  {line or result['why']}", flush=True)
    return results


def _brief(result: Result) -> str:
    if result["verdict"] in ("right", "wrong"):
        return f"{result['verdict']} {result['error']:.0e} {100 * result['split']:.1f} %"
    return f"{result['verdict']}: {_line(result['why'], 150)}"


def _line(text: str, length: int = 600) -> str:
    """A message in one line, without the machine's folders."""
    text = re.sub(r"[^\s(]*/(site-packages|lib/python[\d.]+)/", "", " ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"


HEAD = """# Models

Every architecture of transformers' causal, masked and sequence-to-sequence auto classes and some image
classifiers, tiny and with random weights, split over 2 and 4 ranks with `degree="max"` and compared
with itself in train mode with labels: every output and every parameter's gradient, in float64, with
each attention implementation that it has. `python benchmarks/zoo.py --write` wrote this page
({versions}).
"""
TABLE = """*Split*: the share of matmul FLOPs of the forward that run on shards, the least of the runs.
*Collectives*: all-reduces of one layer, forward and backward, at tp=4. *Seconds*: the capture, and all
after it, at tp=4. What stays whole stays right: every rank computes it.

| architecture | attention | result | split, tp=2 | tp=4 | collectives | seconds | whole, or why not |
|---|---|---|---|---|---|---|---|"""
SLOW = """## The slowest after the capture

| architecture | attention | tp | capture, s | after, s |
|---|---|---|---|---|"""
OUT = """## Left out

| model type | why |
|---|---|"""

# -- the page ----------------------------------------------------------------------------------


def each_run(result: Result) -> list[tuple[str, str, Result]]:
    """(attention, tp, what was found); what did not come so far counts as failed."""
    runs = []
    for attention in ("sdpa", "eager"):
        if attention in result:
            found = result[attention]
            missing = {"verdict": "failed", "why": found.get("why", "")}
            runs += [(attention, str(tp), found["tp"].get(str(tp), missing)) for tp in DEGREES]
    return runs


def verdict(result: Result) -> str:
    """The worst of an architecture's runs."""
    verdicts = {r["verdict"] for *_, r in each_run(result)}
    return next(v for v in ("wrong", "failed", "refused", "right") if v in verdicts)


def split(result: Result) -> float:
    """The least share of matmul FLOPs on shards among its runs."""
    return min((r.get("split", 0.0) for *_, r in each_run(result)), default=0.0)


def page(document: Result) -> str:
    """docs/models.md."""
    results: dict[str, Result] = document["architectures"]
    count = Counter(verdict(r) for r in results.values())
    right = {n: r for n, r in results.items() if verdict(r) == "right"}
    mostly = [n for n, r in right.items() if split(r) >= SPLIT]
    runs = [(n, a, tp, x) for n, r in results.items() for a, tp, x in each_run(r)]
    done = [x for x in runs if x[3]["verdict"] == "right"]
    slow = sorted(done, key=lambda x: -x[3]["after"])[:10]
    over = [x for x in done if x[3]["after"] > x[3]["capture"]]
    captures = sum(x[3]["capture"] for x in done)
    after = sum(x[3]["after"] for x in done)
    lines = [
        HEAD.format(versions=", ".join(f"{k} {v}" for k, v in document["versions"].items())),
        f"- {len(results)} architectures, {len(runs)} runs: **{count['right']} right in all of their "
        f"runs, {count['wrong']} wrong**, {count['refused']} refused with a reason, {count['failed']} "
        "failed.",
        f"- {len(mostly)} of the {count['right']} have {SPLIT:.0%} or more of their matmul FLOPs on "
        "shards at both degrees.",
        f"- Analysis and rewriting took {after:.0f} s in all, the captures {captures:.0f} s; "
        f"{len(over)} runs took longer after the capture than for it.",
        "",
        TABLE,
        *(_row(name, result) for name, result in sorted(results.items())),
        "",
        SLOW,
        *(f"| {n} | {a} | {tp} | {x['capture']} | {x['after']} |" for n, a, tp, x in slow),
        "",
        OUT,
        *(f"| {n} | {why} |" for n, why in sorted(LEFT_OUT.items())),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, result: Result) -> str:
    runs = each_run(result)
    by_tp = {tp: [r for _, t, r in runs if int(t) == tp] for tp in DEGREES}
    last = by_tp[DEGREES[-1]][0]
    shares = [
        f"{100 * min(r.get('split', 0) for r in by_tp[tp]):.1f} %" if verdict(result) == "right" else ""
        for tp in DEGREES
    ]
    seconds = f"{last['capture']} + {last['after']}" if "capture" in last else ""
    bad = next((r for *_, r in runs if r["verdict"] != "right"), None)
    if bad is not None:
        note = _line(bad.get("why") or f"{bad.get('worst')} off by {bad.get('error', 0):.1e}", 400)
    elif split(result) < SPLIT:
        least = min((r for *_, r in runs), key=lambda r: float(r["split"]))
        note = "; ".join(f"`{n}`: {_line(why)}" for n, why in least["whole"])
    else:
        note = ""
    attention = ", ".join(dict.fromkeys(a for a, *_ in runs))
    note = note.replace("|", "\\|")
    return (
        f"| {name} | {attention} | {verdict(result)} | {shares[0]} | {shares[1]} "
        f"| {last.get('collectives', '')} | {seconds} | {note} |"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of architectures (of all kinds)")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of every N architectures")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the results, and write the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    warm = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    autoshard.plan(warm, 2, (torch.ones(2, 4),))  # what torch.export imports, once for all
    chosen = architectures()
    part, parts = map(int, options.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    if options.only:
        chosen = [a for a in chosen if a.model_type in options.only or a.name in options.only]
    found = run(chosen, options.workers)
    document: Result = {"versions": VERSIONS, "architectures": found}
    if (options.only or parts > 1) and RESULTS.exists():
        known = json.loads(RESULTS.read_text())["architectures"]
        document["architectures"] = {**known, **found}
    count = Counter(verdict(r) for r in found.values())
    mostly = sum(verdict(r) == "right" and split(r) >= SPLIT for r in found.values())
    print(", ".join(f"{n} {v}" for v, n in count.items()) + f"; {mostly} mostly split")
    if options.write:
        RESULTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(document))
    sys.exit(bool(count["wrong"] or count["failed"]))


if __name__ == "__main__":
    main()
