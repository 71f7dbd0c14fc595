"""The proof accepts every right graph and refuses every wrong one, naming where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autoshard import UnsoundGraphError, ops, shares
from autoshard.capture import skeleton
from autoshard.layouts import Leaf
from autoshard.passes.prove import prove
from autoshard.pipeline import analyse, rewrite
from autoshard.sharded import Sharded
from tests.models import huggingface, nanogpt
from tests.mutations.faults import GENERATORS, Fault, Site, faults

CASES = {c.name: c for c in (*huggingface.CASES, *nanogpt.CASES)}


@dataclass(frozen=True)
class Subject:
    """An original graph and the right rewritten one."""

    graph: fx.Graph
    sharded: Sharded
    inputs: frozenset[str]

    def prove(self, sharded: Sharded) -> Sharded:
        """The proof for another rewritten graph."""
        return prove(self.graph, sharded, set(self.inputs))

    def refusal(self, sharded: Sharded) -> str:
        """What the refusal says."""
        with pytest.raises(UnsoundGraphError) as raised:
            self.prove(sharded)
        return str(raised.value)


def made(
    model: nn.Module, inputs: dict[str, Any], tp: int, keep_split: tuple[int, ...] = ()
) -> Subject:
    """A model split as far as it goes."""
    program = analyse(skeleton(model), (), inputs, tp)
    _, sharded = rewrite(program, tp, "max", keep_split)
    flows = program.analysis.axes.differentiable
    inputs_ = frozenset(str(n.target) for n in flows if n.op == "placeholder")
    return Subject(program.analysis.graph, sharded, inputs_)


@cache
def subject(name: str, tp: int) -> Subject:
    """A case's model, in train mode, with dropout."""
    case = CASES[name]
    model = case.build(case.attention[-1])
    return made(model, case.inputs(model), tp)


def changed(tried: Subject, name: str, change: Callable[[Site], Any]) -> Sharded:
    """The subject's rewritten graph with one node changed."""
    site = Site(tried.sharded, name)
    change(site)
    return replace(tried.sharded, graph=site.graph)


def names(tried: Subject, *targets: Any) -> list[str]:
    """Nodes of the rewritten graph with one of these targets."""
    return [n.name for n in tried.sharded.graph.nodes if n.target in targets]


# -- faults of every kind, everywhere -------------------------------------------------------------


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda generator: generator.__name__)
def test_every_fault_is_refused(generator: Callable[[Sharded], Iterator[Fault]]) -> None:
    """Every fault, at every place: the refusal names a node, its layer, what is held there.

    Of this model all faults are wrong; ``tests/mutations`` has others, and a judge.
    """
    tried = subject("gpt2", 2)
    accepted = []
    for fault in generator(tried.sharded):
        try:
            tried.prove(fault.sharded)
        except UnsoundGraphError as refusal:
            named = re.search(r"it is not at \w+ \(.* at .*\): \S", str(refusal))
            assert named or "uses groups of" in str(refusal)
        else:
            accepted.append(str(fault))
    assert not accepted


def test_faults_are_many() -> None:
    """The faults are made: hundreds; and the graph that they are made from is right."""
    tried = subject("gpt2", 2)
    assert len(faults(tried.sharded)) > 1000
    assert tried.prove(changed(tried, "output", lambda site: None)) is not None


# -- one of each, and what the refusal says -------------------------------------------------------


def without(tried: Subject, name: str) -> tuple[str, str]:
    """The first user of a collective, and what the refusal says when that one is left out."""

    def passed(site: Site) -> None:
        site.node.replace_all_uses_with(site.node.args[0])
        site.graph.erase_node(site.node)

    user = next(iter(next(n for n in tried.sharded.graph.nodes if n.name == name).users))
    return user.name, tried.refusal(changed(tried, name, passed))


