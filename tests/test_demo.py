"""The demo runs, and notices a training that is not the same."""

from __future__ import annotations

import importlib.util
import json
import math
import operator
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import fx

from autoshard import ops

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo.py"


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(DEMO), "--out", str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_main_job(tmp_path: Path) -> None:
    """One command trains on one process and on two, shows the plan, a layer, and equal losses."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 37)
    done = _run(tmp_path, "--steps", "4", "--data", str(text))
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "10 regions over tp=2 ranks",
        "transformer.h.{0..3}.mlp",
        "ops.copy(view_1, tp2)",
        "addmm_1_reduce = ops.reduce(addmm_1, tp2, True)",
        "rank 1 on cpu",
        "the same training",
    ):
        assert expected in done.stdout
    assert "NOT" not in done.stdout
    curves = json.loads((tmp_path / "result.json").read_text())
    assert len(curves["one"]) == len(curves["split"]) == 4
    assert curves["one"][-1] < curves["one"][0]
    assert curves["one"] == pytest.approx(curves["split"], abs=1e-5)
    alone, *split = curves["perplexity"]
    assert split == pytest.approx([alone] * 2, rel=1e-5)
    assert 1 < alone < math.exp(curves["one"][0])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_differences(demo: ModuleType) -> None:
    """The difference of a step is the largest over all ranks."""
    ranks = [{"losses": [3.0, 2.0]}, {"losses": [3.5, 1.0]}]
    assert demo.differences([3.0, 2.0], ranks).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("step", "difference", "same"),
    [
        (0, 5e-6, True),
        (0, 5e-5, False),
        (50, 5e-4, True),
        (50, 5e-3, False),
        (0, float("nan"), False),
        (50, float("nan"), False),
    ],
)
def test_same(demo: ModuleType, step: int, difference: float, same: bool) -> None:
    """The first steps have the tighter bound; NaN is no rounding."""
    curve = torch.zeros(60, dtype=torch.float64)
    curve[step] = difference
    assert demo.same(curve) is same


@pytest.mark.parametrize(("loss", "perplexity"), [(3.1, 20.0), (float("nan"), 20.0), (3.0, 20.1)])
def test_a_diverged_training_is_not_the_same(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float, perplexity: float
) -> None:
    """Another curve, or perplexity, on a later rank gives a nonzero exit code."""
    ranks: list[dict[str, Any]] = [
        {"losses": [3.0, end], "plan": "", "layer": "", "elements": 1, "device": "", "seconds": 1,
         "perplexity": value}
        for end, value in ((3.0, 20.0), (loss, perplexity))
    ]  # fmt: skip
    monkeypatch.setattr(demo, "train", lambda *_args, **_kwargs: [3.0, 3.0])
    monkeypatch.setattr(demo, "run_ranks", lambda *_args: ranks)
    monkeypatch.setattr(demo, "evaluate", lambda *_args: 20.0)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--steps", "2"])
    assert demo.main() == 1


@pytest.mark.parametrize(("other", "same"), [(20.001, True), (20.1, False), (float("nan"), False)])
def test_same_perplexity(demo: ModuleType, other: float, same: bool) -> None:
    """Its logarithm has the losses' bound, on every rank."""
    ranks = [{"perplexity": value} for value in (20.0, other)]
    assert demo.same_perplexity(20.0, ranks) is same


@pytest.mark.slow
def test_failing_ranks(demo: ModuleType, tmp_path: Path) -> None:
    """Ranks that fail end the demo with an error."""
    with pytest.raises(SystemExit, match="ranks failed"):
        demo.run_ranks(tmp_path, tmp_path / "missing.txt", 1, 1)


def test_data(demo: ModuleType, tmp_path: Path) -> None:
    """The file's bytes and an end token; too short a file is refused; windows repeat."""
    file = tmp_path / "text"
    file.write_bytes(b"abc" * 100)
    tokens = demo.read_tokens(file)
    assert tokens[:3].tolist() == [97, 98, 99]
    assert tokens[-1] == demo.END
    assert all(map(torch.equal, demo.batches(tokens, 3), demo.batches(tokens, 3)))
    trained, held = demo.parted(tokens)
    assert torch.equal(torch.cat([trained, held]), tokens) and len(held) == 75
    trained, held = demo.parted(torch.arange(100_000))
    assert held[0] == trained[-1] + 1 and len(held) == demo.HELD_OUT == 2337
    file.write_bytes(b"a" * 256)
    assert len(next(demo.batches(demo.parted(demo.read_tokens(file))[0], 1))) == demo.BATCH
    file.write_bytes(b"a" * 255)
    with pytest.raises(SystemExit, match="needs 256 or more"):
        demo.read_tokens(file)


def test_layer_as_code(demo: ModuleType) -> None:
    """A line per node of the layer, no node of another one."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name, path in (("a", "h.1.mlp"), ("b", "h.10.mlp"), ("c", "h.1")):
        x = graph.create_node("call_function", torch.ops.aten.mul.Tensor, (x, 2.0), name=name)
        x.meta["nn_module_stack"] = {"0": ("", object), "1": (path, object)}
    lines = demo.layer_as_code(graph, "h.1").splitlines()
    assert lines == ["a = aten.mul.Tensor(x, 2.0)", "c = aten.mul.Tensor(b, 2.0)"]


def test_as_text(demo: ModuleType) -> None:
    """Operators and functions stand under the names that the documentation uses."""
    assert demo.as_text(torch.ops.aten.addmm.default) == "aten.addmm"
    assert demo.as_text(operator.getitem) == "operator.getitem"
    assert demo.as_text(ops.copy) == "ops.copy"
    assert demo.as_text([2, -1]) == "[2, -1]"
