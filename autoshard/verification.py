"""Verify: does the split model compute the same function, gradients included?

The ranks run as threads in one process (``simulate``), each with leaf tensors of its own, and are
compared with the model itself, run eagerly: every output, and the gradient of every parameter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autoshard import capture as capturing
from autoshard.exactly import default_dtype, edit_exactly, exactly
from autoshard.inputs import normalized_inputs
from autoshard.locate import Located
from autoshard.locate import locate as first_difference
from autoshard.measures import TOLERANCE, WHY, cloned, largest_of, objective, order, relative_error
from autoshard.passes.assign_degrees import Request
from autoshard.paths import layer_of
from autoshard.pipeline import Program, analyse_each, rewrite
from autoshard.plans import Plan
from autoshard.rearranged import REFERENCE, Rearranged
from autoshard.rehearsal import simulated
from autoshard.rules.call import op_name
from autoshard.sharded import Sharded

LISTED = 5  # layers in a printed report


@dataclass(frozen=True)
class Report:
    """The outcome of a verification.

    Attributes:
        ok: every relative error is below the tolerance.
        max_relative_error: the largest of all.
        outputs: output -> relative error.
        gradients: parameter -> relative error of its gradient.
        tolerance: what ``ok`` was judged by.
        plan: the plan that was verified.
        dtype: that the comparison was made in, on which the tolerance depends.
        seconds: of each stage of the capture, the analysis and the rewriting.
        located: with ``locate=True`` and where not ok: the first place that differs; None else.
        reference: what was compared with, where that is not the model itself; "" else.
    """

    ok: bool
    max_relative_error: float
    outputs: dict[str, float]
    gradients: dict[str, float]
    tolerance: float
    plan: Plan
    dtype: torch.dtype = torch.float64
    seconds: dict[str, float] = field(default_factory=dict)
    located: Located | None = None
    reference: str = ""

    @property
    def worst(self) -> str:
        """The output or parameter with the largest error."""
        everything = {**self.outputs, **self.gradients}
        return max(everything, key=lambda name: order(everything[name]))

    @property
    def layers(self) -> dict[str, float]:
        """Layer -> the largest error of its parameters' gradients, the worst first.

        A layer is a numbered one (``transformer.h.0``); outside of these, the parameter's module.
        """
        return {layer: self.gradients[name] for layer, name in self._worst_of_layers().items()}

    @property
    def worst_layer(self) -> str:
        """The layer whose parameters' gradients have the largest error; "" without parameters."""
        return next(iter(self.layers), "")

    def _worst_of_layers(self) -> dict[str, str]:
        """Layer -> its parameter with the largest error, the worst layer first."""
        found: dict[str, str] = {}
        for name in sorted(self.gradients, key=lambda n: -order(self.gradients[n])):
            found.setdefault(layer_of(name) or name.rpartition(".")[0], name)
        return found

    def __str__(self) -> str:
        verdict = "the same function" if self.ok else "NOT the same function"
        lines = [
            f"{verdict}: largest relative error {self.max_relative_error:.2e} ({self.worst}), "
            f"tolerance {self.tolerance:.0e}, {len(self.outputs)} outputs, "
            f"{len(self.gradients)} gradients, tp={self.plan.tp}",
            f"tolerance {self.tolerance:.0e}: {WHY[self.dtype]}",
        ]
        if self.reference:
            lines.append(f"compared with {self.reference}")
        if self.located is not None:
            lines.append(str(self.located))
        worst = self._worst_of_layers()
        rows = [
            ("error", "where"),
            *((f"{self.outputs[n]:.2e}", f"output {n}") for n in list(self.outputs)[:LISTED]),
            *((f"{self.gradients[n]:.2e}", f"gradient of {n}") for n in list(worst.values())[:LISTED]),
        ]
        lines += [f"  {error:>8}  {where}" for error, where in rows]
        if len(worst) > LISTED:
            lines.append(f"  the gradients of the {LISTED} worst of {len(worst)} layers")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    tp: int,
    example_inputs: Any = None,
    degree: str | int = "max",
    plan: Plan | None = None,
    dtype: torch.dtype = torch.float64,
    locate: bool = False,
    pre_norm: bool = False,
) -> Report:
    """Compare the model split over ``tp`` simulated ranks with the model itself.

    Works on a copy with every parameter perturbed, in the model's train or eval mode, with dropout
    off, on inputs that hit the first, last and shard-boundary tokens and ignored labels.

    Args:
        model: on the CPU, unchanged by this.
        tp: number of ranks.
        example_inputs: tuple or dict; found when not given.
        degree: ``"max"``, or a number.
        plan: a plan to verify instead.
        dtype: float64 shows 1e-16 of rounding and nothing else; lower ones their own.
        locate: where the functions differ, find the first value or gradient that does, in one more
            run in which every value is compared: ``report.located``.
        pre_norm: as for ``parallelize``: the model is another function then, on purpose, so what is
            compared with is the rearranged graph, run whole. (That the graph is the model's, verify
            shows without ``pre_norm``.)

    Raises:
        AutoshardError: the model cannot be captured or split.
    """
    if plan is None and degree != "max" and not (isinstance(degree, int) and 0 < degree <= tp):
        raise ValueError(f'degree={degree!r} must be "max" or a number up to tp={tp}; or pass plan=')
    args, kwargs = normalized_inputs(model, example_inputs)
    request: Any = plan.degrees if plan is not None else degree
    return next(verify_each(model, (tp,), args, kwargs, request, dtype, locate, pre_norm))


