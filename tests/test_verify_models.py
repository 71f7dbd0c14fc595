"""Real models, split, compute what they compute whole: outputs, loss and every gradient."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import autoshard
from autoshard import pipeline
from autoshard.capture import Captured, capture, skeleton
from autoshard.random_streams import RandomStream
from autoshard.rank import local_share, placeholder_values, rank_module
from tests.models import huggingface, nanogpt, plain
from tests.models.case import Case

CASES = (*huggingface.CASES, *nanogpt.CASES, *plain.CASES)
FAST = ("gpt2", "llama-kv2")
MOSTLY_SPLIT = {c.name for c in (*huggingface.CASES, *nanogpt.CASES)}


def each(*tps: int, attentions: bool = True) -> list[Any]:
    """Every case with each of its attentions at each tp; all but a few are slow."""
    found = []
    for case in CASES:
        for attention in case.attention if attentions else case.attention[:1]:
            for tp in tps:
                fast = case.name in FAST and attention == case.attention[0] and tp == 4
                marks = () if fast else (pytest.mark.slow,)
                name = f"{case.name}-{attention}-tp{tp}"
                found.append(pytest.param(case, attention, tp, id=name, marks=marks))
    return found


_CAPTURED: dict[tuple[str, str], Captured] = {}


def capture_once(key: tuple[str, str], *args: Any) -> Captured:
    """What the capture gives, done once for a model: nine tenths of a verification's time."""
    if key not in _CAPTURED:
        _CAPTURED[key] = capture(*args)
    captured = _CAPTURED[key]
    module = captured.graph.owning_module
    assert module is not None
    return replace(captured, graph=copy.deepcopy(module).graph)


