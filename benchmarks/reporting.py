"""Rows of `benchmarks/step.py` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADINGS = (
    "contestant", "step ms", "quartiles", "to plain", "to limit", "TFLOP/s", "GiB", "busy",
    "comm. ms", "exposed", "host ms", "collectives", "right",
)  # fmt: skip


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """One line of text for each row that was measured."""
    medians = {row["name"]: row["seconds"] for row in rows if "seconds" in row}

    def ratio(row: Row, to: str) -> str:
        return f"{medians[to] / row['seconds']:.3f}" if to in medians else ""

    lines = []
    for row in rows:
        if "seconds" not in row:
            continue
        # A compiled one is compared with the limit compiled so; every family with its own model.
        limits = {"compiled": "limit-compiled", "layers": "limit-compiled", "graphs": "limit-graphs"}
        limit = limits.get(row["name"].rpartition("-")[2], "limit")
        plain = "plain" if row["family"] == "gpt" else row["family"]
        lines.append([
            row["name"],
            f"{1e3 * row['seconds']:.2f}",
            " to ".join(f"{1e3 * q:.2f}" for q in row["quartiles"]),
            ratio(row, plain),
            ratio(row, limit),
            _number(row["flops_per_second"], 1e-12, 0),
            _number(row["peak_bytes"], 2**-30, 2),
            _number(row["busy_share"], 100, 0, " %"),
            _number(row["communication_seconds"], 1e3, 2),
            _number(row["exposed_communication_seconds"], 1e3, 2),
            f"{1e3 * row['host_seconds']:.2f}",
            f"{row['collectives']:g}",
            {True: "yes", False: "NO", None: "not meant to be"}[row["right"]],
        ])  # fmt: skip
    return lines


def _number(value: float | None, scale: float, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:.{digits}f}{unit}"


def table(rows: Sequence[Row]) -> str:
    """The measured rows, by rich where it is installed; what was left out is said below."""
    lines = cells(rows)
    out = [f"{row['name']}: left out: {row['left_out']}" for row in rows if "left_out" in row]
    return "\n".join([_by_rich(lines) if _has_rich() else _plain(lines), *out])


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def _by_rich(lines: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in lines:
        made.add_row(*line)
    file = StringIO()
    Console(file=file, width=200, color_system=None, force_terminal=False).print(made)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _plain(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(HEADINGS, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (HEADINGS, *lines)
    )


def draw(document: Row, path: Path) -> None:
    """Medians with quartiles, one bar for each contestant. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in reversed(document["rows"]) if "seconds" in row]
    middle = [1e3 * row["seconds"] for row in rows]
    low = [1e3 * (row["seconds"] - row["quartiles"][0]) for row in rows]
    high = [1e3 * (row["quartiles"][1] - row["seconds"]) for row in rows]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(rows)))
    axes.barh([row["name"] for row in rows], middle, xerr=(low, high), color="tab:blue", capsize=3)
    for index, value in enumerate(middle):
        axes.text(0, index, f" {value:.4g}", va="center", color="white")
    axes.set_xlabel("ms for one forward and backward: median, quartiles")
    axes.set_title(f"{document['shape_name']}, tp={document['tp']}, {document['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
