"""What a training script does around the step: the same numbers as on one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import autoshard
from tests.distributed import run_distributed
from tests.models import nanogpt

STEPS = 3


def model_of(dtype: torch.dtype = torch.float64) -> nanogpt.GPT:
    """q, k and v in one weight, tied embeddings, biases."""
    torch.manual_seed(0)
    return nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=32, dropout=0.0)).to(dtype)


def batches(count: int) -> Iterator[dict[str, Tensor]]:
    """Tokens and targets, other ones each time."""
    shape = nanogpt.inputs(model_of())
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield {n: torch.randint(0, 200, t.shape, generator=generator) for n, t in shape.items()}


def whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(t).detach().clone() for n, t in model.state_dict().items()}


# -- scripts: each trains a model, plain or split, and says what it saw ---------------------------


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, **seen: Any) -> dict[str, Any]:
    losses = []
    for batch in batches(STEPS):
        optimizer.zero_grad()
        loss = model(**batch)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "state": state(model), **seen}


def adamw_foreach(model: nn.Module) -> dict[str, Any]:
    """All parameters in few kernels."""
    return _train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True))


def adamw_fused(model: nn.Module) -> dict[str, Any]:
    """One kernel for each parameter."""
    return _train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))


def sgd(model: nn.Module) -> dict[str, Any]:
    """With momentum."""
    return _train(model, torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, nesterov=True))


def adafactor(model: nn.Module) -> dict[str, Any]:
    """Factored statistics, of the fused weight too: torch's own on one process."""
    kind = autoshard.Adafactor if isinstance(model, autoshard.ParallelModule) else torch.optim.Adafactor
    # A key's bias has no gradient but rounding, which a smaller eps would scale up to a step.
    optimizer = kind(model.parameters(), lr=1e-1, weight_decay=0.1, eps=(1e-6, 1e-3))
    found = _train(model, optimizer)
    name = "transformer.h.0.attn.c_attn.weight"
    moments = optimizer.state[model.get_parameter(name)]
    share = model.share_of(name) if isinstance(model, autoshard.ParallelModule) else None
    rows = autoshard.parameters.whole(moments["row_var"], share)
    return {**found, "rows": rows.clone(), "columns": whole(moments["col_var"]).clone()}


