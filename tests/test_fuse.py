"""Fused calls: the values and gradients of the calls that they replace, where they are fused, and the
proof that refuses every other fusion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import autoshard
from autoshard import beside, fused_ops, ops, products
from autoshard.bindings import BINDINGS, bind
from autoshard.errors import UnsoundGraphError
from autoshard.groups import Group
from autoshard.passes.fuse import fuse
from autoshard.pipeline import analyse, rewrite
from autoshard.proof.fused import same_as_unfused
from autoshard.sharded import Sharded
from autoshard.simulate import RankContext, run_ranks
from tests.distributed import run_distributed

aten = torch.ops.aten


class Block(nn.Module):
    """q, k and v of separate weights, an MLP with biases and one in the layout of `addmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=i == 1) for i in range(3))
        self.proj = nn.Linear(16, 16)
        self.w1, self.w2 = nn.Parameter(torch.randn(16, 32)), nn.Parameter(torch.randn(32, 16))
        self.b1, self.b2 = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, 16] -> [B, S, 16]."""
        y = self.norm(x)
        q, k, v = (m(y).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(a)
        rows = x.reshape(-1, 16)
        y = F.gelu(torch.addmm(self.b1, rows, self.w1))
        return x + torch.addmm(self.b2, y, self.w2).view_as(x)


class Model(nn.Module):
    """Two blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, 16] -> []."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def sharded() -> Sharded:
    """The model split over two ranks."""
    program = analyse(Model(), (torch.randn(2, 5, 16, requires_grad=True),), {}, 2)
    return rewrite(program, 2, "max")[1]


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """The graph's calls of a function."""
    return [n for n in graph.nodes if n.target is target]


def test_what_is_fused(sharded: Sharded) -> None:
    """Three projections by one call; products with their sums and biases; nothing is left apart."""
    assert sharded.fused is not None and sharded.layered is not None
    for name in sharded.layered.bodies:
        body = sharded.fused.bodies[name]
        columns, rows = calls(body, fused_ops.column_linear), calls(body, fused_ops.row_linear)
        given: Any = [c.args for c in columns]
        assert [(len(weights), layout) for _, _, weights, _, layout in given] == [(3, False), (1, True)]
        assert [b is not None for b in given[0][3]] == [False, True, False]
        assert [(r.args[3][0] is not None, r.args[4]) for r in rows] == [(True, False), (True, True)]
        left = (ops.copy, ops.reduce, aten.linear.default, aten.addmm.default, aten.mm.default)
        assert not [n for target in left for n in calls(body, target)]
        assert rows[0].name.endswith("_reduce") and columns[0].name.endswith("_copy")
    assert len(calls(sharded.graph, ops.copy)) == 4  # people read the graph as it was
    same_as_unfused(sharded)


def _without(graph: fx.Graph, change: Callable[[fx.Graph], None]) -> fx.Graph:
    made = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = made.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    change(made)
    return made


def _set(
    target: Any, place: int, which: int, value: Callable[[Any], Any]
) -> Callable[[fx.Graph], None]:
    """Change one argument of the call of `target` with this number."""

    def change(graph: fx.Graph) -> None:
        node = calls(graph, target)[which]
        args = list(node.args)
        args[place] = value(args)
        node.args = tuple(args)

    return change


def _swap(args: Any) -> Any:
    first, second, *rest = args[2]
    return (second, first, *rest)


def _drop_result(graph: fx.Graph) -> None:
    node = calls(graph, fused_ops.row_linear)[0]
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _sum_twice(graph: fx.Graph) -> None:
    """One sum more than was proven."""
    x = calls(graph, fused_ops.row_linear)[0]
    with graph.inserting_before(x):
        graph.node_copy(x, lambda n: n)


FAULTS: dict[str, Callable[[fx.Graph], None]] = {
    "no bias": _set(fused_ops.row_linear, 3, 0, lambda args: (None,)),
    "another weight": _set(fused_ops.row_linear, 2, 0, lambda args: args[0]),
    "other layout": _set(fused_ops.row_linear, 4, 0, lambda args: True),
    "exchanged": _set(fused_ops.column_linear, 2, 0, _swap),
    "one fewer": _set(fused_ops.column_linear, 2, 0, lambda args: args[2][:2]),
    "bias of another": _set(fused_ops.column_linear, 3, 0, lambda args: (args[3][1], None, None)),
    "no sum": _drop_result,
    "twice": _sum_twice,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_refuses(sharded: Sharded, fault: str) -> None:
    """Every change of a fused call, in a layer."""
    assert sharded.fused is not None
    bodies = dict(sharded.fused.bodies)
    bodies["layer_1"] = _without(bodies["layer_1"], FAULTS[fault])
    with pytest.raises((UnsoundGraphError, ValueError)):
        same_as_unfused(replace(sharded, fused=replace(sharded.fused, bodies=bodies)))


def test_the_proof_asks_for_every_part(sharded: Sharded) -> None:
    """A layer that is missing among what runs."""
    assert sharded.fused is not None
    bodies = dict(sharded.fused.bodies)
    del bodies["layer_1"]
    with pytest.raises(UnsoundGraphError, match="other parts"):
        same_as_unfused(replace(sharded, fused=replace(sharded.fused, bodies=bodies)))


def test_effects_keep_their_order() -> None:
    """Two draws that do not depend on each other, in the other order: refused."""

    def graph(exchanged: bool) -> fx.Graph:
        made = fx.Graph()
        x, group = made.placeholder("x"), made.create_node("get_attr", "tp2", name="tp2")
        names = ["b", "a"] if exchanged else ["a", "b"]
        halves = {n: made.call_function(aten.mul.Tensor, (x, 2 + (n == "a"))) for n in "ab"}
        drop = (aten.dropout.default, 0.5, True)
        drawn = {
            n: made.call_function(ops.with_stream, (group, drop[0], halves[n], *drop[1:]))
            for n in names
        }
        made.output((drawn["a"], drawn["b"]))
        return made

    proven = Sharded(graph(False), {}, (None, None), (2,))
    for exchanged in (False, True):
        fused = replace(proven.unfused, graph=graph(exchanged))
        if exchanged:
            with pytest.raises(UnsoundGraphError, match="in its order"):
                same_as_unfused(replace(proven, fused=fused))
        else:
            same_as_unfused(replace(proven, fused=fused))


class ParallelBlock(Block):
    """Attention's and the MLP's results added to the residual at once."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        del self.w1, self.w2, self.b1, self.b2

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, 16] -> [B, S, 16]."""
        y = self.norm(x)
        q, k, v = (m(y).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(a) + self.down(F.gelu(self.w3(y))) + x


class Parallel(Model):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ParallelBlock() for _ in range(2))


def test_results_that_are_added_are_summed_once() -> None:
    """One all-reduce a layer forward and one backward; loss and gradients are the model's."""
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(2, 5, 16)
    program = analyse(model, (x,), {}, 2)
    sharded = rewrite(program, 2, "max")[1]
    assert sharded.fused is not None
    for name in ("layer_0", "layer_1"):
        body = sharded.fused.bodies[name]
        (row,), (column,) = calls(body, fused_ops.row_linear), calls(body, fused_ops.column_linear)
        given: Any = row.args
        assert len(given[0]) == 2 and [b is not None for b in given[3]] == [True, True]
        assert len(column.args[2]) == 4  # type: ignore[arg-type]
        assert not calls(body, ops.reduce) and not calls(body, ops.copy)
    same_as_unfused(sharded)
    assert run_distributed(_parallel_blocks, 2, timeout=120) == [4, 4]


def _parallel_blocks() -> int:
    """All-reduces of a step on one of two ranks, whose loss and gradients are the model's."""
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(2, 5, 16)
    whole = copy.deepcopy(model)
    whole(x).backward()
    split = autoshard.parallelize(model, 2, (x,), degree="max", device="cpu", check_inputs=False)
    with CommDebugMode() as seen:
        loss = split(x)
        loss.backward()
    torch.testing.assert_close(loss, whole(x))
    for name, parameter in split.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        expected = whole.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.full_tensor(), expected, msg=lambda m, n=name: n + m)
    return seen.get_total_counts()


def _unfused_where(change: Callable[[fx.Graph], None], sharded: Sharded) -> fx.Graph:
    """What is made of a layer that was changed before."""
    assert sharded.layered is not None
    bodies = {"layer_0": _without(sharded.layered.bodies["layer_0"], change)}
    layered = replace(sharded.layered, bodies=bodies)
    made = fuse(replace(sharded, layered=layered, fused=None))
    return bodies["layer_0"] if made.fused is None else made.fused.bodies["layer_0"]


def test_what_is_not_fused(sharded: Sharded) -> None:
    """A copy that something else uses too; a sum that is not in place; a product that is used twice;
    an addition of a residual or in another dtype."""

    def another_use(graph: fx.Graph) -> None:
        copy = calls(graph, ops.copy)[0]
        output = next(n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            graph.call_function(aten.relu.default, (copy,))

    body = _unfused_where(another_use, sharded)
    assert len(calls(body, ops.copy)) == 1 and len(calls(body, fused_ops.column_linear)) == 1

    def not_in_place(graph: fx.Graph) -> None:
        node = calls(graph, ops.reduce)[0]
        node.args = node.args[:2]

    body = _unfused_where(not_in_place, sharded)
    assert len(calls(body, ops.reduce)) == 1 and len(calls(body, fused_ops.row_linear)) == 1

    def used_twice(graph: fx.Graph) -> None:
        node = calls(graph, ops.reduce)[0].args[0]
        output = next(n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            graph.call_function(aten.relu.default, (node,))

    body = _unfused_where(used_twice, sharded)
    assert len(calls(body, ops.reduce)) == 1

    def other_dtype(graph: fx.Graph) -> None:
        bias: Any = next(iter(calls(graph, ops.reduce)[0].users)).args[1]
        bias.meta["val"] = bias.meta["val"].double()

    body = _unfused_where(other_dtype, sharded)
    assert calls(body, fused_ops.row_linear)[0].args[3] == (None,)

    def other_size(graph: fx.Graph) -> None:
        bias: Any = next(iter(calls(graph, ops.reduce)[0].users)).args[1]
        bias.meta["val"] = bias.meta["val"][:1]

    body = _unfused_where(other_size, sharded)
    assert calls(body, fused_ops.row_linear)[0].args[3] == (None,)

    def residual(graph: fx.Graph) -> None:
        add = next(iter(calls(graph, ops.reduce)[0].users))
        add.args = (add.args[0], next(n for n in graph.nodes if n.op == "placeholder"))
        add.args[1].meta["val"] = torch.empty(2, 5, 16)  # type: ignore[union-attr]

    body = _unfused_where(residual, sharded)
    assert calls(body, fused_ops.row_linear)[0].args[3] == (None,)


# -- the calls -----------------------------------------------------------------------------------


def _values(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def linears(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, layouts, which biases there are and what is trained."""
    count = draw(st.integers(1, 3))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    return {
        "tp": draw(st.integers(2, 3)),
        "transposed": draw(st.booleans()),
        "batch": draw(st.sampled_from([(3,), (2, 3), (2, 1, 3), (0, 3), (40,), (2, 20)])),
        "out": draw(st.lists(st.integers(1, 4), min_size=count, max_size=count)),
        "biases": draw(flags),
        "trained": draw(flags),
        "used": draw(flags),
        "x": draw(st.booleans()),
    }


def _fused_and_apart(case: dict[str, Any], run: Any) -> None:
    """`run(fused, group)` gives outputs and gradients: the same for both, on every rank."""
    fused = run_ranks(lambda ctx: run(True, ctx), case["tp"])
    apart = run_ranks(lambda ctx: run(False, ctx), case["tp"])
    for mine, theirs in zip(fused, apart, strict=True):
        assert [x is None for x in mine] == [x is None for x in theirs]
        for a, b in zip(mine, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)


@settings(max_examples=40)
@given(linears())
def test_column_linear(case: dict[str, Any]) -> None:
    """Any number of weights, frozen ones and outputs that nobody uses among them."""
    batch = (case["batch"][-1],) if case["transposed"] else case["batch"]

    def run(fused: bool, ctx: RankContext) -> list[Tensor | None]:
        group: Group = ctx.group(case["tp"])
        x = _values(0, *batch, 5).requires_grad_(case["x"])
        weights, biases = [], []
        for i, out in enumerate(case["out"]):
            shape = (5, out) if case["transposed"] else (out, 5)
            trained = case["trained"][i]
            weights.append(_values(10 * ctx.rank + i + 1, *shape).requires_grad_(trained))
            bias = _values(10 * ctx.rank + i + 5, out).requires_grad_(trained)
            biases.append(bias if case["biases"][i] else None)
        if fused:
            made = fused_ops.column_linear(x, group, weights, biases, case["transposed"])
        else:
            y = ops.copy(x, group)
            made = tuple(
                products.product(y, w, b, case["transposed"])
                for w, b in zip(weights, biases, strict=True)
            )
        loss = sum(
            (_values(i + 7, *y.shape) * y).sum()
            for i, y in enumerate(made) if case["used"][i]
        )  # fmt: skip
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        leaves = [x, *weights, *(b for b in biases if b is not None)]
        return [*(y.detach() for y in made), *(leaf.grad for leaf in leaves)]

    _fused_and_apart(case, run)


@settings(max_examples=40)
@given(linears())
def test_row_linear(case: dict[str, Any]) -> None:
    """The bias counts once; each rank has its whole gradient."""
    batch = (case["batch"][-1],) if case["transposed"] else case["batch"]
    out = case["out"][0]

    def run(fused: bool, ctx: RankContext) -> list[Tensor | None]:
        group: Group = ctx.group(case["tp"])
        shape = (5, out) if case["transposed"] else (out, 5)
        xs, weights, biases = [], [], []
        for i, trained in enumerate(case["trained"]):
            xs.append(_values(ctx.rank + 100 * i, *batch, 5).requires_grad_(case["x"]))
            weights.append(_values(10 + ctx.rank + 100 * i, *shape).requires_grad_(trained))
            bias = _values(20 + 100 * i, out).requires_grad_(case["used"][i])
            biases.append(bias if case["biases"][i] else None)
        if fused:
            y = fused_ops.row_linear(xs, group, weights, biases, case["transposed"])
        else:
            y = torch.zeros(())
            for x, weight, bias in zip(xs, weights, biases, strict=True):
                z = ops.reduce(products.product(x, weight, None, case["transposed"]), group, True)
                y = y + (z if bias is None else z + bias)
        if y.requires_grad:
            (_values(30, *y.shape) * y).sum().backward()
        leaves = [*xs, *weights, *(b for b in biases if b is not None)]
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    _fused_and_apart(case, run)


@pytest.mark.parametrize("transposed", [False, True])
def test_without_gradients(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, and no autograd function is called."""

    def run(ctx: RankContext) -> list[Tensor]:
        group: Group = ctx.group(2)
        shape = (5, 4) if transposed else (4, 5)
        weights = [_values(i + ctx.rank, *shape).requires_grad_() for i in (1, 5)]
        biases = [_values(9, 4).requires_grad_(), None]
        x = _values(3, 6, 5)
        columns = fused_ops.column_linear(x, group, weights, biases, transposed)
        row = fused_ops.row_linear((x, x * 2), group, weights, biases, transposed)
        return [y.detach() for y in (*columns, row)]

    expected = run_ranks(run, 2)

    def applied(*args: Any) -> Any:
        raise AssertionError("an autograd function was called")

    for function in (fused_ops._ColumnLinear, fused_ops._Sum, ops._Copy, ops._Reduce):
        monkeypatch.setattr(function, "apply", applied)

    def without(ctx: RankContext) -> list[Tensor]:
        with torch.no_grad():
            return run(ctx)

    for mine, theirs in zip(run_ranks(without, 2), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("unlike", ["shape", "dtype"])
def test_results_that_are_added_as_they_are(unlike: str) -> None:
    """Where the addition broadcasts or casts, each product is summed over the ranks by itself."""

    def run(fused: bool, ctx: RankContext) -> list[Tensor | None]:
        group: Group = ctx.group(2)
        dtype = torch.float32 if unlike == "dtype" else torch.float64
        shape = (3, 5) if unlike == "shape" else (2, 3, 5)
        xs = [_values(ctx.rank, 2, 3, 5), _values(5 + ctx.rank, *shape).to(dtype)]
        weights = [_values(9 + ctx.rank, 4, 5), _values(15 + ctx.rank, 4, 5).to(dtype)]
        biases = [_values(20, 4), _values(21, 4).to(dtype)]
        leaves = [x.requires_grad_() for x in (*xs, *weights, *biases)]
        if fused:
            y = fused_ops.row_linear(xs, group, weights, biases, False)
        else:
            a, b = (
                ops.reduce(F.linear(x, w), group, True) + c
                for x, w, c in zip(xs, weights, biases, strict=True)
            )
            y = a + b
        (_values(30, *y.shape) * y).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    _fused_and_apart({"tp": 2}, run)


def test_the_sum_runs_under_the_weights_gradients() -> None:
    """It begins before they are computed, and is waited for after."""
    events: list[str] = []

    class Recording:
        degree, coordinate = 2, 0

        def start_all_reduce(self, x: Tensor, lane: Any = None) -> Callable[[], Tensor]:
            events.append("start")
            return lambda: events.append("wait") or x  # type: ignore[func-returns-value]

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    group: Any = Recording()
    (y,) = fused_ops.column_linear(x, group, (weight,), (None,), False)
    with torch.profiler.profile() as profile:
        events.append("backward")
        y.sum().backward()
    assert events == ["backward", "start", "wait"]
    assert sum(e.name == "aten::mm" for e in profile.events() or []) == 2
    original = beside.gradient_of_weight
    try:
        beside.gradient_of_weight = lambda *args: events.append("weight") or original(*args)  # type: ignore[assignment, func-returns-value]
        fused_ops.column_linear(x, group, (weight,), (None,), False)[0].sum().backward()
    finally:
        beside.gradient_of_weight = original
    assert events[3:] == ["start", "weight", "wait"]


@pytest.mark.parametrize(
    ("tokens", "size", "columns", "products"),
    [
        (64, 64, (8, 2, 2), 2),  # few columns: one for the input, one for the weights
        (64, 64, (64, 64, 64), 6),  # many: each alone
        (64, 64, (16, 15), 2),  # 31 * (64 + 64) < 64 * 64
        (64, 64, (16, 16), 4),  # no less
        (64, 64, (8,), 2),
    ],
)
def test_products_side_by_side(
    tokens: int, size: int, columns: tuple[int, ...], products: int
) -> None:
    """One product for the gradient of the input, where that moves less memory; the same gradients."""
    group: Any = SimpleNamespace(degree=2, coordinate=0, start_all_reduce=lambda x, lane: lambda: x)
    x = _values(0, 1, tokens, size).requires_grad_()
    weights = [_values(i + 1, out, size).requires_grad_() for i, out in enumerate(columns)]
    dys = [_values(-1 - i, 1, tokens, out) for i, out in enumerate(columns)]
    ys = fused_ops.column_linear(x, group, weights, [None] * len(columns), False)
    with torch.profiler.profile() as profile:
        found = torch.autograd.grad(ys, [x, *weights], dys)
    assert sum(e.name in ("aten::mm", "aten::addmm_") for e in profile.events() or []) == products
    apart = torch.autograd.grad([torch.nn.functional.linear(x, w) for w in weights], [x, *weights], dys)
    torch.testing.assert_close(found, apart)
    assert all(grad.is_contiguous() for grad in found)


@pytest.mark.parametrize("trained", ["x", "weight", "both"])
def test_what_is_kept(trained: str) -> None:
    """An operand where the other one is trained, as by autograd: frozen weights keep no activations."""
    group: Any = SimpleNamespace(degree=2, coordinate=0, all_reduce=lambda x, inplace: x)
    x = torch.randn(3, 4, requires_grad=trained != "weight")
    weight = torch.randn(5, 4, requires_grad=trained != "x")
    expected = {"x": {weight.data_ptr()}, "weight": {x.data_ptr()}}
    expected["both"] = expected["x"] | expected["weight"]
    kept: set[int] = set()

    def keep(saved: Tensor) -> Tensor:
        kept.add(saved.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        fused_ops.column_linear(x, group, (weight,), (None,), False)
        assert kept == expected[trained]
        kept.clear()
        fused_ops.row_linear((x,), group, (weight,), (None,), False)
        assert kept == expected[trained]


def test_taken_apart_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch has to cast operands, it sees the calls themselves."""
    used: list[str] = []
    for name in ("copy", "reduce"):
        monkeypatch.setattr(ops, name, lambda x, *rest, name=name: used.append(name) or x)
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    group: Any = None
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = fused_ops.column_linear(x, group, (weight,), (bias,), False)
        z = fused_ops.row_linear((x,), group, (weight,), (bias,), False)
    assert used == ["copy", "reduce"]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), z.float(), rtol=2e-2, atol=2e-2)
    z.sum().backward()
    assert weight.grad is not None


# -- bindings ------------------------------------------------------------------------------------

_X = torch.randn(2, 3, 4)
SAMPLES: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    aten.addmm.default: [((torch.randn(5), _X[0], torch.randn(4, 5)), {}),
                         ((torch.randn(5), _X[0], torch.randn(4, 5)), {"beta": 2, "alpha": 0.5})],
    aten.chunk.default: [((_X, 2), {}), ((_X, 2, -1), {})],
    aten.embedding.default: [((_X[0], torch.tensor([2, 0])), {}),
                             ((_X[0], torch.tensor([[1]]), 0), {})],
    aten.flatten.using_ints: [((_X,), {}), ((_X, 0, -2), {}), ((_X, 1), {})],
    aten.gelu.default: [((_X,), {}), ((_X,), {"approximate": "tanh"})],
    aten.layer_norm.default: [((_X, [4]), {}),
                              ((_X, [4], torch.ones(4), torch.ones(4), 1e-3, False), {})],
    aten.linear.default: [((_X, torch.randn(5, 4)), {}), ((_X, torch.randn(5, 4), torch.randn(5)), {})],
    aten.matmul.default: [((_X, torch.randn(4, 5)), {})],
    aten.mm.default: [((_X[0], torch.randn(4, 5)), {})],
    aten.permute.default: [((_X, [2, 0, 1]), {})],
    aten.relu.default: [((_X,), {})],
    aten.reshape.default: [((_X, [6, -1]), {}), ((_X.transpose(0, 1), [24]), {})],
    aten.rsqrt.default: [((_X.abs() + 1,), {})],
    aten.scaled_dot_product_attention.default: [
        ((_X[None], _X[None], _X[None], None, 0.0, True), {}),
        ((_X[None], _X[None], _X[None]), {"scale": 0.3, "enable_gqa": True}),
        ((_X[None], _X[None], _X[None], torch.ones(3, 3, dtype=torch.bool)), {}),
    ],
    aten.split_with_sizes.default: [((_X, [1, 3], -1), {}), ((_X, [1, 1]), {})],
    aten.add.Tensor: [((_X, _X.flip(0)), {"alpha": 2}), ((_X, 0.5), {}), ((_X, _X.bfloat16()), {})],
    aten.mean.dim: [((_X, [-1], True), {}), ((_X, [0]), {"dtype": torch.float64})],
    aten.mul.Tensor: [((_X, _X.flip(0)), {}), ((_X, 2), {}), ((_X, _X.bfloat16()), {})],
    aten.neg.default: [((_X,), {})],
    aten.pow.Tensor_Scalar: [((_X, 2), {}), ((_X, 3.0), {})],
    aten.silu.default: [((_X,), {})],
    aten.tanh.default: [((_X,), {})],
    aten.transpose.int: [((_X, 0, -1), {})],
    aten.unsqueeze.default: [((_X, 1), {})],
    aten.view.default: [((_X, [6, -1]), {})],
}  # fmt: skip


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """What the dispatcher is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        shapes = torch.utils._pytree.tree_map_only(Tensor, lambda t: (t.shape, t.stride()), given)
        self.calls.append((func, shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", BINDINGS, ids=str)
def test_bindings_are_the_operators(operator: Any) -> None:
    """The dispatcher sees the same calls, and the results are the same bits."""
    for args, kwargs in SAMPLES[operator]:
        found = []
        for function in (operator, BINDINGS[operator]):
            with _Seen() as seen:
                result = function(*args, **kwargs)
            found.append((seen.calls, result))
        assert found[0][0] == found[1][0] and found[0][0]
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_bound_graphs_keep_names(sharded: Sharded) -> None:
    """A failure is found by the name of a node, and what runs has that of the graph."""
    bound = bind(sharded.graph)
    assert [n.name for n in bound.nodes] == [n.name for n in sharded.graph.nodes]
    assert not {n.target for n in bound.nodes} & BINDINGS.keys()
    assert {n.target for n in sharded.graph.nodes} & BINDINGS.keys()
