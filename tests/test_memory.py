"""A rank's parameters take what the plan says: elements / degree, and no more."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import autoshard
from autoshard.capture import skeleton
from autoshard.pipeline import analyse
from tests.models import nanogpt
from tests.models.case import Case


@contextlib.contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """This process is one rank of a world in which nobody answers; shapes are all that counts."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def case(name: str) -> Case:
    """A case of the test models; transformers is imported only where it is needed."""
    if name == "nanogpt":
        return nanogpt.CASES[0]
    from tests.models import huggingface

    return huggingface.case(name)


def held(model: nn.Module) -> dict[str, int]:
    """Elements that this rank holds of each parameter, in memory of their own."""
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        assert local.untyped_storage().nbytes() == local.numel() * local.element_size(), name
        found[name] = local.numel()
    return found


@pytest.mark.parametrize(
    ("name", "tp", "degrees"),
    [
        ("nanogpt", 2, {}),
        ("nanogpt", 4, {"transformer.h.0.mlp": 2, "transformer.h.1.attn": 1, "lm_head": 2}),
        pytest.param("gpt2", 4, {}, marks=pytest.mark.slow),
        pytest.param("gpt2", 4, {"transformer.h.1.attn": 2}, marks=pytest.mark.slow),
        pytest.param("llama-kv2", 4, {}, marks=pytest.mark.slow),
        pytest.param("llama-kv2", 4, {"model.layers.0.self_attn": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_rank_holds_what_the_plan_says(
    monkeypatch: pytest.MonkeyPatch, name: str, tp: int, degrees: dict[str, int]
) -> None:
    """On the rank that holds most; split parameters take elements / degree on every rank."""
    one = case(name)
    model = one.build("sdpa", dropout=0.0)
    inputs = one.inputs(model)
    program = analyse(skeleton(model), (), inputs, tp)
    monkeypatch.setattr("autoshard.api.analyse", lambda *args: program)  # once for all ranks
    plan = autoshard.plan(model, tp, inputs, degree="max")
    for region, degree in degrees.items():
        plan = plan.with_degree(region, degree)
    ranks = []
    for rank in range(tp):
        with rank_of(rank, tp):
            ranks.append(held(autoshard.parallelize(model, tp, inputs, plan=plan)))
    shares = {p.name: p for p in plan.parameters}
    assert all(list(elements) == list(shares) for elements in ranks)
    totals = [sum(elements.values()) for elements in ranks]
    assert max(totals) == plan.parameter_numel_per_rank
    for parameter, share in shares.items():
        assert max(elements[parameter] for elements in ranks) == share.local_numel
        assert share.numel == model.get_parameter(parameter).numel()
        rows = 1 if share.dim is None else share.shape[share.dim]
        if rows % share.degree == 0:
            assert {e[parameter] for e in ranks} == {share.numel // share.degree}, parameter
        else:  # a vocabulary: one row more on the first ranks
            assert share.local_numel == math.ceil(rows / share.degree) * share.numel // rows
            assert sum(e[parameter] for e in ranks) == share.numel * tp // share.degree
    whole = sum(p.numel for p in plan.parameters if p.degree == 1)
    if not degrees and name != "llama-kv2":
        large = sum(p.numel for p in plan.parameters if len(p.shape) > 1)
        positions = next(p.numel for p in plan.parameters if "wpe" in p.name)
        assert whole - positions < 0.02 * large
    assert {p.degree for p in plan.parameters} == {1, *plan.degrees.values()}


@pytest.mark.slow
def test_fewer_key_heads_than_ranks() -> None:
    """Keys and values stay whole, and say so; queries and the rest are split four ways."""
    one = case("llama-kv2")
    model = one.build("sdpa", dropout=0.0)
    plan = autoshard.plan(model, 4, one.inputs(model), degree="max")
    for share in plan.parameters:
        if "k_proj" in share.name or "v_proj" in share.name:
            assert share.degree == 1 and "fewer heads than ranks" in share.reason
        elif len(share.shape) == 2:
            assert share.degree == 4, share.name


def test_bytes_of_a_larger_model() -> None:
    """On the meta device: a rank of 8 holds an eighth of all matrices."""
    with torch.device("meta"):
        model = nanogpt.GPT(nanogpt.GPTConfig(n_embd=1024, n_head=16, vocab_size=50304))
    plan = autoshard.plan(model, 8, degree="max")
    matrices = {p.name: p for p in plan.parameters if len(p.shape) == 2 and "wpe" not in p.name}
    assert {p.degree for p in matrices.values()} == {8}
    total = sum(p.numel for p in matrices.values())
    assert sum(p.local_numel for p in matrices.values()) == total // 8
    assert plan.parameter_numel_per_rank < 1.02 * total / 8
