"""What a test needs to know of a model: how to build it and what to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Build(Protocol):
    """Builds a model in train mode; the same seed gives the same parameters."""

    def __call__(
        self, attention: str = "eager", *, dropout: float = 0.1, seed: int = 0
    ) -> nn.Module: ...


class Inputs(Protocol):
    """Draws keyword arguments for the model's forward; the same seed gives the same tensors."""

    def __call__(
        self, model: nn.Module, *, batch: int = 3, length: int = 10, seed: int = 0
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Case:
    """One model in one configuration, and the attention implementations that it has."""

    name: str
    build: Build
    inputs: Inputs
    attention: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def perturb(model: nn.Module, std: float = 0.1) -> None:
    """Add noise to every parameter, so that no bias is zero and no norm weight is one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)


def seeded(construct: Callable[[], Model], seed: int) -> Model:
    """Construct a model in train mode with noisy parameters, all drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = construct()
        perturb(model)
    model.train()
    return model
