"""Every operator's rule by brute force: the operator whole against its shards.

One call is analysed; every axis that the analysis leaves free is split over ranks, the rewritten
graph runs on simulated ranks, and results and gradients are compared with the call run whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import networkx as nx
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines an operator)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autoshard import assignment as assignments
from autoshard.analysis import Axes, Hints
from autoshard.assignment import Assignment
from autoshard.axes import Axis, atoms_of
from autoshard.passes import match
from autoshard.passes.assign_axes import assign_axes
from autoshard.passes.shard import shard
from autoshard.rank import local_share, rank_module
from autoshard.rules import RULES, Rule, rule_for
from autoshard.rules.arithmetic import pointwise, reduction
from autoshard.rules.call import Call
from autoshard.rules.table import computed, row
from autoshard.sharded import Sharded
from autoshard.simulate import RankContext, run_ranks
from tests.rule_samples import (
    Build,
    Draw,
    Fixed,
    Sample,
    builders,
    operator_named,
    pointwise_builders,
)

# -- one call as a graph -------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A graph of one call, its analysis, and what it gives when it runs whole.

    Attributes:
        values: of the placeholders, in order.
        differentiable: placeholders whose gradients are compared.
        sample: the call.
        outputs, gradients: of the whole run.
    """

    graph: fx.Graph
    axes: Axes
    values: dict[str, Tensor]
    differentiable: tuple[str, ...]
    sample: Sample
    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    @property
    def free(self) -> list[Axis]:
        """The axes of parameters that can be split, each once."""
        dims = [axis for node in self.axes.parameters for axis in self.axes.dims[node]]
        atoms = dict.fromkeys(a for axis in dims for a in atoms_of(axis))
        return [a for a in atoms if a.frozen is None and a.size != 0]


Refine = tuple[str, int]  # how one dimension of a parameter is refined by another use, and where
WHOLE: Refine = ("", 0)


def trial(
    op: Any,
    sample: Sample,
    parameters: Sequence[bool] = (),
    refined: Sequence[Refine] = (),
) -> Trial:
    """Analyse one call and run it whole.

    Args:
        op: the operator.
        sample: its arguments.
        parameters: which of its tensors of floats are parameters (the others are inputs); all
            where not given.
        refined: how their dimensions are refined: another use of the parameter sees the dimension
            as a product or as a concatenation.
    """
    graph = fx.Graph()
    values: dict[str, Tensor] = {}
    roles: dict[str, list[str]] = {"parameter": [], "input": [], "buffer": []}
    chosen, refinements = iter(parameters), iter(refined)

    def placeholder(value: Any) -> Any:
        if not isinstance(value, (Tensor, Fixed)):
            return value
        tensor = value.value if isinstance(value, Fixed) else value
        role = "buffer" if isinstance(value, Fixed) else "input"
        if role == "input" and tensor.is_floating_point() and next(chosen, True):
            role = "parameter"
        node = graph.placeholder(f"{role}_{len(values)}")
        node.meta["val"] = tensor
        values[node.name] = tensor
        roles[role].append(node.name)
        return node

    args, kwargs = pytree.tree_map(
        placeholder,
        (sample.args, sample.kwargs),
        is_leaf=lambda v: isinstance(v, (Tensor, Fixed)),
    )
    results: list[fx.Node] = []
    if sample.complex:
        seen: list[fx.Node] = []
        _call(graph, torch.ops.aten.view_as_complex.default, (args[0],), {}, seen)
        args = (seen[0], *args[1:])
    for node in list(graph.nodes):
        if node.name in roles["parameter"]:
            for dim in range(node.meta["val"].dim()):
                _refine(graph, node, dim, next(refinements, WHOLE), results)
    _call(graph, op, args, kwargs, results)
    graph.output(tuple(reversed(results)))
    axes = assign_axes(graph, roles["parameter"], roles["input"])
    match._freeze_repeated(axes)
    usable = match._usable(axes)
    match._Uses(axes, usable, Hints(graph))  # freezes lookups along composed axes
    differentiable = tuple(
        name for name in (*roles["parameter"], *roles["input"]) if values[name].is_floating_point()
    )
    leaves = {n: _leaf(v, n in differentiable) for n, v in values.items()}
    outputs = _run(fx.GraphModule({}, graph), list(leaves.values()), None, sample.backward)
    gradients = {n: _gradient(leaves[n]) for n in differentiable}
    return Trial(
        graph, axes, values, differentiable, sample,
        [o.detach() for o in outputs], gradients,
    )  # fmt: skip


