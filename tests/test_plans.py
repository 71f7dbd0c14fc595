"""Plans: what they say, that they say it everywhere, and how they are changed and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import autoshard
from autoshard import ops
from autoshard.capture import skeleton
from autoshard.inputs import normalized_inputs
from autoshard.pipeline import analyse, rewrite
from autoshard.signatures import plan_hash
from tests.models import nanogpt
from tests.models.case import Case

GPT = nanogpt.CASES[0]
REGIONS = [
    ("transformer.wte", "embedding"),
    ("transformer.h.0.attn", "attention"),
    ("transformer.h.0.mlp", "mlp"),
    ("transformer.h.1.attn", "attention"),
    ("transformer.h.1.mlp", "mlp"),
    ("lm_head", "loss"),
]


def huggingface(name: str) -> Case:
    """A case of transformers, imported where it is needed."""
    from tests.models import huggingface

    return huggingface.case(name)


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    """nanoGPT's plan at tp=4."""
    model = GPT.build("sdpa", dropout=0.0)
    return autoshard.plan(model, 4, GPT.inputs(model), degree="max")


def graph_text(model: nn.Module, tp: int, inputs: object) -> str:
    """The rewritten graph."""
    args, kwargs = normalized_inputs(model, inputs)
    _, sharded = rewrite(analyse(skeleton(model), args, kwargs, tp), tp, "max")
    return str(sharded.graph)


# What a plan says


def test_regions(plan: autoshard.Plan) -> None:
    """Name, kind and degree of each, in the graph's order; the whole forward runs on shards."""
    assert plan.tp == 4
    assert [(r.name, r.kind) for r in plan.regions] == REGIONS
    assert plan.degrees == {name: 4 for name, _ in REGIONS}
    assert plan.sharded_fraction == 1.0
    assert plan.replicated == () and plan.unknown == () and plan.notes == ()


def test_fields_of_a_region(plan: autoshard.Plan) -> None:
    """Attention: parameters, values that enter and leave, collectives, FLOPs."""
    region = plan.region("transformer.h.1.attn")
    assert region.degrees == (1, 2, 4)
    assert region.axes == ("8",)
    prefix = "transformer.h.1.attn."
    assert region.parameters == tuple(
        prefix + name for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    )
    assert "scaled_dot_product_attention_1" in region.nodes
    assert len(region.inputs) == 1 and region.inputs[0].startswith("layer_norm")
    assert len(region.outputs) == 1 and region.outputs[0].startswith("linear")
    assert set(region.outputs) <= set(region.nodes)
    assert len(region.collectives) == 2
    assert sum("backward all-reduce" in c for c in region.collectives) == 1
    assert sum("forward all-reduce" in c for c in region.collectives) == 1
    tokens, hidden, length = 3 * 10, 64, 10
    linears = 2 * tokens * hidden * (3 * hidden + hidden)
    assert region.flops == linears + 2 * 2 * tokens * length * hidden
    assert region.tied == ()
    assert "8" in region.reason and "4" in region.reason


def test_collectives_of_a_plan(plan: autoshard.Plan) -> None:
    """As many lines as all-reduces are made (the loss's two are one line)."""
    lines = [line for region in plan.regions for line in region.collectives]
    assert sum("backward" in line for line in lines) == 2 * 2 + 1
    assert sum("forward" in line for line in lines) == 2 * 2 + 1 + 1
    assert sum("twice" in line for line in lines) == 1
    alone = plan.with_degree("transformer.h.0.mlp", 1).region("transformer.h.0.mlp")
    assert alone.collectives == ()


@pytest.mark.parametrize("tp", [2, 8])
@pytest.mark.parametrize(
    "name",
    ["llama-kv2", "gptj", "falcon-new", "qwen3", "olmo2", pytest.param("t5", marks=pytest.mark.slow)],
)
def test_collectives_of_a_plan_are_those_of_the_graph(name: str, tp: int) -> None:
    """Also where one value enters several regions, or a weight of few heads is stored whole."""
    case = huggingface(name)
    model = case.build("eager", dropout=0.0)
    args, kwargs = normalized_inputs(model, case.inputs(model))
    plan, sharded = rewrite(analyse(skeleton(model), args, kwargs, tp), tp, "max")
    count = Counter(node.target for node in sharded.graph.nodes)
    lines = [line for region in plan.regions for line in region.collectives]
    assert sum("backward" in line for line in lines) == count[ops.copy]
    assert (
        sum("forward" in line for line in lines) == count[ops.reduce] + count[ops.vocab_cross_entropy]
    )


def test_matmuls_that_stay_whole_say_why() -> None:
    """By the weight's own axes, never by batch or sequence. One key head is for all queries."""
    case = huggingface("llama-kv1")
    model = case.build("sdpa", dropout=0.0)
    made = autoshard.plan(model, 2, case.inputs(model), degree="max")
    assert made.replicated
    assert all("inside the attention kernel" in whole.reason for whole in made.replicated)


