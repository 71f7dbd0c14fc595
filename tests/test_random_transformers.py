"""Transformers composed at random, split, compute what they compute whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoshard
from tests.strategies import Spec, build, inputs, specs

TP = st.sampled_from([2, 4, 1])


def assert_same(report: autoshard.Report) -> None:
    """The report is good, and says which tensor is worst where it is not."""
    everything = {**report.outputs, **report.gradients}
    wrong = {name: error for name, error in everything.items() if not error < 1e-10}
    assert report.ok and not wrong, f"{report}\nworst: {report.worst}\n{wrong}\n{report.plan}"


def holds(spec: Spec, tp: int, data: st.DataObject | None) -> None:
    """Verify a transformer at the largest degrees, and at drawn ones."""
    model = build(spec)
    report = autoshard.verify(model, tp, inputs(spec))
    assert_same(report)
    if data is None or tp == 1:
        return
    plan = report.plan
    for region in plan.regions:
        degree = data.draw(st.sampled_from(region.degrees), label=region.name)
        plan = plan.with_degree(region.name, degree)
    assert_same(autoshard.verify(model, tp, inputs(spec), plan=plan))


@settings(max_examples=5)
@given(specs(), TP)
def test_random_transformer_is_the_same_function(spec: Spec, tp: int) -> None:
    """Outputs, loss and all gradients, at the largest degrees."""
    holds(spec, tp, None)


@pytest.mark.slow
@settings(max_examples=25)
@given(specs(), TP, st.data())
def test_more_random_transformers(spec: Spec, tp: int, data: st.DataObject) -> None:
    """The same at the largest degrees and at drawn ones."""
    holds(spec, tp, data)


def test_simplest_transformer() -> None:
    """What random ones shrink to, over 2 and over 4 ranks, is split in all its parts."""
    for tp in (2, 4):
        report = autoshard.verify(build(Spec()), tp, inputs(Spec()))
        assert_same(report)
        kinds = {region.kind for region in report.plan.regions}
        assert kinds == {"embedding", "attention", "mlp", "loss"}
        assert report.plan.sharded_fraction > 0.95
