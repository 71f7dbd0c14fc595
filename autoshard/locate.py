"""Locate: where does a split model begin to differ from the model?

Three things are run on one batch, forward and backward: the model itself, eagerly; the graph that was
captured of it, whole; and the rank's graph on simulated ranks. Where the captured graph gives something
else than the model, the first module is named whose output, or gradient, differs. Else every value of
the rank's graph is compared with what the proof says that a rank holds of the captured one, and the
first node that differs is named: forward in the graph's order, then gradients in the reverse order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autoshard import ops
from autoshard.capture import tied_names
from autoshard.claims import gradient_of
from autoshard.exactly import exactly
from autoshard.measures import FLOOR, cloned, largest_of, magnitude, objective, order, relative_error
from autoshard.mesh import dims_of_degree, ranks_of, tp_mesh_shape
from autoshard.modules import Call, ModuleCalls
from autoshard.paths import module_path
from autoshard.pipeline import Program, held_by_ranks
from autoshard.plans import Plan
from autoshard.proof.held import Held
from autoshard.rank import placeholder_values
from autoshard.rehearsal import simulated
from autoshard.rules import source_line
from autoshard.sharded import Sharded
from autoshard.simulate import RankContext
from autoshard.watching import Values, Watch, run_whole


@dataclass(frozen=True)
class Located:
    """The first place where values differ.

    Attributes:
        stage: ``"capture"``: the captured graph is not the model; ``"split"``: the rank's graph is not
            the captured one.
        way: ``"forward"`` or ``"backward"``.
        layer: path of the module.
        node: of the graph; "" where it is a module's output.
        operator: that the node calls.
        source: file and line of the model; "" where it is not known.
        holds: what each rank ought to hold of it.
        error: the largest relative error there; infinite where it could not be run.
        ranks: that differ.
        note: what else is known.
    """

    stage: str
    way: str
    layer: str
    node: str = ""
    operator: str = ""
    source: str = ""
    holds: str = ""
    error: float = float("inf")
    ranks: tuple[int, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        at = self.layer or "the top of the model"
        if self.stage == "capture":
            first = (
                "the captured graph, which runs whole here, is not the model (the split graph is not "
                f"looked at): in the {self.way} the first difference is at {at}"
            )
        else:
            first = f"in the {self.way} the first difference is at {at}"
        lines = [first + (f" ({self.source})" if self.source else "")]
        if self.node:
            lines.append(f"  {self.node} = {self.operator}")
        if self.holds:
            lines.append(f"  each rank ought to hold of {self.holds}")
        ranks = f", on rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        lines.append(f"  largest relative error {self.error:.2e}{ranks}")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


def locate(
    subject: nn.Module,
    program: Program,
    sharded: Sharded,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    held: Mapping[str, Held] | None = None,
) -> Located | None:
    """The first place that differs by more than the tolerance; None where there is none.

    Memory: every value of the model and its gradient once, whole, and the gradients of one rank.

    Args:
        subject, args, kwargs: the model and its inputs, on the CPU, as in ``compare``.
        program, sharded, plan: what was captured and rewritten.
        held: what ranks ought to hold of each node's value, where the graph is not the proven one.
    """
    captured, differing = program.captured, _Differing(tolerance)
    parameters = dict(subject.named_parameters())
    names = tied_names(subject)
    own = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in parameters.items()}
    own.update({alias: own[n] for alias, n in names.items() if n in own})
    buffers = {n: b.detach().clone() for n, b in subject.named_buffers(remove_duplicate=False)}
    original = Sharded(program.analysis.graph, {}, (), ())
    flat = pytree.tree_leaves((args, kwargs))
    whole = run_whole(
        original.graph, placeholder_values(original, captured, own, buffers, cloned(flat)), dtype
    )
    largest = largest_of({n: own[n].grad for n in parameters if own[n].grad is not None})  # type: ignore[misc]

    with exactly(dtype), ModuleCalls(subject) as modules:
        subject.zero_grad()
        outputs = pytree.tree_leaves(subject(*cloned(args), **cloned(kwargs)))
        objective(outputs).backward()
    tensors = [(a, b) for a, b in zip(whole.outputs, outputs, strict=True) if isinstance(b, Tensor)]
    wrong = any(differing(relative_error([a.detach()], b.detach(), 0.0)) for a, b in tensors)
    gradients = {
        n: relative_error([_gradient(own[n])], _gradient(p), largest) for n, p in parameters.items()
    }
    if wrong or any(map(differing, gradients.values())):
        return _in_capture(original.graph, whole, modules, gradients, differing, largest)
    if held is None:
        held = held_by_ranks(program, sharded)
    return _in_split(subject, program, sharded, plan, args, kwargs, held, whole, differing, largest)


@dataclass(frozen=True)
class _Differing:
    tolerance: float

    def __call__(self, error: float) -> bool:
        return not error < self.tolerance


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


# -- the captured graph against the model ---------------------------------------------------------


def _in_capture(
    graph: fx.Graph, whole: Values, modules: ModuleCalls, gradients: Mapping[str, float],
    differing: _Differing, largest: float,
) -> Located:  # fmt: skip
    """By modules: the model has no nodes to compare with."""
    same: list[tuple[Call, list[str]]] = []
    for call, nodes in modules.nodes(graph, whole.values):
        errors = {n: relative_error([whole.values[n]], call.output, 0.0) for n in nodes}
        best = min(errors.values(), key=order)
        if differing(best):
            return Located(
                "capture", "forward", call.path, error=best,
                note=f"the output of this {call.kind} differs, those of the modules before it do not",
            )  # fmt: skip
        same.append((call, [n for n, error in errors.items() if not differing(error)]))
    later = "the end of the model"
    for call, nodes in reversed(same):
        right = call.gradient
        errors = {n: relative_error([whole.gradient(n)], right, largest) for n in nodes}
        best = min(errors.values(), key=order)
        if differing(best):
            return Located(
                "capture", "backward", call.path, error=best,
                note="the gradient of this module's output differs; it comes back from "
                f"{later}, where it does not",
            )  # fmt: skip
        later = f"{call.path or 'the whole model'} ({call.kind})"
    name = max(gradients, key=lambda n: order(gradients[n]))
    if differing(gradients[name]):
        return Located(
            "capture", "backward", name.rpartition(".")[0], error=gradients[name],
            note=f"the gradient of {name} differs, the gradients of all modules' outputs do not",
        )  # fmt: skip
    return Located(
        "capture", "forward", "", note="an output differs, and the outputs of all modules do not"
    )


# -- the rank's graph against the captured one ----------------------------------------------------


def _in_split(
    subject: nn.Module, program: Program, sharded: Sharded, plan: Plan, args: Any, kwargs: Any,
    held: Mapping[str, Held], whole: Values, differing: _Differing, largest: float,
) -> Located | None:  # fmt: skip
    watches: dict[int, Watch] = {}

    def run(rank: RankContext, module: fx.GraphModule, values: list[Any]) -> list[Any]:
        watches[rank.rank] = Watch(module, held, whole, lambda d: rank.group(d).coordinate)
        watches[rank.rank].outputs = list(watches[rank.rank].run(*values))
        return watches[rank.rank].outputs

    failure: Exception | None = None
    try:
        simulated(subject, program, sharded, plan, args, kwargs, run)
    except Exception as error:  # a wrong graph may well not run: what ran is compared all the same
        failure = error
    if failure is not None and len(watches) < plan.tp:
        raise failure
    shape = tp_mesh_shape(plan.tp, tuple({r.degree for r in plan.regions}))
    groups = {
        h.inside: ranks_of(shape, dims_of_degree(plan.tp, shape, h.inside)) for h in held.values()
    }
    failed = {w.failed[0]: w.failed[1] for w in watches.values() if w.failed is not None}
    for node in sharded.graph.nodes:
        errors = _forward_errors(node, held, whole, watches, groups)
        ranks = tuple(sorted(r for r, error in errors.items() if differing(error)))
        if ranks:
            worst = max(errors.values(), key=order)
            return _told(node, "forward", held, worst, ranks)
        if node.name in failed:
            why = f"it could not be run: {type(failed[node.name]).__name__}: {failed[node.name]}"
            ranks = tuple(
                sorted(r for r, w in watches.items() if w.failed and w.failed[0] == node.name)
            )
            return _told(node, "forward", held, float("inf"), ranks, why.partition("\n")[0])
    if failure is None:
        wrong = _outputs(sharded, whole, watches, differing)
        if wrong is not None:
            return wrong
    total = _total(sharded.graph, held)
    for node in reversed(list(sharded.graph.nodes)):
        if node not in total:
            continue
        errors = _backward_errors(node.name, held[node.name], whole, watches, groups, largest)
        ranks = tuple(sorted(r for r, error in errors.items() if differing(error)))
        if ranks:
            users = ", ".join(f"{u.name} ({_operator(u)})" for u in node.users)
            note = f"this is the gradient of {node.name}; it comes from {users or 'no other node'}"
            return _told(node, "backward", held, max(errors.values(), key=order), ranks, note)
    if failure is not None:
        raise failure
    return None


def _outputs(
    sharded: Sharded, whole: Values, watches: Mapping[int, Watch], differing: _Differing
) -> Located | None:
    """The first output that is not the model's though every value is: the wrong one is handed out."""
    for place, (right, split) in enumerate(zip(whole.outputs, sharded.outputs, strict=True)):
        if not isinstance(right, Tensor) or split is not None:
            continue
        errors = {
            r: relative_error([w.outputs[place].detach()], right.detach(), 0.0)
            for r, w in watches.items()
        }
        ranks = tuple(sorted(r for r, error in errors.items() if differing(error)))
        if ranks:
            node = next(n for n in reversed(sharded.graph.nodes) if n.op == "output")
            given = node.args[0][place]
            return Located(
                "split", "forward", module_path(given), str(given), f"output {place}",
                source_line(given), error=max(errors.values(), key=order), ranks=ranks,
                note="another value is handed out than the model's",
            )  # fmt: skip
    return None


