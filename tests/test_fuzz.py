"""A short run of the state machine, and whether its laws notice what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import fx

from autoshard import ops
from tests.fuzz import laws
from tests.fuzz.laws import CAPTURED, Broken, Subject
from tests.fuzz.machine import RANKS, Machine
from tests.fuzz.pair import Pair
from tests.fuzz.ranks import Ranks
from tests.fuzz.reduce import reduced
from tests.fuzz.spec import Attend, Feed, Mix, Net, Placed, Step, Steps
from tests.fuzz.steps import STEPS, Program
from tests.models.spec import Spec

NET = Net((Placed(Feed()), Placed(Attend(Spec(projection="split")))))


@pytest.mark.slow
def test_a_short_run() -> None:
    """The same models and moves every time."""
    chosen = settings(
        max_examples=12, stateful_step_count=8, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Machine, settings=chosen)


@pytest.mark.parametrize("op", sorted(STEPS))
def test_every_step_has_an_effect_somewhere(op: str) -> None:
    """No step is refused by all shapes."""
    made = [
        Program(Steps((*before, Step(op))), 8)
        for before in ((), (Step("unflatten"),))
    ]  # fmt: skip
    assert any(len(p.steps) - 1 in p.effective for p in made)


def test_a_missing_copy_is_noticed() -> None:
    """Outputs are right, gradients are not."""
    subject = Subject(NET, True, torch.float64, (2,))
    plan, sharded = subject.plan(2)
    subject.same_function(2, plan, sharded, CAPTURED)
    copy = next(n for n in sharded.graph.nodes if n.target is ops.copy)
    copy.replace_all_uses_with(copy.args[0])
    with pytest.raises(Broken, match="verify"):
        subject.same_function(2, plan, sharded, CAPTURED)


def test_a_size_that_is_a_number_is_noticed() -> None:
    """A graph that holds for the captured shape only."""
    net = Net((Placed(Mix()),))
    subject = Subject(net, True, torch.float64, (2,))
    plan, sharded = subject.plan(2)
    sizes = [n for n in sharded.graph.nodes if "sym_size" in str(n.target)]
    for node in sizes:
        users = [u for u in node.users if u.op != "output"]
        for user in users:
            value = node.meta["val"]
            user.args = fx.map_arg(user.args, lambda n, s=node, v=value: int(v) if n is s else n)
    subject.same_function(2, plan, sharded, CAPTURED)
    with pytest.raises((Broken, RuntimeError)):
        subject.same_function(2, plan, sharded, (2, 7))


def test_shares_that_do_not_make_the_whole_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank holds the other's share."""
    subject = Subject(NET, True, torch.float64, (2,))
    _, sharded = subject.plan(2)
    subject.shares_gather(sharded, 2)
    cut = laws.local_share
    monkeypatch.setattr(laws, "local_share", lambda whole, stored, place: cut(whole, stored, 1 - place))
    with pytest.raises(Broken, match="gathered"):
        subject.shares_gather(sharded, 2)


def test_other_numbers_are_noticed(tmp_path: Path) -> None:
    """One parameter of the split model is another."""
    pair = Pair(NET, 1, "max", None, True, "float64")
    pair.begin()
    pair.same(CAPTURED, 0)
    with torch.no_grad():
        next(iter(pair.split.parameters())).mul_(1.001)
    for wrong in (lambda: pair.same(CAPTURED, 0), lambda: pair.reload("file", tmp_path)):
        with pytest.raises(Broken):
            wrong()


@pytest.fixture(autouse=True, scope="module")
def nothing_left() -> Iterator[None]:
    """The state machine's processes end with these tests."""
    yield
    RANKS.stop()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Two processes."""
    made = Ranks(2)
    yield made
    made.stop()


@pytest.mark.slow
def test_ranks_that_disagree_are_noticed(ranks: Ranks) -> None:
    """Strings hash otherwise on each of them; what they compute is the same."""
    first = ranks.call("begin", NET, 2, "max", None, True, "float64")
    assert first == ranks.call("begin", NET, 2, "max", None, True, "float64")
    ranks.call("train", CAPTURED, 1, "adamw", True)
    with pytest.raises(Broken, match="the same on every rank"):
        ranks.call("string_hash")


def test_a_failure_is_made_small() -> None:
    """What does not matter is taken out."""
    spec = Net(
        (Placed(Feed()), Placed(Steps((Step("act"), Step("cat", n=4)), 24), scaled=True)), vocabulary=40
    )

    def fails(net: Net) -> bool:
        return "cat" in repr(net)

    assert reduced(spec, fails) == Net((Placed(Steps((Step("cat"),))),))


@pytest.mark.slow
def test_the_long_run_runs(tmp_path: Path) -> None:
    """A batch, and its counts as Markdown."""
    file = tmp_path / "counts.md"
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--examples",
        "1",
        "--hours",
        "0.0001",
        "--seed",
        "1",
    ]
    subprocess.run([*command, "--write", str(file)], check=True, timeout=300)
    assert "0 failures" in file.read_text() and "Laws checked" in file.read_text()
