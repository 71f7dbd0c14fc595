"""How long planning takes, and how it grows: seconds per stage and peak memory.

    python benchmarks/plan.py                 # the paper's 8.3B GPT-2 at 12, 24, 48 and 72 layers
    python benchmarks/plan.py --sizes paper   # the paper's GPT-2 and BERT sizes
    python benchmarks/plan.py --profile       # where the time after the capture goes, at 24 layers

Models are built on the meta device; each size runs in a process of its own, on one thread. Stages:
everything that ``parallelize`` does before it touches a weight, at ``degree="max"``, in seconds of
the processor, so that other work on the machine does not count. A model of one layer goes first
(``first``: mostly what torch.export imports when it is first called), and the garbage collector
passes over what is there by then.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import math
import os
import pstats
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VOCABULARY, SEQUENCE, BATCH = 51200, 1024, 2
CAPTURE = "capture"
STAGES = (CAPTURE, "normalize", "axes", "match", "plan", "shard", "prove")

Size = tuple[str, int, int, int]  # kind, layers, hidden, heads (arXiv 1909.08053, section 5)
LAYERS: dict[str, Size] = {
    f"GPT-2 8.3B, {layers} layers": ("gpt2", layers, 3072, 24) for layers in (12, 24, 48, 72)
}
PAPER: dict[str, Size] = {
    "GPT-2 355M": ("gpt2", 24, 1024, 16),
    "GPT-2 2.5B": ("gpt2", 54, 1920, 20),
    "GPT-2 8.3B": ("gpt2", 72, 3072, 24),
    "BERT 336M": ("bert", 24, 1024, 16),
    "BERT 1.3B": ("bert", 24, 2048, 32),
    "BERT 3.9B": ("bert", 48, 2560, 40),
}
SIZES = {"layers": LAYERS, "paper": PAPER}


def build(size: Size) -> Any:
    """A Hugging Face model on the meta device."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    kind, layers, hidden, heads = size
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=layers, n_embd=hidden, n_head=heads, vocab_size=VOCABULARY,
            n_positions=SEQUENCE, use_cache=False,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel
    else:
        config = transformers.BertConfig(
            num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
            intermediate_size=4 * hidden, vocab_size=VOCABULARY, max_position_embeddings=SEQUENCE,
        )  # fmt: skip
        model = transformers.BertForMaskedLM
    with torch.device("meta"):
        return model(config)


def measure(size: Size, tp: int, profile: bool = False) -> dict[str, Any]:
    """Plan and rewrite one model in this process."""
    import torch

    from autoshard import progress
    from autoshard.capture import skeleton
    from autoshard.pipeline import analyse, rewrite

    torch.set_num_threads(1)
    progress.perf_counter = time.process_time
    tokens = torch.zeros((BATCH, SEQUENCE), dtype=torch.int64)
    kind, _, _, heads = size
    start = time.process_time()
    inputs = {"input_ids": tokens, "labels": tokens}
    rewrite(analyse(skeleton(build((kind, 1, heads, heads))), (), inputs, tp), tp, "max")
    first = time.process_time() - start
    gc.collect()
    gc.freeze()
    model = build(size)
    before = _peak_gib()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    program = analyse(skeleton(model), (), inputs, tp)
    plan, _ = rewrite(program, tp, "max")
    profiler.disable()
    if profile:
        stats = pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative")
        stats.print_stats(r"/(autoshard|passes)/", 40)
    seconds = program.seconds
    return {
        **{stage: seconds[stage] for stage in STAGES},
        "after": sum(seconds.values()) - seconds[CAPTURE],
        "first": first,
        "GiB": _peak_gib(),
        "GiB more": _peak_gib() - before,
        "nodes": len(program.analysis.graph.nodes),
        "parameters": sum(p.numel for p in plan.parameters),
        "per rank": plan.parameter_numel_per_rank,
        "on shards": plan.sharded_fraction,
    }


def _peak_gib() -> float:
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run(name: str, sizes: str, tp: int, *options: str) -> dict[str, Any]:
    """Measure one size in a process of its own."""
    command = [sys.executable, __file__, "--sizes", sizes, "--tp", str(tp), "--one", name, *options]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def exponent(layers: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(value) over log(layers), least squares: 1 is linear."""
    x, y = [math.log(n) for n in layers], [math.log(max(v, 1e-9)) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def growth(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print how each stage grows, and how the rest compares with the capture."""
    layers = [LAYERS[name][1] for name in results]
    print("\ngrowth with layers, as a power (1 is linear):")
    for stage in (*STAGES, "after", "nodes", "GiB more"):
        print(f"  {stage:12}{exponent(layers, [r[stage] for r in results.values()]):6.2f}")
    for name, result in results.items():
        share = result["after"] / result[CAPTURE]
        verdict = "less" if share < 1 else "NOT less"
        print(f"{name}: after the capture {share:.0%} of the capture's time, {verdict}")


def main() -> None:
    """Run every size and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, default="layers")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1, help="the least of so many runs")
    parser.add_argument("--profile", action="store_true", help="functions by time")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = SIZES[options.sizes]
    if options.one:
        print(json.dumps(measure(sizes[options.one], options.tp, options.profile)))
        return
    if options.profile:
        run("GPT-2 8.3B, 24 layers", "layers", options.tp, "--profile")
        return
    results: dict[str, dict[str, Any]] = {}
    if not options.json:
        print("processor seconds per stage; GiB: peak of the process; more: of that, by this model")
        print(
            f"{'model':24}{'first':>8}{''.join(f'{stage:>10}' for stage in STAGES)}"
            f"{'after':>8}{'GiB':>7}{'more':>7}{'nodes':>7}{'on shards':>11}"
        )
    for name in sizes:
        runs = [run(name, options.sizes, options.tp) for _ in range(options.repeat)]
        result = results[name] = {key: min(one[key] for one in runs) for key in runs[0]}
        if not options.json:
            row = "".join(f"{result[stage]:10.2f}" for stage in STAGES)
            memory = f"{result['GiB']:7.2f}{result['GiB more']:7.2f}{result['nodes']:7d}"
            row = f"{result['first']:8.2f}{row}{result['after']:8.2f}{memory}"
            print(f"{name:24}{row}{result['on shards']:11.2%}", flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.sizes == "layers":
        growth(results)


if __name__ == "__main__":
    main()
