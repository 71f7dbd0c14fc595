"""The command line: ``autoshard plan | explain | verify | calibrate``.

MODEL is ``package.module:factory`` (a function without arguments that returns a model, or a model
and its example inputs), or a local Hugging Face config file or folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from autoshard import api
from autoshard.cost_model.hardware import presets
from autoshard.cost_model.model import OPTIMIZERS
from autoshard.errors import AutoshardError
from autoshard.plans import Plan, Predicted
from autoshard.tables import prediction_lines, scaling_table
from autoshard.verification import verify

DTYPES = {"float64", "float32", "float16", "bfloat16"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where a model is not the same function, 2 for an error."""
    options = _parser().parse_args(arguments)
    sys.path.insert(0, "")
    try:
        return int(options.run(options))
    except (AutoshardError, ValueError, OSError) as error:
        print(f"autoshard: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autoshard", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="plan | explain | verify | calibrate")

    plan = commands.add_parser("plan", help="the degree of every layer, and what a step would take")
    _planning(plan)
    plan.add_argument("--compare", type=_numbers, metavar="1,2,4,8", help="a row for each tp")
    plan.add_argument(
        "--plot", type=Path, metavar="FILE", help="time and efficiency over tp, as a picture"
    )
    plan.add_argument(
        "--save", type=Path, metavar="FILE", help="write the plan, for parallelize(plan=)"
    )
    plan.set_defaults(run=_plan)

    explain = commands.add_parser("explain", help="one region: its graph, formula, and alternatives")
    _planning(explain)
    explain.add_argument("region", help="its name, as the plan shows it")
    explain.set_defaults(run=_explain)

    check = commands.add_parser("verify", help="is the split model the same function?")
    _model(check)
    check.add_argument("--degree", default="max", help='"max" or a number')
    check.add_argument(
        "--locate", action="store_true", help="where it is not, name the first value that differs"
    )
    check.set_defaults(run=_verify)

    calibrate = commands.add_parser("calibrate", help="measure this machine; under torchrun, its links")
    calibrate.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the profile to write"
    )
    calibrate.add_argument("--dtype", choices=sorted(DTYPES), help="bfloat16 on a GPU, float32 without")
    calibrate.add_argument("--json", action="store_true", help="print the profile too")
    calibrate.set_defaults(run=_calibrate)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=__doc__.partition("\n\n")[2].replace("\n", " "))
    parser.add_argument("--tp", type=int, required=True, help="ranks to split over")
    parser.add_argument("--json", action="store_true", help="figures for machines")