def verify_each(
    model: nn.Module,
    tps: Sequence[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    request: Request = "max",
    dtype: torch.dtype = torch.float64,
    locate: bool = False,
    pre_norm: bool = False,
) -> Iterator[Report]:
    """``verify`` over several numbers of ranks, the model captured once."""
    subject = perturbed(copy.deepcopy(model).to(dtype), seed=0)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t.clone(), (args, kwargs)
    )
    hollow, edit = capturing.skeleton(subject), edit_exactly(dtype)
    programs = analyse_each(hollow, args, kwargs, tps, edit, pre_norm)
    for tp in tps:
        with _tensors_of(dtype):
            program = next(programs)
            plan, sharded = rewrite(program, tp, request)
            inputs = boundary_inputs(program, tp, args, kwargs)
            right = Rearranged(subject, program) if pre_norm else subject
            report = compare(right, program, sharded, plan, *inputs, dtype)
            report = replace(report, reference=REFERENCE if pre_norm else "")
            if locate and not report.ok:
                found = first_difference(
                    right, program, sharded, plan, *inputs, dtype, report.tolerance
                )
                report = replace(report, located=found)
        yield report


def _tensors_of(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Exactly means that tensors made without a dtype are exact too; else all is as in training."""
    return default_dtype(dtype) if dtype is torch.float64 else contextlib.nullcontext()


def compare(
    subject: nn.Module,
    program: Program,
    sharded: Sharded,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Compare a rewritten graph, run on simulated ranks, with the model run eagerly."""
    with exactly(dtype):
        subject.zero_grad()
        reference = pytree.tree_leaves(subject(*cloned(args), **cloned(kwargs)))
        objective(reference).backward()
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in subject.named_parameters()
    }
    outputs, gradients = simulated(subject, program, sharded, plan, args, kwargs)
    largest = largest_of(expected)
    gradient_errors = {}
    for name, whole in expected.items():
        shares = gradients.get(name)
        if shares is None:
            gradient_errors[name] = relative_error([torch.zeros_like(whole)], whole, largest)
        else:
            gradient_errors[name] = relative_error(shares, whole, largest)
    names = output_names(program, len(reference))
    tensors = [(i, r) for i, r in enumerate(reference) if isinstance(r, Tensor)]
    output_errors = {
        names[i]: relative_error([rank[i] for rank in outputs], r.detach(), 0.0) for i, r in tensors
    }
    report = judged(output_errors, gradient_errors, _coarsest(program, dtype), plan)
    return replace(report, seconds=program.seconds)


def _coarsest(program: Program, dtype: torch.dtype) -> torch.dtype:
    """What the model computes in where that is coarser: it may cast, or autocast, to less."""
    if dtype is torch.float64:  # casts are made exact
        return dtype
    values = (n.meta.get("val") for n in program.analysis.graph.nodes)
    found = {v.dtype for v in values if isinstance(v, Tensor)} & set(TOLERANCE)
    return max({dtype, *found}, key=lambda d: TOLERANCE[d])


def judged(
    outputs: dict[str, float], gradients: dict[str, float], dtype: torch.dtype, plan: Plan
) -> Report:
    """The report of these relative errors."""
    worst = max([0.0, *outputs.values(), *gradients.values()], key=order)
    tolerance = TOLERANCE[dtype]
    return Report(worst < tolerance, worst, outputs, gradients, tolerance, plan, dtype)


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    """The model with noise on every parameter: a zero bias or a unit norm hides a missing sum."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                scale = 0.02 + 0.1 * float(parameter.detach().abs().mean().nan_to_num())
                parameter.add_((scale * noise).to(parameter.dtype))
    return model


def boundary_inputs(
    program: Program, tp: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs whose tokens include the first, the last, and those at the shards' boundaries."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    axes = program.analysis.axes
    places = {name: i for i, name in enumerate(program.captured.inputs)}
    for call in axes.calls.values():
        if call.lookup is None:
            continue
        vocabulary = call.lookup.find().size
        is_loss = ("target", None) in call.operands
        source = _source_input(call.tensor("target" if is_loss else "indices"), places)
        if source is None or not isinstance(vocabulary, int):
            continue
        rows = -(-vocabulary // tp)
        edges = {0, vocabulary - 1}
        edges |= {e for r in range(1, tp) for e in (r * rows - 1, r * rows) if e < vocabulary}
        tokens = sorted(edges) + ([call.arguments["ignore_index"]] if is_loss else [])
        flat = leaves[source].flatten().clone()
        room = max(1, flat.numel() // 2)
        chosen = (tokens[:1] + tokens[-1:] + tokens[1:-1])[:room]
        step = max(1, flat.numel() // max(1, len(chosen)))
        for index, token in enumerate(chosen):
            if flat.dtype == torch.int64:
                flat[(index * step + step // 2) % flat.numel()] = token
        leaves[source] = flat.view_as(leaves[source])
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def _source_input(node: fx.Node, places: Mapping[str, int]) -> int | None:
    """The input that a node is a view or a copy of."""
    while node.name not in places:
        passing = ("view", "reshape", "slice", "clone", "contiguous", "to", "pad", "flatten")
        if op_name(node) not in passing or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return places[node.name]


def output_names(program: Program, count: int) -> list[str]:
    node = next(n for n in reversed(program.captured.graph.nodes) if n.op == "output")
    names = [n.name if isinstance(n, fx.Node) else str(i) for i, n in enumerate(node.args[0])]
    names += [str(i) for i in range(len(names), count)]
    spec = program.captured.out_spec
    paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))[0]
    if len(paths) != count:
        return names
    return [pytree.keystr(path).strip(".[]'\"") or names[i] for i, (path, _) in enumerate(paths)]
