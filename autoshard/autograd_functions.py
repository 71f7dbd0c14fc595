"""A model's own ``autograd.Function``: the capture keeps its forward and drops its backward.

That is right where the backward is the derivative of the forward (a hand-written GELU), and silently
wrong where it is not (a straight-through estimator). So each function met while capturing is
judged: called on real random tensors of several scales, are its gradients those of its forward?
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autoshard.compat import autograd_functions_applied

# A gradient may be clipped only where values are tiny or huge.
SCALES = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0, 3.0, 30.0, 1e3, 1e6)


@dataclass(frozen=True)
class Met:
    """One call of an ``autograd.Function``: the class, its arguments, tensors as meta tensors, and the
    layer's class, file and line that calls it."""

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    place: str = ""

    @property
    def name(self) -> str:
        """The function's qualified name."""
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def is_its_own_derivative(self) -> bool:
        """Whether the backward gives the gradients of the forward's operators, in float64.

        On arguments of several scales, integers and masks once 0 and once 1; a call that raises or
        gives no finite number tells nothing, and one at least must tell.
        """
        told = False
        for (seed, scale), fill in product(enumerate(SCALES), (0, 1)):
            generator = torch.Generator().manual_seed(seed)
            arguments = [_real(a, generator, scale, fill) for a in self.arguments]
            try:
                own = _gradients(self.function.apply, arguments)
                derived = _gradients(self._forward, arguments)
            except Exception:
                continue
            if len(own) != len(derived):
                return False
            for a, b in zip(own, derived, strict=True):
                finite = a.isfinite() & b.isfinite()
                told |= bool(finite.any()) or not a.numel()
                a, b = a[finite], b[finite]
                largest = float(b.abs().max()) if b.numel() else 0.0
                if not torch.allclose(a, b, rtol=1e-6, atol=1e-9 * largest):
                    return False
        return told

    def _forward(self, *arguments: Any) -> Any:
        """The forward's operators, seen by autograd."""
        if self.function.setup_context is not torch.autograd.Function.setup_context:
            return self.function.forward(*arguments)
        return self.function.forward(_Context(), *arguments)


class _Context:
    """Takes what ``forward`` gives to ``ctx`` and forgets it."""

    needs_input_grad = (True,) * 64

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is kept."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Nothing is marked."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing is set."""


def _real(value: Any, generator: torch.Generator, scale: float, fill: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (drawn * scale).requires_grad_()
    return torch.full(value.shape, fill, dtype=value.dtype)


def _gradients(function: Any, arguments: list[Any]) -> list[Tensor]:
    copies = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    results = [
        r for r in pytree.tree_leaves(function(*copies)) if isinstance(r, Tensor) and r.requires_grad
    ]
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (r * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() for r in results
    )
    leaves = [a for a in copies if isinstance(a, Tensor) and a.requires_grad]
    if not isinstance(loss, Tensor) or not leaves:
        return []
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@contextlib.contextmanager
def noticed() -> Iterator[list[Met]]:
    """Collect the model's own functions that are applied inside, one call of each class."""
    met: dict[type, Met] = {}
    found: list[Met] = []

    def notice(cls: Any, args: tuple[Any, ...]) -> None:
        if not cls.__module__.startswith("torch.") and cls not in met:
            met[cls] = Met(cls, tuple(_described(a) for a in args), _caller())

    try:
        with autograd_functions_applied(notice):
            yield found
    finally:
        found.extend(met.values())


def _caller() -> str:
    """``Attention.forward (model.py:57)``: the innermost layer of the model that is running."""
    frame = inspect.currentframe()
    while frame is not None:
        layer = frame.f_locals.get("self")
        file = frame.f_code.co_filename
        if isinstance(layer, torch.nn.Module) and "/torch/" not in file:
            return f"{type(layer).__name__}.{frame.f_code.co_name} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return "the model"


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")
