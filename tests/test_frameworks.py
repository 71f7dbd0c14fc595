"""Frameworks around a parallel module, with real processes: the numbers of one process."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.testing import assert_close

import autoshard
from tests.distributed import run_distributed
from tests.frameworks import lightning, peft, trainer

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def every_script(folder: str) -> dict[str, Any]:
    """All in one run of processes, which import all of it once."""
    scripts = {"trainer": trainer.run, "lightning": lightning.run, "peft": peft.run}
    found = {}
    for name, script in scripts.items():
        torch.manual_seed(0)
        Path(f"{folder}/{name}").mkdir(parents=True, exist_ok=True)
        found[name] = script(f"{folder}/{name}")
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frameworks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return run_distributed(every_script, 2, str(folder / "ranks"), timeout=500)


def alike(found: dict[str, Any], right: dict[str, Any], **tolerance: float) -> None:
    """Everything that both have; what differs is named."""
    for key, value in right.items():
        if not isinstance(value, str):
            assert_close(found[key], value, msg=lambda m, k=key: f"{k}: {m}", **(tolerance or EXACT))


# -- Hugging Face's Trainer, and Accelerate -------------------------------------------------------


@pytest.mark.slow
def test_trainer(ranks: list[dict[str, Any]], folder: Path) -> None:
    """Losses, norms, evaluation, predictions, which parameters decay, the best model; and the files."""
    right = trainer.run(str(folder / "one"))
    for found in ranks:
        for name, (_, tolerance) in trainer.VARIANTS.items():
            alike(found["trainer"][name], right[name], **tolerance)
        copies = {
            **right["plain"],
            "evaluated": right["plain"]["evaluated"][:, 1:],
        }  # and not the loss:
        found["trainer"]["copies"]["evaluated"] = found["trainer"]["copies"]["evaluated"][:, 1:]
        alike(found["trainer"]["copies"], copies, **trainer.NEAR)  # HF's counts what fills up a batch
        alike(found["trainer"]["accelerated"], right["accelerated"], **trainer.NEAR)
    written = folder / "ranks" / "trainer" / "plain" / "model"
    model = transformers.GPT2LMHeadModel.from_pretrained(written, dtype=torch.float64)
    assert_close(dict(model.state_dict()), right["plain"]["state"], **trainer.NEAR)
    files = {p.name for p in (folder / "one" / "plain" / "model").iterdir()}
    assert {p.name for p in written.iterdir()} == files


@pytest.mark.slow
def test_trainer_resumes(ranks: list[dict[str, Any]]) -> None:
    """From a checkpoint the losses and the parameters are the same bits, dropout included."""
    for found in ranks:
        whole, again = found["trainer"]["resumed"]["losses"]
        assert_close(again, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_trainer_refuses(ranks: list[dict[str, Any]]) -> None:
    """What would be silently wrong is an error that says what to do."""
    for found in ranks:
        copies, checkpointing, streamed = found["trainer"]["refused"]
        assert "2 data parallel copies" in copies and "autoshard.fully_shard(model)" in copies
        assert 'checkpoint="layer"' in checkpointing
        assert "dispatch_batches" in streamed


def test_a_loop_reads_the_model_s_face() -> None:
    """The class has the model's name and its forward's signature, also of a copy; labels are found."""
    plain = trainer.gpt2()
    model = autoshard.parallelize(plain, 1, degree="max")
    for one in (model, copy.deepcopy(model)):
        assert isinstance(one, autoshard.ParallelModule) and one.tp_size == 1
        assert type(one).__name__ == type(plain).__name__
        assert inspect.signature(one.forward) == inspect.signature(plain.forward)
        assert transformers.utils.generic.find_labels(type(one)) == ["labels"]


def test_a_plain_model_is_for_the_plain_trainer() -> None:
    """The Trainer of split models wants one."""
    from autoshard.integrations.trainer import Trainer

    with pytest.raises(ValueError, match=r"transformers\.Trainer"):
        Trainer(model=trainer.gpt2())


# -- Lightning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lightning(ranks: list[dict[str, Any]], folder: Path) -> None:
    """Losses, validated metrics, clipped steps; each goes on from the other's checkpoint."""
    first = lightning.fitted(str(folder / "one"), 6)
    second = lightning.fitted(str(folder / "one"), 9, first["path"])
    for found in ranks:
        alike(found["lightning"]["first"], first)
        alike(found["lightning"]["second"], second)
        whole, again = (found["lightning"][k]["losses"] for k in ("random", "again"))
        assert_close(again[0], whole[2], rtol=0, atol=0)  # the same masks
        assert not torch.equal(whole[:2], first["losses"][:2])
    crossed = lightning.fitted(str(folder / "one"), 9, ranks[0]["lightning"]["first"]["path"])
    alike(crossed, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copies", "split itself"])
def test_lightning_copies(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Two data parallel copies read other batches, and train as one process does on both."""
    right = lightning.fitted(str(folder / "one"), 6)
    copies = [found["lightning"][name] for found in ranks]
    for found in copies:
        alike(found, {name: right[name] for name in ("state", "validated", "rates")})
    assert_close(torch.stack([c["losses"] for c in copies]).mean(0), right["losses"], **EXACT)
    rows = torch.cat([c["rows"] for c in copies], 1)
    assert_close(rows.sort().values, right["rows"].sort().values)


# -- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_peft(ranks: list[dict[str, Any]]) -> None:
    """Losses, gradients of the adapters alone, and a state that the plain model loads."""
    right = peft.run("")
    for found in ranks:
        for name in peft.MODELS:
            alike(found["peft"][name], right[name], **trainer.NEAR)
            assert right[name]["gradients"] and not found["peft"][name]["frozen"]
            peft.adapted(name).load_state_dict(found["peft"][name]["state"])
        one, other = found["peft"]["dropped"]
        assert_close(one, other, rtol=0, atol=0)
        assert not torch.equal(one[0], right["gpt2"]["losses"][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", peft.MODELS)
def test_peft_plans(name: str) -> None:
    """Adapters lie as their layer does; outputs and gradients are the model's at 2 and 4 ranks."""
    model, batch = peft.adapted(name), peft.batch()
    for tp in (2, 4):
        plan = autoshard.plan(model, tp, batch, degree="max")
        dims = {p.name: p.dim for p in plan.parameters}
        for path in (n for n in dims if "lora" in n):
            layer, _, half = path.rpartition(".lora_")
            whole = dims[f"{layer}.base_layer.weight"] is None
            assert not whole or tp == 4, path  # two key heads are whole on four ranks
            rows = any(layer.endswith(target) for target in peft.ROWS[name])
            wanted = {"A": 1, "B": None} if rows else {"A": None, "B": None if whole else 0}
            assert dims[path] == wanted[half[0]], path
        assert plan.sharded_fraction > 0.9
        assert autoshard.verify(model, tp, batch).ok
