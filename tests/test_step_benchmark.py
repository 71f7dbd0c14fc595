"""The benchmark of steps: every contestant has its row, and who computes something else is found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from autoshard.cost_model.hardware import Link
from autoshard.pipeline import analyse
from benchmarks import step
from benchmarks.contestants import CONTESTANTS, Setting, check, make, reference, that_fit
from benchmarks.kernels import covered, is_communication, summary
from benchmarks.reporting import HEADINGS, cells, table
from tests.distributed import run_distributed

SIZES = ["--cpu", "--preset", "tiny", "--layers", "1", "--rounds", "3", "--block", "1"]


def _setting() -> Setting:
    shape = replace(step.SMALL, layers=1)
    return Setting(shape, torch.device("cpu"), torch.float32, "eager")


def _rows(path: Path, wanted: list[str]) -> dict[str, Any]:
    document = json.loads(path.read_text())
    assert document["device"] == "cpu" and document["shape"]["layers"] == 1
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == wanted
    for name, row in rows.items():
        if "left_out" in row:
            assert name == "megatron" and "No module named 'megatron'" in row["left_out"]
            continue
        assert len(row["turns"]) == 3 and 0 < min(row["turns"]) < 60
        assert row["seconds"] == sorted(row["turns"])[1]
        low, high = row["quartiles"]
        assert min(row["turns"]) <= low <= row["seconds"] <= high <= max(row["turns"])
        assert row["host_seconds"] > 0
        compiled = name.endswith(("-compiled", "-layers", "-graphs"))
        assert (row["graphs"] > 0) == compiled, name
        if compiled:
            assert row["peak_bytes"] is None
        else:  # parameters and their gradients, at the least
            held = 12 * 64**2 / document["tp"]
            assert 2 * 4 * held < row["peak_bytes"] < 2**28
        assert row["busy_share"] is None  # no GPU
    return rows


def _on_two_ranks(backend: str, path: str, wrong: str) -> tuple[int, int]:
    """The exit status with all contestants, and with the limit said to compute the model."""
    held: list[Any] = []

    def once(*arguments: Any) -> Any:
        """One capture for all that autoshard splits: it is the same each time."""
        if not held:
            held.append(analyse(*arguments))
        return held[0]

    entries = {**CONTESTANTS, "limit": replace(CONTESTANTS["limit"], checked=True)}
    with mock.patch("autoshard.api.analyse", once):
        status = step.main([*SIZES, "--backend", backend, "--out", path])
        with mock.patch.object(step, "CONTESTANTS", entries):
            return status, step.main([*SIZES, "--only", "plain,limit", "--out", wrong])


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """All contestants agree; collectives are those of the scheme, and none in the limit.

    A model without its collectives that claims to be the model is not measured: exit status 1.
    """
    path, wrong = tmp_path / "two.json", tmp_path / "wrong.json"
    found = run_distributed(_on_two_ranks, 2, "eager", str(path), str(wrong), timeout=300)
    assert found == [(0, 1)] * 2
    rows = {row["name"]: row for row in json.loads(wrong.read_text())["rows"]}
    assert rows["limit"]["right"] is False and "loss off by" in rows["limit"]["left_out"]
    assert "seconds" not in rows["limit"] and rows["plain"]["right"] is True
    assert "limit: left out: loss off by" in table(list(rows.values()))
    rows = _rows(path, that_fit(2))
    assert set(rows) >= {"plain", "limit", "autoshard-layers", "hand-overlap", "megatron", "dtensor"}
    whole = rows["plain"]["loss"]
    for name, row in rows.items():
        if "left_out" in row:
            continue
        if name.startswith("limit"):
            assert row["right"] is None and row["collectives"] == 0
            assert abs(row["loss"] - whole) > 0.1
            continue
        assert row["right"] is True and row["agreement"]["gradient_error"] < 1e-4
        assert row["loss"] == pytest.approx(whole, rel=1e-5)
        # A layer: two forward and two backward; the embedding's, the head's, and those of the loss.
        of_loss = 2 if name.startswith("autoshard") else 3
        if name.startswith("hand-sequence"):  # twice as many, and the sum of what each rank has whole
            assert row["collectives"] == 2 * (4 + 2) + of_loss + 1, name
        elif not name.startswith(("dtensor", "plain")):
            assert row["collectives"] == 4 + 2 + of_loss, name
    assert rows["plain"]["collectives"] == 0 < rows["dtensor"]["collectives"]
    assert rows["autoshard-compiled"]["graphs"] == 1
    assert rows["autoshard"]["peak_bytes"] < rows["plain"]["peak_bytes"]


@pytest.mark.slow
def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of Hugging Face beside autoshard with tp=1; the picture is drawn."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    path, picture = tmp_path / "one.json", tmp_path / "one.png"
    gpt2, llama = ([n for n in that_fit(1) if kind in n] for kind in ("hf-gpt2", "hf-llama"))
    assert len(gpt2) == len(llama) == 4
    chosen = gpt2 + [n for n in llama if "compiled" not in n]
    files = ["--out", str(path), "--plot", str(picture)]
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 8}
    try:
        with torch._dynamo.config.patch(**limits):
            assert step.main([*SIZES, "--backend", "eager", "--only", ",".join(chosen), *files]) == 0
    finally:
        torch._dynamo.reset()
    rows = _rows(path, chosen)
    for name, row in rows.items():
        assert row["right"] is True and row["collectives"] == 0
        assert row["loss"] == pytest.approx(rows[row["family"]]["loss"], rel=1e-5), name
    assert picture.read_bytes().startswith(b"\x89PNG")


def _pretended(how: str) -> list[tuple[tuple[int, ...], bool]]:
    """Sizes of the collectives of a step, and whether they run beside; nothing is sent on a CPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from benchmarks import pretended

    calls: list[tuple[tuple[int, ...], bool]] = []

    class Noted(pretended.PretendedGroup):
        def __init__(self, rank: int, size: int, link: Link) -> None:
            dist.ProcessGroup.__init__(self, rank, size)

        def _send(self, x: Tensor, share: float, asynchronous: bool) -> dist.Work:
            calls.append((tuple(x.shape), asynchronous))
            return pretended._Done([])

    pretended.PretendedGroup = Noted  # type: ignore[misc]
    pretended.register("h200", "cpu")
    dist.init_process_group("pretended", store=FakeStore(), rank=0, world_size=2)
    s = Setting(replace(step.SMALL, layers=1), torch.device("cpu"), torch.float32, "aot_eager", 0, 2)
    one = make(how, s)
    one.step()
    calls.clear()
    one.step()
    return calls


