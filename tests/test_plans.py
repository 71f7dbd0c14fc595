"""Plans: deterministic, savable, editable, and true about what lies where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import autoshard
from autoshard.inputs import normalized_inputs
from tests.models.huggingface import case


def _gpt2(heads: int, hidden: int, vocabulary: int = 203) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_embd=hidden, n_head=heads, vocab_size=vocabulary, n_positions=32,
            use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def test_a_saved_plan_gives_the_same_plan(tmp_path: Path) -> None:
    """Save, load and use: the same degrees, also after with_degree."""
    model = case("gpt2").build("sdpa")
    plan = autoshard.plan(model, 4).with_degree("transformer.h.0.mlp", 2)
    plan.save(tmp_path / "plan.json")
    again = autoshard.plan(model, 4, plan=tmp_path / "plan.json")
    assert again.degrees == plan.degrees
    assert again.degrees["transformer.h.0.mlp"] == 2
    assert again.parameters == plan.parameters


def test_with_degree_changes_what_is_tied_and_says_so() -> None:
    """The embedding and the loss of a tied model have one degree."""
    plan = autoshard.plan(case("gpt2").build("sdpa"), 4).with_degree("lm_head", 2)
    assert plan.degrees["transformer.wte"] == plan.degrees["lm_head"] == 2
    assert "transformer.wte" in plan.notes[-1]
    assert plan.degrees["transformer.h.0.mlp"] == 4


def test_t5_ties_the_heads_of_a_stack() -> None:
    """One table of position biases serves all layers, so their heads have one degree."""
    plan = autoshard.plan(case("t5").build("sdpa"), 2)
    region = plan.region("encoder.block.0.layer.0.SelfAttention")
    assert "encoder.block.1.layer.0.SelfAttention" in region.tied


def test_heads_that_do_not_divide_fall_back_with_a_reason() -> None:
    """25 heads at tp=2 stay whole; the MLP does not."""
    plan = autoshard.plan(_gpt2(heads=25, hidden=50), 2)
    attention = plan.region("transformer.h.0.attn")
    assert attention.degree == 1 and "25" in attention.reason and "tp=2" in attention.reason
    assert plan.region("transformer.h.0.mlp").degree == 2


def test_a_large_odd_vocabulary_is_padded_as_in_the_paper() -> None:
    """50,257 rows over 8 ranks are computed as 51,200 and stored as 50,257."""
    with torch.device("meta"):
        model = _gpt2(heads=8, hidden=64, vocabulary=50257)
    plan = autoshard.plan(model, 8)
    table = next(p for p in plan.parameters if p.name == "transformer.wte.weight")
    assert table.padded == 51200 and table.shape == (50257, 64)
    assert table.local_numel == -(-50257 // 8) * 64


def test_the_plan_on_the_meta_device_is_the_plan() -> None:
    """Weights do not matter for planning."""
    model = case("llama-kv2").build("sdpa")
    plan = autoshard.plan(model, 4)
    assert autoshard.plan(model.to("meta"), 4) == plan


def test_what_stays_whole_has_a_reason() -> None:
    """Every parameter is split or says why not."""
    plan = autoshard.plan(case("bert").build("sdpa"), 2)
    for parameter in plan.parameters:
        assert parameter.dim is not None or parameter.reason, parameter.name


def test_degree_as_a_number() -> None:
    """degree=2 at tp=4 gives no region more than 2."""
    plan = autoshard.plan(case("gpt2").build("sdpa"), 4, degree=2)
    assert set(plan.degrees.values()) == {2}


@pytest.mark.slow
def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    """Ranks are different processes: sets must not order anything."""
    code = (
        "import autoshard, hashlib\n"
        "from tests.models.huggingface import case\n"
        "p = autoshard.plan(case('llama-kv2').build('eager'), 4)\n"
        "print(hashlib.sha256(repr((p.degrees, p.parameters, p.regions)).encode()).hexdigest())\n"
    )
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found.add(done.stdout.splitlines()[-1])
    assert len(found) == 1


def test_huggingface_inputs_are_found_with_labels() -> None:
    """dummy_inputs, brought into the vocabulary, with labels."""
    args, kwargs = normalized_inputs(case("gpt2").build("sdpa"), None)
    assert not args and set(kwargs) >= {"input_ids", "labels"}
    assert int(kwargs["input_ids"].max()) < 203


def test_lightning_inputs_are_found() -> None:
    """example_input_array is taken."""
    model = nn.Linear(4, 4)
    model.example_input_array = torch.zeros(2, 4)  # type: ignore[assignment]
    (array,), _ = normalized_inputs(model, None)
    assert array.shape == (2, 4)


def test_tokens_are_found_for_a_model_that_embeds_first() -> None:
    """The only input of a model whose first act is an embedding is tokens."""
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.net(tokens)

    (tokens,), _ = normalized_inputs(Model(), None)
    assert tokens.dtype == torch.int64 and int(tokens.max()) < 11


def test_one_tensor_given_twice_is_two_inputs() -> None:
    """labels = input_ids must not become one input of the graph."""
    model = case("gpt2").build("sdpa", dropout=0.0)
    tokens = case("gpt2").inputs(model)["input_ids"]
    split = autoshard.parallelize(model, 1, {"input_ids": tokens, "labels": tokens})
    other = torch.full_like(tokens, 7)
    torch.testing.assert_close(
        split(input_ids=tokens, labels=other).loss, model(input_ids=tokens, labels=other).loss
    )
