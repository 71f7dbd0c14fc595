"""Mutants, the judge's verdict on each, and what the proof and ``verify`` say; as a table."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.mutations.faults import KINDS, STREAM, Fault, faults
from tests.mutations.judge import CHANGED, RAISED, SAME, Judge, Verdict
from tests.mutations.subjects import SPECS, Spec, Subject, dropping, subject


@dataclass(frozen=True)
class Result:
    """One mutant: what it does, and who noticed.

    ``seen`` is None for faults in random state, which ``verify``, without dropout, cannot show.
    """

    model: str
    kind: str
    node: str
    what: str
    verdict: Verdict
    refused: bool
    seen: bool | None

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.kind} at {self.node}, {self.what}: {self.verdict.outcome} "
            f"({self.verdict.error:.1e}{self.verdict.said}); proof {self.refused}, verify {self.seen}"
        )


def evenly(found: Sequence[Fault], count: int | None) -> list[Fault]:
    """So many of the faults, from the first to the last at equal distances."""
    if count is None or len(found) <= count:
        return list(found)
    return [found[i * len(found) // count] for i in range(count)]


def chosen(spec: Spec, counts: Mapping[str, int]) -> Iterator[tuple[Subject, list[Fault]]]:
    """The mutants of a model: so many of a kind, or all; those of its dropout apart."""
    for make, kinds in ((subject, [k for k in KINDS if k != STREAM]), (dropping, [STREAM])):
        if all(counts.get(kind) == 0 for kind in kinds):
            continue
        made = make(spec.name)
        every = faults(made.sharded)
        yield made, [f for k in kinds for f in evenly([f for f in every if f.kind == k], counts.get(k))]


def examined(judge: Judge, made: Subject, found: Iterable[Fault]) -> Iterator[Result]:
    """The results, in order. Proof and ``verify`` run here while the ranks run there."""
    found = list(found)
    verdicts = judge.judged(made, (fault.sharded for fault in found))
    for fault, verdict in zip(found, verdicts, strict=True):
        refused = made.refusal(fault.sharded) is not None
        seen = notices(made, fault) if made.exact else None
        yield Result(made.spec.name, fault.kind, fault.node, fault.what, verdict, refused, seen)


def notices(made: Subject, fault: Fault) -> bool:
    """Whether ``verify`` says that the function is another, or cannot run it."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where fx prints what a graph raises
            return not made.verified(fault.sharded).ok
    except Exception:
        return True


def right(judge: Judge, made: Subject) -> list[str]:
    """What any of the three has against the graph that no fault is made in."""
    (verdict,) = judge.judged(made, [made.sharded])
    wrong = [] if verdict.outcome == SAME else [f"the judge: {verdict}"]
    wrong += [f"the proof: {r}" for r in [made.refusal(made.sharded)] if r]
    if made.exact:
        report = made.verified(made.sharded)
        wrong += [] if report.ok else [f"verify: {report}"]
    return wrong


def missed(results: Iterable[Result]) -> list[Result]:
    """Those that change the function, and that the proof accepts or ``verify`` does not see."""
    return [
        r for r in results
        if r.verdict.outcome == CHANGED and (not r.refused or r.seen is False)
    ]  # fmt: skip


HEADER = (
    "kind of fault", "mutants", "change the function", "raise on the ranks", "equivalent",
    "missed by the proof", "missed by verify", "equivalent, yet refused",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """One line for each kind of fault, and one for all, as Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    for kind in (*KINDS, "all"):
        of = [r for r in results if kind in (r.kind, "all")]
        by = {o: [r for r in of if r.verdict.outcome == o] for o in (CHANGED, RAISED, SAME)}
        unseen = "–" if kind == STREAM else sum(r.seen is False for r in by[CHANGED])
        cells = (
            kind, len(of), *(len(b) for b in by.values()), sum(not r.refused for r in by[CHANGED]),
            unseen, sum(r.refused for r in by[SAME]),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def of_models(results: Sequence[Result]) -> str:
    """One line for each model, as Markdown."""
    lines = ["| model | ranks | mutants | change the function |", "|---|---:|---:|---:|"]
    for spec in SPECS:
        of = [r for r in results if r.model == spec.name]
        changed = sum(r.verdict.outcome == CHANGED for r in of)
        lines.append(f"| {spec.name}: {spec.what} | {spec.tp} | {len(of)} | {changed} |")
    return "\n".join(lines)
