"""verify(locate=True): the first value or gradient that differs is named, where it was made wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autoshard
from autoshard import ops
from autoshard.locate import Located, locate
from autoshard.measures import relative_error
from autoshard.pipeline import held_by_ranks
from autoshard.rules import RULES, rule_for
from tests.mutations import faults as mutants
from tests.mutations.faults import Fault
from tests.test_negative_control import Subject, subject

TOLERANCE = 1e-10

# One node is changed by each, at a place that can be named.
GENERATORS = (
    mutants.removed, mutants.bypassed, mutants.duplicated, mutants.swapped, mutants.other_numbers,
    mutants.exchanged, mutants.another_operand, mutants.without_stream, mutants.other_layouts,
    mutants.bias_on_every_rank, mutants.scaled, mutants.stored_otherwise, mutants.segments_exchanged,
)  # fmt: skip


def located(tried: Subject, fault: Fault) -> Located | None:
    """What is found in a graph that was changed after the proof."""
    held = held_by_ranks(tried.program, tried.sharded)
    return locate(
        tried.model, tried.program, fault.sharded, tried.plan, (), tried.inputs, torch.float64,
        TOLERANCE, held,
    )  # fmt: skip


def _named(graph: fx.Graph, name: str) -> fx.Node | None:
    return next((n for n in graph.nodes if n.name == name), None)


def places(tried: Subject, fault: Fault, way: str) -> set[str]:
    """The changed node and its users, new ones seen through; backward, its operands."""
    own = {n.name for n in tried.sharded.graph.nodes}
    found = {fault.node}

    def follow(node: fx.Node) -> None:
        for near in node.users if way == "forward" else node.all_input_nodes:
            found.add(near.name)
            if near.name not in own:
                follow(near)

    for graph in (tried.sharded.graph, fault.sharded.graph):
        node = _named(graph, fault.node)
        if node is not None:
            follow(node)
    for node in fault.sharded.graph.nodes:
        if node.name not in own and node.op == "call_function":  # put in by the fault
            follow(node)
    return found


def faults(tried: Subject, generators: Any, count: int) -> Iterator[tuple[bool, Fault]]:
    """Some of each generator, drawn with a fixed seed; whether it changes how a parameter is stored."""
    drawn = random.Random(0)
    for generator in generators:
        made = list(generator(tried.sharded))
        for fault in drawn.sample(made, min(count, len(made))):
            yield generator is mutants.stored_otherwise, fault


@pytest.mark.parametrize(
    ("name", "tp", "generators", "count"),
    [
        ("gpt2", 2, (mutants.removed, mutants.swapped), 2),
        pytest.param("gpt2", 2, GENERATORS, 3, marks=pytest.mark.slow),
        pytest.param("bloom", 4, GENERATORS, 1, marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_found_where_it_is(name: str, tp: int, generators: Any, count: int) -> None:
    """At the changed node or a direct user of it; a gradient at what the changed node was given."""
    tried = subject(name, tp)
    missed, found = [], 0
    for stored, fault in faults(tried, generators, count):
        try:
            place = located(tried, fault)
        except (IndexError, ValueError, RuntimeError):  # a share that there is not: nothing ran
            assert stored, fault
            continue
        if place is None:  # another text of the same function: verify says so too
            assert tried.compare(fault.sharded.graph).ok or stored, fault
            continue
        found += 1
        handed_out = place.operator.startswith("output")  # a call before the output is left out
        if place.node not in places(tried, fault, "backward" if handed_out else place.way):
            missed.append((fault.kind, fault.node, fault.what, place))
    assert found >= min(10, len(generators))
    assert not missed, f"{len(missed)} of {found}: {missed[:3]}"


def test_the_right_graph_has_no_such_place() -> None:
    """Rounding is no difference."""
    tried = subject("gpt2", 2)
    assert located(tried, Fault("none", "", "", lambda: tried.sharded)) is None


def test_a_missing_copy_is_found_in_the_backward() -> None:
    """All values are right; the gradient of what should have entered is the first that is not."""
    tried = subject("gpt2", 2)
    (fault,) = [f for f in mutants.removed(tried.sharded) if f.node == "view_8_copy"]
    assert _named(tried.sharded.graph, fault.node).target is ops.copy  # type: ignore[union-attr]
    place = located(tried, fault)
    assert place is not None and (place.stage, place.way) == ("split", "backward")
    assert place.node == "view_8" and place.ranks == (0, 1) and place.error > 1e-3
    assert place.layer == "transformer.h.0.mlp.c_fc" and "addmm_2" in place.note
    assert "in the backward" in str(place) and "pytorch_utils.py:" in str(place)


# -- through the door: an operator whose rule is wrong ---------------------------------------------


@torch.library.custom_op("locating::center", mutates_args=())
def center(x: Tensor) -> Tensor:
    """The mean of the last dimension taken off: it needs that dimension whole."""
    return x - x.mean(-1, keepdim=True)


@torch.library.custom_op("locating::held", mutates_args=())
def held_back(x: Tensor) -> Tensor:
    """The values; but the gradient has its mean taken off."""
    return x.clone()


for _op in (center, held_back):
    _op.register_fake(torch.empty_like)
    _op.register_autograd(lambda ctx, g: g - g.mean(-1, keepdim=True))


class Center(nn.Module):
    """Takes the mean off."""

    def forward(self, x: Tensor) -> Tensor:
        return center(x)


class HeldBack(nn.Module):
    """Takes the mean off the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return held_back(x)


