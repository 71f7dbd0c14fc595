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
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.modules.module import register_module_forward_pre_hook

from autoshard.errors import AutoshardError

# What makes another loop than the model's own around more models or other caches.
REFUSED = ("assistant_model", "custom_generate", "negative_prompt_ids")
CACHES = (None, "dynamic")


class Parallel(Protocol):
    """What is needed of a parallel module."""

    training: bool
    logits: str

    @property
    def device(self) -> torch.device:
        """Of this rank's parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""

    def run(self, part: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward, or that of a part of the model."""

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
    _check(skeleton, kwargs)
    if module.logits == "sharded":
        raise AutoshardError('generate reads whole logits: parallelize without logits="sharded"')
    face = _face(module, skeleton)
    with torch.no_grad(), implicit_replication(), _hollow(skeleton, face):
        found = face.generate(*args, **kwargs)
    tokens = found if isinstance(found, Tensor) else getattr(found, "sequences", None)
    if isinstance(tokens, Tensor):
        module.agree_on(tokens)
    return found


def _check(skeleton: Any, kwargs: dict[str, Any]) -> None:
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
    face.__dict__.update(_parallel=module, _running=False)
    face.training = module.training
    return face


def _run(face: Any, part: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    face._running = True
    try:
        return face._parallel.run(part, args, kwargs)
    finally:
        face._running = False


@contextlib.contextmanager
def _hollow(skeleton: nn.Module, face: Any) -> Iterator[None]:
    """Inside, modules of the skeleton, which have no weights, are run by a capture alone."""
    names = {id(module): name for name, module in skeleton.named_modules() if name}

    def refuse(module: nn.Module, args: Any) -> None:
        if id(module) in names and not face._running:
            raise AutoshardError(
                f"generate of {type(skeleton).__name__} runs {names[id(module)]} by itself, beside the "
                "forward and the encoder: on a parallel module only these two run on the weights"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _class_of(skeleton: Any) -> Any:
    return type(skeleton)


@functools.cache
def _face_class(cls: Any) -> Any:
    """The model's class with the forward, the device and the encoder of a parallel module."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, None, args, kwargs)

    def get_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _Encoder(self, cls.get_encoder(self, *args, **kwargs))

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

    def __init__(self, face: Any, encoder: nn.Module) -> None:
        super().__init__()
        self.forward = functools.wraps(encoder.forward)(
            lambda *args, **kwargs: _run(face, "get_encoder", args, kwargs)
        )
