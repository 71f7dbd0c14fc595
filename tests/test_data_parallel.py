"""Copies beside tensor parallelism: what is refused, means of gradients, the paper's 64 x 8 ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing import assert_close

import autoshard
from autoshard.layers import Layer
from tests.distributed import run_distributed
from tests.models import nanogpt

WORLD, TP = 512, 8


def _fake(world: int, rank: int) -> None:
    """A process group of which this process is one rank, and there are no others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


def _paper(rank: int) -> dict[str, Any]:
    _fake(WORLD, rank)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=2, n_embd=3072, n_head=24, vocab_size=50257, n_positions=1024, use_cache=False
            )
        )
    ids = torch.zeros(1, 16, dtype=torch.long)
    small = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=64, n_head=8, vocab_size=257, use_cache=False)
    )
    plan = autoshard.plan(model, TP, {"input_ids": ids, "labels": ids}, degree="max")
    tp_model = autoshard.parallelize(
        small, TP, {"input_ids": ids, "labels": ids}, degree="max", check_inputs=False, device="cpu"
    )
    mesh = tp_model.mesh
    assert mesh is not None
    weight = tp_model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    found = {
        "shape": tuple(mesh.shape),
        "dp": dist.get_process_group_ranks(mesh.get_group("dp")),
        "tp": dist.get_process_group_ranks(mesh.get_group("tp")),
        "local": tuple(weight.to_local().shape),
        "degrees": sorted(set(plan.degrees.values())),
        "splits": [g.coordinate for g in (tp_model.__dict__["_mesh"].group(TP),)],
        "seed": tp_model.__dict__["_mesh"].group(1).stream.seed,
        "own seed": tp_model.__dict__["_mesh"].group(TP).stream.seed,
    }
    dist.destroy_process_group()
    return found


def _papers() -> list[dict[str, Any]]:
    return [_paper(rank) for rank in (0, 7, 8, 300, 511)]


