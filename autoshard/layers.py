"""The model's modules on a rank: its hierarchy, in which the repeated layers are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from autoshard import parameters
from autoshard.compat import are_saved_tensors_hooked
from autoshard.groups import ProcessGroupComm, SingleGroup
from autoshard.layer_function import Differentiated
from autoshard.passes.differentiate import differentiate
from autoshard.passes.tokens_as_rows import tokens_as_rows
from autoshard.paths import layer_of
from autoshard.random_streams import begin_traced, end_traced

_requires_grad = attrgetter("requires_grad")


class Layer(nn.Module):
    """A repeated layer: holds its parameters under the model's names, and runs its part of the graph.

    Called once for each call of the model's own layer, with the same hooks. ``fully_shard``, forward
    hooks and ``compile()`` are for one layer what they are in the model.
    """

    def forward(self, body: Callable[..., Any], names: tuple[str, ...], *operands: Any) -> Any:
        """``body`` on this rank's shares of the parameters `names`, then the operands."""
        held = [find(self, name) for name in names]
        if not torch.compiler.is_compiling():
            made = _differentiated(body, held, operands)
            if made is not None:
                return made(held, operands)
        own = parameters.local(dict(zip(names, held, strict=True)), together=True)
        if not torch.compiler.is_compiling():
            return body(*own.values(), *operands)
        tensor = next(x for x in (*own.values(), *operands) if isinstance(x, Tensor))
        streams = [x.stream for x in operands if isinstance(x, ProcessGroupComm | SingleGroup)]
        begun = begin_traced(streams, tensor.device)  # none where the whole model is compiled
        result = body(*own.values(), *operands)
        end_traced(begun)
        return result


def _differentiated(
    body: Any, held: Sequence[Tensor], operands: Sequence[Any]
) -> Differentiated | None:
    """The body with its backward pass; None where autograd is to record its calls one by one."""
    if not torch.is_grad_enabled() or are_saved_tensors_hooked():
        return None
    trained = [isinstance(x, Tensor) and x.requires_grad for x in operands]
    needed = (*map(_requires_grad, held), *trained)
    if True not in needed:
        return None
    tensor = held[0] if held else next(x for x in operands if isinstance(x, Tensor))
    if torch.is_autocast_enabled(tensor.device.type):
        return None
    known: dict[tuple[bool, ...], Differentiated | None] = body.__dict__.setdefault("known", {})
    if needed not in known:
        known[needed] = differentiate(tokens_as_rows(body.graph), needed)
    return known[needed]


def reshard(model: nn.Module) -> None:
    """Have the shares of FSDP2 stand under the parameters' names again, in every unit of it.

    After an evaluation whole parameters stand there until the next backward pass: an optimizer made of
    them would train what nobody reads, and what is loaded into them is lost.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def find(module: nn.Module, path: str) -> Any:
    """The parameter, buffer or submodule of this name, past the module's own lookup of attributes."""
    *parents, last = _names(path)
    for name in parents:
        module = module._modules[name]  # type: ignore[assignment]
    parameter = module._parameters.get(last)
    if parameter is not None:
        return parameter
    # DistributedDataParallel puts what it made of a DTensor where plain attributes are.
    for kind in (module._parameters, module._buffers, module._modules, module.__dict__):
        if last in kind:
            return kind[last]
    raise AttributeError(f"{type(module).__name__} has no {last}")


@cache
def _names(path: str) -> list[str]:
    return path.split(".")


def container(root: nn.Module, model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule of `root` that holds ``path``'s last name, made where it is missing.

    A repeated layer is a `Layer`, a list of the model's a list, all others hold names only.
    """
    *parents, last = path.split(".")
    module = root
    for index, name in enumerate(parents):
        child = module._modules.get(name)
        if child is None:
            here = ".".join(parents[: index + 1])
            child = _like(model.get_submodule(here), here)
            module.add_module(name, child)
        module = child
    return module, last


def _like(module: nn.Module, path: str) -> nn.Module:
    if layer_of(path) == path:
        return Layer()
    return nn.ModuleList() if isinstance(module, nn.ModuleList) else nn.Module()
