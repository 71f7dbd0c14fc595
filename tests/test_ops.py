"""What runs on a rank: collectives and their gradients, split operators, random streams.

Ranks are threads in most tests; the last ones check that real processes do the same.
"""

from __future__ import annotations

import copy as python_copy
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from autoshard import ops
from autoshard.groups import Group, SingleGroup
from autoshard.mesh import Mesh, init_mesh
from autoshard.random_streams import (
    RandomStream,
    checkpoint_contexts,
    derive_seed,
    group_seed,
)
from autoshard.simulate import RankAborted, RankContext, run_ranks
from tests.distributed import run_distributed

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small integers, whose sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


class Counting:
    """A group that counts its collectives and notes the sizes that they move."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.degree, self.coordinate, self.stream = group.degree, group.coordinate, group.stream
        self.calls: Counter[str] = Counter()
        self.numel = 0

    def all_reduce(self, x: Tensor, op: Any = "sum", *, inplace: bool = False) -> Tensor:
        self.calls[f"all_reduce({op})"] += 1
        self.numel = max(self.numel, x.numel())
        return self.group.all_reduce(x, op, inplace=inplace)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.calls["all_gather"] += 1
        return self.group.all_gather(x)


# Collectives


def grad_of(x: Tensor) -> Tensor:
    """The gradient that a backward pass left, which must be there."""
    assert x.grad is not None
    return x.grad


def collective(name: str, dtype: torch.dtype, group: Group) -> tuple[Tensor, Tensor]:
    """The op's result and its input's gradient on this rank, from numbers that differ by rank."""
    rank = group.coordinate
    x = numbers(4, 2 * group.degree, seed=rank, dtype=dtype).requires_grad_()
    op = getattr(ops, name)
    y: Tensor = op(x, -1, group) if name in ("gather", "scatter") else op(x, group)
    dy = numbers(*y.shape, seed=100 + rank, dtype=dtype)
    torch.autograd.backward(y, dy)
    return y.detach(), grad_of(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("name", ["copy", "reduce", "gather", "scatter"])
def test_collective_is_its_equation(name: str, tp: int, dtype: torch.dtype) -> None:
    """Forward and backward of each op are what its docstring says, from the ranks' numbers."""
    results = run_ranks(lambda ctx: collective(name, dtype, ctx.group(tp)), tp)
    xs = [numbers(4, 2 * tp, seed=r, dtype=dtype) for r in range(tp)]
    dys = [numbers(*results[r][0].shape, seed=100 + r, dtype=dtype) for r in range(tp)]
    for r, (y, dx) in enumerate(results):
        expected = {
            "copy": (xs[r], sum(dys)),
            "reduce": (sum(xs), dys[r]),
            "gather": (torch.cat(xs, 1), dys[r][:, 2 * tp * r : 2 * tp * (r + 1)]),
            "scatter": (xs[r][:, 2 * r : 2 * r + 2], torch.cat(dys, 1)),
        }[name]
        torch.testing.assert_close(y, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(dx, expected[1], rtol=0, atol=0)
        assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("name", ["copy", "reduce", "gather", "scatter"])
def test_collective_of_one_rank_does_nothing(name: str) -> None:
    """At degree 1 every op returns its very argument."""
    group = SingleGroup(RandomStream(0))
    x = numbers(4, 4)
    op = getattr(ops, name)
    assert (op(x, 0, group) if name in ("gather", "scatter") else op(x, group)) is x
    assert group.all_reduce(x) is x and group.all_gather(x)[0] is x


def test_collectives_leave_their_inputs_alone() -> None:
    """An op run twice on one value gives the same twice, also on values that are not contiguous."""

    def twice(ctx: RankContext) -> None:
        group = ctx.group(2)
        x = numbers(4, 6, seed=ctx.rank).t().requires_grad_()
        before = x.detach().clone()
        for op in (ops.copy, ops.reduce, partial(ops.gather, dim=0), partial(ops.scatter, dim=0)):
            first, second = op(x, group=group), op(x, group=group)
            assert torch.equal(first, second)
            dy = numbers(*first.shape[::-1], seed=7).t()
            kept = dy.clone()
            one = torch.autograd.grad(first, x, dy)[0]
            (both,) = torch.autograd.grad((second, op(x, group=group)), x, (dy, dy))
            assert torch.equal(dy, kept)
            assert torch.equal(both, 2 * one)
        assert torch.equal(x, before)

    run_ranks(twice, 2)


def test_reduce_in_place_reuses_only_fresh_memory() -> None:
    """The fresh result of a matmul is overwritten, a leaf or a view never."""

    def reuse(ctx: RankContext) -> None:
        group = ctx.group(2)
        w = numbers(3, 3, seed=ctx.rank).requires_grad_()
        fresh = w @ w
        expected = ops.reduce(w @ w, group)
        result = ops.reduce(fresh, group, inplace=True)
        assert result is fresh  # also for autograd: it is one value, not a view of an old one
        assert torch.equal(result, expected)
        dy = numbers(3, 3, seed=9)
        grads = [torch.autograd.grad(y, w, dy, retain_graph=True)[0] for y in (result, expected)]
        assert torch.equal(*grads)
        for other in (w, (w @ w)[1:], (w @ w).t()):
            kept = other.detach().clone()
            ops.reduce(other, group, inplace=True)
            assert torch.equal(other, kept)
        needed = w.exp()  # autograd keeps the result of exp
        result = ops.reduce(needed, group, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()

    run_ranks(reuse, 2)


def test_collectives_run_without_gradients() -> None:
    """Under no_grad the results are the same and need no gradient."""
    with torch.no_grad():
        results = run_ranks(
            lambda ctx: ops.reduce(numbers(3, seed=ctx.rank).requires_grad_(), ctx.group(2)), 2
        )
    assert not results[0].requires_grad
    assert torch.equal(results[0], numbers(3, seed=0) + numbers(3, seed=1))


def test_scatter_names_the_sizes_that_do_not_divide() -> None:
    """A dimension that cannot be cut in equal parts is an error, not a ragged split."""
    with pytest.raises(ValueError, match=r"dimension 1 of \(4, 3\) .* in 2 equal parts"):
        run_ranks(lambda ctx: ops.scatter(numbers(4, 3), 1, ctx.group(2)), 2)


def test_column_then_row_split_mlp_is_the_whole_mlp() -> None:
    """Figure 3a of the paper: `copy`, column split, row split, `reduce`; outputs and gradients."""
    a, b, x, dy = numbers(5, 4), numbers(4, 8, seed=1), numbers(8, 4, seed=2), numbers(5, 4, seed=3)
    whole = [t.clone().requires_grad_() for t in (a, b, x)]
    (F.relu(whole[0] @ whole[1]) @ whole[2]).backward(dy)

    def split(ctx: RankContext, with_copy: bool = True) -> tuple[Tensor, ...]:
        group = ctx.group(2)
        c = slice(4 * ctx.rank, 4 * ctx.rank + 4)
        mine = [t.clone().requires_grad_() for t in (a, b[:, c], x[c])]
        inside = ops.copy(mine[0], group) if with_copy else mine[0]
        ops.reduce(F.relu(inside @ mine[1]) @ mine[2], group).backward(dy)
        return tuple(grad_of(t) for t in mine)

    results = run_ranks(split, 2)
    for rank, (da, db, dx) in enumerate(results):
        c = slice(4 * rank, 4 * rank + 4)
        torch.testing.assert_close(da, grad_of(whole[0]))
        torch.testing.assert_close(db, grad_of(whole[1])[:, c])
        torch.testing.assert_close(dx, grad_of(whole[2])[c])
    without = run_ranks(partial(split, with_copy=False), 2)
    assert not torch.allclose(without[0][0], grad_of(whole[0]))


# Embedding


@st.composite
def embeddings(draw: st.DrawFn) -> dict[str, Any]:
    tp = draw(st.integers(1, 4))
    vocab = draw(st.integers(1, 12))
    rows = -(-vocab // tp) + draw(st.integers(0, 2))
    return {
        "tp": tp,
        "vocab": vocab,
        "rows": rows,
        "local": rows + draw(st.integers(0, 2)),
        "ids": draw(st.lists(st.integers(0, vocab - 1), max_size=8)),
        "padding_idx": draw(st.integers(-1, vocab - 1)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }


@given(embeddings())
def test_split_embedding_is_the_whole_embedding(case: dict[str, Any]) -> None:
    """Reduced, it is F.embedding, and each rank's gradient is its rows of the whole gradient."""
    tp, vocab, rows, dtype = case["tp"], case["vocab"], case["rows"], case["dtype"]
    ids = torch.tensor(case["ids"], dtype=torch.int64).view(-1, 1)
    table = numbers(vocab, 3, dtype=dtype).requires_grad_()
    padding = case["padding_idx"] if case["padding_idx"] >= 0 else None
    whole = F.embedding(ids, table, padding_idx=padding)
    dy = numbers(*whole.shape, seed=5, dtype=dtype)
    whole.backward(dy)
    stored = torch.full((rows * tp + case["local"], 3), 77, dtype=dtype)
    stored[:vocab] = table.detach()

    def split(ctx: RankContext) -> tuple[Tensor, Tensor]:
        group, start = ctx.group(tp), ctx.rank * rows
        weight = stored[start : start + case["local"]].clone().requires_grad_()
        part = ops.vocab_embedding(weight, ids, group, vocab, rows, case["padding_idx"])
        y = ops.reduce(part, group)
        y.backward(dy)
        assert grad_of(weight).dtype == dtype
        return y.detach(), grad_of(weight)

    for rank, (y, dweight) in enumerate(run_ranks(split, tp)):
        assert torch.equal(y, whole)
        expected = torch.zeros(case["local"], 3, dtype=dtype)
        own = grad_of(table)[rank * rows : (rank + 1) * rows]
        expected[: len(own)] = own
        assert torch.equal(dweight, expected)


@pytest.mark.parametrize("wrong", [-1, 10, 11])
def test_an_id_that_no_rank_holds_is_an_error(wrong: int) -> None:
    """As in F.embedding; a rank's padding rows, here global 10 and 11, are no tokens."""
    with pytest.raises(IndexError, match=f"id {wrong} is out of range: .* 10 entries"):
        run_ranks(
            lambda ctx: ops.vocab_embedding(
                numbers(6, 2), torch.tensor([0, wrong]), ctx.group(2), vocab=10, rows=6
            ),
            2,
        )


# Cross entropy


@st.composite
def losses(draw: st.DrawFn) -> dict[str, Any]:
    tp = draw(st.integers(1, 4))
    vocab = draw(st.integers(1, 11))
    rows = -(-vocab // tp) + draw(st.integers(0, 2))
    batch = draw(st.sampled_from([None, (1,), (4,), (3, 2), (2, 1, 3)]))
    count = 1
    for size in batch or ():
        count *= size
    ignore = draw(st.sampled_from([-100, 0, vocab - 1]))
    label = st.one_of(st.integers(0, vocab - 1), st.just(ignore))
    return {
        "tp": tp,
        "vocab": vocab,
        "rows": rows,
        "local": rows + draw(st.integers(0, 2)),
        "batch": batch,
        "labels": draw(st.lists(label, min_size=count, max_size=count)),
        "ignore_index": ignore,
        "weighted": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from([0, 1, 2])),
        "dtype": draw(st.sampled_from([*DTYPES, torch.float16])),
        "scale": draw(st.sampled_from([1.0, 50.0])),
        "part_bytes": draw(st.sampled_from([1, 100, 2**20])),
    }


CASE: dict[str, Any] = {
    "tp": 2, "vocab": 7, "rows": 4, "local": 5, "batch": (3, 2), "labels": [0, 3, 4, 6, -100, 2],
    "ignore_index": -100, "weighted": True, "label_smoothing": 0.1, "reduction": 1,
    "dtype": torch.float64, "scale": 1.0, "part_bytes": 100,
}  # fmt: skip


def whole_loss(case: dict[str, Any]) -> dict[str, Tensor]:
    """torch's own loss and gradient for a case, computed in float64."""
    vocab, batch = case["vocab"], case["batch"]
    shape = (vocab,) if batch is None else (batch[0], vocab, *batch[1:])
    logits = case["scale"] * torch.randn(shape, dtype=torch.float64)
    logits = logits.to(case["dtype"]).double().requires_grad_()
    weight = torch.rand(vocab).to(case["dtype"]).double() if case["weighted"] else None
    target = torch.tensor(case["labels"]).view(batch or ())
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=case["ignore_index"],
        reduction=("none", "mean", "sum")[case["reduction"]],
        label_smoothing=case["label_smoothing"],
    )
    dloss = torch.randn(loss.shape, dtype=torch.float64).to(case["dtype"]).double()
    loss.backward(dloss)
    whole = {"logits": logits.detach(), "target": target, "loss": loss.detach(), "dloss": dloss}
    return whole | {"grad": grad_of(logits)} | ({} if weight is None else {"weight": weight})


def split_loss(case: dict[str, Any], whole: dict[str, Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """This rank's loss and gradient; what is padding in its logits is a large number."""
    class_dim = 0 if case["batch"] is None else 1
    rows, local = case["rows"], case["local"]
    start = group.coordinate * rows
    mine = whole["logits"].narrow(class_dim, min(start, case["vocab"]), 0)
    width = max(0, min(rows, case["vocab"] - start))
    if width:
        mine = whole["logits"].narrow(class_dim, start, width)
    shape = list(mine.shape)
    shape[class_dim] = local
    logits = torch.full(shape, 1e4, dtype=case["dtype"])
    logits.narrow(class_dim, 0, width).copy_(mine)
    logits.requires_grad_()
    weight = whole.get("weight")
    loss = ops.vocab_cross_entropy(
        logits,
        whole["target"],
        group,
        case["vocab"],
        rows,
        None if weight is None else weight.to(case["dtype"]),
        case["reduction"],
        case["ignore_index"],
        case["label_smoothing"],
        class_dim,
    )
    loss.backward(whole["dloss"].to(case["dtype"]))
    return loss.detach(), grad_of(logits)


def check_loss(case: dict[str, Any]) -> None:
    """Loss, gradient and zero gradient of padding, against torch."""
    whole = whole_loss(case)
    class_dim = 0 if case["batch"] is None else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "PART_BYTES", case["part_bytes"])
        results = run_ranks(lambda ctx: split_loss(case, whole, ctx.group(case["tp"])), case["tp"])
    # Half precision is rounded once, at the end.
    rtol, atol = {
        torch.float64: (1e-10, 1e-10),
        torch.float32: (2e-5, 2e-5),
        torch.float16: (2**-10, 2e-5),
        torch.bfloat16: (2**-7, 2e-5),
    }[case["dtype"]]
    close = partial(torch.testing.assert_close, rtol=rtol, atol=atol, equal_nan=True)
    for rank, (loss, grad) in enumerate(results):
        assert loss.dtype == grad.dtype == case["dtype"]
        close(loss.double(), whole["loss"])
        start = rank * case["rows"]
        width = max(0, min(case["rows"], case["vocab"] - start))
        if width:
            expected = whole["grad"].narrow(class_dim, start, width)
            close(grad.narrow(class_dim, 0, width).double(), expected)
        assert not grad.narrow(class_dim, width, case["local"] - width).any()
    assert all(torch.equal(loss, results[0][0]) or loss.isnan().any() for loss, _ in results)


@example(CASE)
@example(CASE | {"reduction": 0, "label_smoothing": 0.0})
@given(losses())
def test_split_cross_entropy_is_the_whole_one(case: dict[str, Any]) -> None:
    """Every option, any padding of the vocabulary, every dtype."""
    check_loss(case)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_cross_entropy_where_all_targets_are_ignored(
    reduction: int, weighted: bool, smoothing: float
) -> None:
    """The mean is nan as in torch, and no gradient is."""
    case = CASE | {"reduction": reduction, "weighted": weighted, "label_smoothing": smoothing}
    check_loss(case | {"labels": [-100] * 6})


@pytest.mark.parametrize("masked", [1, 4])
def test_cross_entropy_with_logits_of_minus_infinity(masked: int) -> None:
    """Masked classes have probability 0, also where a rank's whole part is masked."""
    logits = torch.randn(3, 8, dtype=torch.float64)
    logits[:, 8 - masked :] = -torch.inf
    logits.requires_grad_()
    target = torch.tensor([0, 1, 3])
    F.cross_entropy(logits, target).backward()

    def split(ctx: RankContext) -> Tensor:
        mine = logits.detach()[:, 4 * ctx.rank : 4 * ctx.rank + 4].clone().requires_grad_()
        ops.vocab_cross_entropy(mine, target, ctx.group(2), 8, 4).backward()
        return grad_of(mine)

    torch.testing.assert_close(torch.cat(run_ranks(split, 2), 1), grad_of(logits))


def test_cross_entropy_of_large_logits_keeps_float32_precision() -> None:
    """Far from zero the loss is as exact as torch's: it is computed around the maximum."""
    logits = (10_000 + torch.randn(16, 8)).requires_grad_()
    target = torch.randint(0, 8, (16,))
    expected = F.cross_entropy(logits.double(), target)
    expected.backward()

    def split(ctx: RankContext) -> tuple[Tensor, Tensor]:
        mine = logits.detach()[:, 4 * ctx.rank : 4 * ctx.rank + 4].clone().requires_grad_()
        loss = ops.vocab_cross_entropy(mine, target, ctx.group(2), 8, 4)
        loss.backward()
        return loss.detach(), grad_of(mine)

    (loss, first), (_, second) = run_ranks(split, 2)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([first, second], 1), grad_of(logits), rtol=1e-5, atol=1e-8)


def test_cross_entropy_moves_and_keeps_little() -> None:
    """Two all-reduces of per-token numbers forward, none backward; one [N, local] tensor kept."""
    tokens, local = 16, 32

    def measure(ctx: RankContext) -> None:
        group = Counting(ctx.group(2))
        logits = torch.randn(tokens, local, dtype=torch.bfloat16).requires_grad_()
        kept: list[Tensor] = []

        def keep(saved: Tensor) -> Tensor:
            kept.append(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = ops.vocab_cross_entropy(
                logits, torch.randint(0, 64, (tokens,)), group, 64, 32, label_smoothing=0.1
            )
        assert group.calls == {"all_reduce(max)": 1, "all_reduce(sum)": 1}
        assert group.numel == 3 * tokens
        large = [t for t in kept if t.numel() >= tokens * local]
        assert [t.data_ptr() for t in large] == [logits.data_ptr()]
        loss.backward()
        assert group.calls.total() == 2

    run_ranks(measure, 2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"target": torch.rand(2, 6)}, NotImplementedError, "probabilities"),
        ({"target": torch.tensor([0, 6])}, IndexError, "target 6 is out of range.* 6 entries"),
        ({"target": torch.tensor([0, -1])}, IndexError, "target -1 is out of range"),
        ({"target": torch.tensor([0, 1, 2])}, ValueError, r"need a target \(2,\), got \(3,\)"),
        ({"weight": torch.rand(4)}, ValueError, r"weight must be \[6\]"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"reduction": 3}, ValueError, "reduction must be"),
    ],
)
def test_cross_entropy_refuses(change: dict[str, Any], error: type[Exception], match: str) -> None:
    """What torch refuses, and what a split vocabulary cannot do."""
    arguments = {"logits": torch.randn(2, 4), "target": torch.tensor([0, 5])} | change
    with pytest.raises(error, match=match):
        run_ranks(
            lambda ctx: ops.vocab_cross_entropy(group=ctx.group(2), vocab=6, rows=4, **arguments), 2
        )