@pytest.mark.slow
def test_the_papers_64_by_8() -> None:
    """512 ranks: a rank's group are the 8 of its machine, its copies those 8 apart; 8 ways all."""
    (found,) = run_distributed(_papers, 1, process_group=False, timeout=300)
    for rank, one in zip((0, 7, 8, 300, 511), found, strict=True):
        machine, place = divmod(rank, TP)
        assert one["shape"] == (WORLD // TP, TP)
        assert one["tp"] == [TP * machine + i for i in range(TP)]
        assert one["dp"] == [TP * i + place for i in range(WORLD // TP)]
        assert one["splits"] == [place]
        assert one["local"] == (64, 4 * 64 // TP)
        assert one["degrees"] == [TP]
    # Dropout outside regions: one mask on a machine, another on the next; inside: each rank its own.
    assert found[0]["seed"] == found[1]["seed"] != found[2]["seed"]
    assert len({one["own seed"] for one in found}) == len(found)


def _refused() -> tuple[str, str, str]:
    _fake(8, 0)
    ids = torch.zeros(1, 8, dtype=torch.long)
    config = transformers.GPT2Config(n_layer=1, n_embd=24, n_head=6, vocab_size=64, use_cache=False)
    inputs = {"input_ids": ids, "labels": ids}
    mixed = autoshard.parallelize(
        transformers.GPT2LMHeadModel(config), 4, inputs, degree="max", check_inputs=False, device="cpu"
    )  # six heads take two ranks
    with pytest.raises(ValueError) as between:
        autoshard.fully_shard(mixed)
    alone = autoshard.parallelize(
        transformers.GPT2LMHeadModel(config), 8, inputs, degree=1, check_inputs=False, device="cpu"
    )
    with pytest.raises(ValueError) as one:
        autoshard.fully_shard(alone)
    copies = autoshard.parallelize(
        transformers.GPT2LMHeadModel(config), 2, inputs, degree=2, check_inputs=False, device="cpu"
    )
    autoshard.fully_shard(copies)
    with pytest.raises(autoshard.AutoshardError) as watched, copies.check_finite():
        pass
    dist.destroy_process_group()
    return str(between.value), str(one.value), str(watched.value)


def test_fully_shard_says_why_not() -> None:
    """Degrees between 1 and tp, and a single copy; and nobody looks for NaN past the layers' units."""
    ((between, one, watched),) = run_distributed(_refused, 1, process_group=False, timeout=200)
    assert "attn is split 2 ways and tp is 4" in between
    assert "average_gradients" in between
    assert "dp x 8 ranks with dp > 1" in one
    assert "before autoshard.fully_shard" in watched


class Sometimes(nn.Module):
    """A second branch that only some batches take."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, also: Tensor | None = None) -> Tensor:
        """x, also: [b, 8] -> []."""
        y = self.down(self.up(x).relu())
        return (y if also is None else y + self.other(also)).square().mean()


def _averaged() -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model = Sometimes().double()
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if not dist.is_initialized():
        ((model(x[:2]) + model(x[2:], x[2:])) / 2).backward()
        return {n: p.grad for n, p in model.named_parameters()}
    tp_model = autoshard.parallelize(model, 2, {"x": x[:2]}, degree="max")
    mesh = tp_model.mesh
    assert mesh is not None
    part = x[:2] if mesh.get_local_rank("dp") == 0 else x[2:]
    (tp_model(part) if mesh.get_local_rank("dp") == 0 else tp_model(part, part)).backward()
    autoshard.average_gradients(tp_model)
    return {
        n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for n, p in tp_model.named_parameters()
    }


@pytest.mark.slow
def test_means_where_a_branch_ran_on_one_copy() -> None:
    """A gradient that one copy has is halved; one that none has stays none."""
    right = _averaged()
    assert right["never"] is None and right["other.weight"] is not None
    for found in run_distributed(_averaged, 4, timeout=300):
        assert found["never"] is None
        assert_close(found, right)


class Mixed(nn.Module):
    """Two key heads for four query heads, an MLP of six: split 4 and 2 ways on four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: [b, s, 8], past: [b, 2, s, 4] -> [b, s, 8], the keys [b, 2, s, 4]."""
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k = k if past is None else k + past
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu()), k


def _mixed() -> list[dict[str, Tensor]]:
    """Gradients of the mean over two batches, each of two calls; on ranks also compiled."""
    torch.manual_seed(0)
    model, batches = Mixed().double().eval(), torch.randn(2, 2, 3, 5, 8, dtype=torch.float64)
    calls: list[Any] = [model]
    if dist.is_initialized():
        given = (batches[0, 0],)
        tp_model = autoshard.parallelize(model, 4, given, degree="max", logits="sharded")
        assert set(tp_model.plan.degrees.values()) == {2, 4}
        assert tp_model.mesh is not None and tuple(tp_model.mesh.shape) == (2, 4)
        batches = batches[tp_model.mesh.get_local_rank("dp")][None]
        compiled = torch.compile(tp_model, backend="aot_eager", fullgraph=True)
        model, calls = tp_model, [tp_model, compiled]
    found = []
    for call in calls:
        model.zero_grad()
        for first, second in batches:
            _, keys = call(first)
            if isinstance(keys, DTensor):
                assert keys.placements == (Shard(1), Replicate())  # two ranks hold each of them
            out, keys = call(second, keys)
            assert isinstance(keys, DTensor) == (len(calls) == 2)
            keys = keys.full_tensor() if isinstance(keys, DTensor) else keys
            ((out.square().sum() + keys.square().sum()) / len(batches)).backward()
        if isinstance(model, autoshard.ParallelModule):
            autoshard.average_gradients(model)
        named = model.named_parameters()
        share = model.share_of if isinstance(model, autoshard.ParallelModule) else lambda name: None
        found.append({n: autoshard.parameters.whole(p.grad, share(n)).clone() for n, p in named})
    return found


@pytest.mark.slow
def test_degrees_between_beside_copies() -> None:
    """2 x 4 ranks, regions split 4 and 2 ways: means over the copies, compiled too."""
    (right,) = _mixed()
    for plain, compiled in run_distributed(_mixed, 8, timeout=400):
        assert_close(plain, right)
        assert_close(compiled, right)


def _hooked() -> list[str]:
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=32, dropout=0.0))
    inputs = nanogpt.inputs(model)
    tp_model = autoshard.parallelize(model, 1, inputs)
    seen: list[str] = []
    for name, module in tp_model.named_modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
            module.register_full_backward_hook(lambda m, gi, go, name=name: seen.append(f"d{name}"))
    tp_model(**inputs)[1].backward()
    return seen


def test_layers_are_called() -> None:
    """Hooks on the model's layers run, forward and backward, in the model's order."""
    assert _hooked() == [
        "transformer.h.0", "transformer.h.1", "dtransformer.h.1", "dtransformer.h.0",
    ]  # fmt: skip


class Block(nn.Module):
    """A part of a layer runs in some of its calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, gated: bool) -> Tensor:
        """x: [b, 8] -> [b, 8]."""
        hidden = self.up(self.norm(x)).relu()
        return x + self.down(hidden * hidden.sigmoid() if gated else hidden)


class Again(nn.Module):
    """Two blocks of which one is called three times, twice without another between."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, 8] -> []."""
        first, second = self.blocks
        x = first(first(x * self.start, False), True)
        return first(second(x, True), False).square().mean()


def _called_again(tp: int) -> None:
    torch.manual_seed(0)
    model, x = Again().double(), torch.randn(4, 8, dtype=torch.float64)
    tp_model = autoshard.parallelize(copy.deepcopy(model), tp, (x,), degree="max")
    assert tp == 1 or tp_model.share_of("blocks.0.up.weight") is not None
    seen: dict[str, list[Any]] = {}
    for who, module in (("model", model), ("split", tp_model)):
        events = seen[who] = []
        for name in ("blocks.0", "blocks.1"):
            layer = module.get_submodule(name)
            layer.register_forward_hook(
                lambda m, given, out, name=name, events=events: events.append((name, out.detach()))
            )
            layer.register_full_backward_hook(
                lambda m, into, out, name=name, events=events: events.append((name, out[0].detach()))
            )
        module(x).backward()
    assert [name for name, _ in seen["split"]] == [name for name, _ in seen["model"]]
    assert len(seen["split"]) == 8
    assert_close([value for _, value in seen["split"]], [value for _, value in seen["model"]])
    for name, parameter in model.named_parameters():
        found = tp_model.get_parameter(name).grad
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert_close(found, parameter.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_a_layer_is_called_again() -> None:
    """A layer's every call is one, on the values and gradients that the model's own layer has."""
    _called_again(1)


@pytest.mark.slow
def test_a_layer_is_called_again_on_ranks() -> None:
    """And split."""
    run_distributed(_called_again, 2, 2, timeout=200)
