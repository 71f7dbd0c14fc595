"""check_finite: where an infinity or a NaN first appears, the same on all ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autoshard
from autoshard.errors import NonFiniteError
from tests.distributed import run_distributed
from tests.models import nanogpt


class Masked(nn.Module):
    """Attention scores masked by -inf, which is meant, and a place where things go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        mask = torch.ones(x.shape[0], x.shape[0], device=x.device).tril() == 0
        x = scores.masked_fill(mask, -math.inf).softmax(-1) @ x
        y = torch.relu(self.up(x))
        y = torch.sqrt(y * scale)  # the gradient of the root of zero is infinite
        out: Tensor = self.down(y)
        return out


def _told(tp_model: autoshard.ParallelModule, *inputs: Tensor, backward: bool = True) -> str:
    try:
        with tp_model.check_finite():
            y = tp_model(*inputs)
            if backward:
                y.sum().backward()
    except NonFiniteError as error:
        return str(error)
    return ""


def _masked(tp: int) -> tuple[autoshard.ParallelModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    return autoshard.parallelize(Masked(), tp, (x, torch.ones(())), degree="max"), x


def test_one_rank() -> None:
    """Masks of -inf are meant; a NaN, an infinity, and a gradient are found where they arise."""
    tp_model, x = _masked(1)
    one = torch.ones(())
    assert _told(tp_model, x, one, backward=False) == ""
    told = _told(tp_model, x, -one)
    assert told.startswith("a NaN first appears in the forward of the top of the model")
    assert "sqrt (sqrt.default)" in told
    assert "an infinity first appears" in _told(tp_model, 100 * x, one * 3e38)
    # relu gives zeros, whose root has an infinite slope
    told = _told(tp_model, x, one)
    assert "in the backward of" in told and "the gradient of mul" in told, told
    assert "which comes from sqrt" in told
    assert "the input x" in _told(tp_model, torch.where(x == x.max(), math.nan, x), one)
    # outside of the block nothing is looked at, and no hook is left
    assert not any(p._backward_hooks for p in tp_model.parameters())
    assert tp_model(x, -one).isnan().any()


def on_two_ranks() -> dict[str, str]:
    """A weight of one rank's share is spoilt: the other rank sees it only after the reduce."""
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=2, n_embd=16, dropout=0.0))
    batch = nanogpt.inputs(model)
    tp_model = autoshard.parallelize(model, 2, batch, degree="max")

    def told() -> str:
        try:
            with tp_model.check_finite():
                tp_model(**batch)[1].backward()
        except NonFiniteError as error:
            return str(error)
        return ""

    found = {"clean": told()}
    eager = tp_model(**batch)[1]
    with tp_model.check_finite():
        found["same"] = str(torch.equal(tp_model(**batch)[1], eager))
    weight = tp_model.get_parameter("transformer.h.1.mlp.c_proj.weight")
    kept = weight.to_local().detach().clone()
    with torch.no_grad():
        if dist.get_rank() == 1:
            weight.to_local()[0, 0] = math.nan
    found["parameter"] = told()
    with torch.no_grad():
        weight.to_local().copy_(kept)
        if dist.get_rank() == 1:
            weight.to_local().mul_(1e20)
            tp_model.get_parameter("transformer.h.1.mlp.c_fc.weight").to_local().mul_(1e24)
    found["overflow"] = told()
    return found


@pytest.mark.slow
def test_ranks_agree_on_the_first() -> None:
    """One rank has it first: both raise, with the layer, the region, and the rank that had it."""
    first, second = run_distributed(on_two_ranks, 2)
    assert first == second
    assert first["clean"] == "" and first["same"] == "True"
    assert "a NaN first appears in the forward of transformer.h.1.mlp.c_proj" in first["parameter"]
    assert "the parameter transformer.h.1.mlp.c_proj.weight, on rank 1 of" in first["parameter"]
    assert "the forward of transformer.h.1.mlp" in first["overflow"], first["overflow"]
    assert "in region transformer.h.1.mlp (mlp)" in first["overflow"]
