"""What fuzzing found, as small as it gets, and what holds there now."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autoshard
from tests.fuzz.build import build, inputs
from tests.fuzz.spec import Mix, Net, Placed, Step, Steps


def program(*steps: Step, width: int = 8) -> Net:
    """A model with one program."""
    return Net((Placed(Steps(steps, width)),), norm="none")


FINDS = {
    # The convolution sums one half of the entry's columns; the other half stays inside the group with
    # no split axis, and the exit's contraction was split alone without taking the rank's columns of it.
    "gate beside a summed half": Net((Placed(Mix(8, 1, False, True, False)),), norm="none"),
    # The k largest of a rank's share are not its share of the k largest: the new axis was not frozen.
    "top-k that a weight reads": program(Step("top", n=2), Step("stack")),
    "top-k": program(Step("top")),
}


@pytest.mark.parametrize("name", FINDS)
def test_find(name: str) -> None:
    """The same function, outputs and gradients."""
    net = FINDS[name]
    report = autoshard.verify(build(net), 2, inputs(net))
    assert report.ok, report


def test_a_value_inside_meets_a_region_of_another_degree() -> None:
    """It has no split axis, so it leaves its group before it enters the other one."""
    net = FINDS["gate beside a summed half"]
    model, given = build(net), inputs(net)
    plan = autoshard.plan(model, 4, given, degree="max")
    entry, exit = "layers.0.block", "layers.0.block.exit"
    for first, second in ((2, 4), (4, 2), (1, 4), (4, 1)):
        mixed = plan.with_degree(entry, first).with_degree(exit, second)
        report = autoshard.verify(model, 4, given, plan=mixed)
        assert report.ok and report.plan.degrees == mixed.degrees, report


def test_dropout_of_exactly_a_half() -> None:
    """Its operator is called without the probability, which is a half by default."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8))
    assert autoshard.verify(model, 2, (torch.randn(3, 8),)).ok