def _call(graph: fx.Graph, op: Any, args: Any, kwargs: Any, results: list[fx.Node]) -> None:
    node = graph.call_function(op, args, kwargs)
    given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    value = op(*given[0], **given[1])
    node.meta["val"] = list(value) if isinstance(value, (tuple, list)) else value
    if isinstance(value, Tensor):
        results.append(node)
        return
    for index, part in enumerate(value):
        item = graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = part
        results.append(item)


def _refine(graph: fx.Graph, node: fx.Node, dim: int, how: Refine, results: list[fx.Node]) -> None:
    shape = list(node.meta["val"].shape)
    kind, at = how
    if not kind or shape[dim] < 4 or shape[dim] % 2:
        return
    first = 2 if at == 0 else shape[dim] // 2
    seen: list[fx.Node] = []
    if kind == "product":
        apart = [*shape[:dim], first, shape[dim] // first, *shape[dim + 1 :]]
        _call(graph, torch.ops.aten.view.default, (node, apart), {}, seen)
        _call(graph, torch.ops.aten.view.default, (seen[0], shape), {}, results)
    else:
        sizes = [first, shape[dim] - first]
        _call(graph, torch.ops.aten.split_with_sizes.default, (node, sizes, dim), {}, results)


def _leaf(value: Tensor, differentiable: bool) -> Tensor:
    leaf = value.clone()
    return leaf.requires_grad_() if differentiable else leaf


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _run(module: fx.GraphModule, values: list[Tensor], own: Any, backward: bool) -> list[Tensor]:
    """The outputs, and a backward pass from a sum of all of them, weighted by random numbers.

    Args:
        own: cuts a rank's share out of the weights of the output of this index, or None.
    """
    outputs: list[Tensor] = list(module(*values))
    objective: Tensor | None = None
    for index, output in enumerate(outputs):
        if not (output.requires_grad and backward):
            continue
        generator = torch.Generator().manual_seed(index)
        weights: Tensor = torch.randn(
            output.shape if own is None else own[index][0], generator=generator
        ).double()
        if own is not None:
            weights = own[index][1](weights)
        if output.is_complex():
            output = torch.view_as_real(output).sum(-1)
        term = (output * weights).nan_to_num(0.0, 0.0, 0.0).sum().double()
        objective = term if objective is None else objective + term
    if objective is not None and objective.requires_grad:
        objective.backward()
    return outputs


# -- splitting it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """Which axes are cut at once: per axis its parts, the stride, and whether it is padded."""

    degree: int
    cuts: tuple[tuple[Axis, int, int, bool], ...]

    def assignment(self) -> Assignment:
        """As the rewriting takes it."""
        made = Assignment()
        for axis, parts, stride, padded in self.cuts:
            made.cut(axis, self.degree, parts, stride, padded)
        return made

    def __str__(self) -> str:
        cuts = ", ".join(
            f"an axis of {axis.size} in {parts}{f'@{stride}' if stride > 1 else ''}"
            f"{', padded' if padded else ''}"
            for axis, parts, stride, padded in self.cuts
        )
        return f"degree {self.degree}: {cuts}"


def schemes(trial: Trial, degrees: Sequence[int] = (2, 3, 4)) -> Iterator[Scheme]:
    """Every way to split the call that the analysis and the matching allow."""
    free = trial.free
    uses = match._Uses(trial.axes, dict.fromkeys(free), Hints(trial.graph))
    ties = nx.Graph([tuple(pair) for pair in uses.ties])
    groups: list[tuple[Axis, ...]] = [(a,) for a in free]
    groups += [_together(free, tied, uses) for tied in nx.connected_components(ties)]
    lookups = {c.lookup.find() for c in trial.axes.calls.values() if c.lookup is not None}
    random = any(
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        for node in trial.axes.calls
    )
    for group in groups:
        if random and len(group) == 1 and any(group[0] in pair for pair in uses.ties):
            continue
        sizes = [a.size for a in group]
        for degree in degrees:
            if all(_size(a) % degree == 0 for a in group):
                yield Scheme(degree, tuple((a, degree, 1, False) for a in group))
        if not (lookups & set(group) or random or any(_size(a) % 2 for a in group)):
            for stride in (2, 1) if 4 in degrees else ():  # fewer parts than ranks
                yield Scheme(4, tuple((a, 2, stride, False) for a in group))
        if len(group) == 1 and group[0] not in uses.unpaddable:
            yield from (Scheme(d, ((group[0], d, 1, True),)) for d in degrees if sizes[0] % d or d == 2)
    for outer, inner in uses.factors:
        if _nested(outer, inner, trial) and not match._summed_apart([outer], inner, uses):
            if _size(outer) % 2 == 0 and _size(inner) % 2 == 0 and 4 in degrees:
                yield Scheme(4, ((outer, 2, 2, False), (inner, 2, 1, False)))


def _together(free: list[Axis], tied: set[Axis], uses: Any) -> tuple[Axis, ...]:
    """Of axes that are tied, those that can be cut at once: one of each product."""
    chosen: list[Axis] = []
    for axis in free:
        if axis in tied and not uses.conflicts[axis] & set(chosen):
            chosen.append(axis)
    return tuple(chosen)


def _size(axis: Axis) -> int:
    assert isinstance(axis.size, int)
    return axis.size


def _nested(outer: Axis, inner: Axis, trial: Trial) -> bool:
    """Whether the two are factors of one product in this order, and nowhere apart."""
    for node in trial.axes.parameters:
        for axis in trial.axes.dims[node]:
            atoms = list(atoms_of(axis))
            if outer in atoms and inner in atoms and atoms.index(outer) < atoms.index(inner):
                return True
    return False


class Wrong(AssertionError):
    """The split call does not compute what the whole one does."""


def check(trial: Trial, scheme: Scheme, keep_split: bool = False) -> None:
    """Split the call, run it on simulated ranks, and compare with the whole.

    Raises:
        Wrong: results or gradients differ, or nothing comes out at all.
    """
    sharded: Sharded | None = None
    try:
        keep = range(len(trial.outputs)) if keep_split else ()
        sharded = shard(trial.graph, trial.axes, scheme.assignment(), keep)
        run = partial(_on_rank, trial, sharded)
        for rank, (outputs, gradients, places) in enumerate(
            run_ranks(run, scheme.degree, timeout=20.0)
        ):
            _compare(trial, sharded, rank, outputs, gradients, places)
    except Exception as error:
        text = "not written" if sharded is None else str(sharded.graph)
        raise Wrong(f"{scheme}\n{trial.graph}\n{text}\n{type(error).__name__}: {error}") from error


def _on_rank(
    trial: Trial, sharded: Sharded, rank: RankContext
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, int]]:
    places = {n: rank.group(share[2]).coordinate for n, share in sharded.stored.items()}
    leaves = {}
    for node in sharded.graph.nodes:
        if node.op == "placeholder":
            value = trial.values[node.name]
            if node.name in sharded.stored:
                value = local_share(value, sharded.stored[node.name], places[node.name])
            leaves[node.name] = _leaf(value, node.name in trial.differentiable)
    own = [(o.shape, partial(_own, sharded, i, rank)) for i, o in enumerate(trial.outputs)]
    outputs = _run(rank_module(sharded, rank.group), list(leaves.values()), own, trial.sample.backward)
    gradients = {n: _gradient(leaf) for n, leaf in leaves.items() if n in trial.differentiable}
    return [o.detach() for o in outputs], gradients, places


