"""Activation checkpointing: the model's own calls and checkpoint="layer"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard import ops
from autoshard import parameters as stored_parameters
from tests.distributed import run_distributed
from tests.live_bytes import LiveBytes

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
    later: float = 0.0


def batches(count: int = 2, batch: int = 2, length: int = 16) -> list[tuple[Tensor, Tensor]]:
    """ids and labels, the same everywhere."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(VOCAB, (count, 2, batch, length), generator=generator)
    return [(ids, labels) for ids, labels in drawn]


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often which collective is called."""
    counts: dict[str, int] = {}
    originals = {"all_reduce": dist.all_reduce}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, wrapped(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step(model: nn.Module, accumulate: int = 2) -> Step:
    """All forwards, then all backwards from the last to the first; then one more forward."""
    done, losses = Step(), []
    given = batches(accumulate)
    with LiveBytes() as live:
        with counted() as counts:
            for ids, labels in given:
                losses.append(model(ids, labels))
            done.forward = dict(counts)
        done.kept = live.now
        with counted() as counts:
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
            grad = stored_parameters.whole(grad, model._share(name))
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


def same(a: Step, b: Step) -> None:
    """Bit for bit: losses, what is drawn afterwards, gradients."""
    assert a.losses == b.losses
    assert a.later == b.later
    torch.testing.assert_close(a.gradients, b.gradients, rtol=0, atol=0)


OWN = ("layer", "reentrant")


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


@dataclass
class Told:
    """What a rank saw: the step with nothing computed again, and the others, by who asked; the last
    without dropout in float64, for one process to compare."""

    plain: Step
    again: dict[str, Step]
    exact: Step


def on_a_rank(tp: int) -> Told:
    """On 4 ranks one attention is split over 2: dropout draws from the streams of three groups."""
    own, plan = "reentrant", None
    if tp == 4:
        own = "layer"
        plan = autoshard.plan(built(None), tp, batches(1)[0], degree="max")
        plan = plan.with_degree("h.0.attention", 2)
        assert {r.degree for r in plan.regions} == {2, 4}
    again = {
        how or "ours": step(split(built(how), tp, layers, plan=plan))
        for how, layers in [(own, None), (None, "layer")]
    }
    exact = split(built(own, 0.0, torch.float64), tp, plan=plan)
    assert exact.verify(batches(1)[0]).ok
    return Told(step(split(built(None), tp, plan=plan)), again, step(exact))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks(tp: int) -> None:
    """Real ranks: bit for bit the step without, and no collective more; the gradients of one process
    that runs torch's own checkpoint."""
    alone = step(built("layer", 0.0, torch.float64))
    for told in run_distributed(on_a_rank, tp, tp, timeout=400):
        # The embedding, two sums and the mean of a layer, two of the loss; entering the MLP, the
        # attention and the head. Two batches.
        assert told.plain.forward == {"all_reduce": 2 * (1 + 3 * LAYERS + 2)}
        assert told.plain.backward == {"all_reduce": 2 * (2 * LAYERS + 1)}
        for done in told.again.values():
            same(done, told.plain)
            assert (done.forward, done.backward) == (told.plain.forward, told.plain.backward)
            print(tp, done.kept, told.plain.kept, done.peak, told.plain.peak)
            assert done.kept < 0.5 * told.plain.kept, (done.kept, told.plain.kept)
            assert done.peak < 0.6 * told.plain.peak, (done.peak, told.plain.peak)
        torch.testing.assert_close(told.exact.losses, alone.losses)
        torch.testing.assert_close(told.exact.gradients, alone.gradients)
