"""Tiny random models of the architectures in transformers' auto classes.

A configuration is made from its class's defaults: every field whose name says what it is (a width, a
number of layers, a vocabulary) gets a small number. What cannot be read off a name stands in
``OVERRIDES``, per model type. All layers' kinds are kept; dropout is 0.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

BATCH, LENGTH, TARGET = 2, 16, 12
LAYERS, EXPERTS, CHOSEN, LANDMARK = 2, 4, 2, 250

AUTO = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
IMAGE = {
    "vit", "deit", "beit", "dinov2", "dinov2_with_registers", "swin", "swinv2", "data2vec-vision",
    "ijepa",
    "vit_msn", "clip", "siglip", "convnext", "segformer", "pvt", "hiera", "imagegpt", "metaclip_2",
    "donut-swin",
}  # fmt: skip


def _names(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Fields by what they say; where the default is a number of the same kind.
SIZES: dict[str, Any] = {
    **_names(64, """hidden_size d_model n_embd dim emb_dim embedding_size embed_dim d_embed width
        hidden_dim hidden_dim_model word_embed_proj_dim lru_width projection_dim proj_dim output_size
        output_dim text_embed_dim text_hidden_size entity_emb_size true_hidden_size embed_proj_dim
        audio_embed_dim tokenizer_hidden_size moe_intermediate_size shared_expert_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_intermediate_size
        n_shared_intermediate"""),
    **_names(128, """intermediate_size ffn_dim d_ff dim_ff ff_dim encoder_ffn_dim decoder_ffn_dim
        n_inner ffn_hidden_size d_inner dense_intermediate_size intermediate_size_mlp mlp_dim
        mlp_hidden_size
        feedforward_size speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim"""),
    **_names(LAYERS, """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        depth num_encoder_layers num_decoder_layers text_encoder_layers n_text_layer t2u_encoder_layers
        t2u_decoder_layers speech_encoder_layers num_self_attends_per_block"""),
    **_names(4, """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads num_cross_attention_heads num_self_attention_heads
        linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads n_mamba_heads
        index_topk"""),
    **_names(2, """num_key_value_heads swa_num_key_value_heads num_kv_heads n_kv_heads
        multi_query_group_num global_num_key_value_heads num_global_key_value_heads
        num_random_blocks"""),
    **_names(256, """vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size n_vocab t2u_vocab_size
        entity_vocab_size vocab_size_per_layer_input text_vocab_size char_vocab_size
        unpadded_vocab_size"""),
    **_names(64, """max_position_embeddings n_positions max_position max_seq_len max_seq_length n_ctx
        max_sequence_length model_max_length context_length max_source_positions max_target_positions
        max_encoder_position_embeddings max_decoder_position_embeddings expert_capacity
        original_max_position_embeddings t2u_max_position_embeddings"""),
    **_names(16, """head_dim d_kv d_head kv_channels attention_head_dim attention_head_size
        global_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
        index_head_dim qk_head_dim indexer_head_dim v_head_dim swa_v_head_dim head_dim_swa
        mamba_head_dim key_length value_length
        query_pre_attn_scalar mamba_d_state state_size ssm_state_size mamba_d_head time_step_rank
        mamba_dt_rank hidden_size_per_layer_input d_rel rope_extent laurel_rank sliding_window
        sliding_window_size sliding_window_tokens local_attention attention_chunk_size window
        attention_window_size local_attention_window"""),
    **_names(8, """qk_rope_head_dim qk_nope_head_dim rotary_dim rotary_emb_dim rope_head_dim
        mamba_n_heads mamba_num_heads chunk_size mamba_chunk_size patch_size block_size"""),
    **_names(32, "kv_lora_rank q_lora_rank o_lora_rank lora_rank rank altup_hidden image_size"),
    **_names(EXPERTS, """num_experts num_local_experts n_routed_experts moe_num_experts n_experts
        num_routed_experts moe_experts"""),
    **_names(CHOSEN, """num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts
        experts_top_k num_selected_experts"""),
    **_names(1, """mamba_n_groups mamba_ngroups n_groups n_group topk_group num_expert_group
        num_expert_groups first_k_dense_replace num_dense_layers moe_layer_start_index num_mem_blocks
        n_shared_experts moe_num_shared_experts num_shared_experts num_shared_expert encoder_sparse_step
        decoder_sparse_step num_sparse_encoder_layers num_sparse_decoder_layers"""),
    "num_kv_shared_layers": 0,
}  # fmt: skip
ALSO_NONE = {"num_key_value_heads", "num_kv_heads", "n_inner", "head_dim", "lru_width"}
RANDOM = re.compile(r"dropout|pdrop|layerdrop|drop_(path_)?rate|drop_prob|jitter|attn_drop|hidden_drop")
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # lists with a kind for each layer
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

DROPPED = "dropped"  # an override: leave the field out

_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_WINDOWED = {
    "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "image_size": 32,
    "patch_size": 4,
    **_names(DROPPED, "out_features hidden_size num_layers stage_names out_indices _out_features "
             "_out_indices"),
}  # fmt: skip
_STAGED = {"image_size": 64, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    **_names(_LATENT, """axk1 deepseek_v3 longcat_flash youtu minicpm3 glm4_moe_lite kimi_linear
        bailing_hybrid"""),
    **_names({**_LATENT, "qk_head_dim": DROPPED}, "axk2 deepseek_v32 glm_moe_dsa"),
    **_names({"decoder_start_token_id": 0}, "t5 mt5 umt5 switch_transformers"),
    **_names(_WINDOWED, "swin swinv2 donut-swin"),
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2,
    },
    "convnext": _STAGED,
    "ctrl": {"dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "attn_pdrop": 0.0, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2,
            "moe_jitter_eps": 0.0,
        },
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "layer_types": ["full_attention"] * 2,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4, "head_dim": 16, "qk_nope_head_dim": 8,
        "shared_experts_intermediate_size": 64,
    },
    "esm": {"vocab_size": 256, "pad_token_id": 1, "mask_token_id": 5,
            "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fsmt": {"pad_token_id": 1, "bos_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": DROPPED,
                "window_size": 8},
    "hiera": {"embed_dim": 32, "depths": (1, 1, 1, 1), "image_size": (64, 64)},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "longformer": {"attention_window": 8, "max_position_embeddings": 66, "pad_token_id": 1},
    "longt5": {"decoder_start_token_id": 0, "local_radius": 4, "global_block_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "expand": 2},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "intermediate_size": 64,
                   "true_hidden_size": DROPPED},
    "mpt": {"attn_config": {"attn_pdrop": 0}, "resid_pdrop": 0.0, "emb_pdrop": 0.0},
    "perceiver": {"d_latents": 64, "num_latents": 16},
    "pvt": {**_STAGED, "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "hc_lowrank": 8, "ple_embed_dim": 64,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 48),
        "attn_layers": ("local", "lsh"), "feed_forward_size": 128, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "num_buckets": 4, "num_hidden_layers": DROPPED, "hash_seed": 0,
    },
    "segformer": {**_STAGED, "num_attention_heads": [1, 2, 4, 4]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
        "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
PART = {"emu3": "text_config", "musicgen": "decoder", "musicgen_melody": "decoder"}

# Not built, and why.
LEFT_OUT = {
    "blt": "byte patches: five sub-configurations that depend on each other",
    "gemma3n": "its vision tower needs timm; the text model is gemma3n_text",
    "gemma4_assistant": "a draft head, which needs a backbone's hidden states",
    "gemma4_unified_assistant": "a draft head, which needs a backbone's hidden states",
    "nemo_speechlm": "needs audio features", "voxtral_realtime": "needs audio features",
    "vibevoice_asr": "needs audio features",
    **{n: f"the class of {n}_text"
       for n in ("llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "dots3_note")},
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One model class of one auto class."""

    kind: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        """``bert``, or ``bert (causal)`` where several auto classes build it."""
        return self.model_type if self.kind == "causal" else f"{self.model_type} ({self.kind})"


