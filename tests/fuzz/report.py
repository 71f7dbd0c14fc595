"""The counts of a run as Markdown."""

from __future__ import annotations

import time
from pathlib import Path

from tests.fuzz.counts import Counts

MARK = "<!-- counts -->"
TITLES = {
    "laws": "Laws checked",
    "rules": "Moves made",
    "blocks": "Blocks of the models",
    "plans": "Plans",
    "refusals": "Refused, by reason",
    "steps": "Steps of the programs",
}


def write(
    counts: Counts, seconds: float, seeds: tuple[int, int], failures: list[str], path: Path | None
) -> str:
    """The counts of a run; also put into a file, behind its mark."""
    text = "\n".join(_lines(counts, seconds, seeds, failures)) + "\n"
    if path is not None:
        before = path.read_text().split(MARK)[0] if path.exists() else ""
        path.write_text(f"{before}{MARK}\n\n{text}")
    return text


def _lines(counts: Counts, seconds: float, seeds: tuple[int, int], failures: list[str]) -> list[str]:
    lines = [
        f"{seconds / 60:.0f} minutes ({time.process_time() / 60:.0f} of one processor, rank "
        f"processes not counted), seeds {seeds[0]} to {seeds[1]}: "
        f"{counts.total('models'):,} models, {counts.total('rules'):,} moves, "
        f"{counts.total('plans'):,} plans, {counts.total('laws'):,} checks of laws, "
        f"{counts.total('refusals'):,} refusals, {len(failures)} failures.",
        "",
    ]
    for group, title in TITLES.items():
        found = counts.groups.get(group)
        if not found:
            continue
        lines += [f"| {title} | |", "|---|---|"]
        lines += [f"| {name.replace('|', '/')} | {number:,} |" for name, number in found.most_common()]
        lines.append("")
    lines += [f"- {failure}" for failure in failures]
    return lines
