"""Dropout's masks: alike outside regions, different inside, alike on twins; repeatable."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autoshard
from autoshard import ops
from autoshard.capture import skeleton
from autoshard.pipeline import analyse, rewrite
from autoshard.random_streams import RandomStream
from autoshard.rank import local_share, placeholder_values, rank_module, whole_tensor
from autoshard.simulate import RankContext, run_ranks
from tests.distributed import run_distributed
from tests.models import nanogpt

aten = torch.ops.aten
Masks = dict[str, list[tuple[str, Tensor]]]
RATE = 0.2

# Seeing masks


@contextlib.contextmanager
def recorded() -> Iterator[Masks]:
    """Every mask that is drawn, by thread, in order: the operator's name and what it kept.

    The operator runs again from the same random state: dropout on ones; attention on queries and
    keys of zero and values that are the identity, so that its result is its dropped weights.
    """
    masks: Masks = defaultdict(list)
    run = RandomStream.run

    def noticed(stream: RandomStream, op: Any, *args: Any, **kwargs: Any) -> Any:
        before = stream.state_dict()
        result = run(stream, op, *args, **kwargs)
        after = stream.state_dict()
        stream.load_state_dict(before)
        with torch.no_grad():
            if op is aten.scaled_dot_product_attention.default:
                q, k, v, *rest = args
                eye = torch.eye(k.shape[-2], dtype=v.dtype).expand(*k.shape[:-2], -1, -1)
                shown = run(stream, op, q * 0, k * 0, eye, *rest, **kwargs)
            else:
                shown = run(stream, op, torch.ones_like(args[0]), *args[1:], **kwargs)
        stream.load_state_dict(after)
        name = str(op).split(".")[1]
        masks[threading.current_thread().name].append((name, shown != 0))
        return result

    with mock.patch.object(RandomStream, "run", noticed):
        yield masks


def alike(masks: list[Tensor]) -> list[set[int]]:
    """Ranks grouped by equal masks."""
    groups: list[set[int]] = []
    for rank, mask in enumerate(masks):
        for group in groups:
            if torch.equal(masks[min(group)], mask):
                group.add(rank)
                break
        else:
            groups.append({rank})
    return groups


# In the simulator


class Block(nn.Module):
    """An MLP with dropout before, inside and after it, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32, dtype=torch.float64)
        self.down = nn.Linear(32, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        states = F.dropout(x, RATE, self.training)
        inner = F.dropout(F.gelu(self.up(states)), RATE, self.training)
        out: Tensor = x + F.dropout(self.down(inner), RATE, self.training)
        return out


def simulated(
    model: nn.Module, inputs: tuple[Tensor, ...], tp: int, degrees: Any = "max", seed: int = 0
) -> tuple[list[list[Any]], list[list[tuple[str, Tensor]]], dict[str, Tensor]]:
    """Outputs and masks by rank, and the gradients of the first output's sum, whole."""
    program = analyse(skeleton(model), inputs, {}, tp)
    plan, sharded = rewrite(program, tp, degrees)
    stored = {program.captured.parameters[p]: share for p, share in sharded.stored.items()}
    used = tuple({region.degree for region in plan.regions})

    def run(rank: RankContext) -> tuple[list[Any], dict[str, Tensor]]:
        local: dict[str, Tensor] = {}
        for name, value in model.named_parameters():
            share = stored.get(name)
            if share is not None:
                value = local_share(value, share, rank.group(share[2]).coordinate)
            local[name] = value.detach().clone().requires_grad_()
        values = placeholder_values(
            sharded, program.captured, local, dict(model.named_buffers()), list(inputs)
        )
        outputs = list(rank_module(sharded, rank.group)(*values))
        outputs[0].sum().backward()
        return outputs, {n: p.grad for n, p in local.items() if p.grad is not None}

    with recorded() as masks:
        ranks = run_ranks(run, tp, seed, degrees=used)
    gradients = {}
    for name in ranks[0][1]:
        shares = [rank[1][name] for rank in ranks]
        share = stored.get(name)
        gradients[name] = shares[0]
        if share is not None and share[2] == tp:
            gradients[name] = whole_tensor(shares, share)
    return [r[0] for r in ranks], [masks[f"rank {r}"] for r in range(tp)], gradients


def test_masks_in_and_around_a_region() -> None:
    """Alike on all ranks before and after the MLP, different inside; about as many as asked."""
    x = torch.randn(30, 16, dtype=torch.float64)
    _, masks, _ = simulated(Block(), (x,), 4)
    assert [len(m) for m in masks] == [3] * 4
    before, inside, after = ([rank[i][1] for rank in masks] for i in range(3))
    assert alike(before) == alike(after) == [{0, 1, 2, 3}]
    assert alike(inside) == [{0}, {1}, {2}, {3}]
    assert before[0].shape == (30, 16) and inside[0].shape == (30, 8)
    for kept in (before[0], after[0], *inside):
        assert abs(kept.double().mean() - (1 - RATE)) < 0.1


def test_masks_are_applied_as_they_are_drawn() -> None:
    """Outputs and gradients equal the model's with the ranks' masks put together."""
    model = Block()
    x = torch.randn(30, 16, dtype=torch.float64)
    outputs, masks, gradients = simulated(model, (x,), 4)
    before, after = masks[0][0][1], masks[0][2][1]
    inside = torch.cat([rank[1][1] for rank in masks], dim=1)
    keep = 1 - RATE
    inner = F.gelu(model.up(x * before / keep)) * inside / keep
    expected = x + model.down(inner) * after / keep
    expected.sum().backward()
    for rank in outputs:
        torch.testing.assert_close(rank[0], expected, rtol=1e-12, atol=1e-12)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        grad = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, grad, rtol=1e-12, atol=1e-12)