def clipped(model: nn.Module) -> dict[str, Any]:
    """Gradients of two batches added up, their norm clipped: the norm is the single process's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for batch in batches(STEPS):
        for part in (0, 1):
            rows = {n: t[part : part + 1] for n, t in batch.items()}
            (model(**rows)[1] / 2).backward()
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)).detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms), "state": state(model)}


def groups_and_frozen(model: nn.Module) -> dict[str, Any]:
    """Decay by name and by dimension; embeddings that do not move, nor their moments."""
    model.get_parameter("transformer.wte.weight").requires_grad_(False)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    found = _train(model, torch.optim.AdamW(groups, lr=1e-2))
    counts = [len(g["params"]) for g in groups]
    return {**found, "counts": counts, "frozen": "transformer.wte.weight" in named}


def averaged(model: nn.Module) -> dict[str, Any]:
    """A moving average of the parameters: a deep copy of the module, and one of the state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    copied, kept = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for batch in batches(STEPS):
        model(**batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(copied.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.25)
    batch = next(batches(1))
    loss = copied(**batch)[1].detach()
    return {"average": state(copied), "loss": loss, "first": {n: whole(t) for n, t in kept.items()}}


def scheduled(model: nn.Module) -> dict[str, Any]:
    """A warm-up, and hooks of an optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    found = _train(model, optimizer)
    return {**found, "rate": optimizer.param_groups[0]["lr"]}


SCRIPTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        adamw_foreach,
        adamw_fused,
        sgd,
        adafactor,
        clipped,
        groups_and_frozen,
        averaged,
        scheduled,
    )
}


def on_ranks(plan: str) -> dict[str, Any]:
    """Every script, on a model that is split anew."""
    found = {}
    world = dist.get_world_size()
    batch = next(batches(1))
    for name, script in SCRIPTS.items():
        model = model_of()
        made = autoshard.plan(model, world, batch, degree="max")
        if plan == "mixed":
            made = made.with_degree("transformer.h.0.attn", 2).with_degree("transformer.h.1.mlp", 2)
        found[name] = script(autoshard.parallelize(model, world, batch, plan=made))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world", "plan"), [(2, "max"), (4, "mixed")])
def test_scripts(world: int, plan: str) -> None:
    """Losses, norms, parameters and averages are those of the script on one process."""
    right = {name: script(model_of()) for name, script in SCRIPTS.items()}
    for found in run_distributed(on_ranks, world, plan, timeout=300):
        for name in SCRIPTS:
            assert_close(
                found[name], right[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


# -- precision ------------------------------------------------------------------------------------


def low(dtype: torch.dtype, how: str, overflow: int | None = None) -> dict[str, Any]:
    """Steps in half precision: parameters in it, or autocast; with a scaler for float16."""
    split = dist.is_initialized()
    model: nn.Module = model_of(dtype if how == "parameters" else torch.float32)
    batch = next(batches(1))
    if split:
        model = autoshard.parallelize(model, dist.get_world_size(), batch, degree="max")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=how == "scaler")
    losses, scales = [], []
    for step, batch in enumerate(batches(STEPS)):
        cast = torch.autocast("cpu", dtype) if how != "parameters" else nullcontext()
        with cast:
            loss = model(**batch)[1]
        scaler.scale(loss).backward()
        if step == 1 and overflow is not None:
            gradient = model.get_parameter("transformer.h.0.mlp.c_fc.weight").grad
            share = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if not split or dist.get_rank() == overflow:
                share.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
        scales.append(scaler.get_scale())
    return {"losses": torch.stack(losses), "scales": scales, "state": state(model)}


PRECISIONS = [
    (torch.bfloat16, "parameters"), (torch.float16, "parameters"), (torch.bfloat16, "autocast"),
    (torch.float16, "scaler"),
]  # fmt: skip


def all_low() -> list[dict[str, Any]]:
    """Every precision, then a scaler with an infinity on one rank."""
    found = [low(dtype, how) for dtype, how in PRECISIONS]
    last = dist.get_world_size() - 1 if dist.is_initialized() else 0
    return [*found, low(torch.float16, "scaler", overflow=last)]


@pytest.mark.slow
def test_precisions() -> None:
    """Within the rounding of the format; an infinity on one rank makes all ranks skip the step."""
    right = all_low()
    ranks = run_distributed(all_low, 2, timeout=300)
    for found in ranks:
        for one, (dtype, how), plain in zip(found, [*PRECISIONS, PRECISIONS[-1]], right, strict=True):
            eps = torch.finfo(dtype).eps
            assert_close(one["losses"], plain["losses"], rtol=8 * eps, atol=0)
            assert one["scales"] == plain["scales"], how
            for name, value in one["state"].items():
                assert value.dtype == plain["state"][name].dtype
                assert_close(value, plain["state"][name], rtol=8 * eps, atol=8 * eps * 0.02)
        assert found[-1]["scales"] == [2.0**10, 2.0**9, 2.0**9]
    for one in ranks[1:]:
        assert_close(one, ranks[0], rtol=0, atol=0)


# -- beside data parallelism ----------------------------------------------------------------------


def hybrid_batches(rows: slice) -> Iterator[dict[str, Tensor]]:
    """Four rows a step, of which a data parallel copy takes two."""
    for batch in batches(2 * STEPS):
        yield {n: torch.cat([t[:2], t[:2].flip(1)])[rows] for n, t in batch.items()}


def hybrid(folder: str, how: str) -> dict[str, Any]:
    """FSDP2 or copies over dp beside tp: gradients of all four rows; saved, loaded, gone on.

    Before each, an evaluation, other values, and the optimizer only then.
    """
    batch = next(batches(1))
    rows, found = slice(None), {}
    for round_ in ("first", "second"):
        model: nn.Module = model_of()
        if dist.is_initialized():
            model = autoshard.parallelize(model, 2, batch, degree="max")
            mesh = model.mesh
            assert mesh is not None
            if how == "one unit":
                fully_shard(model, mesh=mesh["dp"])
            elif how == "layers":
                # In the second round layers stay whole after a forward, as the root does by default.
                autoshard.fully_shard(model, reshard_after_forward=round_ == "first")
                assert model.transformer.h[0].__class__.__name__ == "FSDPLayer"
            rows = slice(2 * mesh.get_local_rank("dp"), 2 * mesh.get_local_rank("dp") + 2)
        with torch.no_grad():
            model(**batch)
        model.load_state_dict({n: 1.5 * t for n, t in model_of().state_dict().items()})
        if isinstance(model, FSDPModule):  # what it left whole would take them, and lose them
            with pytest.raises(autoshard.AutoshardError, match="before fully_shard"):
                model.init_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if round_ == "second":
            with torch.no_grad():
                model(**batch)
            autoshard.load(folder, model, optimizer)
        norms = []
        for step, part in enumerate(hybrid_batches(rows)):
            if (step < STEPS) != (round_ == "first"):
                continue
            optimizer.zero_grad()
            model(**part)[1].backward()
            if how == "copies" and isinstance(model, autoshard.ParallelModule):
                autoshard.average_gradients(model)
            norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)).detach())
            optimizer.step()
        if round_ == "first":
            autoshard.save(folder, model, optimizer)
        found[round_] = torch.stack(norms)
    state_dict = (
        model.full_state_dict() if isinstance(model, autoshard.ParallelModule) else state(model)
    )
    return {**found, "state": state_dict}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one unit", "layers", "copies"])
def test_data_parallelism_beside_it(how: str, tmp_path: Path) -> None:
    """The hybrid trains as one process does on all rows; its checkpoint is the plain model's."""
    right = hybrid(str(tmp_path / "plain"), how)
    for found in run_distributed(hybrid, 4, str(tmp_path / "hybrid"), how, timeout=300):
        assert_close(found, right, rtol=1e-9, atol=1e-11)
    one, other = model_of(), model_of()
    for name, model in (("plain", one), ("hybrid", other)):
        optimizer = torch.optim.AdamW(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plain model has no streams of dropout
            autoshard.load(tmp_path / name, model, optimizer)
        moments = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
        model.moments = moments
    assert_close(dict(other.state_dict()), dict(one.state_dict()), rtol=1e-9, atol=1e-11)
    assert_close(other.moments, one.moments, rtol=1e-9, atol=1e-11)
