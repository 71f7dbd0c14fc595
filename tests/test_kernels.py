"""The kernels of a vocabulary, run by Triton's interpreter: the values are PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from torch import Tensor

from autoshard import kernels, ops
from autoshard.simulate import RankContext, run_ranks
from tests.test_ops import CASE, check_loss, grad_of, losses

LOCK = threading.Lock()  # the interpreter is for one thread at a time


@pytest.fixture(autouse=True)
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors count as those of a GPU: Triton interprets (tests/conftest.py). Those of the cross
    entropy are used, or that of the embedding."""
    names = {"targets", "statistics", "own_sum", "losses", "gradient"}
    used = set()

    def alone(name: str, kernel: Any, *args: Any) -> Any:
        with LOCK:
            used.add(name)
            return kernel(*args)

    for name in (*names, "embedding"):
        monkeypatch.setattr(kernels, name, partial(alone, name, getattr(kernels, name)))
    monkeypatch.setattr(kernels, "_on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "BLOCK", 4)  # several to a row
    monkeypatch.setattr(kernels, "TOKENS", 2)
    yield
    assert used in (names, {"embedding"})


KERNEL = CASE | {"label_smoothing": 0.0, "dtype": torch.float32, "batch": (6,)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_as_pytorch(dtype: torch.dtype, reduction: int) -> None:
    """Every dtype and reduction, with padding and an ignored target."""
    check_loss(KERNEL | {"dtype": dtype, "reduction": reduction})


@example(KERNEL)
@example(KERNEL | {"labels": [-100] * 6})
@settings(max_examples=25)
@given(losses())
def test_any_case(case: dict[str, Any]) -> None:
    """Any padding of the vocabulary; what the kernels do not take goes the other way."""
    check_loss(case)


@pytest.mark.parametrize("masked", [1, 4])
def test_minus_infinity(masked: int) -> None:
    """Masked classes have probability 0, also where a rank's whole part is masked."""
    logits = torch.randn(3, 8)
    logits[:, 8 - masked :] = -torch.inf
    logits.requires_grad_()
    target = torch.tensor([0, 1, 3])
    torch.nn.functional.cross_entropy(logits, target).backward()

    def split(ctx: RankContext) -> Tensor:
        mine = logits.detach()[:, 4 * ctx.rank : 4 * ctx.rank + 4].clone().requires_grad_()
        ops.vocab_cross_entropy(mine, target, ctx.group(2), 8, 4).backward()
        return grad_of(mine)

    torch.testing.assert_close(torch.cat(run_ranks(split, 2), 1), grad_of(logits))


@pytest.mark.parametrize("where", [0, 5, 9])
def test_not_a_number(where: int) -> None:
    """One that is no number makes the loss none, wherever it stands."""
    logits = torch.randn(2, 12)
    logits[1, where] = torch.nan

    def split(ctx: RankContext) -> Tensor:
        mine = logits[:, 6 * ctx.rank : 6 * ctx.rank + 6].clone().requires_grad_()
        losses = ops.vocab_cross_entropy(
            mine, torch.tensor([3, 4]), ctx.group(2), 12, 6, reduction=ops.NONE
        )
        losses.sum().backward()
        return losses.detach()

    for found in run_ranks(split, 2):
        assert not found[0].isnan() and found[1].isnan()


def test_rows_that_lie_apart() -> None:
    """Logits that are some columns of a wider matrix."""
    wide = torch.randn(5, 30)
    target = torch.randint(0, 14, (5,))
    expected = wide[:, 3:17].clone().requires_grad_()
    torch.nn.functional.cross_entropy(expected, target).backward()

    def split(ctx: RankContext) -> Tensor:
        mine = wide[:, 3 + 7 * ctx.rank : 10 + 7 * ctx.rank].detach().requires_grad_()
        assert mine.stride() == (30, 1)
        ops.vocab_cross_entropy(mine, target, ctx.group(2), 14, 7).backward()
        return grad_of(mine)

    torch.testing.assert_close(torch.cat(run_ranks(split, 2), 1), grad_of(expected))


@pytest.mark.parametrize("wrong", [-1, 14, -100])
def test_a_target_that_is_no_class(wrong: int) -> None:
    """It is an error, unless it is the one that is ignored."""

    def split(ctx: RankContext) -> Tensor:
        mine = torch.randn(3, 7, requires_grad=True)
        target = torch.tensor([3, 13, wrong])
        ops.vocab_cross_entropy(mine, target, ctx.group(2), 14, 7).backward()
        return mine.detach()

    if wrong == -100:
        run_ranks(split, 2)
        return
    with pytest.raises(RuntimeError, match="target out of range: the classes has 14 entries"):
        run_ranks(split, 2)
    run_ranks(lambda ctx: ops.vocab_cross_entropy(  # the fixture asks for the others
        torch.randn(3, 7, requires_grad=True), torch.tensor([3, 13, 0]), ctx.group(2), 14, 7
    ).backward(), 2)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding", [-1, 0, 8])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 2)])
def test_embedding(
    dtype: torch.dtype, kind: torch.dtype, padding: int, shape: tuple[int, ...]
) -> None:
    """Rows of a table that is split in two with padding behind, of columns of a wider one."""
    table = torch.randn(11, 9, dtype=dtype)
    ids = torch.randint(0, 11, shape, dtype=kind)
    whole = table.clone().requires_grad_()
    dy = torch.randn(*shape, 9, dtype=dtype)
    expected = F.embedding(ids.long(), whole, None if padding < 0 else padding)
    expected.backward(dy)

    def split(ctx: RankContext) -> tuple[Tensor, Tensor]:
        part = table[6 * ctx.rank : 6 * ctx.rank + 6]
        mine = torch.full((7, 12), 1e4, dtype=dtype)[:, 2:11]
        mine[: len(part)] = part
        mine.requires_grad_()
        y = ops.vocab_embedding(mine, ids, ctx.group(2), 11, 6, padding)
        y.backward(dy)
        return y.detach(), grad_of(mine)

    (first, one), (second, other) = run_ranks(split, 2)
    torch.testing.assert_close(first + second, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([one[:6], other[:5]]), grad_of(whole))
    assert not one[6:].any() and not other[5:].any()


@pytest.mark.parametrize("wrong", [-1, 11])
def test_an_id_that_is_not_in_the_vocabulary(wrong: int) -> None:
    """It is an error, also where a rank has a row for it."""

    def split(ctx: RankContext) -> Tensor:
        return ops.vocab_embedding(torch.randn(6, 4), torch.tensor([2, wrong]), ctx.group(2), 11, 6)

    with pytest.raises(RuntimeError, match="id out of range: the vocabulary has 11 entries"):
        run_ranks(split, 2)