# Random streams


def dropped(group: Group, size: int = 64) -> list[bool]:
    """Which of `size` ones a dropout of one half drops."""
    mask: list[bool] = (ops.with_stream(group, F.dropout, torch.ones(size), 0.5) == 0).tolist()
    return mask


def test_masks_agree_outside_regions_and_differ_inside() -> None:
    """Degree 1: one mask for all ranks. Degree d: one per coordinate, the same on twins."""

    def masks(ctx: RankContext) -> list[list[bool]]:
        return [dropped(ctx.group(degree)) for degree in (1, 2, 4, 1)]

    ranks = run_ranks(masks, 4)
    outside, by_two, by_four, again = zip(*ranks, strict=True)
    assert outside[0] == outside[1] == outside[2] == outside[3]
    assert again[0] == again[3] != outside[0]
    assert by_two[0] == by_two[2] != by_two[1] == by_two[3]
    assert len({tuple(mask) for mask in by_four}) == 4
    assert ranks == run_ranks(masks, 4)
    assert ranks != run_ranks(masks, 4, seed=1)


def test_seeds_depend_on_every_part_of_the_key_and_never_change() -> None:
    """Seeds are stable over releases: a run that goes on from a checkpoint draws on."""
    keys = {(s, dp, d, c) for s in (0, 1) for dp in (0, 1, 2) for d in (2, 4) for c in (0, 1)}
    assert len({group_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(0, "a") == 7386442469337675363
    assert derive_seed(0, 1) != derive_seed(0, "1")


def test_a_stream_leaves_the_default_generator_alone() -> None:
    """Draws of a stream are no draws of the default generator, and the other way round."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    fresh = RandomStream(5).run(torch.rand, 4)
    torch.manual_seed(3)
    stream = RandomStream(5)
    with pytest.raises(ZeroDivisionError):
        stream.run(lambda: 1 / 0)
    first = stream.run(torch.rand, 2)
    assert torch.equal(torch.rand(4), expected)
    second = stream.run(torch.rand, 2)
    whole = torch.Generator().manual_seed(5)
    assert torch.equal(fresh, torch.rand(4, generator=whole))
    assert torch.equal(torch.cat([first, second]), fresh)


def test_a_stream_serves_attention_with_dropout() -> None:
    """scaled_dot_product_attention's own dropout draws from the stream."""
    q = torch.randn(1, 2, 8, 4)
    attend = partial(F.scaled_dot_product_attention, q, q, q, dropout_p=0.5)
    one, other = RandomStream(1), RandomStream(1)
    first = one.run(attend)
    torch.rand(3)
    assert torch.equal(first, other.run(attend))
    assert not torch.equal(first, one.run(attend))


def test_a_stream_goes_on_from_its_saved_state() -> None:
    """state_dict and load_state_dict; manual_seed starts anew."""
    stream = RandomStream(2)
    start = stream.run(torch.rand, 3)
    state = stream.state_dict()
    expected = stream.run(torch.rand, 3)
    other = RandomStream(9)
    other.run(torch.rand, 1)
    other.load_state_dict(state)
    assert torch.equal(other.run(torch.rand, 3), expected)
    assert other.seed == 2
    stream.manual_seed(2)
    assert torch.equal(stream.run(torch.rand, 3), start)
    with pytest.raises(ValueError, match="seed -1"):
        RandomStream(-1)


def test_checkpointing_replays_a_stream() -> None:
    """The recomputed forward draws the first one's masks; later draws are not disturbed."""

    def gradient(recompute: bool) -> tuple[Tensor, Tensor]:
        stream = RandomStream(4)
        x = torch.ones(64, requires_grad=True)
        stream.run(torch.rand, 1)

        def layer(x: Tensor) -> Tensor:
            return stream.run(F.dropout, x * x, 0.5) * x

        if recompute:
            contexts = partial(checkpoint_contexts, [stream])
            y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
        else:
            y = layer(x)
        stream.run(torch.rand, 1)
        y.sum().backward()
        assert x.grad is not None
        return x.grad, stream.run(torch.rand, 2)

    for plain, recomputed in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(plain, recomputed)


# The simulator


def test_results_come_by_rank_and_groups_are_kept() -> None:
    """Each rank runs once, knows its number, and gets one object per degree."""

    def describe(ctx: RankContext) -> tuple[int, int, bool]:
        group = ctx.group(2)
        return ctx.rank, group.coordinate, group is ctx.group(2) is python_copy.deepcopy(group)

    assert run_ranks(describe, 4) == [(0, 0, True), (1, 1, True), (2, 0, True), (3, 1, True)]


def test_a_rank_that_raises_stops_the_others() -> None:
    """Its exception arrives, with its rank, and no thread stays behind."""

    def fail(ctx: RankContext) -> None:
        if ctx.rank == 2:
            raise KeyError("mine")
        ctx.group(4).all_reduce(torch.ones(1))
        raise AssertionError("the collective cannot end")

    before = threading.active_count()
    with pytest.raises(KeyError, match="mine") as caught:
        run_ranks(fail, 4)
    assert caught.value.__notes__ == ["raised on simulated rank 2 of 4"]
    assert threading.active_count() == before


def test_a_missing_collective_is_named_at_once() -> None:
    """A rank that ends while another waits for it: an error, not a wait for the timeout."""

    def uneven(ctx: RankContext) -> None:
        if ctx.rank == 0:
            ctx.group(2).all_reduce(torch.ones(1))

    with pytest.raises(RankAborted, match=r"waited for ranks \[1\], which had ended"):
        run_ranks(uneven, 2)


def test_ranks_that_disagree_are_named() -> None:
    """Different shapes or different collectives are a bug of the graph."""

    def uneven(ctx: RankContext) -> None:
        ctx.group(2).all_reduce(torch.ones(1 + ctx.rank))

    with pytest.raises(RuntimeError, match=r"disagree: rank 0: all_reduce\(sum\) of \(1,\)"):
        run_ranks(uneven, 2)


def test_a_rank_that_waits_too_long_ends() -> None:
    """Two ranks that wait for each other in different groups end after the timeout."""

    def crossed(ctx: RankContext) -> None:
        ctx.group(2 if ctx.rank == 0 else 4).all_reduce(torch.ones(1))

    with pytest.raises(TimeoutError, match=r"rank.* waited for ranks .* for 0.2 s"):
        run_ranks(crossed, 4, timeout=0.2)


# Real processes

TAKING_TURNS = threading.Lock()  # simulated ranks share torch's generator


def everything(group: Group) -> dict[str, Tensor]:
    """Each op's results and gradients on this rank, by name."""
    out: dict[str, Tensor] = {}
    for dtype in DTYPES:
        for name in ("copy", "reduce", "gather", "scatter"):
            for part, value in zip(("y", "dx"), collective(name, dtype, group), strict=True):
                out[f"{name} {dtype} {part}"] = value
        for smoothing in (0.0, 0.2):
            width = -(-7 // group.degree)
            case = CASE | {"tp": group.degree, "rows": width, "local": width + 1, "dtype": dtype}
            case["label_smoothing"] = smoothing
            with TAKING_TURNS:
                torch.manual_seed(0)
                whole = whole_loss(case)
            loss, grad = split_loss(case, whole, group)
            out |= {f"loss {dtype} {smoothing}": loss, f"dlogits {dtype} {smoothing}": grad}
        weight = numbers(4, 3, seed=group.coordinate, dtype=dtype).requires_grad_()
        ids = torch.arange(4 * group.degree).flip(0)
        rows = ops.vocab_embedding(weight, ids, group, 4 * group.degree, 4, padding_idx=1)
        y = ops.reduce(rows, group)
        torch.autograd.backward(y, numbers(*y.shape, seed=6, dtype=dtype))
        out |= {f"embedding {dtype}": y.detach(), f"dweight {dtype}": grad_of(weight)}
    x = numbers(5, seed=group.coordinate)
    out["maximum"] = group.all_reduce(x, "max")
    out["untouched"] = x.clone()
    out["in place"] = group.all_reduce(x, inplace=True)
    assert out["in place"] is x or out["in place"].data_ptr() == x.data_ptr()
    out["mask"] = torch.tensor(dropped(group))
    return out


def everything_on_processes(tp: int, degrees: tuple[int, ...]) -> dict[int, dict[str, Tensor]]:
    mesh = Mesh(init_mesh(tp, device="cpu"), degrees, seed=0)
    return {degree: everything(mesh.group(degree)) for degree in degrees}


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "degrees"), [(2, (2,)), (4, (2, 4))])
def test_processes_and_threads_agree(tp: int, degrees: tuple[int, ...]) -> None:
    """Every op, forward and backward, the masks too, on gloo as in the simulator."""

    def on_threads(ctx: RankContext) -> dict[int, dict[str, Tensor]]:
        return {degree: everything(ctx.group(degree)) for degree in degrees}

    threads = run_ranks(on_threads, tp, degrees=degrees)
    processes = run_distributed(everything_on_processes, tp, tp, degrees)
    for rank in range(tp):
        for degree in degrees:
            ours, theirs = threads[rank][degree], processes[rank][degree]
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], msg=partial("{}: {}".format, name))


