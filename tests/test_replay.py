"""tp_model.verify: real ranks against the whole model, and nothing changed by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autoshard
from autoshard import ops
from autoshard.errors import AutoshardError, RanksDifferError
from autoshard.mesh import Mesh
from tests.distributed import run_distributed
from tests.models import nanogpt


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Counting(nn.Module):
    """A GPT with dropout, a floating input, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=32, dropout=0.2))
        self.register_buffer("scale", torch.full((5,), 0.5))

    def forward(self, idx: Tensor, targets: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss = self.gpt(idx, targets)
        drawn = torch.rand_like(extra)  # moves a stream, and changes nothing
        return logits, loss + (self.scale * extra + 0 * drawn).square().mean()


def _state(tp_model: autoshard.ParallelModule) -> dict[str, Any]:
    """All that verify must leave as it was."""
    mesh: Mesh = tp_model.__dict__["_mesh"]
    return {
        "mode": [m.training for m in tp_model.modules()],
        "gradients": {n: None if p.grad is None else _local(p.grad).clone()
                      for n, p in tp_model.named_parameters()},
        "objects": [id(p.grad) for p in tp_model.parameters()],
        "parameters": {n: _local(p).detach().clone() for n, p in tp_model.named_parameters()},
        "buffers": {n: b.clone() for n, b in tp_model.named_buffers()},
        "streams": [mesh.group(d).stream.packed("cpu") for d in mesh.degrees],
        "random": torch.get_rng_state(),
        "graph": [tp_model.graph],
    }  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def verified() -> dict[str, Any]:
    """Train and eval mode, before and after a step; then wrong in one place each."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    model = Counting()
    batch = {**nanogpt.inputs(model.gpt), "extra": torch.randn(7, 5)}
    plan = autoshard.plan(model, world, batch, degree="max").with_degree("gpt.transformer.h.0.mlp", 2)
    tp_model = autoshard.parallelize(model, world, batch, plan=plan)
    found: dict[str, Any] = {}
    before = _state(tp_model)
    reports = {"fresh": tp_model.verify(batch)}
    found["fresh"] = _same(before, _state(tp_model))
    tp_model(**batch)[1].backward()
    before = _state(tp_model)
    with torch.no_grad():
        reports["after a step"] = tp_model.verify(batch, device="cpu")
    found["after a step"] = _same(before, _state(tp_model))
    tp_model.eval()
    before = _state(tp_model)
    reports["eval"] = tp_model.verify(batch)
    # The graph that ran last is still the one of the training step.
    found["eval"] = _same(before, _state(tp_model))
    exact = {**batch, "extra": batch["extra"].double()}
    doubled = autoshard.parallelize(model.double(), world, exact, degree="max")
    reports["double"] = doubled.verify(exact)
    tp_model.train()

    # A replicated weight that differs on one rank, and a backward without its all-reduce.
    weight = tp_model.get_parameter("gpt.transformer.ln_f.weight")
    with torch.no_grad():
        if dist.get_rank() == world - 1:
            weight.to_local()[3] += 0.5
    reports["drifted"] = tp_model.verify(batch)
    tp_model.check_replicas(repair=True)
    with mock.patch.object(ops._Copy, "backward", lambda ctx, dy: (dy, None)):
        reports["no all-reduce"] = tp_model.verify(batch)
    reports["again"] = tp_model.verify(batch)
    found["reports"] = {name: replace(report, plan=None) for name, report in reports.items()}
    for what, wrong in (
        ("batch", {**batch, "extra": batch["extra"] + dist.get_rank()}),
        ("token", {**batch, "idx": batch["idx"] + 10**6}),
    ):
        try:
            tp_model.verify(wrong)
        except (AutoshardError, IndexError) as error:
            found[what] = (type(error), str(error))
    with mock.patch("autoshard.replay.functional_call", side_effect=MemoryError("no room")):
        try:
            tp_model.verify(batch)
        except AutoshardError as error:
            found["memory"] = str(error)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_verify_on_real_ranks(world: int) -> None:
    """The same function within rounding; what is wrong on one rank only is found; no trace is left."""
    ranks = run_distributed(verified, world, timeout=300)
    reports = ranks[0]["reports"]
    for found in ranks:
        assert found["fresh"] and found["after a step"] and found["eval"]
        for name, report in found["reports"].items():
            assert report.outputs == reports[name].outputs
            assert report.gradients == reports[name].gradients
    for name in ("fresh", "after a step", "eval", "again"):
        assert reports[name].ok and reports[name].max_relative_error < 1e-4, reports[name]
        assert len(reports[name].outputs) == 2
        assert "gpt.transformer.h.1.attn.c_attn.weight" in reports[name].gradients
    assert reports["double"].max_relative_error < 1e-10
    assert not reports["drifted"].ok
    assert not reports["no all-reduce"].ok
    assert max(reports["no all-reduce"].outputs.values()) < 1e-4
    for found in ranks:
        assert found["batch"][0] is RanksDifferError and "extra: other values" in found["batch"][1]
        assert found["token"][0] is IndexError
        assert "the whole model did not run on cpu" in found["memory"]
        assert "no room" in found["memory"] and 'pass device="cpu"' in found["memory"]


def test_verify_on_one_rank() -> None:
    """tp=1 in a plain script, a batch as a tuple."""
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=1, dropout=0.1))
    batch = nanogpt.inputs(model)
    tp_model = autoshard.parallelize(model, 1, batch)
    report = tp_model.verify(tuple(batch.values()))
    assert report.ok and report.max_relative_error < 1e-4
