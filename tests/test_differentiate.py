"""A layer's own backward pass gives what autograd gives: for every row, for graphs drawn at random, for
models, and however one asks for gradients."""

from __future__ import annotations

import contextlib
import gc
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

import autoshard
from autoshard import beside, fused_ops, layer_function, ops, products
from autoshard.bindings import bind
from autoshard.derivatives import DERIVATIVES
from autoshard.layer_function import Differentiated
from autoshard.layers import Layer
from autoshard.passes.differentiate import differentiate
from autoshard.passes.tokens_as_rows import tokens_as_rows
from benchmarks import tiny_models

aten = torch.ops.aten
B, S, H = 2, 3, 8


class Twins:
    """A group of two ranks that hold the same numbers: a sum over them is the double."""

    degree = 2

    def __init__(self, coordinate: int = 0) -> None:
        self.coordinate = coordinate

    def all_reduce(self, x: Tensor, op: str = "sum", *, inplace: bool = False) -> Tensor:
        x = x.detach()
        return x.mul_(2) if inplace else x * 2

    def start_all_reduce(self, x: Tensor, lane: Any = None) -> Callable[[], Tensor]:
        return lambda: x.mul_(2)


class Body:
    """A layer's graph while it is written: values of shape [B, S, H], parameters, one group."""

    def __init__(self, coordinate: int = 0) -> None:
        self.graph = fx.Graph()
        self.values: list[Any] = []  # of the placeholders
        self.group = self.given("group", Twins(coordinate))
        self.x = self.given("x", _numbers(B, S, H))

    def given(self, name: str, value: Any) -> fx.Node:
        self.values.append(value)
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1:]
        with self.graph.inserting_after(last[0]) if last else contextlib.nullcontext():
            return self.graph.placeholder(name)

    def weight(self, *shape: int) -> fx.Node:
        return self.given(f"w{len(self.values)}", _numbers(*shape))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def column(self, x: fx.Node, out: Sequence[int] = (H,), transposed: bool = False) -> list[fx.Node]:
        shapes = [(H, n) if transposed else (n, H) for n in out]
        weights = tuple(self.weight(*shape) for shape in shapes)
        biases = tuple(self.weight(n) if i % 2 == 0 else None for i, n in enumerate(out))
        made = self.call(fused_ops.column_linear, x, self.group, weights, biases, transposed)
        return [self.call(operator.getitem, made, i) for i in range(len(out))]

    def row(self, xs: Sequence[fx.Node], transposed: bool = False) -> fx.Node:
        weights = tuple(self.weight(H, H) for _ in xs)
        biases = tuple(self.weight(H) if i % 2 == 0 else None for i in range(len(xs)))
        return self.call(fused_ops.row_linear, tuple(xs), self.group, weights, biases, transposed)

    def ended(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results[0] if len(results) == 1 else results)
        self.graph.lint()
        module = fx.GraphModule({}, bind(self.graph))
        with torch.no_grad():
            _Traced(module).run(*self.values)
        return module