def test_what_a_region_of_degree_one_leaves_whole(plan: autoshard.Plan) -> None:
    """Its matmuls and parameters say so."""
    alone = plan.with_degree("transformer.h.0.mlp", 1)
    reasons = [w.reason for w in alone.replicated]
    reasons += [p.reason for p in alone.parameters if p.name.startswith("transformer.h.0.mlp.c_fc")]
    assert reasons == ["its region has degree 1"] * len(reasons)
    assert len(reasons) >= 3


def test_parameters_and_their_reasons(plan: autoshard.Plan) -> None:
    """All of the model's, in its order; what is whole says why, what is split says how."""
    model = GPT.build("sdpa")
    assert [(p.name, p.shape) for p in plan.parameters] == [
        (name, tuple(p.shape)) for name, p in model.named_parameters()
    ]
    shares = {p.name: p for p in plan.parameters}
    qkv = shares["transformer.h.0.attn.c_attn.weight"]
    assert (qkv.dim, qkv.degree, qkv.reason) == (0, 4, "")
    assert qkv.layout == "8/4·8 | 8/4·8 | 8/4·8"
    assert qkv.local_numel == qkv.numel // 4
    row = shares["transformer.h.0.mlp.c_proj.weight"]
    assert (row.dim, row.degree) == (1, 4)
    whole = [p for p in plan.parameters if p.degree == 1]
    assert {p.name.split(".", 3)[-1] for p in whole if ".h.0." in p.name} == {
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_proj.bias",
        "mlp.c_proj.bias",
    }  # fmt: skip
    for share in whole:
        assert share.reason, share.name
        assert share.dim is None and share.local_numel == share.numel


def test_an_odd_vocabulary_is_padded(plan: autoshard.Plan) -> None:
    """203 rows over 4 ranks: 51 each, 204 while computing; the parameter has 203."""
    table = next(p for p in plan.parameters if p.name == "transformer.wte.weight")
    assert table.shape == (203, 64)
    assert (table.dim, table.degree, table.padded) == (0, 4, 204)
    assert table.local_numel == 51 * 64
    assert "padded to 204" in plan.region("transformer.wte").reason
    assert "padded to 204" in plan.region("lm_head").reason


@pytest.mark.slow
def test_twenty_five_heads() -> None:
    """GPT-2 XL's heads at tp=2: attention stays whole and says why; its projections are split alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=211, n_positions=16, n_embd=100, n_layer=1, n_head=25)
    model = GPT2LMHeadModel(config)
    plan = autoshard.plan(model, 2, degree="max")
    attention = plan.region("transformer.h.0.attn")
    assert (attention.degree, attention.degrees) == (1, (1,))
    assert "25" in attention.reason and "tp=2" in attention.reason
    assert plan.region("transformer.h.0.mlp").degree == 2
    assert 0.5 < plan.sharded_fraction < 1.0
    assert plan.region("transformer.h.0.attn.c_attn").degree == 2
    assert {w.name.rpartition(" ")[2] for w in plan.replicated} == {"transformer.h.0.attn"}
    assert all(w.reason for w in plan.replicated)
    assert autoshard.plan(model, 5, degree="max").region("transformer.h.0.attn").degree == 5
    assert autoshard.verify(model, 2).ok


def test_unused_parameters_are_listed() -> None:
    """A parameter that the forward does not touch is whole, and said to be unused."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model.extra = nn.Parameter(torch.ones(3, 5))
    plan = autoshard.plan(model, 2, (torch.ones(3, 8),), degree="max")
    extra = next(p for p in plan.parameters if p.name == "extra")
    assert (extra.degree, extra.local_numel, extra.reason) == (1, 15, "not used in the forward")


def test_an_integer_degree_is_a_bound() -> None:
    """The largest degree of each region that divides the number."""
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=1, n_head=6, n_embd=48))
    inputs = {"idx": torch.zeros(2, 7, dtype=torch.int64)}
    assert set(autoshard.plan(model, 4, inputs, degree=2).degrees.values()) == {2}
    most = autoshard.plan(model, 4, inputs, degree="max").degrees
    assert most["transformer.h.0.attn"] == 2 and most["transformer.h.0.mlp"] == 4
    assert autoshard.plan(model, 4, inputs, degree="max").degrees == most


# Changing a plan


def test_with_degree_changes_one_region(plan: autoshard.Plan) -> None:
    """Another plan in which degree, parameters and FLOPs follow; the first stays as it was."""
    changed = plan.with_degree("transformer.h.0.mlp", 2)
    assert plan.degrees["transformer.h.0.mlp"] == 4
    assert changed.degrees == {**plan.degrees, "transformer.h.0.mlp": 2}
    assert changed.notes == ("transformer.h.0.mlp: degree 2 by request",)
    shares = {p.name: p.degree for p in changed.parameters}
    assert shares["transformer.h.0.mlp.c_fc.weight"] == 2
    assert shares["transformer.h.1.mlp.c_fc.weight"] == 4
    none = changed.with_degree("transformer.h.0.mlp", 1)
    assert 0.5 < none.sharded_fraction < 1.0 == changed.sharded_fraction
    assert any("transformer.h.0.mlp" in w.name for w in none.replicated)
    assert len(none.notes) == 2
    back = none.with_degree("transformer.h.0.mlp", 4)
    assert back.degrees == plan.degrees and back.parameters == plan.parameters


