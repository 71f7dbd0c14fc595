"""Activation checkpointing: the model's own calls and checkpoint="layer"."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard import failures, groups, ops
from autoshard import parameters as stored_parameters
from autoshard.capture import skeleton
from autoshard.errors import UnsoundGraphError
from autoshard.pipeline import analyse, rewrite
from autoshard.proof.nested import same_as_flat
from autoshard.sharded import Nested, Sharded
from benchmarks.live_bytes import LiveBytes
from tests.distributed import run_distributed
from tests.models.huggingface import case

WIDTH, HEADS, LAYERS, VOCAB = 32, 4, 2, 64


class Block(nn.Module):
    """A pre-norm layer with dropout in the attention and behind both halves."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """x: [b, s, WIDTH] -> the attention's result, and its values [b, HEADS, s, WIDTH / HEADS]."""
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=p)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout, self.training), v

    def mlp(self, x: Tensor) -> Tensor:
        """x: [b, s, WIDTH] -> the same shape."""
        return F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), self.dropout, self.training)

    def forward(self, x: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
        """x: [b, s, WIDTH] -> the next layer's x, and what the values sum to."""
        y, v = self.attend(x, causal)
        x = x + y
        return x + self.mlp(x), v.pow(2).mean()


class Stack(nn.Module):
    """Blocks around which the model itself puts checkpoints: None, "layer", "reentrant", "nested"."""

    def __init__(self, how: str | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.how, self.dropout = how, dropout
        self.table, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.h = nn.ModuleList(Block(dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def layer(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [b, s, WIDTH] -> the next layer's x, and a number."""
        y: Any
        if self.how == "layer":
            y = checkpoint(block, x, causal=True, use_reentrant=False)
        elif self.how == "reentrant":
            y = checkpoint(block, x, True, use_reentrant=True)
        elif self.how == "nested":
            inner = partial(checkpoint, block, use_reentrant=False)
            y = checkpoint(lambda z: inner(z * 1.5), x / 1.5, use_reentrant=False)
        else:
            y = block(x)
        return y[0], y[1]

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [b, s] -> the loss."""
        x = F.dropout(self.table(ids), self.dropout, self.training)
        extra = x.new_zeros(())
        for block in self.h:
            x, value = self.layer(block, x)
            extra = extra + value
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.01 * extra


@dataclass
class Step:
    """What one step did, as plain tensors and numbers."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    peak: int = 0
    places: list[str] = field(default_factory=list)
    later: float = 0.0


def batches(count: int = 2, batch: int = 2, length: int = 16) -> list[tuple[Tensor, Tensor]]:
    """ids and labels, the same everywhere."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(VOCAB, (count, 2, batch, length), generator=generator)
    return [(ids, labels) for ids, labels in drawn]


@contextlib.contextmanager
def counted(places: list[str]) -> Iterator[dict[str, int]]:
    """How often which collective is called; and what an error there would name."""
    counts: dict[str, int] = {}
    originals = {name: getattr(groups, name) for name in ("all_reduce", "start_all_reduce")}

    def call(name: str, *args: Any) -> Any:
        counts["all_reduce"] = counts.get("all_reduce", 0) + 1
        places.append(str(failures.place(sys._getframe(1))))
        return originals[name](*args)

    for name in originals:
        setattr(groups, name, partial(call, name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(groups, name, original)


def step(model: nn.Module, accumulate: int = 2) -> Step:
    """All forwards, then all backwards from the last to the first; then one more forward."""
    done, losses = Step(), []
    given = batches(accumulate)
    with LiveBytes() as live:
        with counted(done.places) as counts:
            for ids, labels in given:
                losses.append(model(ids, labels))
            done.forward = dict(counts)
        done.kept = live.now
        with counted(done.places) as counts:
            for loss in reversed(losses):
                loss.backward()
            done.backward = dict(counts)
        done.peak = live.peak
    done.losses = [loss.item() for loss in losses]
    with torch.no_grad():
        done.later = model(*given[0]).item()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if isinstance(model, autoshard.ParallelModule):
            grad = stored_parameters.whole(grad, model.share_of(name))
        done.gradients[name] = grad.detach().clone()
    return done


def built(how: str | None, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> Stack:
    """The same weights each time."""
    torch.manual_seed(0)
    return Stack(how, dropout).to(dtype)


def split(
    model: nn.Module, tp: int, again: str | None = None, degree: str | int = "max", plan: Any = None
) -> autoshard.ParallelModule:
    """The parallel module."""
    return autoshard.parallelize(
        model, tp, batches(1)[0], degree=degree, plan=plan, checkpoint=again, check_inputs=False
    )


def nearly_same(a: Step, b: Step) -> None:
    """In float64: the bias is added after a sum over ranks in a part, before it in a fused call."""
    assert (a.forward, a.backward, a.places) == (b.forward, b.backward, b.places)
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-14)
    close(torch.tensor([*a.losses, a.later]), torch.tensor([*b.losses, b.later]))
    assert all(g.dtype == torch.float64 for g in a.gradients.values())
    close(a.gradients, b.gradients)


def same(a: Step, b: Step) -> None:
    """Bit for bit: losses, what is drawn afterwards, gradients; and no collective more or elsewhere."""
    assert (a.forward, a.backward, a.places) == (b.forward, b.backward, b.places)
    assert a.losses == b.losses
    assert a.later == b.later
    torch.testing.assert_close(a.gradients, b.gradients, rtol=0, atol=0)


@pytest.mark.slow
def test_one_process() -> None:
    """Nothing split: bit for bit the step without, dropout and accumulation included; less is kept."""
    plain = step(split(built(None), 1))
    for model, again in [(built("layer"), None), (built("reentrant"), None), (built(None), "layer")]:
        tp_model = split(model, 1, again)
        done = step(tp_model)
        same(done, plain)
        assert done.kept < 0.35 * plain.kept, (done.kept, plain.kept)
        assert done.peak < 0.7 * plain.peak, (done.peak, plain.peak)
        assert [n.name for n in tp_model.graph.nodes if n.target is ops.checkpointed] == [
            f"part_{i}" for i in range(LAYERS)
        ]
        assert "class checkpoint_0" in tp_model.print_readable(False)


@pytest.mark.slow
def test_nested_calls() -> None:
    """The outermost counts; tensors that are closed over, keywords, several results."""
    model = built("nested", 0.0, torch.float64)
    tp_model = split(model, 1)
    theirs, ours = step(model), step(tp_model)
    torch.testing.assert_close(ours.gradients, theirs.gradients)
    assert len(tp_model._last.sharded.nested.bodies) == LAYERS
    assert ours.kept < 1.1 * theirs.kept, (ours.kept, theirs.kept)
    report = autoshard.verify(built("nested"), 2, batches(1)[0])
    assert report.ok, report


def test_reentrant_calls_have_gradients() -> None:
    """Traced as it is, what runs under a reentrant checkpoint has none."""
    report = autoshard.verify(built("reentrant"), 2, batches(1)[0])
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reentrant"), [("gpt2", False), ("llama-kv4", True)])
def test_hugging_face(name: str, reentrant: bool) -> None:
    """``gradient_checkpointing_enable`` in train mode: noticed, and the same gradients."""
    model = case(name).build("sdpa", dropout=0.0).double().train()
    layers = model.config.num_hidden_layers
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    inputs = case(name).inputs(model)
    report = autoshard.verify(model, 2, inputs)
    assert report.ok, report
    tp_model = autoshard.parallelize(model, 1, inputs)
    assert sum(n.target is ops.checkpointed for n in tp_model.graph.nodes) == layers
    kept = []
    for each in (model, tp_model):
        with LiveBytes() as live:
            loss = each(**inputs).loss
            kept.append(live.now)
            loss.backward()
    gradients = [{n: p.grad for n, p in each.named_parameters()} for each in (tp_model, model)]
    torch.testing.assert_close(*gradients)
    assert kept[1] < 1.1 * kept[0], kept


def test_train_and_eval() -> None:
    """Layers are computed again in train mode only, and only where gradients are taken."""
    tp_model = split(built(None), 1, "layer").eval()
    loss = tp_model(*batches(1)[0])
    assert not any(n.target is ops.checkpointed for n in tp_model.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(tp_model.train().eval()(*batches(1)[0]), loss)
    tp_model.train()
    with torch.no_grad(), LiveBytes() as live:
        tp_model(*batches(1)[0])
    assert any(n.target is ops.checkpointed for n in tp_model.graph.nodes)
    assert live.now < 1000
    with pytest.raises(ValueError, match="checkpoint='block'"):
        split(built(None), 1, "block")


def test_backward_twice() -> None:
    """A graph that is retained is computed again each time, and draws the same."""
    tp_model = split(built(None), 1, "layer")
    loss = tp_model(*batches(1)[0])
    loss.backward(retain_graph=True)
    once = {n: p.grad for n, p in tp_model.named_parameters()}
    once = {n: g.clone() for n, g in once.items()}
    loss.backward()
    for name, parameter in tp_model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=0, atol=0)


@pytest.mark.slow
def test_check_finite_looks_at_each_value_once() -> None:
    """The node is named as without, and the same is drawn."""
    tp_model, plain = split(built(None), 1, "layer"), split(built(None), 1)
    losses = []
    for model in (tp_model, plain):
        with model.check_finite():
            losses.append(model(*batches(1)[0]))
            losses[-1].backward()
    assert losses[0] == losses[1]
    with torch.no_grad():
        tp_model.get_parameter("h.1.up.bias")[3] = torch.nan
    with (
        pytest.raises(
            autoshard.AutoshardError, match=r"forward of h.1.up, in no region.*the parameter"
        ),
        tp_model.check_finite(),
    ):
        tp_model(*batches(1)[0])


def test_a_model_without_layers_is_told_so() -> None:
    """Nothing would be computed again, and nobody would notice."""
    model, x = Stateful(False), torch.randn(6, 8)
    with pytest.raises(autoshard.AutoshardError, match="no numbered layers"):
        autoshard.parallelize(model, 1, (x,), checkpoint="layer")


class Stateful(nn.Module):
    """A checkpointed part with running statistics, a counter, autocast, and a mask made in place."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.first, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("calls", torch.zeros(()))

    def part(self, x: Tensor, *, scale: float) -> Tensor:
        """x: [n, 8] -> [n, 32]."""
        h = self.norm(self.first(x))
        self.calls.add_(1)
        mask = torch.ones(32)
        mask[::2] = 0.5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.down(F.dropout(torch.relu(self.up(h * mask)), 0.2, self.training))
        return h + y.float() * scale + self.calls

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 8] -> [n, 32]."""
        if self.checkpointed:
            return checkpoint(self.part, x, scale=0.5, use_reentrant=False)  # type: ignore[no-any-return]
        return self.part(x, scale=0.5)


def test_what_a_part_writes_is_written_once() -> None:
    """Running statistics and counters, also read by the next forward before this backward."""
    x = torch.randn(6, 8)
    models = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = autoshard.parallelize(Stateful(checkpointed), 1, (x,), degree="max")
        losses = [model(x + i).square().sum() for i in range(2)]
        for loss in reversed(losses):
            loss.backward()
        models.append(model)
    assert any(n.target is ops.checkpointed for n in models[1].graph.nodes)
    plain, again = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in models]
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def nested() -> Sharded:
    """The rank's graph of two ranks, its layers computed again."""
    program = analyse(skeleton(built(None)), batches(1)[0], {}, 2)
    return rewrite(program, 2, "max", layers_again=True)[1]


def _forget_stream(sharded: Nested) -> None:
    part = next(n for n in sharded.graph.nodes if n.target is ops.checkpointed and n.args[1])
    part.args = (part.args[0], (), *part.args[2:])


def _swap_operands(sharded: Nested) -> None:
    part = next(n for n in sharded.graph.nodes if n.target is ops.checkpointed)
    x, weight, bias, *rest = part.args[2:]
    part.args = (*part.args[:2], x, bias, weight, *rest)


def _swap_results(sharded: Nested) -> None:
    part = next(n for n in sharded.graph.nodes if n.target is ops.checkpointed and len(n.users) > 1)
    first, second = list(part.users)[:2]
    first.args, second.args = second.args, first.args


def _other_number(sharded: Nested) -> None:
    nodes = [n for body in sharded.bodies.values() for n in body.nodes]
    node = next(n for n in nodes if n.target is ops.with_stream)
    node.args = tuple(0.2 if a == 0.1 else a for a in node.args)


def _left_out(sharded: Nested) -> None:
    body = sharded.bodies["checkpoint_1"]
    copied = next(n for n in body.nodes if n.target is ops.copy)
    copied.replace_all_uses_with(copied.args[0])
    body.erase_node(copied)


@pytest.mark.parametrize(
    "fault", [_forget_stream, _swap_operands, _swap_results, _other_number, _left_out]
)
def test_the_proof_refuses(fault: Any) -> None:
    """What runs is the proven graph, node for node, and draws from streams that are set back."""
    sharded = nested()
    assert sharded.nested is not None
    same_as_flat(sharded.nested, sharded.graph)
    fault(sharded.nested)
    with pytest.raises(UnsoundGraphError):
        same_as_flat(sharded.nested, sharded.graph)


def test_no_collective_of_the_forward_is_inside() -> None:
    """Parts end at partial sums: of the attention, of the MLP, and of the mean of the values."""
    sharded = nested()
    assert sharded.nested is not None and len(sharded.nested.bodies) == 3 * LAYERS
    for body in sharded.nested.bodies.values():
        assert not {n.target for n in body.nodes} & {ops.reduce, ops.gather, ops.vocab_cross_entropy}
    assert replace(sharded, nested=None).runs is sharded.graph


@dataclass
class Told:
    """What a rank saw: the step with nothing computed again, and the others, by who asked; the last
    without dropout in float64, for one process to compare."""

    plain: Step
    again: list[Step]
    exact: Step


def on_a_rank(tp: int) -> Told:
    """On 4 ranks one attention is split over 2: dropout draws from the streams of three groups."""
    own, plan = "reentrant", None
    if tp == 4:
        own = "layer"
        plan = autoshard.plan(built(None), tp, batches(1)[0], degree="max")
        plan = plan.with_degree("h.0.attention", 2)
        assert {r.degree for r in plan.regions} == {2, 4}
    double = torch.float64
    again = [step(split(built(None, dtype=double), tp, "layer", plan=plan))]
    if tp == 2:
        again.append(step(split(built(own, dtype=double), tp)))
    exact = split(built(own, 0.0, torch.float64), tp, plan=plan)
    assert exact.verify(batches(1)[0]).ok
    return Told(step(split(built(None, dtype=double), tp, plan=plan)), again, step(exact))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks(tp: int) -> None:
    """Real ranks: the step without but for the order of sums, and no collective more; the gradients
    of one process that runs torch's own checkpoint."""
    alone = step(built("layer", 0.0, torch.float64))
    for told in run_distributed(on_a_rank, tp, tp, timeout=400):
        # The embedding, two sums and the mean of a layer, two of the loss; entering the MLP, the
        # attention and the head. Two batches.
        assert told.plain.forward == {"all_reduce": 2 * (1 + 3 * LAYERS + 2)}
        assert told.plain.backward == {"all_reduce": 2 * (2 * LAYERS + 1)}
        assert any(p.startswith("the backward of copy at h.0") for p in told.plain.places)
        for done in told.again:
            nearly_same(done, told.plain)
            assert done.kept < 0.5 * told.plain.kept, (done.kept, told.plain.kept)
            assert done.peak < 0.6 * told.plain.peak, (done.peak, told.plain.peak)
        torch.testing.assert_close(told.exact.losses, alone.losses)
        torch.testing.assert_close(told.exact.gradients, alone.gradients)
