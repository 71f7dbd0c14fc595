"""A long run: ``python -m tests.fuzz --hours 1 --write docs/fuzzing.md``."""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

import tests.conftest  # noqa: F401  (one thread, no network)
from tests.fuzz.counts import COUNTS
from tests.fuzz.laws import Broken
from tests.fuzz.machine import Machine
from tests.fuzz.report import write

MOVES = 12


def main() -> int:
    """Run until the time is over; the number of failures that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument(
        "--seed", type=int, default=None, help="of the first batch; random if not given"
    )
    parser.add_argument("--examples", type=int, default=20, help="of a batch: a seed")
    parser.add_argument("--shrink", action="store_true", help="make failures small (minutes each)")
    parser.add_argument("--write", type=Path, default=None, help="a Markdown file for the counts")
    given = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    phases = [Phase.generate, Phase.shrink] if given.shrink else [Phase.generate]
    chosen = settings(
        max_examples=given.examples, stateful_step_count=MOVES, deadline=None, database=None,
        phases=phases, suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    start, batch = time.monotonic(), first
    failures: dict[str, str] = {}
    while time.monotonic() - start < given.hours * 3600:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                run_state_machine_as_test(seed(batch)(Machine), settings=chosen)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            kind = re.sub(r"\d+", "N", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
            if kind not in failures:
                seen = "\n".join(dict.fromkeys(Broken.seen))
                failures[kind] = f"seed {batch}\n{text}\n{seen}"
                print(f"FAILURE {kind}\n{failures[kind]}\n{printed.getvalue()}", flush=True)
            Broken.seen.clear()
        COUNTS.add("run", "batches")
        batch += 1
        print(
            f"{time.monotonic() - start:6.0f} s: {COUNTS.line()}, {len(failures)} failures", flush=True
        )
    seconds = time.monotonic() - start
    print(write(COUNTS, seconds, (first, batch - 1), list(failures), given.write))
    return len(failures)


if __name__ == "__main__":
    raise SystemExit(main())