def counts() -> dict[str, tuple[int, int]]:
    """Collectives that CommDebugMode sees in each op's forward and backward pass."""
    group = Mesh(init_mesh(2, device="cpu"), [2]).group(2)
    seen: dict[str, tuple[int, int]] = {}

    def count(name: str, forward: Any) -> None:
        with CommDebugMode() as before:
            y = forward()
        with CommDebugMode() as after:
            y.sum().backward()
        seen[name] = before.get_total_counts(), after.get_total_counts()

    x = torch.randn(4, 4, requires_grad=True)
    count("copy", lambda: ops.copy(x, group))
    count("reduce", lambda: ops.reduce(x, group))
    count("gather", lambda: ops.gather(x, 0, group))
    count("scatter", lambda: ops.scatter(x, 0, group))
    ids = torch.arange(4)
    count("embedding", lambda: ops.vocab_embedding(x, ids, group, 8, 4))
    count("loss", lambda: ops.vocab_cross_entropy(x, ids, group, 8, 4, label_smoothing=0.1))
    return seen


@pytest.mark.slow
def test_comm_debug_mode_counts_every_collective_once() -> None:
    """The numbers that the plan promises are the numbers that run."""
    expected = {
        "copy": (0, 1),
        "reduce": (1, 0),
        "gather": (1, 0),
        "scatter": (0, 1),
        "embedding": (0, 0),
        "loss": (2, 0),
    }
    assert run_distributed(counts, 2) == [expected, expected]