def _forward_errors(
    node: fx.Node, held: Mapping[str, Held], whole: Values, watches: Mapping[int, Watch],
    groups: Mapping[int, list[list[int]]],
) -> dict[int, float]:  # fmt: skip
    known = held.get(node.name)
    if known is None:
        return {}
    if known.times is None:
        return {r: w.errors[node.name] for r, w in watches.items() if node.name in w.errors}
    if any(node.name not in w.partial for w in watches.values()):
        return {}
    found: dict[int, float] = {}
    value = whole.meant(known)
    largest = max(magnitude(value) / FLOOR, whole.largest_operand(known.of))
    for group in groups[known.inside]:
        parts = [watches[r].partial[node.name] for r in group]
        if any(p.shape != value.shape for p in parts):
            error = float("inf")
        else:
            total = torch.stack(parts).sum(0) / known.times
            error = relative_error([total.to(value.dtype)], value, largest)
        found.update(dict.fromkeys(group, error))
    return found


def _backward_errors(
    name: str, held: Held, whole: Values, watches: Mapping[int, Watch],
    groups: Mapping[int, list[list[int]]], largest: float,
) -> dict[int, float]:  # fmt: skip
    found: dict[int, float] = {}
    right = whole.gradient(held.of.name)
    for group in groups[held.inside]:
        own = [watches[r].gradients.get(name) for r in group]
        if all(g is None for g in own) and held.of.name not in whole.gradients:
            continue
        shapes = [g.shape for g in own if g is not None]
        zero = torch.zeros(shapes[0] if shapes else (), dtype=right.dtype)
        shares = [zero if g is None else g for g in own]
        try:
            if shapes:
                together, wanted = gradient_of(shares, right, held)
            else:
                together, wanted = torch.zeros_like(right), right
            error = relative_error([together.to(wanted.dtype)], wanted, largest)
        except (RuntimeError, IndexError):  # shapes that do not fit
            error = float("inf")
        found.update(dict.fromkeys(group, error))
    return found