@pytest.mark.slow
def test_pretended_links() -> None:
    """Every collective of a step gets there; those of input gradients run beside the matmuls."""
    (calls,) = run_distributed(_pretended, 1, "autoshard", process_group=False, timeout=120)
    whole, rows, tokens = (2, 32, 64), (64, 64), (64,)
    forward = [(shape, False) for shape in (whole, rows, rows, tokens, (2, *tokens))]
    assert calls == [*forward, *[(rows, True)] * 3]
    (calls,) = run_distributed(_pretended, 1, "autoshard-compiled", process_group=False, timeout=120)
    assert [shape for shape, _ in calls] == [whole] * 3 + [tokens, (2, *tokens)] + [rows] * 3


def _alone(path: str) -> int:
    return step.main([*SIZES, "--alone", "2", "--only", "limit,autoshard,hand", "--out", path])


@pytest.mark.slow
def test_one_rank_alone(tmp_path: Path) -> None:
    """Its collectives are called, and nothing is compared: no other rank answers."""
    path = tmp_path / "alone.json"
    assert run_distributed(_alone, 1, str(path), process_group=False, timeout=200) == [0]
    document = json.loads(path.read_text())
    assert document["alone"] is True and document["tp"] == 2
    rows = {row["name"]: row for row in document["rows"]}
    assert [row["right"] for row in rows.values()] == [None] * 3
    called = {name: row["collectives"] for name, row in rows.items()}
    assert called == {"limit": 0, "autoshard": 4 + 2 + 2, "hand": 4 + 2 + 3}


def test_who_is_for_how_many_ranks() -> None:
    """A contestant for several ranks cannot be chosen for one."""
    assert set(that_fit(1)) | set(that_fit(2)) == set(CONTESTANTS)
    with pytest.raises(SystemExit, match="hand is not for 1 ranks"):
        step.main([*SIZES, "--only", "plain,hand"])


