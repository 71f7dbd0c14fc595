"""How many multiprocessors a sum gets that runs beside products."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
import torch.distributed as dist

from autoshard import api, beside, fused_ops, groups, products
from autoshard.cost_model.formulas import constants, seconds
from autoshard.cost_model.hardware import Hardware, load
from autoshard.cost_model.hardware import Lane as Shared
from autoshard.cost_model.lanes import rooms
from autoshard.cost_model.work import Collective, D, Product
from autoshard.groups import Lane, ProcessGroupComm, Room
from autoshard.mesh import init_mesh
from autoshard.random_streams import RandomStream
from tests.distributed import run_distributed

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
def test_the_room_is_the_one_of_least_time(name: str, degree: int) -> None:
    """On both sides of the border the formula takes the lane that the step takes."""
    machine = load(name)
    first, second = rooms(machine, degree, "bfloat16")
    wide, narrow = machine.lanes
    assert first.columns == 0 and first[2:] == (wide.multiprocessors, wide.left)
    assert second[2:] == (narrow.multiprocessors, narrow.left)
    border = second.columns
    for columns, best, other in ((border * 9 // 10, wide, narrow), (border * 11 // 10, narrow, wide)):
        alone = [exposed(replace(machine, lanes=(lane,)), columns, degree) for lane in (best, other)]
        assert alone[0] < alone[1]
        assert exposed(machine, columns, degree) == pytest.approx(alone[0])


def test_products_cover_the_sum() -> None:
    """With fewer columns the sum is the longer one, with more the products are."""
    machine = replace(load("h200"), kernel=0.0, overlap=0.0)
    for lane, room in zip(machine.lanes, rooms(machine, 2, "bfloat16"), strict=True):
        own = replace(machine, lanes=(lane,))
        seconds_of_sum = exposed(own, 1, 2)
        for columns in (room.covers * 95 // 100, room.covers * 105 // 100):
            product = 2 * TOKENS * SIZE * columns / machine.rate("bfloat16")
            both = product + exposed(own, columns, 2)
            sent = 2 * TOKENS * SIZE / machine.links[0].bandwidth / lane.share
            expected = max(sent, product * lane.slower)
            assert both == pytest.approx(min(expected, product + seconds_of_sum), rel=0.01)
            assert (product * lane.slower > sent) == (columns > room.covers)


def test_seconds_by_hand() -> None:
    """The longer of the sum at its share of the bus, and the products on what is left to them."""
    machine = replace(load("h200"), lanes=(Shared(24, 32, 1.2, 0.8),), kernel=0.0)
    rate, bus = machine.rate("bfloat16"), machine.links[0].bandwidth
    for columns, products_are_longer in ((256, False), (2**15, True)):
        product = 2 * TOKENS * SIZE * columns / rate
        sent = 2 * TOKENS * SIZE / bus / 0.8 + machine.links[0].latency
        assert (product > sent) == products_are_longer
        both = max(sent, product * 1.2)
        apart = 2 * TOKENS * SIZE / bus + machine.links[0].latency
        expected = min(both - product, apart - machine.overlap * min(apart, product))
        assert exposed(machine, columns, 2) == pytest.approx(expected, rel=1e-6)


def test_nothing_to_share() -> None:
    """One rank, a machine without lanes, one without links."""
    assert rooms(load("h200"), 1, "bfloat16") == ()
    for name in ("v100", "a100", "cpu", "h200-x1"):
        assert rooms(load(name), 2, "bfloat16") == ()


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


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens, in its order: sums by name, what products are told, products, waits."""
    events: list[Any] = []
    of_weight = beside.gradient_of_weight
    monkeypatch.setattr(groups.dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(groups, "leave_multiprocessors", lambda count, of: events.append(count))
    monkeypatch.setattr(
        groups,
        "start_all_reduce",
        lambda x, group: events.append(group.group_name)
        or SimpleNamespace(wait=lambda: events.append("wait")),
    )
    monkeypatch.setattr(
        beside, "gradient_of_weight", lambda *args: events.append("product") or of_weight(*args)
    )
    return events


def _group(events: list[Any]) -> ProcessGroupComm:
    """Two lanes: from 0 columns, which 6 cover, and from 10, which 30 cover."""
    wide: Any = Process(events, "wide")
    narrow: Any = Process(events, "narrow")
    lanes = Lane(Room(0, 6, 24, 32), wide, 132), Lane(Room(10, 30, 8, 8), narrow, 132)
    return ProcessGroupComm(wide, RandomStream(0), lanes)


@pytest.mark.parametrize(
    ("columns", "trained", "expected"),
    [
        ((9,), (True,), ["wide", 32, "product", 0, "wait"]),
        ((10,), (True,), ["narrow", 8, "product", 0, "wait"]),
        ((4, 4, 4), (True,) * 3, ["wide", 32, "product", "product", 0, "product", "wait"]),
        ((4, 12), (False, True), ["narrow", 8, "product", 0, "wait"]),
        ((4,), (False,), ["wide", "wait"]),
        ((9, 1, 1), (True,) * 3, ["wide", 32, "product", 0, "wait"]),  # joined; by the first one
    ],
)
def test_products_leave_room_until_they_cover_the_sum(
    columns: tuple[int, ...], trained: tuple[bool, ...], expected: list[Any], told: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On the lane of the first product's columns; what runs behind the sum has all of the GPU."""
    if columns[-1] == 1:
        monkeypatch.setattr(products, "one_moves_less", lambda *sizes: True)
    x, dys = torch.randn(5, 3), [torch.randn(5, n) for n in columns]
    weights = [torch.randn(n, 3) for n in columns]
    given, biased = x if any(trained) else None, (False,) * len(columns)
    found = fused_ops.column_gradients(
        given, (5, 3), _group(told), weights, dys, False, trained, biased
    )
    torch.testing.assert_close(found[0], sum(dy @ w for dy, w in zip(dys, weights, strict=True)))
    for dw, dy, train in zip(found[1:], dys, trained, strict=False):
        assert (dw is not None) == train
        if dw is not None:
            torch.testing.assert_close(dw, dy.t() @ x)
    assert told == expected


def test_room_is_taken_back_where_a_product_fails(
    told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that comes after would leave it."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(beside, "gradient_of_weight", fail)
    x, weight, dy = torch.randn(5, 3), torch.randn(4, 3), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused_ops.column_gradients(x, (5, 3), _group(told), [weight], [dy], False, [True], [False])
    assert told == ["wide", 32, 0]


def _agreed(names: tuple[str, str]) -> list[dict[int, tuple[Room, ...]]]:
    """What ranks of these machines agree on, and a rank whose GPU is of another size."""
    mesh = init_mesh(2, device="cpu")
    model, plan = torch.nn.Linear(3, 3).bfloat16(), SimpleNamespace(overlap=True)
    machine = load(names[dist.get_rank()])
    costs = SimpleNamespace(
        setting=SimpleNamespace(hardware=machine),
        rooms=lambda dtype: {2: rooms(machine, 2, dtype)},
    )
    found = []
    for size in (132, 108):
        properties = SimpleNamespace(multi_processor_count=size)
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "get_device_properties", lambda p=properties: p),
        ):
            found.append(api._rooms(plan, costs, model, mesh))  # type: ignore[arg-type]
    return found


@pytest.mark.slow
def test_ranks_leave_the_same_room_or_none() -> None:
    """A sum is on one communicator for all of them."""
    expected = {2: rooms(load("h200"), 2, "bfloat16")}
    assert expected[2]
    assert run_distributed(_agreed, 2, ("h200", "h200")) == [[expected, {}]] * 2
    assert rooms(load("h100"), 2, "bfloat16") != expected[2]
    assert run_distributed(_agreed, 2, ("h100", "h200")) == [[{}, {}]] * 2
