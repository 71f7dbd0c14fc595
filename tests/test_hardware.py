"""Machines as data: presets, profiles, and the fit of measurements."""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoshard import flow
from autoshard.cost_model import measure, operators
from autoshard.cost_model.fit import fit, nonnegative
from autoshard.cost_model.hardware import LEAST_PASSES, PROFILES, HardwareError, at_hand, load, presets

MEASURED = Path(__file__).resolve().parent.parent / "benchmarks" / "measured"


def test_presets() -> None:
    """Those that are promised are there, with a source, and link as many ranks as a node has."""
    assert {"v100", "a100", "h100", "h200", "cpu"} <= set(presets())
    for name in presets():
        hardware = load(name)
        assert hardware.source
        assert set(hardware.passes) == set(LEAST_PASSES)
        assert set(hardware.host) >= {"kernel", "view", "product", "attention", "collective"}
        assert set(hardware.attention) == {"causal", "full", "masked"}
        if name != "h200-x1":
            assert hardware.link(8).bandwidth > 0
    assert load("v100").link(8).bandwidth > load("v100").link(32).bandwidth


@pytest.mark.parametrize("name", ["h200", "h200-x1", "h100"])
def test_measured_presets_say_when_and_how_well(name: str) -> None:
    """Date, versions, and the fit's error."""
    hardware = load(name)
    assert hardware.date and hardware.versions["torch"]
    assert 0 < hardware.fit_error["products"] < 0.1


def test_a_profile_of_one_device_knows_no_link() -> None:
    """What to do is said."""
    with pytest.raises(HardwareError, match="measured on one device"):
        load("h200-x1").link(2)


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla V100-SXM2-32GB", "v100"),
     ("NVIDIA L4", "h100")],
)  # fmt: skip
def test_the_gpu_at_hand_has_its_profile(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str
) -> None:
    """By its name; one that has none is planned for as an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert at_hand() == load(name)


def test_every_name_that_is_measured_has_a_default() -> None:
    """An operator of the work, one that calibrate times, and the rewriting's loss: one spelling."""
    assert {name for name, _ in operators.NAMED.values()} <= set(LEAST_PASSES)
    assert set(measure.OPERATORS) | {"vocab_cross_entropy"} <= set(LEAST_PASSES)
    assert operators.LOSS == flow.LOSS


def test_saved_and_read(tmp_path: Path) -> None:
    """As it was."""
    load("h200").save(tmp_path / "mine.json")
    again = load(tmp_path / "mine.json")
    assert again == load("h200")
    assert load(str(tmp_path / "mine.json")) == again


LANE = {"multiprocessors": 24, "left": 32, "slower": 1.2, "share": 0.8}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory", None),
        ("memory", 0),
        ("bandwidth", "fast"),
        ("flops", {}),
        ("flops", {"bfloat16": -1}),
        ("fill", [1, 2]),
        ("kernel", -1e-6),
        ("host", {"kernel": [1e-6]}),
        ("attention", {k: [0, 0] for k in ("causal", "full", "masked")}),
        ("attention", {"causal": [1e12, 1e12]}),
        ("links", {"ranks": 8}),
        ("links", [{"ranks": 8, "latency": 1e-5, "bandwidth": 0}]),
        ("tile", [128]),
        ("lanes", {"left": 8}),
        ("lanes", [LANE] * 3),
        ("lanes", [LANE | {"slower": 0.9}]),
        ("lanes", [LANE | {"share": 0}]),
        ("lanes", [LANE | {"left": 132}]),
        ("multiprocessors", 8),
        ("autoshard_hardware", 2),
    ],
)
def test_a_malformed_profile_names_the_field(tmp_path: Path, field: str, value: Any) -> None:
    """And the file."""
    document = json.loads((PROFILES / "h200.json").read_text()) | {field: value}
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(HardwareError, match=rf"bad\.json.*{field}"):
        load(tmp_path / "bad.json")


def test_what_is_no_profile(tmp_path: Path) -> None:
    """No file, no JSON."""
    with pytest.raises(HardwareError, match="neither a known name"):
        load("gpu")
    (tmp_path / "text.json").write_text("fast")
    with pytest.raises(HardwareError, match="no JSON"):
        load(tmp_path / "text.json")