@pytest.mark.parametrize("place", [0, 1, 2, -1])
@pytest.mark.parametrize("name", ["gpt2", "llama-kv2"])
def test_missing_copy(name: str, place: int) -> None:
    """Right outputs, wrong gradients: the refusal is at the first use without it."""
    tried = subject(name, 2 if name == "gpt2" else 4)
    node = names(tried, ops.copy)[place]

    user, said = without(tried, node)
    assert f"it is not at {user} (" in said and " at " in said and "copy" in said


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("name", ["gpt2", "llama-kv2"])
def test_missing_reduce(name: str, place: int) -> None:
    """The refusal is at what uses the partial sum, and says so."""
    tried = subject(name, 2 if name == "gpt2" else 4)
    node = names(tried, ops.reduce)[place]

    user, said = without(tried, node)
    assert f"it is not at {user} (" in said and "reduce it first" in said


@pytest.mark.parametrize("argument", ["vocab", "rows"])
@pytest.mark.parametrize("name", ["gpt2", "llama-kv2"])
@pytest.mark.parametrize("op", [ops.vocab_embedding, ops.vocab_cross_entropy])
@pytest.mark.parametrize("step", [-1, 1])
def test_vocabulary_off_by_one(op: Any, name: str, argument: str, step: int) -> None:
    """An offset or a mask that is off by one row."""
    tried = subject(name, 2 if name == "gpt2" else 4)
    (node,) = names(tried, op)
    index = {"vocab": 3, "rows": 4}[argument]

    def off(site: Site) -> None:
        args = list(site.node.args)
        args[index] = args[index] + step
        site.node.args = tuple(args)

    assert f"it is not at {node} (" in tried.refusal(changed(tried, node, off))


def test_kv_heads_of_other_ranks() -> None:
    """Key heads by coordinate modulo, where queries need them by coordinate divided."""
    tried = subject("llama-kv2", 4)
    parts = names(tried, shares.local_part)
    assert len(parts) >= 4
    for node in parts:
        wrong = changed(tried, node, lambda site: setattr(
            site.node, "args", (*site.node.args[:2], "2/2·8", site.node.args[3])))  # fmt: skip
        said = tried.refusal(wrong)
        assert "self_attn" in said and "held of 8" in said


@pytest.mark.parametrize("degree", [1, 4])
def test_random_stream_of_other_ranks(degree: int) -> None:
    """Dropout inside a region draws with it, outside with all ranks."""
    tried = subject("gpt2", 2)
    for node in names(tried, ops.with_stream):
        at = next(n for n in tried.sharded.graph.nodes if n.name == node)
        other = degree if at.args[0].target == "tp2" or degree != 1 else 2
        wrong = changed(tried, node, lambda site, d=other: setattr(
            site.node, "args", (site.group(d), *site.node.args[1:])))  # fmt: skip
        assert f"it is not at {node} (" in tried.refusal(wrong)


def test_weight_of_another_layer() -> None:
    """A weight that is of the same shape and placement."""
    tried = subject("gpt2", 2)
    for part in ("attn_c_attn_weight", "attn_c_proj_weight", "mlp_c_fc_bias", "ln_1_weight"):
        names_ = [f"p_transformer_h_{i}_{part}" for i in (0, 1)]
        nodes = [next(n for n in tried.sharded.graph.nodes if n.name == n_) for n_ in names_]
        user = next(iter(nodes[1].users))
        if user.target is ops.copy:
            user = next(iter(user.users))

        def other(site: Site, a: str = names_[1], b: str = names_[0], at: Any = nodes[1]) -> None:
            x, y = (next(n for n in site.graph.nodes if n.name == s) for s in (a, b))
            for use in list(x.users):
                use.replace_input_with(x, y)

        said = tried.refusal(changed(tried, nodes[1].name, other))
        assert f"it is not at {user} (" in said and names_[1] in said


