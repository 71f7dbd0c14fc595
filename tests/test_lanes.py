"""How many multiprocessors a sum gets that runs beside products."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from autoshard import groups
from autoshard.cost_model.formulas import constants, seconds
from autoshard.cost_model.hardware import Hardware, Lane, load
from autoshard.cost_model.lanes import lanes_by_columns
from autoshard.cost_model.work import Collective, D, Product
from autoshard.groups import ProcessGroupComm
from autoshard.random_streams import RandomStream

TOKENS, SIZE = 2**20, 2**13  # so large that latency and fill do not count


def exposed(hardware: Hardware, columns: int, degree: int) -> float:
    """What a sum adds to the weights' gradients that it runs beside, in seconds, by the formula."""
    values = constants(hardware, degree) | {"d": degree, "m0": 0.0, "n0": 0.0, "k0": 0.0}
    product = Product(1, SIZE, columns, TOKENS, "bfloat16")
    item = Collective("all_reduce", 2 * TOKENS * SIZE, D, (product,))
    formula = seconds(item)
    return float(formula.xreplace({s: sympy.Float(values[s.name]) for s in formula.free_symbols}))


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("name", ["h100", "h200"])
def test_the_lane_is_the_one_of_least_time(name: str, degree: int) -> None:
    """On both sides of every border the formula takes the lane that the step takes."""
    machine = load(name)
    (first, wide), (border, narrow) = lanes_by_columns(machine, degree, "bfloat16")
    assert first == 0 and (wide, narrow) == machine.lanes
    for columns, best, other in ((border * 9 // 10, wide, narrow), (border * 11 // 10, narrow, wide)):
        alone = [exposed(replace(machine, lanes=(lane,)), columns, degree) for lane in (best, other)]
        assert alone[0] < alone[1]
        assert exposed(machine, columns, degree) == pytest.approx(alone[0])


def test_seconds_by_hand() -> None:
    """The longer of the sum at its share of the bus, and the products on what is left to them."""
    machine = replace(load("h200"), lanes=(Lane(24, 0.8),), kernel=0.0)
    rate, bus = machine.rate("bfloat16"), machine.links[0].bandwidth
    for columns, products_are_longer in ((256, False), (2**15, True)):
        product = 2 * TOKENS * SIZE * columns / rate
        sent = 2 * TOKENS * SIZE / bus / 0.8 + machine.links[0].latency
        assert (product > sent) == products_are_longer
        both = max(sent, product * 132 / 108)
        apart = 2 * TOKENS * SIZE / bus + machine.links[0].latency
        expected = min(both - product, apart - machine.overlap * min(apart, product))
        assert exposed(machine, columns, 2) == pytest.approx(expected, rel=1e-6)


def test_nothing_to_share() -> None:
    """One rank, a machine without lanes, one without links."""
    assert lanes_by_columns(load("h200"), 1, "bfloat16") == ()
    for name in ("v100", "a100", "cpu", "h200-x1"):
        assert lanes_by_columns(load(name), 2, "bfloat16") == ()


class Process:
    """A process group that notes what is summed on it."""

    def __init__(self, events: list[Any], name: str) -> None:
        self.events, self.group_name = events, name

    def size(self) -> int:
        """Of two."""
        return 2

    def rank(self) -> int:
        """The first."""
        return 0


def test_between_start_and_end_products_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the lane of as many columns; without products none; where the sum fails to end too."""
    events: list[Any] = []
    works = SimpleNamespace(wait=lambda: events.append("wait"))
    monkeypatch.setattr(groups.dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(groups, "leave_multiprocessors", lambda count, of: events.append((count, of)))
    monkeypatch.setattr(
        groups, "start_all_reduce", lambda x, group: events.append(group.group_name) or works
    )
    wide: Any = Process(events, "wide")
    narrow: Any = Process(events, "narrow")
    lanes = (groups.Lane(0, wide, 24, 132), groups.Lane(100, narrow, 8, 132))
    group = ProcessGroupComm(wide, RandomStream(0), lanes)
    x = torch.zeros(3)
    for columns, name, count in ((99, "wide", 24), (100, "narrow", 8)):
        events.clear()
        assert group.start_all_reduce(x, columns)() is x
        assert events == [name, (count, 132), (0, 132), "wait"]
    events.clear()
    group.start_all_reduce(x)()
    assert events == ["wide", "wait"]

    def fail() -> None:
        raise RuntimeError("gone")

    works.wait = fail
    monkeypatch.setattr(groups.failures, "explanation_of", lambda error, *args: ValueError(str(error)))
    events.clear()
    with pytest.raises(ValueError, match="gone"):
        group.start_all_reduce(x, 1)()
    assert events == ["wide", (24, 132), (0, 132)]
