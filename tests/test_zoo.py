"""The benchmark over all architectures: its tiny models, one run, and its page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import zoo
from benchmarks.tiny_models import LEFT_OUT, Architecture, architectures, attentions

RIGHT = {
    "verdict": "right", "error": 1e-15, "worst": "x", "split": 0.95, "collectives": 4, "whole": [],
    "unknown": 0, "capture": 2.0, "after": 0.5,
}  # fmt: skip
REFUSED = {"verdict": "refused", "captured": False, "why": "a branch | on data"}


def result(**runs: Any) -> dict[str, Any]:
    """An architecture with one attention, at both degrees."""
    return {"kind": "causal", "class": "C", "eager": {"tp": {"2": RIGHT, "4": RIGHT, **runs}}}


def test_every_class_once() -> None:
    """Hundreds; the ones left out have a reason; gpt2 stands for what shares its class."""
    found = architectures()
    names = [a.name for a in found]
    assert len(found) > 250 and len(set(names)) == len(names)
    assert "gpt2" in names and "gpt-sw3" not in names
    assert not set(LEFT_OUT) & {a.model_type for a in found}


@pytest.mark.slow
def test_one_architecture() -> None:
    """In a process of its own; what is found is plain data."""
    architecture = next(a for a in architectures() if a.name == "qwen3_moe")
    assert attentions(architecture) == ("sdpa", "eager")
    found = zoo.examined(architecture, "sdpa")
    for tp in zoo.DEGREES:
        assert found["tp"][tp]["verdict"] == "right" and found["tp"][tp]["split"] > 0.9, found
    json.dumps(found)


def test_an_architecture_that_cannot_be_built() -> None:
    """It is reported, with the error."""
    found = zoo.examined(Architecture("causal", "nothing", "Nothing"), "eager")
    assert found["tp"] == {} and "nothing" in found["why"]
    assert zoo.verdict({"eager": found}) == "failed"


def test_the_page_says_the_worst_of_the_runs() -> None:
    """Totals, a row each, and a reason for what is refused or mostly whole."""
    whole = RIGHT | {"split": 0.5, "whole": [["linear in head", "a reason"]]}
    wrong = RIGHT | {"verdict": "wrong", "error": 0.1, "worst": "h.weight"}
    document = {
        "versions": {"torch": "2"},
        "architectures": {
            "a": result(), "b": result(**{"4": REFUSED}), "c": result(**{"2": whole}),
            "d": result(**{"4": wrong}), "e": result(**{"4": RIGHT | {"after": 3.0}}),
        },
    }  # fmt: skip
    page = zoo.page(document)
    assert "5 architectures, 10 runs: **3 right in all of their runs, 1 wrong**, 1 refused" in page
    assert "2 of the 3 have 90%" in page and "1 runs took longer" in page
    lines = [line for line in page.splitlines() if line.count(" | ") == 7]
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "a branch \\| on data" in rows["b"] and "`linear in head`: a reason" in rows["c"]
    assert "h.weight off by 1.0e-01" in rows["d"]
