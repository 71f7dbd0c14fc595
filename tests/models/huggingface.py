"""Tiny, randomly initialised instances of the language models of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BloomForCausalLM,
    FalconForCausalLM,
    GPT2LMHeadModel,
    GPTJForCausalLM,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Olmo2ForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
    XLNetLMHeadModel,
)

from tests.models.case import Build, Case, seeded

LAYERS = 2
HIDDEN = 64
HEADS = 8
HEAD_DIM = HIDDEN // HEADS
FFN = 128
VOCABULARY = 203
MAX_LENGTH = 64
PAD, BOS, EOS = 0, 1, 2
IGNORED = -100

BOTH = ("sdpa", "eager")
EAGER = ("eager",)


def builder(
    model_class: type[PreTrainedModel], dropouts: tuple[str, ...], settings: dict[str, Any]
) -> Build:
    """Return the builder of one configuration; `dropouts` are its fields of dropout rates."""

    def build(attention: str = "eager", *, dropout: float = 0.1, seed: int = 0) -> PreTrainedModel:
        fields: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "attn_implementation": attention,
            **dict.fromkeys(dropouts, dropout),
            **settings,
        }
        return seeded(lambda: model_class(model_class.config_class(**fields)), seed)

    return build


def _ids(generator: torch.Generator, batch: int, length: int) -> Tensor:
    return torch.randint(EOS + 1, VOCABULARY, (batch, length), generator=generator)


def _labels(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """Labels of which about a fifth, and always the last of the first row, are ignored."""
    labels = _ids(generator, batch, length)
    ignored = torch.rand((batch, length), generator=generator) < 0.2
    ignored[:, length // 2] = False
    ignored[0, -1] = True
    return labels.masked_fill(ignored, IGNORED)


def token_inputs(
    model: nn.Module, *, batch: int = 3, length: int = 10, seed: int = 0
) -> dict[str, Tensor]:
    """Token ids and labels of the same length."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": _ids(generator, batch, length),
        "labels": _labels(generator, batch, length),
    }


def sequence_pair_inputs(
    model: nn.Module, *, batch: int = 3, length: int = 10, seed: int = 0
) -> dict[str, Tensor]:
    """Token ids for an encoder and shorter labels for its decoder."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": _ids(generator, batch, length),
        "labels": _labels(generator, batch, max(2, length - 3)),
    }


def _gpt2(name: str, **settings: Any) -> Case:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FFN}
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    build = builder(GPT2LMHeadModel, dropouts, {**sizes, "n_positions": MAX_LENGTH, **settings})
    return Case(name, build, token_inputs, BOTH)


def _t5(name: str, **settings: Any) -> Case:
    sizes = {
        "d_model": HIDDEN,
        "d_kv": HEAD_DIM,
        "d_ff": FFN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": PAD,
        "use_cache": False,
    }
    build = builder(T5ForConditionalGeneration, ("dropout_rate",), {**sizes, **settings})
    return Case(name, build, sequence_pair_inputs, BOTH)


def _xlnet(name: str) -> Case:
    settings = {
        "d_model": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "d_inner": FFN,
        "mem_len": None,
        "use_mems_eval": False,
    }
    return Case(name, builder(XLNetLMHeadModel, ("dropout",), settings), token_inputs, EAGER)


def _gptj(name: str) -> Case:
    settings = {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": FFN,
        "n_positions": MAX_LENGTH,
        "rotary_dim": HEAD_DIM // 2,
        "use_cache": False,
    }
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return Case(name, builder(GPTJForCausalLM, dropouts, settings), token_inputs, EAGER)


def _bloom(name: str) -> Case:
    settings = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "use_cache": False}
    dropouts = ("hidden_dropout", "attention_dropout")
    return Case(name, builder(BloomForCausalLM, dropouts, settings), token_inputs, EAGER)


def _usual(
    name: str, model_class: type[PreTrainedModel], dropouts: tuple[str, ...], **settings: Any
) -> Case:
    """Return a case of a class whose configuration uses the usual names for its sizes."""
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_LENGTH,
        "use_cache": False,
    }
    return Case(name, builder(model_class, dropouts, {**sizes, **settings}), token_inputs, BOTH)


def _bert(name: str) -> Case:
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return _usual(name, BertForMaskedLM, dropouts, intermediate_size=FFN)


def _llama(name: str, kv_heads: int) -> Case:
    return _usual(
        name,
        LlamaForCausalLM,
        ("attention_dropout",),
        intermediate_size=FFN,
        num_key_value_heads=kv_heads,
    )


def _gpt_neox(name: str) -> Case:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return _usual(
        name,
        GPTNeoXForCausalLM,
        ("attention_dropout", "hidden_dropout"),
        intermediate_size=FFN,
        rope_parameters=rope,
    )


def _opt(name: str) -> Case:
    return _usual(name, OPTForCausalLM, ("dropout", "attention_dropout"), ffn_dim=FFN)


def _falcon(name: str, **settings: Any) -> Case:
    dropouts = ("hidden_dropout", "attention_dropout")
    return _usual(name, FalconForCausalLM, dropouts, ffn_hidden_size=FFN, **settings)


def _phi3(name: str, kv_heads: int) -> Case:
    return _usual(
        name,
        Phi3ForCausalLM,
        ("resid_pdrop", "embd_pdrop", "attention_dropout"),
        intermediate_size=FFN,
        num_key_value_heads=kv_heads,
        original_max_position_embeddings=MAX_LENGTH,
    )


def _olmo2(name: str, kv_heads: int) -> Case:
    return _usual(
        name,
        Olmo2ForCausalLM,
        ("attention_dropout",),
        intermediate_size=FFN,
        num_key_value_heads=kv_heads,
    )


def _qwen3(name: str, kv_heads: int) -> Case:
    return _usual(
        name,
        Qwen3ForCausalLM,
        ("attention_dropout",),
        intermediate_size=FFN,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
    )


CASES: list[Case] = [
    _gpt2("gpt2", use_cache=False),
    _gpt2("gpt2-cache"),
    _bert("bert"),
    _t5("t5"),
    _t5(
        "t5-gated",
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        initializer_factor=0.1,
    ),
    _xlnet("xlnet"),
    _llama("llama-kv8", kv_heads=HEADS),
    _llama("llama-kv4", kv_heads=HEADS // 2),
    _llama("llama-kv2", kv_heads=2),
    _llama("llama-kv1", kv_heads=1),
    _gpt_neox("gpt-neox"),
    _opt("opt"),
    _falcon("falcon-new", new_decoder_architecture=True, num_kv_heads=2),
    _falcon("falcon-multi-query"),
    _falcon("falcon-multi-query-alibi", alibi=True),
    _falcon("falcon-alibi", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    _phi3("phi3", kv_heads=HEADS),
    _phi3("phi3-kv2", kv_heads=2),
    _olmo2("olmo2", kv_heads=HEADS),
    _qwen3("qwen3", kv_heads=HEADS // 2),
    _gptj("gptj"),
    _bloom("bloom"),
]


def case(name: str) -> Case:
    """Return the case of this name."""
    return next(one for one in CASES if one.name == name)