def test_twins_draw_the_same() -> None:
    """A degree of 2 on 4 ranks: two masks, each on two ranks, and one output on all."""
    x = torch.randn(30, 16, dtype=torch.float64)
    model = Block()
    plan = autoshard.plan(model, 4, (x,), degree="max")
    (region,) = plan.regions
    outputs, masks, _ = simulated(model, (x,), 4, {region.name: 2})
    before, inside, after = ([rank[i][1] for rank in masks] for i in range(3))
    assert alike(before) == alike(after) == [{0, 1, 2, 3}]
    assert alike(inside) == [{0, 2}, {1, 3}]
    assert inside[0].shape == (30, 16)
    assert alike([rank[0] for rank in outputs]) == [{0, 1, 2, 3}]
    _, whole, _ = simulated(model, (x,), 4, {region.name: 1})
    assert alike([rank[1][1] for rank in whole]) == [{0, 1, 2, 3}]


def test_seeds_in_the_simulator() -> None:
    """The seed decides all masks."""
    x = torch.randn(30, 16, dtype=torch.float64)
    model = Block()
    runs = [simulated(model, (x,), 2, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(runs[0][0][0][0], runs[1][0][0][0])
    assert not torch.equal(runs[0][0][0][0], runs[2][0][0][0])
    for one, other, third in zip(*(run[1][0] for run in runs), strict=True):
        assert torch.equal(one[1], other[1]) and not torch.equal(one[1], third[1])


def test_no_stream_is_used_in_eval_mode() -> None:
    """The graph for eval draws nothing."""
    model = Block().eval()
    x = torch.randn(3, 16, dtype=torch.float64)
    outputs, masks, _ = simulated(model, (x,), 2)
    assert masks == [[], []]
    torch.testing.assert_close(outputs[1][0], model(x), rtol=1e-12, atol=1e-12)


# One process


def test_one_process_keeps_the_default_generator() -> None:
    """Neither parallelize nor a step draws from it; train drops, eval does not."""
    model = nanogpt.CASES[0].build("sdpa", dropout=RATE)
    batch = nanogpt.inputs(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    tp_model = autoshard.parallelize(model, 1, batch, degree="max")
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (tp_model(**batch)[1] for _ in range(2))
    second.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert first != second
    tp_model.eval()
    assert torch.equal(tp_model(**batch)[1], tp_model(**batch)[1])
    assert torch.equal(tp_model(**batch)[1], model.eval()(**batch)[1])
    tp_model.train()
    tp_model.manual_seed(11)
    third = tp_model(**batch)[1]
    tp_model.manual_seed(11)
    assert torch.equal(tp_model(**batch)[1], third)
    assert third not in (first, second)
    assert torch.equal(torch.get_rng_state(), state)


# Real ranks


def split_four_ways(attention: str) -> dict[str, Any]:
    """nanoGPT at tp=4, its second attention at degree 2."""
    torch.manual_seed(dist.get_rank())  # the first rank's seed is everybody's
    model = nanogpt.CASES[0].build(attention, dropout=RATE)
    batch = nanogpt.inputs(model)
    plan = autoshard.plan(model, 4, batch, degree="max").with_degree("transformer.h.1.attn", 2)
    tp_model = autoshard.parallelize(model, 4, batch, plan=plan, logits="whole")
    found: dict[str, Any] = {}
    state = torch.get_rng_state()
    with recorded() as masks:
        logits, loss = tp_model(**batch)
        loss.backward()
    found["masks"] = masks["MainThread"]
    found["logits"], found["loss"] = logits.detach(), loss.detach()
    found["undisturbed"] = torch.equal(torch.get_rng_state(), state)

    def step() -> list[Tensor]:
        tp_model.zero_grad()
        loss = tp_model(**batch)[1]
        loss.backward()
        grads = [p.grad.to_local().clone() for p in tp_model.parameters()]
        return [loss.detach(), *grads]

    tp_model.manual_seed(5)
    first, later = step(), step()
    tp_model.manual_seed(5)
    again = step()
    tp_model.manual_seed(6)
    other = step()
    found["repeats"] = all(map(torch.equal, first, again))
    found["differs"] = not torch.equal(first[0], later[0]) and not torch.equal(first[0], other[0])
    tp_model.eval()
    with recorded() as masks:
        evaluated = tp_model(**batch)[0]
    found["eval"] = (len(masks), (evaluated - model.eval()(**batch)[0]).abs().max().item())
    found["streams"] = sum(n.target is ops.with_stream for n in tp_model.graph.nodes)
    return found


def replicated() -> list[tuple[str, Tensor]]:
    """Masks of nanoGPT at tp=2 in a world of 4."""
    model = nanogpt.CASES[0].build("sdpa", dropout=RATE)
    batch = nanogpt.inputs(model)
    tp_model = autoshard.parallelize(model, 2, batch, degree="max")
    with recorded() as masks:
        tp_model(**batch)
    return masks["MainThread"]


def everything() -> dict[str, Any]:
    """All that the tests below look at."""
    split = {how: split_four_ways(how) for how in ("sdpa", "eager")}
    return {**split, "replicas": replicated()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What four processes drew."""
    return run_distributed(everything, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "operator"), [("sdpa", "scaled_dot_product_attention"), ("eager", "dropout")]
)
def test_masks_on_real_ranks(ranks: list[dict[str, Any]], how: str, operator: str) -> None:
    """Attention's own dropout too: by region and twin; whole outputs alike on all ranks."""
    found = [rank[how] for rank in ranks]
    layer = [operator, "dropout", "dropout"]  # attention, its output, the MLP's
    for rank in found:
        assert [name for name, _ in rank["masks"]] == ["dropout", *layer, *layer]
    by_place = [alike([rank["masks"][i][1] for rank in found]) for i in range(7)]
    everyone = [{0, 1, 2, 3}]
    assert by_place[1] == [{0}, {1}, {2}, {3}]
    assert by_place[4] == [{0, 2}, {1, 3}]
    assert [by_place[i] for i in (0, 2, 3, 5, 6)] == [everyone] * 5
    assert found[0]["masks"][1][1].shape == (3, 2, 10, 10)
    assert found[0]["masks"][4][1].shape == (3, 4, 10, 10)
    assert alike([rank["logits"] for rank in found]) == everyone
    assert alike([rank["loss"] for rank in found]) == everyone


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_seeds_on_real_ranks(ranks: list[dict[str, Any]], how: str) -> None:
    """One seed repeats bit for bit, another does not; eval draws nothing; torch's own goes on."""
    for rank in (rank[how] for rank in ranks):
        assert rank["undisturbed"] and rank["repeats"] and rank["differs"]
        drawn, off = rank["eval"]
        assert drawn == 0 and off < 1e-5
        assert rank["streams"] == 0


@pytest.mark.slow
def test_replicas_draw_for_themselves(ranks: list[dict[str, Any]]) -> None:
    """Data parallel replicas see other batches: their masks differ, outside regions too."""
    outside, inside = (alike([rank["replicas"][i][1] for rank in ranks]) for i in (0, 1))
    assert outside == [{0, 1}, {2, 3}]
    assert inside == [{0}, {1}, {2}, {3}]
