"""Example inputs: what the user gave, or what can be found out from the model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoshard import huggingface
from autoshard.errors import AutoshardError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class ExampleInputsError(AutoshardError, ValueError):
    """No example inputs could be found."""


def normalized_inputs(model: nn.Module, given: Any) -> Inputs:
    """Example inputs as positional and keyword arguments, on the CPU.

    Args:
        given: a tensor, a tuple, a dict, or None: then a Hugging Face model's ``dummy_inputs``, a
            Lightning module's ``example_input_array``, or tokens where the first thing done to the
            only input is an embedding.

    Raises:
        ExampleInputsError: none can be found; says what to pass.
    """
    if given is None:
        given = _found(model)
    if isinstance(given, Tensor):
        given = (given,)
    if isinstance(given, dict):
        args, kwargs = (), dict(given)
    elif isinstance(given, (tuple, list)):
        args, kwargs = tuple(given), {}
    else:
        raise ExampleInputsError(
            f"example_inputs must be a tuple or a dict of forward's arguments, is {type(given)}"
        )
    if any(map(huggingface.is_cache, pytree.tree_leaves((args, kwargs), huggingface.is_cache))):
        raise ExampleInputsError(
            "example inputs hold a cache of keys and values: leave it out; a call that is given one is "
            "captured when it comes"
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"example_inputs do not fit forward{signature} of {type(model).__name__}: {error}"
        ) from None
    return pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), (args, kwargs))  # type: ignore[no-any-return]


def _found(model: nn.Module) -> Any:
    if huggingface.is_huggingface(model):
        return huggingface.example_inputs(model)
    array = getattr(model, "example_input_array", None)
    if array is not None:
        return array
    tokens = _tokens(model)
    if tokens is not None:
        return tokens
    names = [
        p.name for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip
    raise ExampleInputsError(
        f"example inputs of {type(model).__name__} could not be found. Pass example_inputs=, a tuple "
        f"or dict of forward's arguments ({', '.join(names)}), as one training step gives them"
    )


def _tokens(model: nn.Module) -> tuple[Tensor, ...] | None:
    """Tokens of shape [3, 5], where the first module that meets the input is an embedding."""
    required = [
        p for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if len(required) != 1 or not embeddings:
        return None
    met: list[nn.Embedding] = []
    probe = torch.zeros((3, 5), dtype=torch.int64)

    class Met(Exception):
        pass

    def notice(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is probe:
            met.append(module)  # type: ignore[arg-type]
        raise Met

    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    handles = [m.register_forward_pre_hook(notice) for m in leaves]
    try:
        with torch.no_grad():
            model(probe)
    except Exception:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not met or not isinstance(met[0], nn.Embedding):
        return None
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, met[0].num_embeddings, (3, 5), generator=generator),)
