"""A collective that a GPU does not finish: noticed, named, and raised where the program waits."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import autoshard
from autoshard import pending
from autoshard.errors import CollectiveError
from autoshard.failures import place_of
from autoshard.groups import ProcessGroupComm
from tests.distributed import run_distributed
from tests.test_failures import Stack


class Event:
    """What stands in for a GPU's event."""

    def __init__(self, ended: bool) -> None:
        self.ended, self.asked = ended, 0

    def query(self) -> bool:
        """Whether the GPU came past it."""
        self.asked += 1
        return self.ended


class Group:
    """A process group that notes its end."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        """As a ProcessGroup's."""
        self.aborted = True


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No collective is known, and there is a process group with a timeout of four seconds."""
    monkeypatch.setattr(pending, "timeout_of", lambda group, device: timedelta(seconds=4))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    here = threading.current_thread()
    monkeypatch.setattr(pending.threading, "main_thread", lambda: here)
    yield
    pending._issued.clear()
    pending._free.clear()


def issued(ended: list[bool], group: Any) -> list[Event]:
    """Collectives in a row, of which these have ended."""
    events = [Event(e) for e in ended]
    for event in events:
        pending._issued.append(
            pending._Issued(event, "all-reduce", [0, 1], group, "forward", None)  # type: ignore[arg-type]
        )
    return events


def test_what_has_ended_is_forgotten_and_used_again() -> None:
    """However many have ended; few are asked, as each question gives up the interpreter's lock."""
    for done in range(6):
        pending._issued.clear()
        pending._free.clear()
        issued([i < done for i in range(5)], Group())
        assert pending._forget_ended() == min(done, 5)
        assert len(pending._issued) == 5 - min(done, 5) and len(pending._free) == min(done, 5)
    pending._issued.clear()
    events = issued([True] * 1000, Group())
    assert pending._forget_ended() == 1000
    assert sum(e.asked for e in events) < 15


def test_a_collective_that_stands_still_is_raised() -> None:
    """In the thread that waits; its group is aborted, so that the GPU comes back."""
    group = Group()
    issued([True, False, False], group)
    watch = pending._Watch()
    start = time.monotonic()
    try:
        with pytest.raises(CollectiveError) as raised:
            while time.monotonic() < start + 20:
                time.sleep(0.01)
    finally:
        watch._end()
    assert 2 <= time.monotonic() - start < 10
    said = str(raised.value)
    assert (
        "an all-reduce among the ranks 0, 1 does not end on rank 0" in said and "It stood for" in said
    )
    assert group.aborted


def test_slow_collectives_are_waited_for() -> None:
    """Each begins its time when the one before has ended."""
    group = Group()
    events = issued([False] * 8, group)
    watch = pending._Watch()
    try:
        for event in events:
            time.sleep(0.4)
            event.ended = True
        deadline = time.monotonic() + 20
        while pending._issued and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not pending._issued and watch.thread.is_alive() and not group.aborted
    finally:
        watch._end()
    assert not watch.thread.is_alive()


def test_a_watch_that_has_ended_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next collective has one again: nobody asks whether its thread is alive."""
    monkeypatch.setattr(pending, "is_capturing", lambda: False)
    monkeypatch.setattr(pending, "record", lambda event, device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(ended=True))
    monkeypatch.setattr(pending, "_watch", None)
    seen = []
    try:
        for _ in range(2):
            pending.note("all-reduce", [0, 1], SimpleNamespace(), 0)  # type: ignore[arg-type]
            watch = pending._watch
            assert watch is not None and watch.thread.is_alive()
            seen.append(watch)
            watch._end()
            assert pending._watch is None
    finally:
        pending._issued.clear()
        pending._free.clear()
    assert seen[0] is not seen[1]


def test_nothing_is_noted_within_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that belongs to a captured graph cannot be asked."""
    monkeypatch.setattr(pending, "is_capturing", lambda: True)
    pending.note("all-reduce", [0, 1], SimpleNamespace(), 0)  # type: ignore[arg-type]
    assert not pending._issued


class Recorded(Event):
    """An event on no GPU."""

    def __init__(self) -> None:
        super().__init__(ended=False)

    def record(self) -> None:
        """As a GPU's."""


def noted() -> list[str]:
    """The places of a step's collectives, noted as if tensors were on a GPU."""

    def note(self: ProcessGroupComm, collective: str, x: torch.Tensor, on: object = None) -> None:
        pending.note(collective, self.ranks, self.process_group, 0)

    x = torch.randn(3, 8, requires_grad=True)
    tp_model = autoshard.parallelize(Stack(), 2, (x,), degree="max", check_inputs=False)
    with (
        mock.patch.object(ProcessGroupComm, "_note", note),
        mock.patch.object(torch.cuda, "Event", Recorded),
        mock.patch.object(pending, "is_capturing", lambda: False),
        mock.patch.object(pending, "record", lambda event, device: event.record()),
        mock.patch.object(pending, "_Watch"),
    ):
        tp_model(x).sum().backward()
    return [str(place_of(one.way, one.line)) for one in pending._issued]


@pytest.mark.slow
def test_each_collective_knows_its_place() -> None:
    """Pass, operator, layer and node, forward and backward."""
    for found in run_distributed(noted, 2):
        layers = [re.sub(r" \(node \w+\)", "", place) for place in found]
        assert layers == [
            "the forward of reduce at layers.0.down", "the forward of reduce at layers.1.down",
            "the backward of copy at layers.1.up", "the backward of copy at layers.0.up",
        ]  # fmt: skip