def _planning(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--hardware", help=f"{', '.join(presets())}, or a profile's path")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--memory", type=float, metavar="BYTES", help="that a rank may use")
    parser.add_argument("--degree", default="auto", help='"auto", "max" or a number')
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the parameters; else the model's")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adamw")
    parser.add_argument("--checkpoint", choices=("layer",), help="activations are computed again")
    parser.add_argument("--uniform", action="store_true", help="only the degrees 1 and tp")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,2,4,8") from None


# -- models --------------------------------------------------------------------------------------


def load_model(name: str, device: str = "meta") -> tuple[nn.Module, Any]:
    """A model by MODEL's syntax, and its example inputs or None.

    Raises:
        ValueError: nothing by this name; says which forms there are.
    """
    if ":" in name and not Path(name).exists():
        return _from_factory(name, device)
    if Path(name).exists():
        with torch.device(device):
            return _from_config(Path(name)), None
    raise ValueError(
        f"{name!r} is neither package.module:factory nor a Hugging Face config file or folder here"
    )


def _from_factory(name: str, device: str) -> tuple[nn.Module, Any]:
    module, _, factory = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"{name!r} is not callable: it must be a function that returns a model")
    try:
        with torch.device(device):
            made = function()
    except (NotImplementedError, RuntimeError):
        made = function()  # it does more than the meta device can
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} returned {type(model).__name__}, not a torch.nn.Module")
    if inputs is not None:
        inputs = torch.utils._pytree.tree_map_only(torch.Tensor, _real, inputs)
    return model, inputs


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """Inputs that were made on the meta device, as zeros: their shapes count."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _from_config(path: Path) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "a Hugging Face config needs transformers: pip install autoshard[transformers]"
        ) from None
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    config.use_cache = False
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            made: nn.Module = getattr(transformers, architecture)(config)
            return made
    causal: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return causal


# -- commands ------------------------------------------------------------------------------------


def _made(options: argparse.Namespace, tp: int) -> Plan:
    model, inputs = load_model(options.model)
    if options.dtype:
        model = model.to(getattr(torch, options.dtype))
    degree = int(options.degree) if options.degree.isdecimal() else options.degree
    return api.plan(
        model, tp, inputs, degree=degree, hardware=options.hardware, batch=options.batch,
        sequence=options.sequence, memory=options.memory, optimizer=options.optimizer,
        checkpoint=options.checkpoint, uniform=options.uniform,
    )  # fmt: skip


def _plan(options: argparse.Namespace) -> int:
    made = _made(options, options.tp)
    if options.save:
        made.save(options.save)
    rows = []
    if options.compare or options.plot:
        for tp in options.compare or _divisors(options.tp):
            one = made if tp == options.tp else _made(options, tp)
            rows.append((tp, one.predicted, efficiency(one)))
    if options.json:
        document: dict[str, Any] = plan_figures(made)
        if rows:
            document["compare"] = [
                {"tp": tp, "efficiency": share, **asdict(found)} for tp, found, share in rows
            ]
        print(json.dumps(document, indent=1))
    else:
        print(made)
        print("\n".join(["", *prediction_lines(made.predicted, efficiency(made), made.tp)]))
        if options.compare:
            print("\n" + scaling_table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


def efficiency(plan: Plan) -> float:
    """Step time on one GPU over tp times the step time on tp: 1 is perfect."""
    costs = plan.costs
    alone = costs.predict(dict.fromkeys(plan.degrees, 1)).step_time
    return float(alone / (plan.tp * plan.predicted.step_time))


def plan_figures(plan: Plan) -> dict[str, Any]:
    """A plan and its prediction as plain data."""
    return {
        "tp": plan.tp,
        "regions": [
            {"name": r.name, "kind": r.kind, "degree": r.degree, "degrees": r.degrees,
             "reason": r.reason, "collectives": r.collectives, "parameters": r.parameters}
            for r in plan.regions
        ],
        "overlap": plan.overlap,
        "sharded_fraction": plan.sharded_fraction,
        "parameters_per_rank": plan.parameter_numel_per_rank,
        "predicted": asdict(plan.predicted),
        "efficiency": efficiency(plan),
    }  # fmt: skip


def _explain(options: argparse.Namespace) -> int:
    made = _made(options, options.tp)
    region, costs = made.region(options.region), made.costs
    alternatives = {d: costs.alternative(region.name, d) for d in region.degrees}
    formula = made.cost_formula(region.name)
    if options.json:
        print(
            json.dumps(
                {
                    "name": region.name, "kind": region.kind, "degree": region.degree,
                    "reason": region.reason, "nodes": region.nodes, "formula": str(formula),
                    "alternatives": {str(d): asdict(p) for d, p in alternatives.items()},
                },
                indent=1,
            )
        )  # fmt: skip
        return 0
    print(f"{region.name} ({region.kind}), degree {region.degree}: {region.reason}")
    print(f"\nenters: {', '.join(region.inputs)}\nleaves: {', '.join(region.outputs)}")
    print("collectives: " + ("; ".join(region.collectives) or "none"))
    print("\nits part of the captured graph:\n" + costs.graph_text(region.nodes))
    print(f"\nseconds of a step (B batch, S sequence, d degree):\n{formula}\n")
    for line in alternative_lines(alternatives, region.degree):
        print(line)
    return 0


def alternative_lines(found: dict[int, Predicted], chosen: int) -> list[str]:
    """A row per degree."""
    lines = [
        f"{'degree':>6} {'step':>10} {'compute':>10} {'traffic':>10} {'all-reduce':>10} {'memory':>10}"
    ]
    for degree, p in found.items():
        times = (p.step_time, p.compute_time, p.memory_traffic_time, p.exposed_communication_time)
        row = " ".join(f"{t * 1e6:>7.0f} us" for t in times)
        mark = "  <- the plan" if degree == chosen else ""
        lines.append(f"{degree:>6} {row} {p.memory_per_rank / 2**20:>6.0f} MiB{mark}")
    return lines


def _verify(options: argparse.Namespace) -> int:
    model, inputs = load_model(options.model, "cpu")
    degree = int(options.degree) if options.degree.isdecimal() else options.degree
    report = verify(model, options.tp, inputs, degree=degree, locate=options.locate)
    if options.json:
        located = None if report.located is None else asdict(report.located)
        figures = {
            "ok": report.ok, "max_relative_error": _finite(report.max_relative_error),
            "worst": report.worst, "worst_layer": report.worst_layer,
            "tolerance": report.tolerance, "dtype": str(report.dtype).removeprefix("torch."),
            "tp": report.plan.tp,
            "located": located and {**located, "error": _finite(located["error"])},
            "layers": {k: _finite(v) for k, v in report.layers.items()},
            "outputs": {k: _finite(v) for k, v in report.outputs.items()},
            "gradients": {k: _finite(v) for k, v in report.gradients.items()},
        }  # fmt: skip
        print(json.dumps(figures, indent=1))
    else:
        print(report)
    return 0 if report.ok else 1


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _calibrate(options: argparse.Namespace) -> int:
    import os

    import torch.distributed as dist

    from autoshard.cost_model.fit import fit
    from autoshard.cost_model.measure import measure

    gpu = torch.cuda.is_available()
    rank = int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if gpu else "gloo")
    degrees = _divisors(dist.get_world_size())[1:] if dist.is_initialized() else []
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    with contextlib.ExitStack() as after:
        if started:
            after.callback(dist.destroy_process_group)
        measured = measure(device, dtype, tuple(degrees))
    if rank == 0:
        profile = fit(measured, options.out.stem, datetime.date.today().isoformat())
        profile.save(options.out)
        if options.json:
            print(options.out.read_text(), end="")
        else:
            errors = ", ".join(f"{k} {v:.1%}" for k, v in profile.fit_error.items())
            Console().print(f"wrote {options.out}: mean relative error of the fit: {errors}")
    return 0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def plot(rows: list[tuple[int, Predicted, float]], path: Path) -> None:
    """Step time by kind of cost, and efficiency, over tp.

    Raises:
        ValueError: matplotlib is not installed; says how to install it.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install autoshard[plot]") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    places = range(len(rows))
    below = [0.0] * len(rows)
    kinds = {
        "compute": "compute_time", "memory traffic": "memory_traffic_time",
        "exposed communication": "exposed_communication_time", "launch": "launch_time",
    }  # fmt: skip
    for label, name in kinds.items():
        heights = [getattr(found, name) * 1e3 for _, found, _ in rows]
        axes.bar(places, heights, bottom=below, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set(
        xlabel="tp", ylabel="ms a step", xticks=list(places), xticklabels=[str(r[0]) for r in rows]
    )
    right = axes.twinx()
    right.plot(places, [100 * share for *_, share in rows], "k.--", label="efficiency")
    right.set(ylabel="efficiency, %", ylim=(0, 105))
    handles = [h for a in (axes, right) for h in a.get_legend_handles_labels()[0]]
    axes.legend(handles, [*kinds, "efficiency"], loc="upper center", ncols=3, fontsize="small")
    axes.set_ylim(0, max(below) * 1.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


__all__ = ["load_model", "main"]