def _own(sharded: Sharded, index: int, rank: RankContext, whole: Tensor) -> Tensor:
    """What a rank has of an output that leaves it as a share."""
    split = sharded.outputs[index] if index < len(sharded.outputs) else None
    if split is None:
        return whole
    rows = -(-split.size // split.degree)
    begin = min(rank.group(split.degree).coordinate * rows, split.size)
    return whole.narrow(split.dim, begin, min(rows, split.size - begin))


def _compare(
    trial: Trial,
    sharded: Sharded,
    rank: int,
    outputs: list[Tensor],
    gradients: dict[str, Tensor],
    places: dict[str, int],
) -> None:
    assert len(outputs) == len(trial.outputs)
    for index, (output, whole) in enumerate(zip(outputs, trial.outputs, strict=True)):
        split = sharded.outputs[index]
        if split is not None:
            rows = -(-split.size // split.degree)
            begin = min(rank * rows, split.size)
            whole = whole.narrow(split.dim, begin, min(rows, split.size - begin))
        if trial.sample.values:
            _close(output, whole, msg=lambda m, i=index: f"output {i} on rank {rank}: {m}")
        else:
            assert output.shape == whole.shape and output.dtype == whole.dtype
    for name, gradient in gradients.items():
        whole = trial.gradients[name]
        if name in sharded.stored:
            whole = local_share(whole, sharded.stored[name], places[name])
        _close(gradient, whole, msg=lambda m, n=name: f"gradient of {n} on rank {rank}: {m}")


def _close(actual: Tensor, expected: Tensor, msg: Any) -> None:
    single = expected.dtype is torch.float32
    rtol, atol = (1e-4, 1e-4) if single else (1e-9, 1e-10)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=msg)


def brute_force(trial: Trial, degrees: Sequence[int] = (2, 3, 4)) -> int:
    """Check every scheme; how many there were."""
    count = 0
    for scheme in schemes(trial, degrees):
        check(trial, scheme)
        count += 1
    return count


def first(options: Sequence[Any]) -> Any:
    """The choice that is made where nothing is random."""
    return options[0]


# -- the tests -----------------------------------------------------------------------------------


@pytest.fixture
def small_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies are padded to multiples of 4 from 2 rows on, so that small ones are."""
    monkeypatch.setattr(assignments, "ALIGNED_FROM", 2)
    monkeypatch.setattr(assignments, "ALIGNMENT", 4)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_sample(name: str) -> None:
    """A new row of the table is tried: by its letters, by its schema, or by samples of its own."""
    assert builders(name), f"{name} needs samples in tests/rule_samples.py"


ALL = [
    pytest.param(name, build, id=f"{name}-{index}")
    for name in RULES
    for index, build in enumerate(builders(name))
]


DEGREES = [pytest.param((2,), id="by 2"), pytest.param((3, 4), id="by 3, 4", marks=pytest.mark.slow)]


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize(("name", "build"), ALL)
def test_rule_holds_on_every_split(name: str, build: Build, degrees: tuple[int, ...]) -> None:
    """A sample, whole against each split of each axis that its rule leaves free."""
    sample = build(Draw(first))
    tried = trial(operator_named(name), sample)
    free = len(tried.free)
    assert free >= sample.splits, f"{tried.graph}\n{free} axes are free: {frozen(tried)}"
    assert sample.splits or not free, f"{tried.graph}\nan axis is free: {tried.axes.dims}"
    count = brute_force(tried, degrees)
    assert 2 not in degrees or count >= sample.splits


def frozen(trial: Trial) -> str:
    """Why the axes of parameters are whole, for messages."""
    dims = [axis for node in trial.axes.parameters for axis in trial.axes.dims[node]]
    return "; ".join(f"{a}: {a.frozen}" for axis in dims for a in atoms_of(axis) if a.frozen)


REFINE = st.sampled_from([WHOLE, ("product", 0), ("product", 1), ("parts", 0), ("parts", 1)])


@pytest.mark.slow
@pytest.mark.usefixtures("small_padding")
@pytest.mark.parametrize("name", RULES)
@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],  # the calls are small as they are
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_rule_holds_on_drawn_calls(name: str, data: st.DataObject) -> None:
    """Drawn sizes, operands that are no parameters, dimensions that are products and parts."""
    draw = Draw(lambda options: data.draw(st.sampled_from(list(options))), seed=1)
    sample = data.draw(st.sampled_from(builders(name)))(draw)
    tensors = [t for t in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(t, Tensor)]
    reals = [t for t in tensors if t.is_floating_point()]
    parameters = data.draw(st.lists(st.booleans(), min_size=len(reals), max_size=len(reals)))
    if not any(parameters):
        parameters = [True] * len(reals)
    dims = sum(t.dim() for t, p in zip(reals, parameters, strict=True) if p)
    dims = dims if sample.refined else 0
    refined = data.draw(st.lists(REFINE, min_size=dims, max_size=dims))
    tried = trial(operator_named(name), sample, parameters, refined)
    found = list(schemes(tried))
    if found:
        check(tried, found[data.draw(st.integers(0, len(found) - 1))])


# -- pointwise by its tag ------------------------------------------------------------------------

COMMON = (
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "pow.Tensor_Scalar", "neg.default",
    "exp.default", "log.default", "sqrt.default", "rsqrt.default", "tanh.default", "erf.default",
    "sigmoid.default", "relu.default", "gelu.default", "silu.default", "maximum.default",
    "where.self", "masked_fill.Scalar", "lt.Tensor", "addcmul.default", "lerp.Tensor",
    "clamp.default", "leaky_relu.default", "abs.default",
)  # fmt: skip


def tagged() -> list[str]:
    """Operators that have the pointwise tag, change nothing in place, and have no row."""
    found = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if f"aten.{name}.{overload}" in RULES or op._schema.is_mutable:
                continue
            if torch.Tag.pointwise in op.tags:
                found.append(f"{name}.{overload}")
    return found


def takes_reals(op: Any, sample: Sample) -> bool:
    """Whether the operator is defined on floats at all: parameters are never anything else."""
    try:
        result = op(*sample.args, **sample.kwargs)
    except (RuntimeError, NotImplementedError):
        return False
    if not any(isinstance(r, Tensor) for r in pytree.tree_leaves(result)):
        return False
    return any(isinstance(a, Tensor) and a.is_floating_point() for a in sample.args)


def has_derivative(op: Any, sample: Sample) -> bool:
    """Whether a backward pass through the operator works."""
    leaves = [_leaf(a, True) if isinstance(a, Tensor) and a.is_floating_point() else a
              for a in sample.args]  # fmt: skip
    try:
        results = [r for r in pytree.tree_leaves(op(*leaves)) if r.requires_grad]
        torch.autograd.backward([r.sum() for r in results])
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMMON else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted({*tagged(), *COMMON})
    ],
)
def test_tagged_operator_is_pointwise(name: str) -> None:
    """What PyTorch tags as pointwise is, on operands of one shape and on broadcast ones."""
    op = operator_named(f"aten.{name}")
    rule = rule_for(op)
    assert rule is not None and rule.text == "pointwise"
    for build in pointwise_builders(op):
        sample = build(Draw(first))
        if takes_reals(op, sample):
            sample = replace(sample, backward=has_derivative(op, sample))
            assert brute_force(trial(op, sample), degrees=(2,))


# -- what leaves as a share ----------------------------------------------------------------------


@pytest.mark.usefixtures("small_padding")
@pytest.mark.parametrize("rows", [8, 9, 11, 5])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_output_leaves_as_share(rows: int, degree: int) -> None:
    """Logits kept split leave each rank with its own true rows, padding dropped, gradients right."""
    draw = Draw(first)
    sample = Sample((draw.real(6, 4), draw.real(rows, 4), draw.real(rows)))
    tried = trial(torch.ops.aten.linear.default, sample)
    axis = tried.axes.dims[tried.axes.outputs[0]][-1].find()
    scheme = Scheme(degree, ((axis, degree, 1, True),))
    sharded = shard(tried.graph, tried.axes, scheme.assignment(), {0})
    assert sharded.outputs[0] is not None and sharded.outputs[0].size == rows
    check(tried, scheme, keep_split=True)


# -- a wrong rule is caught ----------------------------------------------------------------------


def _select_passing(call: Call) -> None:
    dims = list(call.operand("self"))
    del dims[call.arguments["dim"]]
    call.outputs = [tuple(dims)]


def _free_norm(call: Call) -> None:
    dims = call.operand("input")
    for name in ("weight", "bias"):
        call.unify(call.operand(name)[0], dims[-1])
    call.outputs = [dims]


WRONG: list[tuple[str, Rule, str]] = [
    ("aten.softmax.int", computed(pointwise), "softmax passes the axis that it runs over"),
    ("aten.linear.default", row("* k, n k, n! -> * n"), "the contracted axis is not summed"),
    ("aten.linear.default", row("* k+, n k+, n -> * n"), "the bias is added on every rank"),
    ("aten.mm.default", row("m k+, j n -> m n"), "the right operand's rows are another axis"),
    ("aten.select.int", computed(_select_passing), "an index into a split axis"),
    ("aten.mean.dim", computed(reduction), "a mean is summed like a sum"),
    ("aten.layer_norm.default", computed(_free_norm), "the normalized axis passes"),
    ("aten.cumsum.default", computed(pointwise), "a running sum passes its axis"),
    ("aten.transpose.int", computed(pointwise), "two axes are not swapped"),
]


@pytest.mark.parametrize(("name", "rule", "why"), WRONG, ids=[why for _, _, why in WRONG])
def test_wrong_rule_is_caught(name: str, rule: Rule, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The brute force would notice a wrong row in the table."""
    build = builders(name)[0]
    monkeypatch.setitem(RULES, name, rule)
    rule_for.cache_clear()
    try:
        with pytest.raises(Wrong):
            brute_force(trial(operator_named(name), build(Draw(first))))
    finally:
        monkeypatch.undo()
        rule_for.cache_clear()


def test_right_rule_is_not_caught() -> None:
    """The samples that catch the wrong rules pass with the right ones."""
    for name, _, _ in WRONG:
        build = builders(name)[0]
        assert brute_force(trial(operator_named(name), build(Draw(first)))) > 0