@pytest.mark.parametrize("fault", ["gradient", "no gradient", "loss", "nan"])
def test_one_wrong_number_is_found(fault: str) -> None:
    """One gradient that is off, or missing, or a loss that is, or that is no number."""
    s = _setting()
    expected = reference("gpt", s)
    good = make("plain", s)
    assert check(good, s, expected).ok
    step_of = type(good).step

    def spoilt(self: Any) -> torch.Tensor:
        loss = step_of(self)
        parameter = self.parameters["layers.0.fc.weight"]
        if fault == "gradient":
            parameter.grad[3] *= 1.01
        elif fault == "no gradient":
            parameter.grad = None
        elif fault == "nan":
            parameter.grad[0, 0] = math.nan
        return loss * 1.01 if fault == "loss" else loss

    with mock.patch.object(type(good), "step", spoilt):
        found = check(good, s, expected)
    assert not found.ok
    assert fault == "loss" or found.worst == "layers.0.fc.weight"


def test_losses_at_full_size() -> None:
    """Rounding in bfloat16 is no fault, a loss that is 3 % off is; the limit is not judged."""
    rows: dict[str, Any] = {
        "plain": {"family": "gpt", "loss": 10.0, "right": True},
        "hand": {"family": "gpt", "loss": 10.03, "right": True},
        "dtensor": {"family": "gpt", "loss": 10.3, "right": True},
        "limit": {"family": "gpt", "loss": 11.0, "right": None},
        "hf-gpt2": {"family": "hf-gpt2", "loss": 3.0, "right": True},
        "megatron": {"family": "gpt", "left_out": "no"},
    }
    step.compare_losses(rows, torch.bfloat16)
    assert [r.get("right") for r in rows.values()] == [True, True, False, None, True, None]
    step.compare_losses(rows, torch.float32)
    assert rows["hand"]["right"] is False


def test_what_a_gpu_did() -> None:
    """Unions of intervals; a copy counts as computing; the compiler's kernels are none of NCCL's."""
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4 and covered([]) == 0

    def event(category: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}

    events = [
        event("kernel", "sm90_xmma_gemm", 0, 10),
        event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 8, 6),
        event("kernel", "triton_poi_fused_add_all_reduce_wait_tensor", 20, 4),
        event("gpu_memset", "Memset (Device)", 23, 3),
        event("gpu_user_annotation", "nccl:all_reduce", 0, 100),
        event("cpu_op", "c10d::allreduce_", 0, 1),
        event("cpu_op", "_c10d_functional::all_reduce", 0, 1),
        event("cpu_op", "c10d::barrier", 0, 1),
        {"ph": "M", "name": "process_name"},
    ]
    found = summary(events, 2)
    assert found["collectives"] == 0.5 and found["kernels"] == 2
    assert found["busy_seconds"] == pytest.approx(10e-6)
    assert found["communication_seconds"] == pytest.approx(3e-6)
    assert found["exposed_communication_seconds"] == pytest.approx(2e-6)
    assert summary(events[5:], 1)["busy_seconds"] is None
    assert is_communication("two_shot_all_reduce_kernel") and not is_communication("gemm")


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rich and without; a compiled contestant is compared with the compiled limit."""
    measured = {
        "family": "gpt", "quartiles": [0.9, 1.1], "flops_per_second": 5e14, "peak_bytes": 2**31,
        "busy_share": 0.9, "communication_seconds": 0.1, "exposed_communication_seconds": 0.05,
        "host_seconds": 0.2, "collectives": 9.0, "right": True,
    }  # fmt: skip
    times = {
        "plain": 4.0, "limit": 2.0, "limit-compiled": 1.0, "limit-graphs": 0.5, "hand": 4.0,
        "hand-layers": 2.0, "autoshard-graphs": 1.0,
    }  # fmt: skip
    rows = [{"name": name, "seconds": seconds, **measured} for name, seconds in times.items()]
    ratios = {line[0]: line[3:5] for line in cells(rows)}
    assert ratios["hand"] == ["1.000", "0.500"] and ratios["hand-layers"] == ["2.000", "0.500"]
    assert ratios["autoshard-graphs"] == ["4.000", "0.500"]
    with_rich = table(rows)
    monkeypatch.setattr("benchmarks.reporting._has_rich", lambda: False)
    for text in (with_rich, table(rows)):
        assert all(heading in text for heading in HEADINGS)
        assert "hand-layers" in text and "2000.00" in text and "90 %" in text


def test_flops() -> None:
    """As counted by hand for one layer; models of Hugging Face are not counted."""
    shape = replace(step.SMALL, layers=1)
    tokens, hidden = 64, 64
    matrices = 6 * tokens * (12 * hidden**2 + 256 * hidden)
    scores = 3 * 2 * 2 * 2 * 32 * 32 * hidden // 2
    assert step.flops(shape, "gpt") == matrices + scores
    assert step.flops(shape, "hf-gpt2") is None