class _Traced(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _leaves(values: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    return [
        v.clone().requires_grad_(need) if isinstance(v, Tensor) else v
        for v, need in zip(values, needed, strict=True)
    ]


def _ran(
    call: Callable[..., Any], values: Sequence[Any], needed: Sequence[bool], used: Sequence[bool]
) -> tuple[list[Any], list[Tensor | None]]:
    """Results, and the gradients of a loss that reads those that are used."""
    leaves = _leaves(values, needed)
    results = call(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    loss = torch.zeros((), dtype=torch.float64)
    for place, (y, one) in enumerate(zip(results, used, strict=True)):
        if one and y.requires_grad:
            weights = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).view(y.shape)
            loss = loss + (y * torch.cos(weights + place)).sum()
    if loss.requires_grad:
        loss.backward()
    return results, [x.grad for x in leaves if isinstance(x, Tensor)]


def _same(
    module: fx.GraphModule, values: Sequence[Any], needed: Sequence[bool], used: Sequence[bool]
) -> Differentiated | None:
    """Compare with autograd, as the graph is and on rows; None where it is left to autograd."""
    _same_graph(module, module.graph, values, needed, used)
    return _same_graph(module, tokens_as_rows(module.graph), values, needed, used)


def _same_graph(
    module: fx.GraphModule, graph: fx.Graph, values: Sequence[Any], needed: Sequence[bool],
    used: Sequence[bool],
) -> Differentiated | None:  # fmt: skip
    made = differentiate(graph, needed)
    if made is None:
        return None
    results, grads = _ran(lambda *leaves: made((), leaves), values, needed, used)
    expected, true = _ran(module.forward, values, needed, used)
    for mine, theirs in zip(results, expected, strict=True):
        assert mine.requires_grad == theirs.requires_grad
        assert_close(mine, theirs, rtol=0, atol=0)
    for mine, theirs in zip(grads, true, strict=True):
        if theirs is None:
            assert mine is None or not mine.any()  # nobody used what it is for
        elif mine is None:
            assert not theirs.any()
        else:
            assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    return made


# -- each row ------------------------------------------------------------------------------------


def _rows_of(body: Body) -> dict[Any, Callable[[fx.Node], fx.Node]]:
    """A call of each operator of the table, of a value of [B, S, H], which gives one."""

    def pieces(target: Any, how: Any, dim: int) -> Callable[[fx.Node], fx.Node]:
        def call(x: fx.Node) -> fx.Node:
            made = body.call(target, x, how, dim)
            a, b = (body.call(operator.getitem, made, i) for i in (0, 1))
            return body.call(aten.cat.default, [b, body.call(aten.sin.default, a)], -1)

        return call

    def viewed(target: Any) -> Callable[[fx.Node], fx.Node]:
        def call(x: fx.Node) -> fx.Node:
            return body.call(target, body.call(target, x, [B, S, 2, -1]), [B, S, H])

        return call

    def permuted(x: fx.Node) -> fx.Node:
        y = body.call(aten.permute.default, x, [2, 0, -2])
        return body.call(aten.permute.default, body.call(aten.sin.default, y), [1, 2, 0])

    def transposed(x: fx.Node) -> fx.Node:
        y = body.call(aten.sin.default, body.call(aten.transpose.int, x, 1, -1))
        return body.call(aten.transpose.int, y, -1, 1)

    def unsqueezed(x: fx.Node) -> fx.Node:
        y = body.call(aten.mul.Tensor, body.call(aten.unsqueeze.default, x, -2), 2.0)
        return body.call(aten.squeeze.dim, y, -2)

    def norm(x: fx.Node) -> fx.Node:
        return body.call(aten.layer_norm.default, x, [H], body.weight(H), body.weight(H), 1e-5, False)

    def product(target: Any) -> Callable[[fx.Node], fx.Node]:
        def call(x: fx.Node) -> fx.Node:
            flat, weight = body.call(aten.view.default, x, [-1, H]), body.weight(H, H)
            given = (flat, weight) if target is aten.mm.default else (body.weight(H), flat, weight)
            return body.call(aten.view.default, body.call(target, *given), [B, S, H])

        return call

    def flattened(x: fx.Node) -> fx.Node:
        return body.call(aten.view.default, body.call(aten.flatten.using_ints, x, 0, -2), [B, S, H])

    def as_tokens(x: fx.Node) -> fx.Node:
        rows = body.call(aten.sin.default, body.call(aten.reshape.default, x, [-1, H]))
        return body.call(products.as_tokens, rows, body.call(Tensor.size, x))

    return {
        ops.copy: lambda x: body.call(ops.copy, x, body.group),
        aten.linear.default: lambda x: body.call(
            aten.linear.default, x, body.weight(H, H), body.weight(H)
        ),
        aten.mm.default: product(aten.mm.default),
        aten.addmm.default: product(aten.addmm.default),
        fused_ops.column_linear: lambda x: body.column(x)[0],
        fused_ops.row_linear: lambda x: body.row([x, body.call(aten.sin.default, x)]),
        aten.layer_norm.default: norm,
        aten.gelu.default: lambda x: body.call(aten.gelu.default, x, approximate="tanh"),
        aten.silu.default: lambda x: body.call(aten.silu.default, x),
        aten.relu.default: lambda x: body.call(aten.relu.default, x),
        aten.tanh.default: lambda x: body.call(aten.tanh.default, x),
        aten.add.Tensor: lambda x: body.call(aten.add.Tensor, x, body.x),
        aten.mul.Tensor: lambda x: body.call(aten.mul.Tensor, x, body.x),
        aten.pow.Tensor_Scalar: lambda x: body.call(aten.pow.Tensor_Scalar, x, 3.0),
        aten.view.default: viewed(aten.view.default),
        aten.reshape.default: viewed(aten.reshape.default),
        aten.flatten.using_ints: flattened,
        products.as_tokens: as_tokens,
        aten.transpose.int: transposed,
        aten.permute.default: permuted,
        aten.unsqueeze.default: unsqueezed,
        aten.split_with_sizes.default: pieces(aten.split_with_sizes.default, [2, H - 2], -1),
        aten.chunk.default: pieces(aten.chunk.default, 2, 2),
    }


@pytest.mark.parametrize("target", DERIVATIVES)
@pytest.mark.parametrize("coordinate", [0, 1])
def test_every_row(target: Any, coordinate: int) -> None:
    """With every choice of what a gradient is asked of."""
    body = Body(coordinate)
    (x,) = body.column(body.x)
    y = _rows_of(body)[target](x)
    module = body.ended(body.call(aten.add.Tensor, body.row([y]), body.x))
    tensors = [i for i, v in enumerate(body.values) if isinstance(v, Tensor)]
    asked = list(itertools.product([False, True], repeat=min(len(tensors), 5)))
    for some in asked:
        needed = [False] * len(body.values)
        for place, need in zip(reversed(tensors), reversed(some), strict=False):
            needed[place] = need
        for rest in tensors[: len(tensors) - len(some)]:
            needed[rest] = True
        if any(needed):
            made = _same(module, body.values, needed, [True])
            assert made is not None
            assert made.backward.graph.nodes


# -- random graphs -------------------------------------------------------------------------------


@st.composite
def bodies(draw: st.DrawFn) -> tuple[Body, fx.GraphModule, list[bool], list[bool]]:
    """A graph of rows, of operators without one, and of values that no gradient flows through."""
    body = Body(draw(st.sampled_from([0, 1])))
    values = [body.x]

    def some() -> fx.Node:
        return values[draw(st.integers(max(0, len(values) - 4), len(values) - 1))]

    def attention() -> fx.Node:
        q, k, v = (
            body.call(aten.transpose.int, body.call(aten.view.default, some(), [B, S, 2, -1]), 1, 2)
            for _ in range(3)
        )
        y = body.call(
            aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, draw(st.booleans())
        )
        return body.call(aten.reshape.default, body.call(aten.transpose.int, y, 1, 2), [B, S, H])

    def as_rows() -> fx.Node:
        flat = body.call(aten.view.default, some(), [-1, H])
        (y,) = body.column(flat, transposed=True)
        y = body.row([body.call(aten.gelu.default, y)], transposed=True)
        return body.call(aten.view.default, y, [B, S, H])

    def chosen() -> fx.Node:
        x = some()
        positive = body.call(aten.gt.Scalar, some(), 0.0)
        return body.call(aten.where.self, positive, x, body.call(aten.neg.default, x))

    def column() -> fx.Node:
        made = body.column(some(), [H] * draw(st.integers(1, 3)))
        values.extend(made[1:])
        return made[0]

    rows = _rows_of(body)
    others: list[Callable[[], fx.Node]] = [
        attention, as_rows, chosen, column,
        lambda: body.call(aten.sin.default, some()),
        lambda: body.call(aten.softmax.int, some(), -1),
        lambda: body.call(aten.add.Tensor, some(), body.weight(H)),
        lambda: body.call(aten.add.Tensor, some(), some(), alpha=2),
        lambda: body.call(aten.mul.Tensor, some(), 3.0),
        lambda: body.call(aten.add.Tensor, some(), 2),
        lambda: body.call(aten.pow.Tensor_Scalar, some(), draw(st.sampled_from([0, 1, 2, 3.0]))),
        lambda: body.call(aten.mul.Tensor, some(), some()),
        lambda: body.call(aten.detach.default, some()),
        lambda: body.row([some() for _ in range(draw(st.integers(1, 2)))]),
    ]  # fmt: skip
    kinds = [*rows, *range(len(others))]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=10)):
        values.append(others[kind]() if isinstance(kind, int) else rows[kind](some()))
    results = [
        body.call(aten.add.Tensor, body.row([some()]), some())
        for _ in range(draw(st.integers(1, 3)))
    ]
    module = body.ended(*results)
    flags = st.booleans()
    needed = [isinstance(v, Tensor) and draw(flags) for v in body.values]
    used = [draw(flags) for _ in results]
    return body, module, needed, used


