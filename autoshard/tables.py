"""Plans as text: the tables that ``print(plan)`` shows.

Layers that are treated alike are one row: ``transformer.h.{0..71}.mlp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from io import StringIO
from itertools import product
from typing import TYPE_CHECKING, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autoshard.plans import ParameterShare, Plan, Predicted, Region, Whole

T = TypeVar("T")

LISTED = 5  # rows of a list that could be as long as the model
BYTES = {"float32": 4, "bfloat16": 2}
UNITS = ("B", "KiB", "MiB", "GiB")
DIRECTIONS = ("forward", "backward")


def plan_table(plan: Plan, width: int = 110) -> str:
    """The plan as plain text, without colour codes.

    Args:
        plan: made by ``plan()`` or loaded; a loaded one knows its regions and their degrees only.
        width: columns.
    """
    sections: list[list[Table | str]] = [[_regions(plan), *_tied(plan)]]
    if plan.parameters:
        sections += [_split_parameters(plan), _whole_parameters(plan), _whole_matmuls(plan)]
        sections += [_unknown(plan), _sizes(plan)]
    sections.append([f"note: {note}" for note in plan.notes])
    file = StringIO()
    console = Console(file=file, width=width, color_system=None, force_terminal=False)
    for section in filter(None, sections):
        for block in section:
            console.print(Text(block) if isinstance(block, str) else block)
        console.print()
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


# -- names ---------------------------------------------------------------------------------------


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ only in integer components, as one: ``h.0.mlp, h.1.mlp -> h.{0..1}.mlp``.

    Several components that vary are folded together where all combinations occur.
    """
    groups: dict[tuple[str, ...], dict[tuple[int, ...], None]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("#" if p.isdecimal() else p for p in parts)
        groups.setdefault(pattern, {})[tuple(int(p) for p in parts if p.isdecimal())] = None
    return [name for pattern, found in groups.items() for name in _fold(pattern, list(found))]


def _fold(pattern: tuple[str, ...], numbers: list[tuple[int, ...]]) -> list[str]:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if set(numbers) == set(product(*columns)):
        texts = iter([_ranges(column) for column in columns])
        return [".".join(next(texts) if part == "#" else part for part in pattern)]
    varying = next(i for i, column in enumerate(columns) if len(column) > 1)
    return [
        name
        for value in columns[varying]
        for name in _fold(pattern, [n for n in numbers if n[varying] == value])
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5] -> {0..2,5}``; one number stays itself."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    texts = [str(first) if first == last else f"{first}..{last}" for first, last in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def siblings(names: Iterable[str]) -> list[str]:
    """Like ``folded``, and parameters of one module as one: ``h.{0..1}.mlp.{weight,bias}``."""
    leaves: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        leaves.setdefault(parent, []).append(leaf)
    parents: dict[str, list[str]] = {}
    for parent, own in leaves.items():
        leaf = own[0] if len(own) == 1 else "{" + ",".join(own) + "}"
        parents.setdefault(leaf, []).append(parent)
    result = []
    for leaf, found in parents.items():
        result += [f"{parent}.{leaf}" if parent else leaf for parent in folded(found)]
    return result


def _pattern(name: str) -> str:
    """The name with its integer components blanked: what layers treated alike have in common."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _alike(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items with equal keys, in the order of the first of each."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# -- regions -------------------------------------------------------------------------------------


def _regions(plan: Plan) -> Table:
    title = f"{len(plan.regions)} regions over tp={plan.tp} ranks"
    table = _table(title, "region", "kind", "degree>", "axis>", "forward", "backward", "why")

    def key(region: Region) -> Hashable:
        how = region.kind, region.degree, region.axes, region.reason, _all_reduces(region)
        return _pattern(region.name), how

    for alike in _alike(plan.regions, key):
        first = alike[0]
        for name in folded(region.name for region in alike):
            axes = " | ".join(first.axes)
            row = (name, first.kind, str(first.degree), axes, *_all_reduces(first), first.reason)
            _add(table, *row)
    if plan.parameters:
        forward, backward = (sum(_count(r, d) for r in plan.regions) for d in DIRECTIONS)
        table.caption = (
            f"forward, backward: all-reduces of one step, {forward} and {backward} in all"
            + ("; small: a few numbers per token" if any(map(_is_small, plan.regions)) else "")
            + _overlap(plan)
        )
    return table


def _overlap(plan: Plan) -> str:
    """Whether all-reduces run under matmuls, and why."""
    if plan.tp == 1 or all(region.degree == 1 for region in plan.regions):
        return ""
    how = "under the weights' gradients" if plan.overlap else "before the weights' gradients"
    why = f" ({plan.overlap_reason})" if plan.overlap_reason else ""
    lines = [f"input gradients are summed {how}{why}"]
    if plan.has_costs:
        lines += plan.costs.mechanisms(plan.degrees)
    return "".join(f"\n{line}" for line in lines)


def _all_reduces(region: Region) -> tuple[str, str]:
    """How many, forward and backward; of what, where it is not whole activations."""
    texts = []
    for direction in DIRECTIONS:
        count = _count(region, direction)
        small = direction == "forward" and _is_small(region)
        texts.append(f"{count} small" if small else str(count or ""))
    return texts[0], texts[1]


def _is_small(region: Region) -> bool:
    return any(line.startswith("forward") and "scalars" in line for line in region.collectives)


def _count(region: Region, direction: str) -> int:
    lines = [line for line in region.collectives if line.startswith(direction)]
    return sum(2 if "twice" in line else 1 for line in lines)


def _tied(plan: Plan) -> list[str]:
    """The sets of regions that have one degree."""
    groups = {frozenset((r.name, *r.tied)): None for r in plan.regions if r.tied}
    names = [r.name for r in plan.regions]
    lists = [", ".join(folded(n for n in names if n in group)) for group in groups]
    return [f"one degree, for what they share: {one}" for one in lists]


# -- parameters ----------------------------------------------------------------------------------


def _split_parameters(plan: Plan) -> list[Table | str]:
    split = [p for p in plan.parameters if p.dim is not None]
    if not split:
        return []
    share = sum(p.local_numel for p in split) / max(1, plan.parameter_numel_per_rank)
    title = f"split: {len(split)} parameters, {share:.1%} of a rank's elements"
    table = _table(title, "parameter", "shape", "split", "on a rank>", "layout")
    for group in _alike(split, lambda p: (_pattern(p.name), p.shape, p.dim, p.layout)):
        first = group[0]
        local = f"{sum(p.local_numel for p in group):,}"
        for name in folded(p.name for p in group):
            _add(table, name, _shape(first), f"dim {first.dim}", local, first.layout)
    table.caption = (
        "layout: 12/2·64 is an axis of 12, half of it on a rank, times a whole one of 64; "
        "| joins what lies behind each other"
    )
    return [table]


def _whole_parameters(plan: Plan) -> list[Table | str]:
    """Parameters that every rank holds, largest first."""
    whole = [p for p in plan.parameters if p.dim is None]
    if not whole or plan.tp == 1:
        return []
    share = _elements(whole) / max(1, plan.parameter_numel_per_rank)
    title = f"whole on every rank: {len(whole)} parameters, {share:.1%} of a rank's elements"
    table = _table(title, "parameter", "shape", "elements>", "why")

    def key(parameter: ParameterShare) -> Hashable:
        module = _pattern(parameter.name.rpartition(".")[0])
        return module, parameter.shape, _without_place(parameter.reason)

    groups = sorted(_alike(whole, key), key=lambda group: -_elements(group))
    for group in groups[:LISTED]:
        names, reason = siblings(p.name for p in group), _without_place(group[0].reason)
        _add(table, "\n".join(names), _shape(group[0]), f"{_elements(group):,}", reason)
    rest = [p for group in groups[LISTED:] for p in group]
    if rest:
        _add(table, f"and {len(rest)} more", "", f"{_elements(rest):,}", "")
    return [table]


def _elements(parameters: Iterable[ParameterShare]) -> int:
    return sum(p.numel for p in parameters)


def _shape(parameter: ParameterShare) -> str:
    return "×".join(map(str, parameter.shape))


# -- matmuls -------------------------------------------------------------------------------------


def _whole_matmuls(plan: Plan) -> list[Table | str]:
    """Matmuls that every rank computes, largest first."""
    if not plan.replicated or plan.tp == 1:
        return []
    total = sum(w.flops for w in plan.replicated) / max(1e-12, 1 - plan.sharded_fraction)
    title = f"computed whole on every rank: {len(plan.replicated)} matmuls"
    table = _table(title, "matmul in", "number>", "of all FLOPs>", "why")

    def key(matmul: Whole) -> Hashable:
        return _pattern(_module(matmul)), _without_place(matmul.reason)

    groups = sorted(_alike(plan.replicated, key), key=lambda group: -sum(w.flops for w in group))
    for group in groups[:LISTED]:
        names, reason = "\n".join(folded(map(_module, group))), _without_place(group[0].reason)
        share = sum(w.flops for w in group) / total
        _add(table, names, str(len(group)), f"{share:.2%}", reason)
    rest = [w for group in groups[LISTED:] for w in group]
    if rest:
        share = sum(w.flops for w in rest) / total
        _add(table, "and others", str(len(rest)), f"{share:.2%}", "")
    return [table]


def _module(matmul: Whole) -> str:
    """``linear_3 in h.0.mlp -> h.0.mlp``: the node's number differs from layer to layer."""
    return matmul.name.partition(" in ")[2] or matmul.name


def _unknown(plan: Plan) -> list[Table | str]:
    if not plan.unknown:
        return []
    lines = [f"  {line}" for line in plan.unknown]
    return ["operators without a rule, their operands kept whole:", *lines]


def _without_place(reason: str) -> str:
    """``needs it whole (aten.sort.default at h.0 (x.py:8)) -> needs it whole (aten.sort)``."""
    return re.sub(r"\((\S+?)(?:\.\w+)? at [^()]*(?:\([^()]*\))?\)", r"(\1)", reason)


# -- sizes ---------------------------------------------------------------------------------------


def _sizes(plan: Plan) -> list[Table | str]:
    local, whole = plan.parameter_numel_per_rank, _elements(plan.parameters)
    sizes = ", ".join(f"{_in_words(local * size)} in {name}" for name, size in BYTES.items())
    lines: list[Table | str] = [
        f"parameters on a rank: {local:,} of {whole:,} elements ({local / max(1, whole):.1%})",
        f"  {sizes}",
        f"matmul FLOPs of the forward that run on a shard: {plan.sharded_fraction:.2%}",
    ]
    for p in plan.parameters:
        if p.padded and p.dim is not None:
            extra = (p.padded - p.shape[p.dim]) * p.numel // p.shape[p.dim]
            lines.append(
                f"padded while computing: {p.name} from {p.shape[p.dim]:,} to {p.padded:,} rows, "
                f"{p.padded // p.degree:,} on a rank ({extra:,} elements in all, not stored)"
            )
    return lines


# -- predictions ---------------------------------------------------------------------------------


def prediction_lines(found: Predicted, efficiency: float, tp: int) -> list[str]:
    """What a step takes: time by kind of cost, memory by what holds it, efficiency."""
    kinds = {
        "compute": found.compute_time, "memory traffic": found.memory_traffic_time,
        "exposed communication": found.exposed_communication_time, "launch": found.launch_time,
    }  # fmt: skip
    holders = {
        "parameters": found.parameter_memory, "gradients": found.gradient_memory,
        "optimizer": found.optimizer_memory, "activations": found.activation_memory,
    }  # fmt: skip
    times = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in kinds.items())
    sizes = ", ".join(f"{name} {_in_words(size)}" for name, size in holders.items())
    return [
        f"predicted step (forward and backward): {found.step_time * 1e3:.2f} ms on a rank ({times})",
        f"memory of a rank: {_in_words(found.memory_per_rank)} ({sizes})",
        f"efficiency against one GPU: {efficiency:.1%} of {tp} ranks, "
        f"{found.flops_per_rank / found.step_time / 1e12:.1f} TFLOP/s a rank",
    ]


def scaling_table(rows: Sequence[tuple[int, Predicted, float]], width: int = 110) -> str:
    """A row for each tp: time, speed-up over the first row, efficiency, memory."""
    table = _table("scaling", "tp>", "ms a step>", "speed-up>", "efficiency>", "memory of a rank")
    for tp, found, share in rows:
        faster = rows[0][1].step_time / found.step_time
        memory = _in_words(found.memory_per_rank)
        _add(table, str(tp), f"{found.step_time * 1e3:.2f}", f"{faster:.2f}x", f"{share:.1%}", memory)
    file = StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _in_words(count: float) -> str:
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} {UNITS[-1]}"


def _table(title: str, *columns: str) -> Table:
    """An empty table: only the last column is wrapped, one named ``x>`` is right-aligned."""
    table = Table(
        title=title, title_justify="left", title_style="", header_style="", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left",
        caption_style="",
    )  # fmt: skip
    for column in columns:
        table.add_column(
            column.rstrip(">"),
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
            no_wrap=column != columns[-1],
            min_width=16 if column == columns[-1] else None,
        )
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # text, not markup: a name may hold brackets