def _total(graph: fx.Graph, held: Mapping[str, Held]) -> set[fx.Node]:
    """Nodes whose gradient is all of the original value's: every use of that goes through them."""
    found: set[fx.Node] = set()
    started: set[str] = set()
    for node in graph.nodes:
        known = held.get(node.name)
        if known is None or not known.gradient or known.of.name in started:
            continue
        started.add(known.of.name)
        current = node
        while True:
            found.add(current)
            (user, *others) = list(current.users) or [None]
            after = held.get(user.name) if user is not None else None
            if others or user is None or after is None or after.of is not known.of:
                break
            if list(user.all_input_nodes)[:1] != [current]:
                break
            current = user
    return found


def _told(
    node: fx.Node, way: str, held: Mapping[str, Held], error: float, ranks: Iterable[int],
    note: str = "",
) -> Located:  # fmt: skip
    return Located(
        "split", way, module_path(node), node.name, _operator(node), source_line(node),
        str(held.get(node.name, "")), error, tuple(ranks), note,
    )  # fmt: skip


def _operator(node: fx.Node) -> str:
    """What a node calls: out of its random stream and its autocast."""
    if node.op == "placeholder":
        return "a parameter or an input"
    target: Any = node.target
    if target is ops.with_autocast:
        target = node.args[2]
    elif target is ops.with_stream:
        target = node.args[1]
    elif target is not None and getattr(target, "__name__", "") == "getitem":
        return f"item {node.args[1]} of {node.args[0]}"
    own = getattr(target, "__module__", "") == ops.__name__
    text = f"ops.{target.__name__}" if own else str(getattr(target, "__name__", target))
    if isinstance(target, torch._ops.OpOverload):
        text = str(target)
    return f"{text}({', '.join(str(a) for a in node.all_input_nodes)})"
