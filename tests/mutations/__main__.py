"""``python -m tests.mutations``: every mutant of every model; writes ``docs/mutations.md``.

``python -m tests.mutations gpt2 t5`` examines these models alone, and only prints.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tests.mutations.campaign import Result, chosen, examined, missed, of_models, right, table
from tests.mutations.faults import NUMBER, OPERAND, STREAM
from tests.mutations.judge import CHANGED, EQUAL, RAISED, SAME, Judge
from tests.mutations.subjects import SPECS

PAGE = Path(__file__).parents[2] / "docs" / "mutations.md"
OTHERS = 40  # of each model, of the two kinds that are no faults of splitting
TEXT = """# Mutants

Right rewritten graphs of eight small models, one fault made in each copy, at every place where it
can be made. Whether a fault changes the function is decided by neither of the two checks, but by
real gloo ranks: they run the graph in float64, forward and backward, and each compares its outputs,
and its share of every gradient, with the plain model. Parameters are perturbed, tokens stand on
both sides of every border between shards, some labels are ignored, padding holds garbage. A mutant
is *equivalent* where all of this is the same to {equal:g}. Faults in random state are judged by
masks: ranks drop alike exactly where they drop elements of one value, and PyTorch's own generator
is not drawn from.

What changes the function is to be refused by the proof (`autoshard/passes/prove.py`) before it
runs, and seen by `verify`, which may also be unable to run it (random state excepted: `verify`
turns dropout off).

`python -m tests.mutations` writes this page (torch {torch}, transformers {transformers}). In every
`make test`, `tests/mutations/test_mutations.py` examines a part: of each kind and model so many,
from the first to the last at equal distances.

**{mutants} mutants, {changed} of them change the function. The proof misses {accepted}, `verify`
misses {blind}.**

## By kind of fault

{kinds}

Of those that change the function the smallest relative error is {least:.0e}, of the equivalent ones
the largest {most:.0e}.

*Raise on the ranks*: they stop with an error, so that nothing wrong can go unnoticed; the proof
refuses {refused} of these {raised} too. *Equivalent, yet refused*: on the judge's inputs there is
no difference, which need not mean that there is none on others: a slice of a table that is longer
than the sequence, a bound of token ids that no token reaches. None of these is a graph that the
passes write. The last two kinds are no faults of splitting, and {others} of each are taken of each
model, at equal distances.

## By model

{models}
"""


def page(results: Sequence[Result]) -> str:
    """The text of the page."""
    lost = missed(results)
    raised = [r for r in results if r.verdict.outcome == RAISED]
    seen = [r for r in results if r.kind != STREAM]
    return TEXT.format(
        least=min(r.verdict.error for r in seen if r.verdict.outcome == CHANGED),
        most=max(r.verdict.error for r in seen if r.verdict.outcome == SAME),
        equal=EQUAL,
        torch=torch.__version__,
        transformers=transformers.__version__,
        mutants=len(results),
        changed=sum(r.verdict.outcome == CHANGED for r in results),
        accepted=sum(not r.refused for r in lost),
        blind=sum(r.seen is False for r in lost),
        kinds=table(results),
        refused=sum(r.refused for r in raised),
        raised=len(raised),
        others=OTHERS,
        models=of_models(results),
    )


def main(names: Sequence[str]) -> int:
    """Examine and print; 1 where anything is missed, or where a graph without a fault is not right."""
    begun = time.monotonic()
    specs = [s for s in SPECS if not names or s.name in names]
    results: list[Result] = []
    wrong: list[str] = []
    for world in sorted({s.tp for s in specs}):
        with Judge(world) as judge:
            for spec in (s for s in specs if s.tp == world):
                for made, found in chosen(spec, {NUMBER: OTHERS, OPERAND: OTHERS}):
                    wrong += right(judge, made)
                    results += examined(judge, made, found)
                minutes = (time.monotonic() - begun) / 60
                print(f"{spec.name}: {len(results)} mutants, {minutes:.0f} min", file=sys.stderr)
    print(table(results))
    for line in (*wrong, *missed(results)):
        print(line)
    if not names:
        PAGE.write_text(page(results))
    return bool(wrong or missed(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
