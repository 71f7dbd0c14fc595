"""What a run has done, in numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from autoshard import AutoshardError
from autoshard.errors import (
    CaptureError,
    CollectiveError,
    NonFiniteError,
    RanksDifferError,
    UnsoundGraphError,
)
from tests.fuzz.spec import Net, Steps

FAILURES = (UnsoundGraphError, RanksDifferError, CollectiveError, NonFiniteError, CaptureError)


@dataclass
class Counts:
    """Numbers by group and name: models, blocks, steps, rules, laws, refusals."""

    groups: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, group: str, name: str, number: int = 1) -> None:
        """Count something."""
        self.groups.setdefault(group, Counter())[name] += number

    def total(self, group: str) -> int:
        """All of a group."""
        return self.groups.get(group, Counter()).total()

    def model(self, net: Net) -> None:
        """Count a model and what it is made of."""
        self.add("models", net.head)
        for placed in net.blocks:
            self.add("blocks", type(placed.block).__name__)
            if isinstance(placed.block, Steps):
                for step in placed.block.steps:
                    self.add("steps", step.op)

    def line(self) -> str:
        """The totals."""
        names = ("models", "rules", "plans", "laws", "refusals")
        return ", ".join(f"{self.total(name)} {name}" for name in names)

    def refused(self, error: AutoshardError) -> None:
        """Count a refusal by its reason, whatever the names and numbers in it are."""
        text = re.sub(r"\S*[\d_.:/]\S*", "…", str(error).split("\n")[0])
        self.add("refusals", f"{type(error).__name__}: {text[:90]}")


def is_refusal(error: BaseException) -> bool:
    """Whether the product may say this of a model: no result, and the reason.

    The generator makes models that can be captured and ranks that agree; the proof refuses what the
    rewriting got wrong. So errors that say otherwise are finds.
    """
    if isinstance(error, FAILURES) or "computed another plan" in str(error):
        return False
    return isinstance(error, AutoshardError) and bool(str(error))


COUNTS = Counts()
