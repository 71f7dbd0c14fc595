"""Language models around the transformer layers of torch.nn, and one without attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.case import Build, Case, Inputs, seeded

LAYERS = 2
HIDDEN = 64
HEADS = 8
FFN = 136
VOCABULARY = 203
MAX_LENGTH = 64
IGNORED = -100


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels that are not ignored."""
    return F.cross_entropy(
        logits.reshape(-1, logits.size(-1)), labels.reshape(-1), ignore_index=IGNORED
    )


def causal_mask(states: Tensor, length: int) -> Tensor:
    """Return the additive mask that hides the later positions."""
    return nn.Transformer.generate_square_subsequent_mask(
        length, device=states.device, dtype=states.dtype
    )


class Embedding(nn.Module):
    """Embeddings of the tokens plus those of their positions."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(MAX_LENGTH, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.size(1), device=ids.device)
        states: Tensor = self.dropout(self.tokens(ids) + self.positions(positions))
        return states


class EncoderLM(nn.Module):
    """A causal language model around nn.TransformerEncoder that returns logits only."""

    def __init__(self, *, batch_first: bool, norm_first: bool, dropout: float) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = Embedding(dropout)
        layer = nn.TransformerEncoderLayer(
            HIDDEN,
            HEADS,
            dim_feedforward=FFN,
            dropout=dropout,
            activation="gelu",
            batch_first=batch_first,
            norm_first=norm_first,
        )
        norm = nn.LayerNorm(HIDDEN) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
        self.output = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        mask = causal_mask(states, ids.size(1))
        if not self.batch_first:
            states = states.transpose(0, 1)
        states = self.encoder(states, mask=mask, is_causal=True)
        if not self.batch_first:
            states = states.transpose(0, 1)
        logits: Tensor = self.output(states)
        return logits


class EncoderLMWithLoss(nn.Module):
    """The same model with its loss."""

    def __init__(self, *, batch_first: bool, norm_first: bool, dropout: float) -> None:
        super().__init__()
        self.model = EncoderLM(batch_first=batch_first, norm_first=norm_first, dropout=dropout)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(ids)
        return logits, language_loss(logits, labels)


class DecoderLM(nn.Module):
    """A decoder around nn.TransformerDecoder that attends to embeddings of a source."""

    def __init__(self, *, batch_first: bool, norm_first: bool, dropout: float) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.source = Embedding(dropout)
        self.target = Embedding(dropout)
        layer = nn.TransformerDecoderLayer(
            HIDDEN,
            HEADS,
            dim_feedforward=FFN,
            dropout=dropout,
            batch_first=batch_first,
            norm_first=norm_first,
        )
        norm = nn.LayerNorm(HIDDEN) if norm_first else None
        self.decoder = nn.TransformerDecoder(layer, LAYERS, norm)
        self.output = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, source: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.source(source)
        states = self.target(ids)
        mask = causal_mask(states, ids.size(1))
        if not self.batch_first:
            memory = memory.transpose(0, 1)
            states = states.transpose(0, 1)
        states = self.decoder(states, memory, tgt_mask=mask, tgt_is_causal=True)
        if not self.batch_first:
            states = states.transpose(0, 1)
        logits = self.output(states)
        return logits, language_loss(logits, labels)


class MLPBlock(nn.Module):
    """A normalised MLP added to the residual stream."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.net = nn.Sequential(
            nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN), nn.Dropout(dropout)
        )

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = states + self.net(self.norm(states))
        return out


class MLPLM(nn.Module):
    """A language model without attention: every position predicts from its own token."""

    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.Sequential(*(MLPBlock(dropout) for _ in range(LAYERS)))
        self.output = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.output(self.blocks(self.embedding(ids)))
        return logits, language_loss(logits, labels)


def _draw(*names: str, source_length: int = 2) -> Inputs:
    """Return the drawing of ids, of `labels` with some ignored and of a longer `source`."""

    def inputs(
        model: nn.Module, *, batch: int = 3, length: int = 10, seed: int = 0
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name in names:
            shape = (batch, length + source_length if name == "source" else length)
            drawn[name] = torch.randint(VOCABULARY, shape, generator=generator)
        if "labels" in drawn:
            drawn["labels"][0, -1] = IGNORED
        return drawn

    return inputs


def _encoder(*, batch_first: bool, norm_first: bool) -> Build:
    def build(attention: str = "sdpa", *, dropout: float = 0.1, seed: int = 0) -> nn.Module:
        def construct() -> nn.Module:
            return EncoderLMWithLoss(batch_first=batch_first, norm_first=norm_first, dropout=dropout)

        return seeded(construct, seed)

    return build


def _decoder(*, batch_first: bool, norm_first: bool) -> Build:
    def build(attention: str = "sdpa", *, dropout: float = 0.1, seed: int = 0) -> nn.Module:
        def construct() -> nn.Module:
            return DecoderLM(batch_first=batch_first, norm_first=norm_first, dropout=dropout)

        return seeded(construct, seed)

    return build


def _logits_only(attention: str = "sdpa", *, dropout: float = 0.1, seed: int = 0) -> nn.Module:
    return seeded(lambda: EncoderLM(batch_first=True, norm_first=True, dropout=dropout), seed)


def _mlp(attention: str = "sdpa", *, dropout: float = 0.1, seed: int = 0) -> nn.Module:
    return seeded(lambda: MLPLM(dropout=dropout), seed)


def _layer_cases() -> list[Case]:
    cases = []
    for batch_first, layout in ((True, "batch-first"), (False, "sequence-first")):
        for norm_first, place in ((True, "pre-norm"), (False, "post-norm")):
            encoder = _encoder(batch_first=batch_first, norm_first=norm_first)
            decoder = _decoder(batch_first=batch_first, norm_first=norm_first)
            kind = f"{layout}-{place}"
            cases.append(Case(f"encoder-{kind}", encoder, _draw("ids", "labels"), ("sdpa",)))
            cases.append(Case(f"decoder-{kind}", decoder, _draw("source", "ids", "labels"), ("sdpa",)))
    return cases


CASES: list[Case] = [
    *_layer_cases(),
    Case("logits-only", _logits_only, _draw("ids"), ("sdpa",)),
    Case("mlp", _mlp, _draw("ids", "labels"), ("sdpa",)),
]