def compiled() -> dict[str, bool]:
    """Whether each op gives the same, forward and backward, within torch.compile."""
    group = Mesh(init_mesh(2, device="cpu"), [2]).group(2)
    ids = torch.arange(4)
    same: dict[str, bool] = {}

    def compare(
        name: str, function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64
    ) -> None:
        torch._dynamo.reset()
        faster = torch.compile(function, backend="aot_eager", fullgraph=True)
        found = []
        for run in (function, faster):
            x = numbers(4, 4, seed=group.coordinate, dtype=dtype).requires_grad_()
            y = run(x)
            dy = numbers(*y.shape, seed=8 + group.coordinate, dtype=dtype)
            torch.autograd.backward(y, dy)
            found += [y.detach(), grad_of(x)]
        same[name] = torch.allclose(found[0], found[2]) and torch.allclose(found[1], found[3])

    compare("copy", lambda x: ops.copy(x.sin(), group))
    compare("reduce", lambda x: ops.reduce(x.sin(), group))
    compare("gather", lambda x: ops.gather(x.sin(), 1, group))
    compare("scatter", lambda x: ops.scatter(x.sin(), 1, group))
    compare("embedding", lambda x: ops.vocab_embedding(x, ids, group, 8, 4))

    def loss(x: Tensor, smoothing: float) -> Tensor:
        return ops.vocab_cross_entropy(x, ids, group, 8, 4, label_smoothing=smoothing)

    for dtype in (torch.float64, torch.bfloat16):
        for smoothing in (0.0, 0.1):
            compare(f"loss {dtype} {smoothing}", partial(loss, smoothing=smoothing), dtype)
    return same


@pytest.mark.slow
def test_ops_are_the_same_within_compile() -> None:
    """torch.compile takes every op but the random ones without a graph break."""
    for same in run_distributed(compiled, 2, timeout=300):
        assert len(same) == 9
        assert [name for name, is_same in same.items() if not is_same] == []