@settings(max_examples=120)
@given(bodies())
def test_random_graphs(case: tuple[Body, fx.GraphModule, list[bool], list[bool]]) -> None:
    """Any graph, any choice of what a gradient is asked of, and of what the loss reads."""
    body, module, needed, used = case
    made = _same(module, body.values, needed, used)
    if made is None:  # only where no gradient arrives at what is asked for
        results, _ = _ran(module.forward, body.values, needed, used)
        assert not any(needed) or not any(y.requires_grad for y in results)


# -- how one asks --------------------------------------------------------------------------------


@pytest.fixture
def layer() -> tuple[Body, fx.GraphModule, Differentiated]:
    """An MLP with an operator that has no row, and a residual."""
    body = Body()
    norm = body.call(aten.layer_norm.default, body.x, [H], body.weight(H), None, 1e-5, False)
    (y,) = body.column(norm)
    y = body.row([body.call(aten.sin.default, body.call(aten.gelu.default, y))])
    module = body.ended(body.call(aten.add.Tensor, y, body.x))
    made = differentiate(module.graph, [isinstance(v, Tensor) for v in body.values])
    assert made is not None
    return body, module, made


def _called(layer: Any) -> tuple[list[Any], Tensor]:
    body, _, made = layer
    leaves = _leaves(body.values, [isinstance(v, Tensor) for v in body.values])
    return leaves, made((), leaves)