@pytest.fixture
def model(
    case: Case, attention: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The case's model in float64 and its inputs."""
    monkeypatch.setattr(pipeline, "capture", partial(capture_once, (case.name, attention)))
    built = case.build(attention).double()
    return built, case.inputs(built)


def assert_same(report: autoshard.Report) -> None:
    """The report is good, and says which tensor is worst where it is not."""
    everything = {**report.outputs, **report.gradients}
    wrong = {name: error for name, error in everything.items() if not error < 1e-10}
    assert report.ok and not wrong, f"{report}\nworst: {report.worst}\n{wrong}"


@pytest.mark.parametrize(("case", "attention", "tp"), each(2, 4, 8))
def test_split_model_is_the_same_function(
    case: Case, attention: str, tp: int, model: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    """At the largest degrees, with nothing large left whole."""
    report = autoshard.verify(model[0], tp, model[1])
    assert_same(report)
    names = {name for name, _ in model[0].named_parameters()}
    assert set(report.gradients) == names and report.outputs
    if case.name in MOSTLY_SPLIT:
        plan = report.plan
        assert plan.sharded_fraction >= 0.95, f"{plan.sharded_fraction}: {plan.replicated}"


@pytest.mark.parametrize(("case", "attention", "tp"), each(4, 8, attentions=False))
def test_regions_of_different_degrees_meet(
    case: Case, attention: str, tp: int, model: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    """Drawn degrees, tied regions alike."""
    plan = autoshard.verify(model[0], tp, model[1]).plan
    dice = random.Random(f"{case.name} {tp}")
    drawn = plan
    for region in plan.regions:
        drawn = drawn.with_degree(region.name, dice.choice(region.degrees))
    for region in drawn.regions:
        assert {drawn.region(name).degree for name in region.tied} <= {region.degree}
    report = autoshard.verify(model[0], tp, model[1], plan=drawn)
    assert report.plan.degrees == drawn.degrees
    assert_same(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5", "nanogpt"])
def test_one_rank_is_the_model_itself(name: str) -> None:
    """At tp=1 nothing is split and the graph has no collective."""
    case = next(c for c in CASES if c.name == name)
    model = case.build(case.attention[0])
    report = autoshard.verify(model, 1, case.inputs(model))
    assert_same(report)
    assert set(report.plan.degrees.values()) <= {1}


class Alone:
    """A group whose other ranks hold what this one holds: for counting, not for numbers."""

    coordinate = 0

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.stream = RandomStream(0)

    def all_reduce(self, x: Tensor, op: str = "sum", *, inplace: bool = False) -> Tensor:
        """The tensor itself."""
        return x.clone()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensor, once per rank."""
        return [x] * self.degree


def flops(module: fx.GraphModule, values: list[Any]) -> int:
    """Matmul FLOPs of a forward."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*values)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("case", "attention", "tp"), each(2, 4, 8, attentions=False))
def test_flops_run_on_shards(
    case: Case, attention: str, tp: int, model: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    """Counted on the graphs: a rank does 1/tp of at least 95 % of the matmuls."""
    built, inputs = model
    if case.name not in MOSTLY_SPLIT:
        return
    program = pipeline.analyse(skeleton(built), (), inputs, tp)
    _, sharded = pipeline.rewrite(program, tp, "max")
    stored = {program.captured.parameters[n]: s for n, s in sharded.stored.items()}
    whole = {n: p.detach() for n, p in built.named_parameters(remove_duplicate=False)}
    local = {n: local_share(p, stored[n], 0) if n in stored else p for n, p in whole.items()}
    buffers = dict(built.named_buffers(remove_duplicate=False))
    values = partial(placeholder_values, sharded, program.captured)
    given = list(inputs.values())
    rank = flops(rank_module(sharded, Alone), values(local, buffers, given))
    model_flops = flops(fx.GraphModule({}, program.analysis.graph), values(whole, buffers, given))
    fraction = (1 - rank / model_flops) / (1 - 1 / tp)
    assert fraction >= 0.95, f"{fraction:.3f}"


# -- models that are awkward in one way ----------------------------------------------------------


class Branches(nn.Module):
    """Two branches of an MLP lie behind each other before one projection sums over both."""

    def __init__(self, *, normed: bool = False, dropout: bool = False, chunked: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 32), nn.Linear(16, 32)
        self.both = nn.Linear(16, 64)
        self.norm = nn.LayerNorm(32) if normed else nn.Identity()
        self.dropout = nn.Dropout(0.1 if dropout else 0.0)
        self.chunked = chunked
        self.out = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.chunked:
            left, right = self.both(x).chunk(2, -1)
        else:
            left, right = self.left(x), self.right(x)
        joined = torch.cat([F.gelu(left), self.norm(F.gelu(right))], -1)
        out: Tensor = self.out(self.dropout(joined))
        return out


class Head(nn.Module):
    """A language model's end: logits over a vocabulary that four ranks do not divide."""

    def __init__(self, kind: str, vocabulary: int = 203) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(vocabulary, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.extra = nn.Linear(16, 5, bias=False)
        self.gate = nn.Parameter(torch.ones(()))
        self.final_bias: Tensor
        self.register_buffer("final_bias", torch.linspace(-1, 1, vocabulary))
        self.allowed: Tensor
        self.register_buffer("allowed", torch.arange(vocabulary) % 7 > 0)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.mlp(self.embedding(ids))
        weight = self.embedding.weight
        if self.kind == "cosine":
            weight = weight / weight.norm(dim=-1, keepdim=True)
        logits = states @ weight.t()
        if self.kind == "buffer":
            logits = logits + self.final_bias
        if self.kind == "masked":
            logits = logits.masked_fill(~self.allowed, -100.0)
        if self.kind == "decoupled":
            logits = torch.cat([logits, self.extra(states)], -1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return loss, logits


class OneToken(nn.Module):
    """The loss of one position: logits with no dimension but the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(16, 64)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(self.output(x[0, 0]), label)


class Squeezed(nn.Module):
    """A dimension as large as the number of ranks is squeezed: in the model it has more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 4 * 8), nn.Linear(4 * 8, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = F.gelu(self.up(x)).unflatten(-1, (4, 8)).softmax(-1)
        out: Tensor = self.down(heads.squeeze(-2).flatten(-2))
        return out


class Convolved(nn.Module):
    """An MLP written as convolutions of width one, the second one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(16, 32, 1), nn.Conv1d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return out


class Mean(nn.Module):
    """The mean over two branches, one of which is normed and so stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([F.gelu(self.left(x)), self.right(x).softmax(-1)], -1)
        return joined.mean(-1) + joined.sum(-1)


def _states() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 5, 16, dtype=torch.float64)}


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(203, (3, 5))
    return {"ids": ids, "labels": ids.roll(1, 1)}


AWKWARD: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "branches": (Branches, _states),
    "branches, one normed": (partial(Branches, normed=True), _states),
    "branches with dropout": (partial(Branches, dropout=True), _states),
    "branches of one weight": (partial(Branches, chunked=True), _states),
    "branches of one weight, one normed": (partial(Branches, chunked=True, normed=True), _states),
    "mean of branches": (Mean, _states),
    "plain head": (partial(Head, "plain"), _tokens),
    "head with a buffer": (partial(Head, "buffer"), _tokens),
    "head with a mask": (partial(Head, "masked"), _tokens),
    "head of unit rows": (partial(Head, "cosine"), _tokens),
    "head of two parts": (partial(Head, "decoupled"), _tokens),
    "one token": (OneToken, lambda: {**_states(), "label": torch.tensor(63)}),
    "squeezed heads": (Squeezed, _states),
    "convolutions": (Convolved, _states),
}


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_model_is_the_same_function(name: str, tp: int) -> None:
    """Small models that each do one thing that a rule or the rewriting must take care of."""
    build, inputs = AWKWARD[name]
    assert_same(autoshard.verify(build().double(), tp, inputs()))
