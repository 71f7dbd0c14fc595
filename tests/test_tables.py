"""Plans as text: names folded over layers, nothing large left out, no colour codes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autoshard.plans import ParameterShare, Plan, Region, Whole
from autoshard.tables import folded, plan_table, siblings

FORWARD = "forward all-reduce of addmm"
BACKWARD = "backward all-reduce of the gradient of view"
SCALARS = "forward all-reduce of per-token scalars, twice (cross_entropy_loss)"


def _region(name: str, kind: str = "mlp", degree: int = 2, **fields: object) -> Region:
    values: dict[str, object] = {
        "degrees": (1, 2), "axes": ("256",), "parameters": (), "nodes": (), "inputs": (),
        "outputs": (), "collectives": (FORWARD, BACKWARD), "tied": (), "flops": 1,
        "reason": "256 divides by 2",
    }  # fmt: skip
    return Region(name, kind, degree, **{**values, **fields})  # type: ignore[arg-type]


def _parameter(
    name: str, shape: tuple[int, ...], dim: int | None = None, padded: int = 0, reason: str = ""
) -> ParameterShare:
    whole, degree = math.prod(shape), 1 if dim is None else 2
    layout = "" if dim is None else f"{shape[dim]}/2"
    return ParameterShare(name, shape, dim, degree, layout, -(-whole // degree), padded, reason)


NORM = "normalized over this axis (aten.layer_norm.default at h.{}.ln (modeling.py:12))"


def _plan(layers: int = 3, **fields: object) -> Plan:
    regions = [
        _region("wte", "embedding", axes=("50257",), collectives=(FORWARD,), tied=("head",)),
        *(_region(f"h.{i}.mlp") for i in range(layers)),
        _region("head", "loss", axes=("50257",), collectives=(SCALARS, BACKWARD), tied=("wte",)),
    ]
    parameters = [_parameter("wte.weight", (50257, 8), dim=0, padded=50432)]
    for i in range(layers):
        parameters += [
            _parameter(f"h.{i}.mlp.fc.weight", (8, 256), dim=1),
            _parameter(f"h.{i}.ln.weight", (8,), reason=NORM.format(i)),
            _parameter(f"h.{i}.ln.bias", (8,), reason=NORM.format(i)),
        ]
    return Plan(2, tuple(regions), tuple(parameters), sharded_fraction=1.0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.mlp", "h.1.mlp"], ["h.{0..1}.mlp"]),
        (["h.0.mlp"], ["h.0.mlp"]),
        (["h.0.mlp", "h.2.mlp", "h.3.mlp"], ["h.{0,2..3}.mlp"]),
        (["h.0.mlp", "h.1.attn"], ["h.0.mlp", "h.1.attn"]),
        (["lm_head", "h.0", "h.1"], ["lm_head", "h.{0..1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0..1}.b.{0..1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.{0..1}", "a.1.b.0"]),
        (["h10.mlp", "h11.mlp"], ["h10.mlp", "h11.mlp"]),
        (["2.w", "10.w", "3.w"], ["{2..3,10}.w"]),
        ([], []),
    ],
)
def test_folded(names: list[str], expected: list[str]) -> None:
    """Only whole integer components are folded, and only where every combination occurs."""
    assert folded(names) == expected


def test_siblings() -> None:
    """Parameters of one module are one name."""
    names = [f"h.{i}.ln.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    names += ["scale", "h.0.fc.weight"]
    assert siblings(names) == ["h.{0..1}.ln.{weight,bias}", "scale", "h.0.fc.weight"]


def test_layers_are_one_row() -> None:
    """Layers treated alike are one row, and a layer treated differently has a row of its own."""
    text = plan_table(_plan(72))
    assert len([line for line in text.splitlines() if line.startswith("h.{0..71}.mlp ")]) == 1
    regions = [r if r.name != "h.5.mlp" else _region("h.5.mlp", degree=1) for r in _plan(8).regions]
    text = plan_table(Plan(2, tuple(regions)))
    assert "h.{0..4,6..7}.mlp" in text
    assert "h.5.mlp" in text


def test_length_does_not_grow_with_layers() -> None:
    """The table of 72 layers has as many lines as that of 3."""
    assert len(plan_table(_plan(72)).splitlines()) == len(plan_table(_plan(3)).splitlines())


def test_numbers() -> None:
    """Elements and bytes of a rank, padding, and all-reduces are those of the plan."""
    plan = _plan(3)
    text = plan_table(plan)
    local = plan.parameter_numel_per_rank
    assert f"{local:,} of {sum(p.numel for p in plan.parameters):,} elements" in text
    assert f"{4 * local / 1024:.4g} KiB in float32" in text
    assert "wte.weight from 50,257 to 50,432 rows, 25,216 on a rank (1,400 elements" in text
    # wte 1, three layers 1 each, head 2; backward: three layers and the head
    assert "6 and 4 in all" in text
    assert "one degree, for what they share: wte, head" in text


def test_what_stays_whole() -> None:
    """Whole parameters and matmuls stand with their reason, unknown operators with their place."""
    replicated = (
        Whole("linear_7 in h.1.router", 600, "sorted (aten.sort.default at h.1 (x.py:3))"),
        Whole("linear_2 in h.0.router", 600, "sorted (aten.sort.default at h.0 (x.py:3))"),
        Whole("linear in head", 50, "no region"),
    )
    unknown = ("aten.fft.default at h.0.mix (x.py:9)",)
    plan = _plan(2, replicated=replicated, unknown=unknown, notes=("made by hand",))
    plan = Plan(**{**plan.__dict__, "sharded_fraction": 0.75})
    text = plan_table(plan)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "h.{0..1}.ln.{weight,bias} 8 32 normalized over this axis (aten.layer_norm)" in lines
    assert "h.{0..1}.router 2 24.00% sorted (aten.sort)" in lines
    assert "head 1 1.00% no region" in lines
    assert "aten.fft.default at h.0.mix (x.py:9)" in lines
    assert "matmul FLOPs of the forward that run on a shard: 75.00%" in lines
    assert "note: made by hand" in lines


def test_plain_text() -> None:
    """No colour codes, no trailing blanks, not wider than asked, brackets as they are."""
    plan = Plan(2, (_region("layers.[red]0.mlp", reason="a reason " * 30),))
    for text in (plan_table(plan, width=100), str(_plan())):
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in text.splitlines())
    assert max(map(len, plan_table(plan, width=100).splitlines())) <= 100
    assert "layers.[red]0.mlp" in plan_table(plan)


def test_of_a_loaded_plan(tmp_path: Path) -> None:
    """A plan read from a file knows its regions and degrees, and shows them."""
    _plan().save(tmp_path / "plan.json")
    text = str(Plan.load(tmp_path / "plan.json"))
    assert "h.{0..2}.mlp" in text
    assert "read from plan.json" in text
    assert "parameters on a rank" not in text


def test_of_one_rank() -> None:
    """At tp=1 nothing is called whole: there is nothing else."""
    plan = Plan(1, (), (_parameter("w", (4, 4)),), (Whole("linear in fc", 3, "x"),))
    assert "whole" not in plan_table(plan)
