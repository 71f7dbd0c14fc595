"""Models with LoRA adapters."""

from __future__ import annotations

from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import autoshard

WORDS = 48


def gpt2() -> nn.Module:
    """Weights the other way round, q, k and v in one."""
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=1, n_head=4, use_cache=False,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Two key heads for four query heads, a gated MLP."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, use_cache=False,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "llama": llama}
COLUMNS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}
ROWS = {"gpt2": ["attn.c_proj", "mlp.c_proj"], "llama": ["o_proj", "down_proj"]}


def adapted(name: str, dropout: float = 0.0) -> nn.Module:
    """With adapters on every linear; none of their weights is zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, fan_in_fan_out=name == "gpt2",
        target_modules=[*COLUMNS[name], *ROWS[name]], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(MODELS[name](), config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch() -> dict[str, Tensor]:
    """Tokens, some of them without a label."""
    tokens = torch.randint(WORDS, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens.masked_fill(tokens % 5 == 0, -100)}


def step(name: str, dropout: float = 0.0) -> dict[str, Any]:
    """Three steps of the adapters: losses, first gradients, and what the model became."""
    model, given = adapted(name, dropout), batch()
    if dist.is_initialized():
        model = autoshard.parallelize(model, dist.get_world_size(), given, degree="max")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], lr=0.1)
    losses, gradients = [], {}
    for _ in range(3):
        loss = model(**given).loss
        loss.backward()
        losses.append(loss.detach())
        if not gradients:
            gradients = {n: _whole(model, n, p.grad) for n, p in trained}
        optimizer.step()
        optimizer.zero_grad()
    untouched = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    split = isinstance(model, autoshard.ParallelModule)
    state = model.full_state_dict() if split else dict(model.state_dict())
    return {"losses": losses, "gradients": gradients, "state": state, "frozen": untouched}


def _whole(model: nn.Module, name: str, value: Any) -> Tensor:
    share = model.share_of(name) if isinstance(model, autoshard.ParallelModule) else None
    return autoshard.parameters.whole(value, share).clone()


def run(folder: str) -> dict[str, Any]:
    """Every model; on ranks, with dropout in the adapters, twice."""
    found: dict[str, Any] = {name: step(name) for name in MODELS}
    if dist.is_initialized():
        found["dropped"] = [step("gpt2", 0.3)["losses"] for _ in range(2)]
        model = autoshard.parallelize(adapted("llama"), 2, batch(), degree="max")
        model.save_pretrained(f"{folder}/adapters")
    return found
