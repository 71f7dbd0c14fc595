"""No mutant that changes the function is missed, by the proof or by ``verify``; with a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.mutations.campaign import Result, chosen, evenly, examined, missed, right, table
from tests.mutations.faults import KINDS, NUMBER, OPERAND, STREAM, faults
from tests.mutations.judge import CHANGED, EQUAL, RAISED, SAME, Judge, Verdict
from tests.mutations.subjects import SPECS, subject

# Of each model and kind, from the first to the last at equal distances.
OF_A_KIND = 9
OTHERS = 4
DROPPING = ("gpt2", "nanogpt")  # whose dropout is judged, at every place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """What became of the mutants that are examined here."""
    found: list[Result] = []
    for world in (2, 4):
        with Judge(world) as judge:
            for spec in (s for s in SPECS if s.tp == world):
                counts: dict[str, int] = dict.fromkeys(KINDS, OF_A_KIND)
                counts |= {NUMBER: OTHERS, OPERAND: OTHERS, STREAM: 1000 * (spec.name in DROPPING)}
                for made, mutants in chosen(spec, counts):
                    assert right(judge, made) == []
                    found += examined(judge, made, mutants)
    return found


def test_none_is_missed(results: list[Result], record_property: Callable[[str, object], None]) -> None:
    """Real ranks say that it is another function: so do the proof, and ``verify``."""
    record_property("table", table(results))
    assert [str(r) for r in missed(results)] == []


def test_none_that_raises_is_accepted(results: list[Result]) -> None:
    """What the ranks cannot run is no proven graph either."""
    accepted = [str(r) for r in results if r.verdict.outcome == RAISED and not r.refused]
    assert accepted == []


def test_mutants_are_many(results: list[Result]) -> None:
    """A thousand, twenty of each kind, of which enough change the function; each model is there."""
    assert len(results) >= 1000
    for kind in KINDS:
        of = [r for r in results if r.kind == kind]
        assert len(of) >= 20, kind
        if kind not in (NUMBER, OPERAND):  # most of those cannot run at all
            assert sum(r.verdict.outcome == CHANGED for r in of) >= 10, kind
    assert {r.model for r in results} == {s.name for s in SPECS}
    assert any("norm_weight_copy" in r.node for r in results)


def test_the_judge_is_sure(results: list[Result]) -> None:
    """No error is near the border between the same function and another."""
    errors = [r.verdict.error for r in results]
    assert not [e for e in errors if EQUAL / 100 < e < EQUAL * 10]


def test_what_is_missed() -> None:
    """A mutant that one of the checks lets pass is reported, and shows in the table."""
    fault = faults(subject("nanogpt").sharded)[0]
    caught = Result("nanogpt", fault.kind, "node", "what", Verdict(CHANGED, 1.0), True, True)
    accepted, unseen = replace(caught, refused=False), replace(caught, seen=False)
    same = replace(accepted, verdict=Verdict(SAME), seen=False)
    stopped = replace(accepted, verdict=Verdict(RAISED))
    random = replace(caught, kind=STREAM, seen=None)
    results = [caught, accepted, unseen, same, stopped, random]
    assert missed(results) == [accepted, unseen]
    lines = table(results).splitlines()
    counted = [
        [int(cell) for cell in lines[i].split("|")[2:-1]] for i in (2 + KINDS.index(fault.kind), -1)
    ]
    assert counted == [[5, 3, 1, 1, 1, 1, 0], [6, 4, 1, 1, 1, 1, 0]]


def test_which_are_taken() -> None:
    """All where they are few, else from the first on, none twice."""
    every = faults(subject("nanogpt").sharded)
    assert evenly(every[:5], 9) == every[:5]
    assert evenly(every, None) == every
    taken = evenly(every, 9)
    assert len({id(f) for f in taken}) == 9 and taken[0] is every[0]
