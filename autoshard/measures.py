"""How far apart two tensors are, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autoshard.errors import AutoshardError

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-3,
    torch.bfloat16: 1e-1,
    torch.float16: 1e-1,
}

# What the tolerance lies between. eps is the distance from 1 to the next number.
WHY = {
    torch.float64: "in float64 (eps 2e-16) rounding gives about 1e-14, another function 1e-6 and more",
    torch.float32: "in float32 (eps 1e-7) rounding gives up to 1e-4 in deep models; smaller faults "
    "show in float64 alone",
    torch.bfloat16: "in bfloat16 (eps 8e-3) rounding alone gives some percent: this shows gross "
    "faults, such as a missing sum over ranks, and no others",
    torch.float16: "in float16 (eps 1e-3) rounding and gradients that are too small for it give some "
    "percent: this shows gross faults, such as a missing sum over ranks, and no others",
}

FLOOR = 1e-4  # of the largest gradient: what one that is truly zero is measured by
HUGE = 1e30  # what masks are written with (the dtype's lowest number, or infinity) is no scale


def relative_error(shares: list[Tensor], whole: Tensor, largest: float) -> float:
    """``max|a - b| / max(max|b|, 1e-4 * largest)`` over all ranks; infinite for other shapes.

    Elements above 1e30 (a mask) are no scale for the others: each is compared with itself.
    """
    if not whole.numel():
        return 0.0 if all(s.shape == whole.shape for s in shares) else float("inf")
    worst = 0.0
    for share in shares:
        if share.shape != whole.shape:
            return float("inf")
        if not whole.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(share, whole) else float("inf"))
            continue
        same = (share == whole) | (share.isnan() & whole.isnan())
        difference = torch.where(same, 0.0, (share.double() - whole.double()).abs())
        scale = max(magnitude(whole), FLOOR * largest) or 1.0
        error = torch.where(is_huge(whole), difference / whole.abs().double(), difference / scale)
        error = torch.where(same, 0.0, error)
        worst = max(worst, error.max().item(), key=order)
    return worst


def is_huge(tensor: Tensor) -> Tensor:
    """Where a tensor is infinite, or as large as only a mask is."""
    return tensor.abs().double() > HUGE


def magnitude(tensor: Tensor) -> float:
    """The largest absolute element that is no mask's and a number."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    size = tensor.detach().abs().double()
    return torch.where(size <= HUGE, size, 0.0).max().item()


def order(error: float) -> float:
    """By which errors are compared: what is not a number is the largest."""
    return float("inf") if error != error else error


def largest_of(gradients: Mapping[str, Tensor]) -> float:
    """The largest absolute element: what a gradient that is truly zero is measured by."""
    return max((g.abs().max().item() for g in gradients.values() if g.numel()), default=1.0)


def objective(outputs: list[Any]) -> Tensor:
    """A scalar that depends on every element of every differentiable output."""
    total: Tensor | None = None
    generator = torch.Generator().manual_seed(7)
    for value in outputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if not value.requires_grad:
                continue
            value = value.nan_to_num(0.0, 0.0, 0.0).double()
            term = (value * (1 + weights.to(value.device))).sum()
            total = term if total is None else total + term
    if total is None:
        raise AutoshardError("no output of the model depends on its parameters")
    return total


def cloned(value: Any) -> Any:
    """The same with tensors of its own."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), value)