def test_nonnegative_least_squares() -> None:
    """Exact where there is an exact solution; no coefficient below zero."""
    generator = np.random.default_rng(0)
    features = generator.uniform(1, 2, (30, 3))
    np.testing.assert_allclose(nonnegative(features, features @ [2.0, 0.0, 3.0]), [2, 0, 3], atol=1e-9)
    assert (nonnegative(features, features @ [2.0, -1.0, 3.0]) >= 0).all()


HOST = ("kernel", "view", "product", "attention", "collective", "step")


def made_up() -> dict[str, Any]:
    """Measurements of a machine whose constants are known."""
    rate, fill, bandwidth, kernel = 2e14, (20.0, 30.0, 40.0), 1e12, 1e-6
    gemms = [
        (m, n, k, 2 * m * n * k / rate * (1 + fill[0] / m + fill[1] / n + fill[2] / k) + kernel)
        for m in (512, 2048) for n in (256, 1024, 4096) for k in (256, 2048)
    ]  # fmt: skip
    attention = [
        (b, h, s, 64, how, 4 * b * h * s * s * 64 / 1e14, 10 * b * h * s * s * 64 / 5e13)
        for how in ("causal", "full", "masked") for b, h, s in ((1, 1, 64), (8, 16, 512), (8, 16, 1024))
    ]  # fmt: skip
    return {
        "device": "made up", "memory": 2**34, "versions": {"torch": "0"}, "dtype": "bfloat16",
        "itemsize": 2, "gemms": gemms, "attention": attention,
        "passes": [(2**e, 6 * 2**e / bandwidth + kernel) for e in (4, 20, 24, 28)],
        "operators": [
            ("gelu", 8192, c, 4 * 8192 * c / bandwidth, 6 * 8192 * c / bandwidth) for c in (1024, 4096)
        ],
        "host": {kind: [1e-5, 2e-5] for kind in HOST},
        "collectives": [
            ("all_reduce", d, 2**e, 1e-5 * np.log2(d) + 2 * (d - 1) / d * 2**e / 3e11)
            for d in (2, 4) for e in range(10, 29, 2)
        ],
    }  # fmt: skip


def test_the_fit_finds_known_constants() -> None:
    """Of measurements without noise."""
    found = fit(made_up(), "mine", "2026-01-01")
    assert found.flops["bfloat16"] == pytest.approx(2e14)
    assert found.fill == pytest.approx((20.0, 30.0, 40.0), rel=1e-6)
    assert found.bandwidth == pytest.approx(1e12, rel=1e-3)
    assert found.kernel == pytest.approx(1e-6, rel=1e-3)
    assert found.attention["full"] == pytest.approx((1e14, 5e13))
    assert found.passes["gelu"] == pytest.approx((2.0, 3.0), rel=1e-3)
    assert [link.ranks for link in found.links] == [2, 4]
    for link in found.links:
        assert link.latency == pytest.approx(1e-5) and link.bandwidth == pytest.approx(3e11)
    assert max(found.fit_error.values()) < 1e-2


def test_a_noisy_link_still_has_a_bandwidth() -> None:
    """Times that do not grow with the size: the largest says how much passes at least."""
    noisy = made_up()
    noisy["collectives"] = [("all_reduce", 2, 2**e, 1e-3 * (30 - e)) for e in range(10, 24)]
    link = fit(noisy, "mine", "2026-01-01").links[0]
    assert 0 < link.bandwidth < float("inf") and link.latency >= 0


@pytest.mark.parametrize(
    ("file", "name"), [("h200-x2", "h200"), ("h200-x1", "h200-x1"), ("h100-x1", "h100")]
)
def test_presets_are_the_fit_of_what_was_measured(file: str, name: str) -> None:
    """Nothing but what the source says was changed by hand. The fit's last digit is the processor's."""
    same = partial(pytest.approx, rel=1e-9)
    found = fit(json.loads((MEASURED / f"{file}-calibration.json").read_text()), name, load(name).date)
    preset = load(name)
    assert preset.flops["bfloat16"] == same(found.flops["bfloat16"])
    assert preset.fill == same(found.fill) and preset.bandwidth == same(found.bandwidth)
    for mine, theirs in zip(preset.links, found.links, strict=False):
        assert astuple(mine) == same(astuple(theirs))
    if preset.lanes:  # not measured: those of the preset of this GPU
        assert (found.lanes, found.multiprocessors) == (preset.lanes, preset.multiprocessors)
    assert preset.attention.keys() == found.attention.keys()
    for kernel, rates in found.attention.items():
        assert preset.attention[kernel] == same(rates)
