"""The models whose graphs are mutated: small ones of each family, split as far as they go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import (
    BertForMaskedLM,
    BloomForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
)

from autoshard.capture import skeleton
from autoshard.errors import UnsoundGraphError
from autoshard.exactly import edit_exactly
from autoshard.passes.prove import prove
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.plans import Plan
from autoshard.sharded import Sharded
from autoshard.verification import Report, boundary_inputs, compare, perturbed
from tests.models import nanogpt
from tests.models.case import Build, seeded
from tests.models.huggingface import IGNORED, VOCABULARY, builder

LARGE = 4099  # a vocabulary whose shares are padded to 128 rows on every rank
USUAL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "use_cache": False,
}


@dataclass(frozen=True)
class Spec:
    """A model, the number of ranks, and the degrees of regions that are not to be the largest."""

    name: str
    what: str
    tp: int
    build: Build
    attention: str = "sdpa"
    tokens: str = "input_ids"
    labels: str = "labels"
    ignored: int = IGNORED
    degrees: dict[str, int] = field(default_factory=dict)
    vocabulary: int = VOCABULARY


@dataclass(frozen=True)
class Subject:
    """A model, its captured graph, and the right rewritten one."""

    spec: Spec
    model: nn.Module
    inputs: dict[str, Any]
    program: Program
    plan: Plan
    sharded: Sharded
    exact: bool

    @property
    def graph(self) -> fx.Graph:
        """The graph of the whole model."""
        return self.program.analysis.graph

    def refusal(self, sharded: Sharded) -> str | None:
        """What the proof says against a rewritten graph; None if it accepts it."""
        flows = self.program.analysis.axes.differentiable
        inputs = {str(n.target) for n in flows if n.op == "placeholder"}
        try:
            prove(self.graph, sharded, inputs)
        except UnsoundGraphError as error:
            return str(error)
        return None

    def verified(self, sharded: Sharded) -> Report:
        """The comparison that ``verify`` makes, with this graph on the ranks."""
        with exact():
            inputs = boundary_inputs(self.program, self.spec.tp, (), self.inputs)
            return compare(self.model, self.program, sharded, self.plan, *inputs)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Tensors without a dtype are exact too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _nanogpt(attention: str = "eager", *, dropout: float = 0.1, seed: int = 0) -> nn.Module:
    config = nanogpt.GPTConfig(vocab_size=LARGE, n_layer=1, dropout=dropout, flash=attention == "sdpa")
    return seeded(lambda: nanogpt.GPT(config), seed)


_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_T5 = {
    "d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 128, "use_cache": False}
_BERT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_BLOOM = {"hidden_size": 64, "n_layer": 1, "n_head": 8, "use_cache": False}

SPECS = (
    Spec("gpt2", "q, k, v in one weight; biases; tied", 2, builder(GPT2LMHeadModel, _DROPOUTS, _GPT2)),
    Spec(
        "llama", "2 key heads on 4 ranks", 4,
        builder(LlamaForCausalLM, ("attention_dropout",), {**USUAL, "num_key_value_heads": 2}),
    ),
    Spec("bert", "an encoder", 2, builder(BertForMaskedLM, _BERT, USUAL)),
    Spec("t5", "encoder and decoder", 2, builder(T5ForConditionalGeneration, ("dropout_rate",), _T5)),
    Spec(
        "mixtral", "a mixture of experts; 4 key heads for 8", 2,
        builder(
            MixtralForCausalLM, ("attention_dropout",),
            {**USUAL, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
    ),
    Spec(
        "bloom", "heads in the batch; ALiBi", 4,
        builder(BloomForCausalLM, ("hidden_dropout", "attention_dropout"), _BLOOM), "eager",
    ),
    Spec(
        "qwen3", "norms within attention; 4 key heads for 8", 2,
        builder(
            Qwen3ForCausalLM, ("attention_dropout",), {**USUAL, "num_key_value_heads": 4, "head_dim": 8}
        ),
    ),
    Spec(
        "nanogpt", "attention over 2 of 4 ranks; padding on all", 4, _nanogpt,
        "sdpa", "idx", "targets", -1, {"transformer.h.0.attn": 2}, LARGE,
    ),
)  # fmt: skip


def spec_of(name: str) -> Spec:
    """The one of this name."""
    return next(s for s in SPECS if s.name == name)


@cache
def subject(name: str) -> Subject:
    """In float64, without dropout."""
    spec = spec_of(name)
    with exact():
        model = perturbed(spec.build(spec.attention, dropout=0.0).double(), seed=0).eval()
        return _subject(spec, model, example(spec), edit_exactly(torch.float64))


@cache
def dropping(name: str) -> Subject:
    """In train mode, with dropout, in operators of their own."""
    spec = spec_of(name)
    return _subject(spec, spec.build("eager", dropout=0.2).train(), example(spec), None)


def _subject(spec: Spec, model: nn.Module, inputs: dict[str, Tensor], edit: Any) -> Subject:
    program = analyse(skeleton(model), (), inputs, spec.tp, edit)
    plan, sharded = rewrite(program, spec.tp, "max")
    if spec.degrees:
        plan, sharded = rewrite(program, spec.tp, {**plan.degrees, **spec.degrees})
    return Subject(spec, model, inputs, program, plan, sharded, edit is not None)


def example(spec: Spec) -> dict[str, Tensor]:
    """Tokens anywhere in the vocabulary, and labels of which the last are ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(3, spec.vocabulary, (2, 8), generator=generator) for _ in range(2))
    labels[:, -1] = spec.ignored
    if spec.name == "t5":
        labels = labels[:, 2:]
    return {spec.tokens: tokens, spec.labels: labels}
