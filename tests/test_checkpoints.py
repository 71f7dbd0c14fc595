"""Checkpoints: what four ranks wrote, two, one and the plain model read; and no file is trusted."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import autoshard
from autoshard import CheckpointError
from autoshard.checkpoints import index
from tests.distributed import run_distributed
from tests.models import nanogpt


def plain(seed: int = 0) -> nanogpt.GPT:
    """q, k and v in one weight, tied embeddings, a vocabulary that two does not divide."""
    torch.manual_seed(seed)
    return nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=32, dropout=0.1))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as trainers make them."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> list[Tensor]:
    """A few steps; their losses."""
    losses = []
    batch = nanogpt.inputs(plain())
    for step in range(count):
        generator = torch.Generator().manual_seed(seed + step)
        batch = {n: torch.randint(0, 200, t.shape, generator=generator) for n, t in batch.items()}
        optimizer.zero_grad()
        loss = model(**batch)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def parallel(seed: int, tp: int, degree: Any = "max") -> autoshard.ParallelModule:
    """The model, split."""
    model = plain(seed)
    batch = nanogpt.inputs(model)
    plan = autoshard.plan(model, tp, batch, degree="max")
    if degree != "max":
        plan = plan.with_degree("transformer.h.0.attn", degree).with_degree(
            "transformer.h.1.mlp", degree
        )
    return autoshard.parallelize(model, tp, batch, plan=plan)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimizer's moments, whole, in the model's order."""
    found = {n: whole(t).clone() for n, t in model.state_dict().items()}
    names = {p: n for n, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        for key, value in state.items():
            value = torch.as_tensor(value)
            if isinstance(model, autoshard.ParallelModule) and value.dim():
                stored = model.share_of(name)
                value = autoshard.parameters.whole(value, stored)
            found[f"{name}.{key}"] = value.clone()
    return found


# -- saved by some, loaded by others --------------------------------------------------------------


def saves(folder: str, degree: Any, later: bool) -> dict[str, Tensor]:
    """Train, save, train on."""
    model = parallel(0, dist.get_world_size(), degree)
    optimizer = adamw(model)
    steps(model, optimizer, 2, seed=0)
    extra = {"step": 2, "best": 1.5, "history": [1, 2], "table": {"seen": torch.arange(5)}}
    if later:
        future = autoshard.async_save(folder, model, optimizer, extra)
        found = state_of(model, optimizer)
        losses = steps(model, optimizer, 2, seed=2)  # while it is written
        future.result()
    else:
        autoshard.save(folder, model, optimizer, extra)
        found = state_of(model, optimizer)
        losses = steps(model, optimizer, 2, seed=2)
    return found | {"losses": torch.stack(losses)} | {f"after.{n}": t for n, t in
                                                       state_of(model, optimizer).items()}  # fmt: skip


def loads(folder: str, degree: Any) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Another model's numbers, replaced."""
    model = parallel(1, dist.get_world_size(), degree)
    optimizer = adamw(model)
    steps(model, optimizer, 1, seed=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extra = autoshard.load(folder, model, optimizer)
    found = state_of(model, optimizer)
    losses = steps(model, optimizer, 2, seed=2)
    found |= {"losses": torch.stack(losses)}
    found |= {f"after.{n}": t for n, t in state_of(model, optimizer).items()}
    return found, extra, [str(w.message) for w in caught if "dropout goes on" in str(w.message)]


def at(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state at the time of saving."""
    return {n: t for n, t in found.items() if n != "losses" and not n.startswith("after.")}


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "later"), [("max", True), (2, False)])
def test_saved_by_four_loaded_by_others(tmp_path: Path, degree: Any, later: bool) -> None:
    """Four ranks save; four go on bit for bit; two, one, and the plain model have the same numbers."""
    folder = tmp_path / "checkpoint"
    saved = run_distributed(saves, 4, str(folder), degree, later)
    for rank in saved[1:]:
        assert_close(rank, saved[0], rtol=0, atol=0)
    for tp in (4, 2) if degree == "max" else (4,):
        for found, extra, warned in run_distributed(loads, tp, str(folder), degree):
            assert_close(at(found), at(saved[0]), rtol=0, atol=0)
            if tp == 4:
                assert not warned
                assert_close(found, saved[0], rtol=0, atol=0)  # dropout's masks too
            else:
                assert len(warned) == 1
            assert extra["step"] == 2 and extra["best"] == 1.5 and extra["history"] == [1, 2]
            assert_close(extra["table"]["seen"], torch.arange(5))
    for model in (plain(1), parallel(1, 1)):
        optimizer = adamw(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert autoshard.load(folder, model, optimizer)["step"] == 2
        assert_close(state_of(model, optimizer), at(saved[0]), rtol=0, atol=0)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def uneven(seed: int, tp: int | None = None) -> nn.Module:
    """The model, biases and norms drawn too; split over so many ranks."""
    model = plain(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    if tp is None:
        return model
    return autoshard.parallelize(model, tp, nanogpt.inputs(model), degree="max")


def raw(folder: str) -> dict[str, Tensor]:
    """Save what state_dict() gives as four ranks, with PyTorch alone; load it as two and two."""
    dcp.save(uneven(0, 4).state_dict(), checkpoint_id=folder)
    other = uneven(1, 2)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    assert isinstance(other, autoshard.ParallelModule)
    return other.full_state_dict()


@pytest.mark.slow
def test_torchs_own_checkpoints(tmp_path: Path) -> None:
    """torch.distributed.checkpoint of state_dict() needs nothing of this package: the fused weights,
    the odd vocabulary and the tied weights of four ranks are in the model's order in its files."""
    right = uneven(0).state_dict()
    assert right["transformer.wte.weight"].shape[0] % 2
    for found in run_distributed(raw, 4, str(tmp_path)):
        assert_close(found, dict(right), rtol=0, atol=0)
    for model in (uneven(1), uneven(1, 1)):
        state = model.state_dict()
        assert state.keys() == right.keys()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process, it says
            dcp.load(state, checkpoint_id=tmp_path)
        model.load_state_dict(state)
        assert_close(dict(model.state_dict()), dict(right), rtol=0, atol=0)
        tied = dict(model.named_parameters(remove_duplicate=False))
        assert tied["lm_head.weight"] is tied["transformer.wte.weight"]


def test_the_plain_model_saves_too(tmp_path: Path) -> None:
    """A plain run goes on as if it had not been cut; a split one goes on from it."""
    model = plain()
    model.eval()
    optimizer = adamw(model)
    steps(model, optimizer, 2, seed=0)
    autoshard.save(tmp_path, model, optimizer, {"step": 2})
    losses = steps(model, optimizer, 2, seed=2)
    for other in (plain(1), parallel(1, 1)):
        other.eval()
        again = adamw(other)
        assert autoshard.load(tmp_path, other, again) == {"step": 2}
        assert_close(torch.stack(steps(other, again, 2, seed=2)), torch.stack(losses))


def test_a_model_without_memory_is_filled(tmp_path: Path) -> None:
    """What was built on the meta device runs after a load, of a checkpoint or of a state dict."""
    model = plain().eval()
    autoshard.save(tmp_path, model)
    batch = nanogpt.inputs(model)
    for fill in (
        lambda m: m.load_state_dict(model.state_dict()),
        lambda m: autoshard.load(tmp_path, m),
    ):
        with autoshard.meta_parameters():
            empty = nanogpt.GPT(model.config).eval()
        tp_model = autoshard.parallelize(empty, 1, batch)
        with pytest.raises(autoshard.AutoshardError, match="have no values"):
            tp_model(**batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plain model has no streams of dropout
            fill(tp_model)
        assert_close(tp_model(**batch), model(**batch))


def test_options_and_dtypes_of_an_optimizer(tmp_path: Path) -> None:
    """A learning rate that a scheduler changed; momentum finer than its parameter; no state yet."""
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    autoshard.save(tmp_path / "fresh", model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    moments = {p: torch.randn(p.shape) for p in model.parameters()}
    for parameter, moment in moments.items():
        optimizer.state[parameter]["momentum_buffer"] = moment
    autoshard.save(tmp_path / "later", model, optimizer)

    other = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    autoshard.load(tmp_path / "later", model, other)
    assert other.param_groups[0]["lr"] == 0.25
    for parameter, moment in moments.items():
        assert_close(other.state[parameter]["momentum_buffer"], moment, rtol=0, atol=0)
    autoshard.load(tmp_path / "fresh", model, other)
    assert other.param_groups[0]["lr"] == 0.5
    assert not any(other.state[p] for p in model.parameters())


# -- nothing is trusted ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a small model after a step."""
    folder = tmp_path / "run"
    model = plain()
    optimizer = adamw(model)
    steps(model, optimizer, 1, seed=0)
    autoshard.save(folder, model, optimizer, {"step": 1})
    return folder


def refusal(folder: Path, model: nn.Module | None = None, optimizer: Any = None) -> str:
    """What the refusal says; the model is as it was."""
    model = plain(3) if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as raised:
        autoshard.load(folder, model, optimizer)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    return str(raised.value)


def file_of(folder: Path) -> Path:
    (found,) = folder.glob("*/*.safetensors")
    return found


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pickle nor torch.load runs, and no file holds a pickle."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    model = plain(1)
    assert autoshard.load(saved, model, adamw(model)) == {"step": 1}
    kinds = {p.suffix for p in saved.rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors"}


@pytest.mark.parametrize("left", [0, 5, 100, 0.3, 0.9, -1])
def test_truncated(saved: Path, left: float) -> None:
    """The file is named, and a tensor that is not all there."""
    path = file_of(saved)
    size = path.stat().st_size
    keep = size - 1 if left == -1 else int(left * size) if isinstance(left, float) else left
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:keep])
    said = refusal(saved)
    assert str(path) in said and f"has {keep} bytes, {size} were written" in said
    named = said.split(" written: ")[1].split(" ")[0]
    if keep > 100:  # the header is there: what is named is really lost, and nothing before it
        length = int.from_bytes(whole_file[:8], "little")
        header = json.loads(whole_file[8 : 8 + length])
        ends = sorted(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        end = header[named]["data_offsets"][1]
        assert end + 8 + length > keep
        assert all(e + 8 + length <= keep for e in ends if e < end)


def test_another_file(saved: Path, tmp_path: Path) -> None:
    """Another file in the place of the right one, of the same shapes or not; a bit that flipped."""
    path = file_of(saved)
    right = path.read_bytes()
    tensors = load_file(path)

    other = plain(5)
    optimizer = adamw(other)
    steps(other, optimizer, 1, seed=1)
    autoshard.save(tmp_path / "other", other, optimizer, {"step": 1})
    shutil.copy(file_of(tmp_path / "other"), path)
    assert "holds other values than were written: model." in refusal(saved) and str(path) in refusal(
        saved
    )

    name = "model.transformer.h.1.mlp.c_fc.weight"
    path.write_bytes(right)
    changed = bytearray(right)
    changed[-3] ^= 1
    path.write_bytes(changed)
    assert "holds other values than were written" in refusal(saved)

    save_file({n: t for n, t in tensors.items() if n != name}, path)
    assert str(path) in refusal(saved)
    path.write_bytes(b"x" * len(right))
    assert "cannot be read" in refusal(saved)
    path.unlink()
    assert "is missing" in refusal(saved)
    path.write_bytes(right)
    autoshard.load(saved, plain())


def test_a_header_that_lies(saved: Path) -> None:
    """Another dtype or shape, with the number of bytes that was written."""
    path = file_of(saved)
    right = path.read_bytes()
    length = int.from_bytes(right[:8], "little")
    name = "model.transformer.h.0.mlp.c_fc.weight"
    for key, value in (("dtype", "I32"), ("shape", [32, 128])):
        header = json.loads(right[8 : 8 + length])
        header[name][key] = value
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        path.write_bytes(right[:8] + text + right[8 + length :])
        said = refusal(saved)
        assert str(path) in said and name in said and "is another file" in said


def test_foreign_folders(saved: Path, tmp_path: Path) -> None:
    """Each is told what it is."""
    assert "there is no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no save to it was ever completed" in refusal(tmp_path / "empty")
    save_file({"w": torch.zeros(2)}, tmp_path / "empty" / "model.safetensors")
    assert "weights, not a checkpoint" in refusal(tmp_path / "empty")
    torch.distributed.checkpoint.save(
        {"w": torch.zeros(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    assert "pickle" in refusal(tmp_path / "dcp")
    text = (saved / index.NAME).read_text()
    for damaged in ("", "[]", text[: len(text) // 2], text.replace('"shape"', '"form"')):
        (saved / index.NAME).write_text(damaged)
        assert str(saved / index.NAME) in refusal(saved)
    (saved / index.NAME).write_text(text.replace(index.FORMAT, "autoshard checkpoint 99"))
    assert "checkpoint 99" in refusal(saved)


def test_another_model(saved: Path) -> None:
    """Other layers, another size, another dtype, another optimizer: named, and nothing is loaded."""
    deeper = nanogpt.GPT(nanogpt.GPTConfig(n_layer=3, n_head=4, n_embd=32))
    assert "transformer.h.2.attn.c_attn.bias is not in the checkpoint" in refusal(saved, deeper)
    flatter = nanogpt.GPT(nanogpt.GPTConfig(n_layer=1, n_head=4, n_embd=32))
    assert "transformer.h.1.attn.c_attn.bias is in the checkpoint, and not" in refusal(saved, flatter)
    wider = nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=64))
    said = refusal(saved, wider)
    assert "[96, 32] there" in said or "32] there" in said
    assert "torch.float32" in refusal(saved, plain().double())
    model = plain()
    assert "2 parameter groups, this one 1" in refusal(
        saved, model, torch.optim.AdamW(model.parameters())
    )
    fewer = adamw(model)
    fewer.param_groups[0]["params"].pop()
    assert "only in the checkpoint" in refusal(saved, model, fewer)
    foreign = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    assert "make the optimizer after parallelize" in refusal(saved, model, foreign)
    autoshard.save(saved, model)
    assert "saved without an optimizer" in refusal(saved, model, adamw(model))


@pytest.mark.parametrize("value", [object(), (1, 2), {1: 2}, {"tensor": 1}, {"a": [torch.float32]}])
def test_what_is_not_saved(tmp_path: Path, value: Any) -> None:
    """What would have to be pickled is refused by its place, before anything is written."""
    with pytest.raises(CheckpointError, match=r"extra\.state"):
        autoshard.save(tmp_path / "new", nn.Linear(2, 2), extra={"state": value})
    assert not (tmp_path / "new").exists()


# -- killed at any moment -------------------------------------------------------------------------


def _save_and_die(folder: Path, model: nn.Module, moment: int) -> bool:
    """Save in a child, killed at its `moment`-th operation on a file; whether it got that far."""
    child = os.fork()
    if not child:
        seen = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            operations = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if event in operations and any(str(folder) in str(a) for a in args):
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        try:
            autoshard.save(folder, model, extra={"step": int(model.weight[0, 0])})  # type: ignore
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_at_every_operation(tmp_path: Path) -> None:
    """A save that dies before any of its operations on files: the one before, or its own, is whole."""
    model, found = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    autoshard.save(tmp_path, model, extra={"step": 1})
    loaded, moment, step = set(), 0, 1
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        died = _save_and_die(tmp_path, model, moment)
        there = autoshard.load(tmp_path, found)["step"]
        for parameter in found.parameters():
            assert_close(parameter.detach(), torch.full_like(parameter, there), rtol=0, atol=0)
        loaded.add("new" if there == step else "old")
        if not died:
            break
        if there != step:
            step = there
        moment += 1
    assert moment > 8 and loaded == {"old", "new"}
    assert there == step and len(list(tmp_path.iterdir())) == 2  # what killed saves left is gone


def _saves_forever(folder: str) -> None:
    model = parallel(0, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 10_000):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
                optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step)
        autoshard.save(folder, model, optimizer, {"step": step})


@pytest.mark.slow
def test_ranks_killed_while_they_save(tmp_path: Path) -> None:
    """One rank of two, or both, killed by SIGKILL at some moment: what is there is whole."""
    for round_, victims in enumerate([(0,), (1,), (0, 1)]):
        folder = tmp_path / str(round_)
        killer = multiprocessing.get_context("fork").Process(
            target=_kill_later, args=(folder, victims, 0.13 * (round_ + 1))
        )
        killer.start()
        with pytest.raises(RuntimeError, match="exited with -9"):
            run_distributed(_named, 2, str(folder), timeout=60)
        killer.join()
        model = plain(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = autoshard.load(folder, model, optimizer)["step"]
        for parameter in model.parameters():
            assert_close(parameter.detach(), torch.full_like(parameter, step), rtol=0, atol=0)
            moment = optimizer.state[parameter]["momentum_buffer"]
            assert_close(moment, torch.full_like(parameter, step), rtol=0, atol=0)


def _named(folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder).parent / f"{Path(folder).name}.{dist.get_rank()}.pid").write_text(str(os.getpid()))
    _saves_forever(folder)


def _kill_later(folder: Path, victims: tuple[int, ...], seconds: float) -> None:
    while not (folder / index.NAME).exists():
        time.sleep(0.01)
    time.sleep(seconds)
    for rank in victims:
        os.kill(int((folder.parent / f"{folder.name}.{rank}.pid").read_text()), signal.SIGKILL)
