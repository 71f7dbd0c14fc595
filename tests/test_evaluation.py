"""Perplexity and last-word accuracy: as written out token by token, and on ranks as on one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import autoshard
from autoshard.evaluation import last_word_accuracy, perplexity
from tests.distributed import run_distributed


def gpt2() -> transformers.GPT2LMHeadModel:
    """Small, with unequal logits."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)
    return model


def text(length: int) -> Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(1))


def written_out(model: Any, tokens: Tensor, window: int, overlap: int) -> float:
    """Nats, one token at a time: the window of each is the first one that holds it."""
    nats, start = 0.0, 0
    for t in range(1, len(tokens)):
        while t > start + window:
            start += window - overlap
        with torch.no_grad():
            logits = model(tokens[None, start:t]).logits[0, -1]
        nats -= float(torch.log_softmax(logits, -1)[tokens[t]])
    return nats


@pytest.mark.parametrize(
    ("length", "window", "overlap"),
    [(50, 16, 4), (50, 16, 0), (33, 16, 15), (10, 16, 4), (17, 16, 4), (18, 16, 4), (2, 1, 0)],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity(length: int, window: int, overlap: int, batch: int) -> None:
    """Every token once, with all that its window has before it."""
    model, tokens = gpt2(), text(length)
    found = perplexity(model, tokens, window, overlap, batch=batch)
    nats = written_out(model, tokens, window, overlap)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.tokens == found.words == length - 1
    assert found.value == pytest.approx(math.exp(nats / (length - 1)), rel=1e-4)
    by_words = perplexity(model, tokens, window, overlap, words=length + 30)
    assert by_words.value == pytest.approx(math.exp(nats / (length + 30)), rel=1e-4)


def examples(model: Any) -> list[tuple[list[int], list[int]]]:
    """Words that the model would say, words whose second token it would not, and others."""
    found = []
    for seed in range(12):
        tokens = torch.randint(
            0, 61, (3 + seed,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        said = list(tokens)
        for _ in range(2):
            with torch.no_grad():
                said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
        word = said[-2:]
        if seed % 3 == 1:
            word = [word[0], (word[1] + 1) % 61]
        elif seed % 3 == 2:
            word = [(word[0] + 1) % 61]
        found.append((tokens, word))
    return found


@pytest.mark.parametrize("batch", [1, 5])
def test_last_word(batch: int) -> None:
    """A word counts when all its tokens are the likeliest."""
    model = gpt2()
    assert last_word_accuracy(model, examples(model), batch) == pytest.approx(4 / 12)


def test_wrong_arguments() -> None:
    """Each is told what to do."""
    model = gpt2()
    with pytest.raises(ValueError, match="overlap=16 must be at least 0 and less than window=16"):
        perplexity(model, text(20), 16, 16)
    with pytest.raises(ValueError, match=r"shape \[1\]"):
        perplexity(model, text(1), 16, 4)
    with pytest.raises(ValueError, match="a context and a word"):
        last_word_accuracy(model, [([], [1])])
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        perplexity(model.train(), text(20), 16, 4)


def on_ranks() -> tuple[float, float]:
    model = gpt2()
    tp_model = autoshard.parallelize(model, 2, {"input_ids": text(16)[None]}, degree="max")
    return perplexity(tp_model, text(50), 16, 4).nats, last_word_accuracy(tp_model, examples(model))


@pytest.mark.slow
def test_on_ranks() -> None:
    """As on one process."""
    for nats, accuracy in run_distributed(on_ranks, 2):
        assert nats == pytest.approx(perplexity(gpt2(), text(50), 16, 4).nats, rel=1e-5)
        assert accuracy == pytest.approx(4 / 12)