def test_twice_where_the_graph_is_kept(layer: Any) -> None:
    leaves, y = _called(layer)
    y.sum().backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves if isinstance(x, Tensor)]
    y.sum().backward()
    for x, once in zip([x for x in leaves if isinstance(x, Tensor)], first, strict=True):
        assert_close(x.grad, once * 2)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_some_gradients(layer: Any) -> None:
    leaves, y = _called(layer)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    some = torch.autograd.grad(y.sum(), tensors[1:3], retain_graph=True)
    assert all(x.grad is None for x in tensors)
    y.sum().backward()
    for x, grad in zip(tensors[1:3], some, strict=True):
        assert_close(grad, x.grad, rtol=0, atol=0)


def test_what_was_written_into_is_refused(layer: Any) -> None:
    leaves, y = _called(layer)
    with torch.no_grad():
        leaves[3].add_(1)  # the weight of the column-parallel product
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_gradient_of_a_gradient_is_refused(layer: Any) -> None:
    leaves, y = _called(layer)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), [leaves[1]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_memory_is_free_after_its_last_use(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the backward pass goes on, though the loss is still there."""
    _, y = _called(layer)
    kept = y.grad_fn.kept  # type: ignore[union-attr]
    first = weakref.ref(next(x for x in kept if isinstance(x, layer_function.Record)))
    del kept
    seen: list[bool] = []
    original = Twins.start_all_reduce

    def start(self: Twins, x: Tensor, lane: Any = None) -> Any:
        seen.append(first() is None)  # of the activation, behind the first product
        return original(self, x)

    monkeypatch.setattr(Twins, "start_all_reduce", start)
    loss = y.sum()
    loss.backward()
    assert seen == [True]
    assert y.grad_fn.kept is None  # type: ignore[union-attr]


def test_what_is_not_used_is_free_at_once() -> None:
    """Nothing keeps itself: results that the backward pass reads are kept without what made them."""
    body = Body()
    (y,) = body.column(body.x)
    module = body.ended(body.call(aten.tanh.default, body.call(aten.sin.default, body.row([y]))))
    made = differentiate(module.graph, [isinstance(v, Tensor) for v in body.values])
    assert made is not None
    assert any(made.given)
    gc.collect()
    gc.disable()
    try:
        leaves = _leaves(body.values, [isinstance(v, Tensor) for v in body.values])
        result = made((), leaves)
        node = weakref.ref(result.grad_fn)
        del result
        assert node() is None
    finally:
        gc.enable()


def test_a_result_that_no_gradient_flows_through() -> None:
    body = Body()
    (y,) = body.column(body.x)
    stopped = body.call(aten.detach.default, body.call(aten.sin.default, body.x))
    z = body.row([y])
    module = body.ended(z, body.call(aten.mul.Tensor, stopped, stopped))
    needed = [isinstance(v, Tensor) for v in body.values]
    assert _same(module, body.values, needed, [True, True]) is not None


@pytest.mark.parametrize("alias", ["operand", "view", "reshape", "dropout", "cast"])
def test_results_that_may_be_operands_are_left_to_autograd(alias: str) -> None:
    body = Body()
    (y,) = body.column(body.x)
    other = {
        "operand": lambda: body.x,
        "view": lambda: body.call(aten.view.default, body.x, [-1, H]),
        "reshape": lambda: body.call(aten.reshape.default, body.x, [-1, H]),
        "dropout": lambda: body.call(aten.dropout.default, body.x, 0.0, True),
        "cast": lambda: body.call(aten.type_as.default, body.x, body.x),
    }[alias]()
    module = body.ended(body.row([y]), other)
    assert differentiate(module.graph, [isinstance(v, Tensor) for v in body.values]) is None


def test_a_part_may_give_its_operand() -> None:
    """A cast to its own dtype computes nothing, and autograd has no node for it."""
    body = Body()
    (y,) = body.column(body.x)
    cast = body.call(aten.to.dtype, y, torch.float64)
    module = body.ended(body.row([cast]))
    needed = [isinstance(v, Tensor) for v in body.values]
    made = _same(module, body.values, needed, [True])
    assert made is not None
    assert any(n.target is layer_function.recorded for n in made.forward.graph.nodes)


def test_the_sum_runs_under_the_gradients_of_the_weights(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: events.append(name) or call(*args)  # type: ignore[func-returns-value]

    class Recording(Twins):
        def start_all_reduce(self, x: Tensor, lane: Any = None) -> Callable[[], Tensor]:
            events.append("start")
            return noted("wait", super().start_all_reduce(x, lane))

    body, _, made = layer
    body.values[0] = Recording()
    monkeypatch.setattr(beside, "gradient_of_weight", noted("weight", beside.gradient_of_weight))
    made((), _leaves(body.values, [isinstance(v, Tensor) for v in body.values])).sum().backward()
    assert events == ["start", "weight", "wait"]


# -- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "bert", "t5", "gpt_neox", "opt", "mixtral", "bart", "fnet"]
)
def test_layers_of_models_are_differentiated(name: str, two_ranks: None) -> None:
    """None falls back to autograd in silence; results and gradients are those of autograd's own record.

    The missing rank answers nothing, so that the sums are this rank's; they are so for both.
    """
    found = next(a for a in tiny_models.architectures() if a.model_type == name)
    attention = "eager" if name == "fnet" else "sdpa"  # it has none
    model, inputs = tiny_models.build(found, attention)
    split = autoshard.parallelize(model.train(), 2, inputs, degree="max")
    outputs = []
    hooks = torch.autograd.graph.saved_tensors_hooks(_same_one, _same_one)
    for around in (contextlib.nullcontext(), hooks):
        split.zero_grad()
        with around:  # with hooks a layer is recorded call by call
            loss = split(**inputs).loss
        loss.backward()
        grads = {n: p.grad.to_local() for n, p in split.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
        outputs.append((loss.detach(), grads))
        if not outputs[1:]:
            known = [
                made
                for layer, body in _bodies(split)
                for made in body.__dict__.get("known", {}).values()
            ]
            assert known
            assert None not in known
    (loss, grads), (expected, true) = outputs
    assert_close(loss, expected, rtol=0, atol=0)
    assert grads.keys() == true.keys()
    for key, grad in grads.items():
        assert_close(grad, true[key], rtol=1e-5, atol=1e-6)


def _same_one(x: Tensor) -> Tensor:
    return x


def _bodies(split: Any) -> list[tuple[Layer, Any]]:
    module = split._last.module
    layers = [m for m in split.modules() if isinstance(m, Layer)]
    bodies = [b for n, b in module.named_children() if n.startswith("layer_")]
    return list(zip(layers, bodies, strict=False))


def test_a_view_of_a_copy_is_not_written_into() -> None:
    """A copy into a group lies in its operand's memory: autograd refuses, and so does the layer."""
    body = Body()
    z = body.weight(B, S, H)
    first = body.call(aten.view.default, body.call(ops.copy, z, body.group), [-1, H])
    (y,) = body.column(body.x)
    module = body.ended(first, body.call(aten.add.Tensor, body.row([y]), body.x))
    needed = [isinstance(v, Tensor) for v in body.values]
    made = differentiate(module.graph, needed)
    assert made is not None
    for call in (module.forward, lambda *leaves: made((), leaves)):
        given = [v * 1 if isinstance(v, Tensor) else v for v in _leaves(body.values, needed)]
        result, _ = call(*given)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            result.mul_(2)


def _both(
    body: Body, module: fx.GraphModule, read: Callable[[Any], Tensor]
) -> tuple[list[Tensor | None], ...]:
    """Gradients of what is read of the results: autograd's, and those of the layer on rows."""
    needed = [isinstance(v, Tensor) for v in body.values]
    made = differentiate(tokens_as_rows(module.graph), needed)
    assert made is not None
    found = []
    for call in (module.forward, lambda *leaves: made((), leaves)):
        leaves = _leaves(body.values, needed)
        read(call(*leaves)).sum().backward()
        found.append([x.grad for x in leaves if isinstance(x, Tensor)])
    return tuple(found)


def test_a_result_may_be_written_into() -> None:
    """What was computed on rows leaves as a tensor of its own."""
    body = Body()
    (y,) = body.column(body.x)
    module = body.ended(body.call(aten.add.Tensor, body.row([y]), body.x))
    assert_close(*_both(body, module, lambda result: result.mul_(3)))


def test_a_weight_behind_a_result_that_nobody_reads_has_no_gradient() -> None:
    """Of several that are one call; zeros would be decayed."""
    body = Body()
    read, unread = body.column(body.x, [H, H])
    theirs, mine = _both(body, body.ended(body.row([read]), unread), lambda results: results[0])
    assert any(grad is None for grad in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_pieces_of_unequal_size_between_collectives() -> None:
    """A tuple that no row gives is no operand of a part: autograd has the layer."""
    body = Body()
    (y,) = body.column(body.x)
    chunks = body.call(aten.chunk.default, y, 3, -1)
    pieces = [body.call(operator.getitem, chunks, i) for i in range(3)]
    joined = body.call(aten.cat.default, [body.call(aten.sin.default, p) for p in pieces], -1)
    module = body.ended(body.row([joined]))
    _same(module, body.values, [isinstance(v, Tensor) for v in body.values], [True])
