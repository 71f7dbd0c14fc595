"""The command line, called as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autoshard.cli import load_model, main
from autoshard.plans import Plan
from benchmarks.models import Shape, build, tokens
from tests.test_locate import Model, Otherwise, X

FACTORY = f"{__name__}:gpt"
SIZES = ["--hardware", "h200", "--batch", "8", "--sequence", "1024"]


def gpt() -> Any:
    """A model that is worth splitting, with its inputs."""
    shape = Shape("gpt", 2048, 16, 2, 1024, 8, vocabulary=1024)
    return build(shape).bfloat16(), tokens(1024, 2, 16)


def tiny() -> Any:
    """A model that can be verified quickly."""
    return build(Shape("gpt", 32, 4, 1, 16, 2, vocabulary=64)), tokens(64, 3, 8)


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The table, the prediction by kind of cost, a scaling table, a plot, a file."""
    picture, kept = tmp_path / "scaling.png", tmp_path / "plan.json"
    arguments = ["plan", FACTORY, "--tp", "4", *SIZES, "--compare", "1,4"]
    assert main([*arguments, "--plot", str(picture), "--save", str(kept)]) == 0
    text = capsys.readouterr().out
    assert "layers.{0..1}.mlp" in text and "all-reduce" in text
    for word in ("compute", "exposed communication", "memory traffic", "optimizer", "efficiency"):
        assert word in text
    assert "1.00x" in text and "100.0%" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert Plan.load(kept).degrees["layers.0.mlp"] == 4


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures that add up."""
    assert main(["plan", FACTORY, "--tp", "4", *SIZES, "--compare", "1,2,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["name"]: r["degree"] for r in found["regions"]}["layers.0.mlp"] == 4
    rows = {row["tp"]: row for row in found["compare"]}
    assert rows[1]["efficiency"] == pytest.approx(1.0)
    assert rows[4]["step_time"] == pytest.approx(found["predicted"]["step_time"])
    assert rows[1]["step_time"] > rows[2]["step_time"] > rows[4]["step_time"]
    assert rows[4]["efficiency"] == pytest.approx(rows[1]["step_time"] / rows[4]["step_time"] / 4)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    """The region's nodes, its formula, the other degrees' costs."""
    assert main(["explain", FACTORY, "layers.0.mlp", "--tp", "4", *SIZES]) == 0
    text = capsys.readouterr().out
    assert "aten.gelu" in text and "latency" in text and "<- the plan" in text
    assert main(["explain", FACTORY, "layers.0.mlp", "--tp", "4", *SIZES, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["alternatives"]) == {"1", "2", "4"}
    assert found["degree"] == min(
        (int(d) for d in found["alternatives"]),
        key=lambda d: found["alternatives"][str(d)]["step_time"],
    )


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status says it too."""
    assert main(["verify", f"{__name__}:tiny", "--tp", "2"]) == 0
    assert "the same function" in capsys.readouterr().out
    assert main(["verify", f"{__name__}:tiny", "--tp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["max_relative_error"] < 1e-10 and found["gradients"]


def otherwise() -> Any:
    """A model whose capture is not itself."""
    return Model(Otherwise(gradient_only=False)), X


def test_verify_of_another_function(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, the worst layer, and with --locate the first place that differs."""
    arguments = ["verify", f"{__name__}:otherwise", "--tp", "2"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert text.startswith("NOT the same function") and "tolerance 1e-10: in float64" in text
    assert "gradient of layers.1." in text and "first difference" not in text
    assert main([*arguments, "--locate"]) == 1
    assert "the first difference is at layers.1.op" in capsys.readouterr().out
    assert main([*arguments, "--locate", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and found["dtype"] == "float64" and found["tolerance"] == 1e-10
    assert found["located"]["stage"] == "capture" and found["located"]["layer"] == "layers.1.op"
    assert set(found["layers"]) == {"layers.0", "layers.1"}
    assert found["worst_layer"] == next(iter(found["layers"]))


def test_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Hugging Face config, as a folder or a file; the model is built without memory."""
    import transformers

    config = transformers.GPT2Config(n_embd=1024, n_head=16, n_layer=2, vocab_size=50257)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    model, inputs = load_model(str(tmp_path))
    assert type(model).__name__ == "GPT2LMHeadModel" and inputs is None
    assert all(p.is_meta for p in model.parameters())
    arguments = ["plan", str(tmp_path / "config.json"), "--tp", "8", "--dtype", "bfloat16", "--json"]
    assert main([*arguments, "--hardware", "h200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["regions"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nothing", "--tp", "2"], "neither package.module:factory nor"),
        (["plan", "no.module:factory", "--tp", "2"], "No module named"),
        (["plan", f"{__name__}:SIZES", "--tp", "2"], "not callable"),
        (["plan", FACTORY, "--tp", "2", "--hardware", "abacus"], "known name"),
        (["plan", FACTORY, "--tp", "0"], "tp=0"),
        (["plan", FACTORY, "--tp", "2", "--batch", "0"], "batch=0"),
        (["plan", FACTORY, "--tp", "2", "--memory", "1e6"], "no choice of degrees fits"),
        (["explain", FACTORY, "layers.9", "--tp", "2"], "no region 'layers.9'"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with exit status 2."""
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_calibrate_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows no link: tp=1 is planned (in seconds that make sense), tp=2 is refused."""
    profile = tmp_path / "alone.json"
    assert main(["calibrate", "--out", str(profile)]) == 0
    capsys.readouterr()
    arguments = ["--hardware", str(profile), "--batch", "2", "--sequence", "16", "--json"]
    assert main(["plan", f"{__name__}:tiny", "--tp", "1", *arguments]) == 0
    assert 1e-5 < json.loads(capsys.readouterr().out)["predicted"]["step_time"] < 0.5
    assert main(["plan", f"{__name__}:tiny", "--tp", "2", *arguments]) == 2
    assert "knows no link" in capsys.readouterr().err


@pytest.mark.slow
def test_calibrate_two_processes(tmp_path: Path) -> None:
    """A profile of this machine, with its link, that plan() takes."""
    profile = tmp_path / "here.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "autoshard", "calibrate", "--out", str(profile), "--json"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    arguments = ["plan", FACTORY, "--tp", "2", "--hardware", str(profile), "--batch", "2"]
    assert main([*arguments, "--sequence", "64", "--json"]) == 0
    document = json.loads(profile.read_text())
    assert document["versions"]["torch"] == torch.__version__
    assert [link["ranks"] for link in document["links"]] == [2]
    assert document["overlap"] <= 1
    assert document["fit_error"]["products"] < 0.5
