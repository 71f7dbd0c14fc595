"""The kernels of the cross entropy, run by Triton's interpreter: the values are PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from autoshard import kernels, ops
from autoshard.simulate import RankContext, run_ranks
from tests.test_ops import CASE, check_loss, grad_of, losses

LOCK = threading.Lock()  # the interpreter is for one thread at a time


@pytest.fixture(autouse=True)
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors count as those of a GPU: Triton interprets (tests/conftest.py). Both kernels are used."""
    used = set()

    def alone(name: str, kernel: Any, *args: Any) -> Any:
        with LOCK:
            used.add(name)
            return kernel(*args)

    for name in ("statistics", "gradient"):
        monkeypatch.setattr(kernels, name, partial(alone, name, getattr(kernels, name)))
    monkeypatch.setattr(kernels, "_on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "BLOCK", 4)  # several to a row
    yield
    assert used == {"statistics", "gradient"}


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