def test_with_degree_on_tied_regions(plan: autoshard.Plan) -> None:
    """The embedding's table is the output's: both change, and the note says so."""
    assert plan.region("transformer.wte").tied == ("lm_head",)
    assert plan.region("lm_head").tied == ("transformer.wte",)
    for name, other in (("lm_head", "transformer.wte"), ("transformer.wte", "lm_head")):
        changed = plan.with_degree(name, 2)
        assert changed.degrees[name] == changed.degrees[other] == 2
        assert changed.degrees["transformer.h.0.mlp"] == 4
        (note,) = changed.notes
        assert name in note and other in note and "share" in note


@pytest.mark.slow
def test_position_bias_ties_the_stack() -> None:
    """T5's heads have one degree in a stack: its layers look one table up; the other's is free."""
    one = huggingface("t5")
    model = one.build("sdpa", dropout=0.0)
    plan = autoshard.plan(model, 4, one.inputs(model), degree="max")
    first = plan.region("encoder.block.0.layer.0.SelfAttention")
    assert "encoder.block.1.layer.0.SelfAttention" in first.tied
    changed = plan.with_degree(first.name, 2)
    twos = {name for name, degree in changed.degrees.items() if degree == 2}
    assert twos == {first.name, *first.tied}
    assert not any("decoder" in name for name in twos)
    assert all(name in changed.notes[0] for name in twos)


# Keeping a plan


def test_save_and_load(plan: autoshard.Plan, tmp_path: Path) -> None:
    """Degrees and fingerprint; loaded into plan() it is the whole plan again."""
    path = tmp_path / "plan.json"
    changed = plan.with_degree("transformer.h.0.mlp", 2).with_degree("lm_head", 1)
    changed.save(path)
    loaded = autoshard.Plan.load(path)
    assert (loaded.tp, loaded.degrees) == (4, changed.degrees)
    assert loaded.fingerprint == plan.fingerprint
    assert plan_hash(loaded) == plan_hash(changed)
    loaded.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())
    model = GPT.build("sdpa", dropout=0.0)
    for given in (changed, loaded, path, str(path)):
        made = autoshard.plan(model, 4, GPT.inputs(model), plan=given)
        assert made.degrees == changed.degrees
        assert made.parameters == changed.parameters
        assert made.sharded_fraction == changed.sharded_fraction
    assert "transformer.h.0.mlp" in str(loaded) and "by request" not in loaded.regions[0].reason


def test_a_plan_prints(plan: autoshard.Plan) -> None:
    """Regions, degrees and the sums that a reader looks for."""
    text = str(plan)
    for word in ("tp=4", "transformer.wte", "lm_head", "100.00%", "203"):
        assert word in text


# Determinism


PROGRAM = """
import hashlib, torch, autoshard
from autoshard.signatures import plan_hash
from tests.models import nanogpt
from tests.test_plans import graph_text
model = nanogpt.CASES[0].build("sdpa")
inputs = nanogpt.CASES[0].inputs(model)
plan = autoshard.plan(model, 4, inputs)
print(plan_hash(plan), plan.fingerprint, repr(plan.regions), repr(plan.parameters))
print(graph_text(model, 4, inputs))
"""


@pytest.mark.slow
def test_the_same_plan_in_every_process() -> None:
    """Two processes with other hash seeds print the same plan and the same graph."""
    root = Path(__file__).parent.parent

    def start(seed: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(root)}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    outputs = [p.communicate(timeout=120) for p in [start(1), start(2)]]
    assert outputs[0][0] == outputs[1][0]
    assert "vocab_cross_entropy" in outputs[0][0], outputs[0][1]


def _nanogpt() -> nn.Module:
    return nanogpt.GPT(nanogpt.GPTConfig(n_layer=1))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=203, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("build", [_nanogpt, pytest.param(_llama, marks=pytest.mark.slow)])
def test_a_model_on_the_meta_device_has_the_same_plan(build: Callable[[], nn.Module]) -> None:
    """No weight is looked at: plan and graph are those of the real model."""
    model = build()
    with torch.device("meta"):
        hollow = build()
    assert all(p.is_meta for p in hollow.parameters())
    real, meta = autoshard.plan(model, 4, degree="max"), autoshard.plan(hollow, 4, degree="max")
    assert meta == real
    assert plan_hash(meta) == plan_hash(real)
    assert all(p.is_meta for p in hollow.parameters())
    assert graph_text(hollow, 4, None) == graph_text(model, 4, None)


def test_planning_leaves_the_model_alone() -> None:
    """Mode, weights, gradients and the random state are as before."""
    model = GPT.build("sdpa").eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    autoshard.plan(model, 2, GPT.inputs(model), degree="max")
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(m.training for m in model.modules())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
