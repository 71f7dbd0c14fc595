"""Evaluation as in the Megatron-LM paper (arXiv 1909.08053, appendix E): perplexity, and the last word.

Both take any causal language model, a parallel module or a plain one, in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

Logits = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        value: ``exp(nats / words)``.
        nats: minus the log likelihood of all tokens but the first.
        tokens: how many were predicted.
        words: what the perplexity is per: the text's own words, where they were given.
    """

    value: float
    nats: float
    tokens: int
    words: int


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """``model(tokens)``, its logits if it gives several things: [batch, length, vocabulary]."""
    output = model(tokens)
    found = getattr(output, "logits", output)
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    window: int,
    overlap: int = 32,
    words: int | None = None,
    batch: int = 8,
    logits: Logits = logits_of,
) -> Perplexity:
    """Perplexity with sliding windows: every token but the first is predicted once.

        PPL = exp(-1/T0 Σ_t log P(t | tokens before it in its window))

    The first window predicts its tokens 1 to window; each later one begins `window - overlap` tokens
    after the one before and predicts what that did not see, with `overlap` tokens before the first.

    Args:
        model: in eval mode.
        tokens: [N], on the model's device.
        window: tokens that the model is given at a time.
        overlap: 0 to window - 1; the paper's is 32 of 1024.
        words: T0, the text's words where perplexity is per word; the predicted tokens if not given.
        batch: windows at a time.
        logits: from the model and tokens [batch, length] to [batch, length, vocabulary].
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap={overlap} must be at least 0 and less than window={window}")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens have the shape {list(tokens.shape)}: pass one row of two or more")
    _check_mode(model)
    nats = 0.0
    for rows in _windows(len(tokens), window, overlap, batch):
        given = torch.stack([tokens[begin:end] for begin, _, end in rows])
        targets = torch.stack([tokens[begin + 1 : end + 1] for begin, _, end in rows])
        for row, (begin, new, _) in enumerate(rows):
            targets[row, : new - begin] = -100
        values = _whole(logits(model, given)).flatten(0, 1).float()
        nats += float(F.cross_entropy(values, targets.flatten(), reduction="sum"))
    count = len(tokens) - 1
    per = count if words is None else words
    return Perplexity(math.exp(nats / per), nats, count, per)


def _windows(
    length: int, window: int, overlap: int, batch: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Rows of equal length: (first token given, first one whose successor is predicted, end)."""
    found, new = [], 0
    while new < length - 1:
        begin = max(0, new - overlap)
        end = min(begin + window, length - 1)
        found.append((begin, new, end))
        new = end
    for _, group in groupby(found, key=lambda row: row[2] - row[0]):
        rows = list(group)
        yield from (rows[i : i + batch] for i in range(0, len(rows), batch))


@torch.no_grad()
def last_word_accuracy(
    model: nn.Module,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int = 8,
    logits: Logits = logits_of,
    device: torch.device | str = "cpu",
) -> float:
    """Cloze accuracy, as on LAMBADA: the share of last words of which every token is the likeliest.

    Args:
        model: in eval mode, causal.
        examples: (context, last word), as token ids; neither is empty.
        batch: examples at a time; they are filled up on the right, where nothing looks.
        logits: as for ``perplexity``.
        device: the model's.
    """
    if not examples or not all(context and word for context, word in examples):
        raise ValueError("each example needs a context and a word, and there must be one")
    _check_mode(model)
    right = 0
    for first in range(0, len(examples), batch):
        part = examples[first : first + batch]
        rows = [[*context, *word][:-1] for context, word in part]
        longest = max(map(len, rows))
        given = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=device)
        best = _whole(logits(model, given)).argmax(-1).tolist()
        for (context, word), row in zip(part, best, strict=True):
            begin = len(context) - 1
            right += row[begin : begin + len(word)] == list(word)
    return right / len(examples)


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the model is in train mode, with dropout: call model.eval() first")


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
