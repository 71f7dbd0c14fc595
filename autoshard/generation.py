"""Generation: ``generate`` of a Hugging Face model, its forward run on the ranks.

The loop is the model's own (greedy, sampling, beams, its logits processors and stopping criteria). It
runs on a *face* of the parallel module: an object of a subclass of the model's class, with the model's
configuration and none of its weights, whose forward is the parallel module's. So every rank runs the
same loop on the same whole logits, and keeps a cache of its own heads.

The ranks have to choose the same tokens. Sampling draws from torch's generator, so every rank needs the
same seed. Before the loop decides whether to go on, the ranks compare the last tokens that they chose
(one all-gather of 8 bytes a sequence): ranks that differ raise, all of them, before one stops and the
others wait for it.

``transformers`` is not imported here: what is needed of it comes with the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication

from autoshard.errors import AutoshardError

# What makes another loop than the model's own around more models or other caches.
REFUSED = ("assistant_model", "custom_generate", "negative_prompt_ids")
CACHES = (None, "dynamic")


class Parallel(Protocol):
    """What is needed of a parallel module."""

    training: bool

    @property
    def device(self) -> torch.device:
        """Of this rank's parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward."""

    def run(self, part: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a part of the model."""

    def agree_on(self, tokens: Tensor) -> None:
        """Raise where the ranks have other tokens."""


def generate(module: Parallel, skeleton: Any, *args: Any, **kwargs: Any) -> Any:
    """``skeleton.generate(*args, **kwargs)`` with the weights of a parallel module.

    Raises:
        AttributeError: the model has no ``generate``.
        RanksDifferError: on every rank of the group, where they chose different tokens.
        AutoshardError: an option that the ranks cannot serve: another cache than a dynamic one, or an
            assistant model.
    """
    if not callable(getattr(skeleton, "generate", None)):
        raise AttributeError(f"{type(skeleton).__name__} has no generate")
    _check(skeleton, args, kwargs)
    face = _face(module, skeleton)
    with torch.no_grad(), implicit_replication():
        found = face.generate(*args, **kwargs)
    tokens = found if isinstance(found, Tensor) else getattr(found, "sequences", None)
    if isinstance(tokens, Tensor):
        module.agree_on(tokens)
    return found


def _check(skeleton: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [name for name in REFUSED if kwargs.get(name) is not None]
    if given:
        raise AutoshardError(
            f"generate({given[0]}=...) is not offered on a parallel module: leave it out"
        )
    config = kwargs.get("generation_config") or getattr(skeleton, "generation_config", None)
    kind = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    if kind not in CACHES:
        raise AutoshardError(
            f"cache_implementation={kind!r} is not offered on a parallel module, whose ranks hold "
            "their heads of a dynamic cache: leave it out"
        )


def _face(module: Parallel, skeleton: Any) -> Any:
    face, cls = copy.copy(skeleton), _class_of(skeleton)
    face.__class__ = _face_class(cls)
    face.__dict__["_parallel"] = module
    face.training = module.training
    return face


def _class_of(skeleton: Any) -> Any:
    return type(skeleton)


@functools.cache
def _face_class(cls: Any) -> Any:
    """The model's class with the forward, the device and the encoder of a parallel module."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._parallel(*args, **kwargs)

    def get_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _Encoder(self._parallel, cls.get_encoder(self, *args, **kwargs))

    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = cls._get_stopping_criteria(self, *args, **kwargs)
        criteria.insert(0, _Agreement(self._parallel))
        return criteria

    parts = {
        "forward": forward,
        "device": property(lambda self: self._parallel.device),
        "dtype": property(lambda self: self._parallel.dtype),
        "get_encoder": get_encoder,
        "_get_stopping_criteria": _get_stopping_criteria,
        # Experts are run as the plan splits them, for one token too.
        "_optimize_model_for_decode": lambda self: contextlib.nullcontext(),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), parts)


class _Agreement:
    """A stopping criterion that stops nothing: the ranks have chosen the same tokens, or all raise."""

    def __init__(self, module: Parallel) -> None:
        self.module = module

    def __call__(self, tokens: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.module.agree_on(tokens[:, -1])
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)


class _Encoder(nn.Module):
    """The encoder alone, run on the ranks: a program of its own on the parameters as they lie."""

    def __init__(self, module: Parallel, encoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.forward = functools.wraps(encoder.forward)(
            lambda *args, **kwargs: module.run("get_encoder", args, kwargs)
        )
