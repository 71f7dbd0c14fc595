"""Adafactor for split parameters: torch's own writes into partial sums, which DTensors refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class Adafactor(torch.optim.Adafactor):
    """``torch.optim.Adafactor`` (Shazeer and Stern, arXiv 1804.04235), also for a parallel module.

    The same arguments, the same state under the same names, the same numbers as torch's on one process,
    up to rounding. Of a weight of R x C it keeps the means of squares of rows and of columns: a split
    weight's are split with it. Means of rows do not depend on the order in which a fused weight's rows
    lie on the ranks, and means of columns, and the norms, are summed over the ranks.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; every rank calls it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        gradient = -gradient if group["maximize"] else gradient
        state, lr = self.state[parameter], float(group["lr"])
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
        step = state.setdefault("step", torch.tensor(0.0))
        step += 1
        new = step.item() ** group["beta2_decay"]  # 1 - beta2 at this step
        rate = max(eps2, _root_mean_square(parameter)) * min(lr, step.item() ** -0.5)
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        if gradient.dim() > 1:
            rows = self._followed(state, "row_var", _mean(gradient.square(), -1), new)
            columns = self._followed(state, "col_var", _mean(gradient.square(), -2), new)
            variance = rows * columns / _mean(rows, -2).clamp(min=eps1)  # [R, 1] * [1, C]
        else:
            variance = self._followed(state, "variance", gradient.square(), new)
        update = variance.clamp(min=eps1 * eps1).rsqrt() * gradient
        if isinstance(parameter, DTensor) and isinstance(update, DTensor):
            update = update.redistribute(placements=parameter.placements)
        clip = max(1.0, _root_mean_square(update) / group["d"])
        parameter.add_(update, alpha=-rate / clip)

    @staticmethod
    def _followed(state: dict[str, Any], key: str, value: Tensor, new: float) -> Tensor:
        """The moving average of a value, kept in the state."""
        state[key] = torch.lerp(state.get(key, torch.zeros_like(value)), value, new)
        return state[key]  # type: ignore[no-any-return]


def _mean(x: Tensor, dim: int) -> Tensor:
    """The mean over a dimension, which stays as one element; complete on every rank."""
    return _complete(x.mean(dim, keepdim=True))


def _complete(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(
        placements=[Replicate() if isinstance(p, Partial) else p for p in x.placements]
    )


def _root_mean_square(x: Tensor) -> float:
    return math.sqrt(_complete(x.square().sum()).item() / max(1, x.numel()))