def test_parameter_stored_twice() -> None:
    """Ranks that share an element would each hold a part of its gradient."""
    tried = subject("llama-kv2", 4)
    name = "p_model_layers_0_mlp_up_proj_weight"
    stored = {**tried.sharded.stored, name: (0, Leaf(128, 2), 4)}
    said = tried.refusal(replace(tried.sharded, stored=stored))
    assert f"it is not at {name} (" in said and "exactly one" in said


def test_outputs_declared_otherwise() -> None:
    """A share that is said to be whole, and the other way round."""
    case = CASES["gpt2"]
    model = case.build("sdpa")
    tried = made(model, case.inputs(model), 2, keep_split=(1,))
    (split,) = [o for o in tried.sharded.outputs if o is not None]
    whole = tuple(None for _ in tried.sharded.outputs)
    assert "gather" in tried.refusal(replace(tried.sharded, outputs=whole))
    smaller, fewer = Leaf(split.size - 1, 2), Leaf(split.size, 2, 2)
    for other in (
        replace(split, dim=0), replace(split, degree=4),
        replace(split, layout=smaller), replace(split, layout=fewer),
    ):  # fmt: skip
        outputs = tuple(None if o is None else other for o in tried.sharded.outputs)
        assert "declared" in tried.refusal(replace(tried.sharded, outputs=outputs))


# -- models that are awkward in one way -----------------------------------------------------------


class Branches(nn.Module):
    """Two branches behind each other, one of them whole, before one projection sums over both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(64, 16)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([F.gelu(self.left(x)), self.norm(F.gelu(self.right(x)))], -1)
        out: Tensor = self.out(joined)
        return out


def test_weights_of_a_sum() -> None:
    """Elements that all ranks add, beside elements that one rank adds."""
    tried = made(Branches(), {"x": torch.randn(3, 5, 16)}, 2)
    (weighed,) = names(tried, shares.weighed)

    def without(site: Site) -> None:
        site.node.replace_all_uses_with(site.node.args[0])

    assert "some elements 1 times, others 2 times" in tried.refusal(changed(tried, weighed, without))
    scales = [n for n in names(tried, torch.ops.aten.mul.Tensor) if "scale" in n]
    for node in scales:
        wrong = changed(tried, node, lambda site: setattr(site.node, "args", (site.node.args[0], 1.0)))
        assert "add" in tried.refusal(wrong)
    assert scales


class Dropped(nn.Module):
    """One key head for all queries, repeated, then dropped: each copy has a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k = self.k(x).view(batch, length, 1, 8).transpose(1, 2).expand(batch, 4, length, 8)
        a = F.scaled_dot_product_attention(q, F.dropout(k, 0.1, self.training), k)
        out: Tensor = self.o(a.transpose(1, 2).reshape(batch, length, 32))
        return out


def test_repeated_heads_are_told_apart_by_dropout() -> None:
    """Equal elements before it, not after it; alike on all ranks they would have one mask."""
    tried = made(Dropped(), {"x": torch.randn(3, 5, 32)}, 4)
    (drawn,) = names(tried, ops.with_stream)
    wrong = changed(tried, drawn, lambda site: setattr(
        site.node, "args", (site.group(1), *site.node.args[1:])))  # fmt: skip
    assert f"it is not at {drawn} (" in tried.refusal(wrong)


class Squared(nn.Module):
    """Batch and sequence of one size in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = F.gelu(self.up(x)).view(batch, length, 4, 8).softmax(-1)
        out: Tensor = self.down(heads.reshape(batch, length, 32))
        return out


def test_a_size_written_as_the_example_has_it() -> None:
    """A constant where the model has a symbol is right for one size alone."""
    tried = made(Squared(), {"x": torch.randn(3, 5, 16)}, 2)
    views = [n for n in tried.sharded.graph.nodes if n.target is torch.ops.aten.view.default]
    node = next(n.name for n in views if len(n.args[1]) == 4)

    def constant(site: Site) -> None:
        x, sizes = site.node.args
        site.node.args = (x, [3, 5, *sizes[2:]])

    assert f"it is not at {node} (" in tried.refusal(changed(tried, node, constant))