class Block(nn.Module):
    """An MLP with an operator of its own."""

    def __init__(self, width: int, op: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.op = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), op

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.op(F.gelu(self.up(x))))
        return x + down


class Model(nn.Module):
    """Two MLPs; the operator stands in the second one."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(16, nn.Identity()), Block(16, op)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def wrong_rules() -> Iterator[None]:
    """Rules that say of both operators that they work element by element."""
    before = dict(RULES)
    autoshard.register_rule(torch.ops.locating.center.default, "* h -> * h")
    autoshard.register_rule(torch.ops.locating.held.default, "* h -> * h")
    yield
    RULES.clear()
    RULES.update(before)
    rule_for.cache_clear()


X = {"x": torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))}


@pytest.mark.usefixtures("wrong_rules")
@pytest.mark.parametrize(("op", "way"), [(Center(), "forward"), (HeldBack(), "backward")])
def test_a_wrong_rule_is_found_at_its_operator(op: Any, way: str) -> None:
    """The proof takes rules for true; the numbers do not."""
    report = autoshard.verify(Model(op), 2, X, locate=True)
    place = report.located
    assert not report.ok and place is not None
    assert (place.stage, place.way) == ("split", way)
    assert place.layer == ("layers.1.op" if way == "forward" else "layers.1")
    assert "locating." in (place.operator if way == "forward" else place.note)
    assert "test_locate.py" in place.source and "rank 0:" in place.holds
    assert str(place) in str(report) and "NOT the same function" in str(report)
    assert autoshard.verify(Model(op), 2, X).located is None


def test_what_is_the_same_has_no_place() -> None:
    """Without the wrong rule, the operator stays whole."""
    report = autoshard.verify(Model(Center()), 2, X, locate=True)
    assert report.ok and report.located is None
    assert report.worst_layer in ("layers.0", "layers.1") and set(report.layers) == {
        "layers.0", "layers.1"
    }  # fmt: skip
    text = str(report)
    assert text.startswith("the same function: ") and "in float64" in text
    assert "gradient of layers." in text


# -- a capture that is not the model --------------------------------------------------------------


class Otherwise(nn.Module):
    """What is captured is another function than what runs, or has another gradient."""

    def __init__(self, gradient_only: bool) -> None:
        super().__init__()
        self.gradient_only = gradient_only

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return x * 1.5
        return (x * 1.5).detach() * 0.5 + x * 0.75 if self.gradient_only else x * 1.25


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_capture_that_is_not_the_model(gradient_only: bool) -> None:
    """Said as such, with the first module that differs."""
    report = autoshard.verify(Model(Otherwise(gradient_only)), 2, X, locate=True)
    place = report.located
    assert not report.ok and place is not None and place.stage == "capture"
    assert "the captured graph" in str(place) and "is not the model" in str(place)
    if gradient_only:
        assert (place.way, place.layer) == ("backward", "layers.1.up")
        assert "layers.1.op (Otherwise)" in place.note
    else:
        assert (place.way, place.layer) == ("forward", "layers.1.op")
        assert "Otherwise" in place.note


# -- the measure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [float("-inf"), torch.finfo(torch.float64).min])
def test_a_mask_is_no_scale(mask: float) -> None:
    """An output that holds a mask's number is compared elsewhere too."""
    right = torch.tensor([1.0, 2.0, mask], dtype=torch.float64)
    assert relative_error([right.clone()], right, 0.0) == 0.0
    wrong = torch.tensor([1.0, 2.5, mask], dtype=torch.float64)
    assert relative_error([wrong], right, 0.0) == pytest.approx(0.25)
    unmasked = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert not relative_error([unmasked], right, 0.0) < 0.5
    assert not relative_error([torch.tensor([1.0, float("nan"), mask])], right, 0.0) < 1e300


class Autocast(nn.Module):
    """A part of it runs in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block(16, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.mlp(x)
        return y.float()


def test_a_model_that_computes_in_less_is_judged_by_that() -> None:
    """In float32 it rounds as bfloat16 does; in float64 nothing is rounded so."""
    report = autoshard.verify(Autocast(), 2, X, dtype=torch.float32)
    assert report.ok and report.dtype is torch.bfloat16 and "in bfloat16" in str(report)
    assert report.max_relative_error > 1e-5
    assert autoshard.verify(Autocast(), 2, X).max_relative_error < 1e-12