def architectures() -> list[Architecture]:
    """Every class once; under each of the auto classes that it stands for."""
    found: list[Architecture] = []
    classes: set[str] = set()
    configs: set[tuple[str, type]] = set()
    for kind, mapping in AUTO.items():
        named = list(getattr(modeling_auto, mapping).items())
        named.sort(key=lambda n: CONFIG_MAPPING[n[0]].model_type != n[0])  # gpt2 before gpt-sw3
        for model_type, class_name in named:
            if model_type in LEFT_OUT or (kind == "image" and model_type not in IMAGE):
                continue
            first = class_name[0] if isinstance(class_name, (tuple, list)) else class_name
            config = (first, CONFIG_MAPPING[model_type])
            if config in configs or (kind != "causal" and first in classes):
                continue
            configs.add(config)
            classes.add(first)
            found.append(Architecture(kind, model_type, first))
    return found


def build(architecture: Architecture, attention: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with random weights, and inputs with labels.

    Raises:
        ValueError: the model has no such attention.
    """
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    config = _without_dropout(_config(architecture.model_type))
    config.is_decoder = architecture.kind == "causal" or getattr(config, "is_decoder", False)
    if architecture.kind == "masked":
        config.is_decoder = False
    config._attn_implementation = attention
    model: nn.Module = getattr(transformers, architecture.class_name)(config)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    generator = torch.Generator().manual_seed(3)
    return model, _inputs(architecture, model, config, generator)


def attentions(architecture: Architecture) -> tuple[str, ...]:
    """The attention implementations that the class has."""
    own = getattr(transformers, architecture.class_name)
    return ("sdpa", "eager") if getattr(own, "_supports_sdpa", False) else ("eager",)


def _config(model_type: str) -> Any:
    if model_type == "encoder-decoder":
        halves = [CONFIG_MAPPING["bert"](**_fields(CONFIG_MAPPING["bert"])) for _ in range(2)]
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return config
    made = CONFIG_MAPPING[model_type](**_fields(CONFIG_MAPPING[model_type]))
    return getattr(made, PART[model_type]) if model_type in PART else made


def _fields(config_class: Any, landmarks: list[int] | None = None) -> dict[str, Any]:
    """Keyword arguments for a tiny configuration."""
    landmarks = [LANDMARK] if landmarks is None else landmarks
    try:
        defaults = dict(config_class().__dict__)
    except Exception:  # a configuration without a default
        given = inspect.signature(config_class.__init__).parameters.values()
        defaults = {p.name: p.default for p in given if p.default is not p.empty}
    parts = {k: v for k, v in defaults.items() if isinstance(v, PreTrainedConfig)}
    made: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in parts:
            continue
        small = _small(name, value, landmarks)
        if small is not DROPPED:
            made[name] = small
    layers = max((len(made[k]) for k in KINDS if k in made), default=LAYERS)
    if layers != LAYERS:
        for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            if name in made:
                made[name] = layers
    if "mlp_layer_types" in made:
        kinds = made["mlp_layer_types"]
        made["mlp_layer_types"] = (kinds * layers)[:layers]
    for name, part in parts.items():
        made[name] = {**_fields(type(part), landmarks), "model_type": type(part).model_type}
    for name, value in OVERRIDES.get(config_class.model_type, {}).items():
        if value is DROPPED:
            made.pop(name, None)
        elif name != "head_dim" or name in defaults:
            made[name] = value
    return made


def _small(name: str, value: Any, landmarks: list[int]) -> Any:
    if isinstance(value, bool):
        return False if name == "use_cache" else DROPPED
    if name in SIZES and (isinstance(value, int) or (value is None and name in ALSO_NONE)):
        return SIZES[name]
    if name == "max_position_embeddings" and isinstance(value, float):
        return SIZES[name]
    if RANDOM.search(name) and isinstance(value, (int, float)):
        return 0.0
    if name in TOKENS:
        return TOKENS[name]
    if name in ("decoder_start_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        return None if value is None else 2
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 200:
        landmarks[0] -= 1
        return landmarks[0] + 1
    if name in KINDS and isinstance(value, list) and value:
        kinds = list(dict.fromkeys(value))
        return (kinds * LAYERS)[:LAYERS] if len(kinds) <= LAYERS else kinds
    return DROPPED


def _without_dropout(config: Any) -> Any:
    seen: set[int] = set()

    def visit(each: Any) -> None:
        if id(each) in seen:
            return
        seen.add(id(each))
        for name, value in list(each.__dict__.items()):
            if isinstance(value, PreTrainedConfig):
                visit(value)
            elif RANDOM.search(name) and isinstance(value, float) and value:
                setattr(each, name, 0.0)
        each.use_cache = False

    visit(config)
    return config


def _inputs(
    architecture: Architecture, model: nn.Module, config: Any, generator: torch.Generator
) -> dict[str, Any]:
    kind, model_type = architecture.kind, architecture.model_type

    def tokens(*shape: int, below: int = 200) -> Tensor:
        return torch.randint(5, below, shape, generator=generator)

    special: dict[str, Callable[[], dict[str, Any]]] = {
        "imagegpt": lambda: {"input_ids": tokens(BATCH, LENGTH), "labels": torch.tensor([0, 1])},
        "git": lambda: {
            **_same(tokens(BATCH, LENGTH)),
            "pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator),
        },
        "reformer": lambda: _same(tokens(BATCH, 64)),
        "fsmt": lambda: {"input_ids": tokens(BATCH, LENGTH), "labels": tokens(BATCH, LENGTH)},
        **dict.fromkeys(
            ("musicgen", "musicgen_melody"),
            lambda: {
                "input_ids": tokens(BATCH * config.num_codebooks, LENGTH),
                "labels": tokens(BATCH, LENGTH, config.num_codebooks),
            },
        ),
        # Without a mask these make one from sizes that the capture does not know.
        **dict.fromkeys(
            ("longt5", "switch_transformers"),
            lambda: {
                "input_ids": tokens(BATCH, LENGTH), "labels": tokens(BATCH, TARGET),
                "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64),
            },
        ),
    }  # fmt: skip
    if model_type == "perceiver" and kind == "masked":
        ids = tokens(BATCH, 64)
        return {"inputs": ids, "labels": ids.clone()}
    if model_type in special:
        return special[model_type]()
    if kind == "causal":
        return _same(tokens(BATCH, LENGTH))
    if kind == "masked":
        ids = tokens(BATCH, LENGTH)
        hidden = torch.rand(BATCH, LENGTH, generator=generator) < 0.5
        return {"input_ids": ids, "labels": torch.where(hidden, tokens(BATCH, LENGTH), -100)}
    if kind == "seq2seq":
        ids, labels = tokens(BATCH, LENGTH), tokens(BATCH, TARGET)
        if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
            labels = ids.clone()
        return {"input_ids": ids, "labels": labels}
    vision = getattr(config, "vision_config", None)
    size = getattr(config, "image_size", None) or getattr(vision, "image_size", None) or 64
    size = size[0] if isinstance(size, (tuple, list)) else size
    pixels = torch.randn(BATCH, getattr(config, "num_channels", 3), size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def _same(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids.clone()}
