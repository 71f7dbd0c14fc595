"""An optimizer's state as one process would have it: whole tensors, in the model's own order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from autoshard import parameters as stored_parameters
from autoshard.checkpoints import state
from autoshard.layers import reshard
from autoshard.parameters import Stored


def of_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` is of the plain model's; every rank calls it.

    Args:
        model: the parallel module; what the optimizer trains beside it is left as it is.
        keep: whether this rank wants the result; others get no tensors, and only help to gather.
    """
    given: dict[str, Any] = optimizer.state_dict()  # whose states are the optimizer's own dicts
    states = {place: dict(own) for place, own in given["state"].items()}
    for place, share, _ in _trained(model, optimizer):
        for key, value in states.get(place, {}).items():
            if isinstance(value, Tensor):
                split = share if state.is_split_in(value, share) else None
                whole = stored_parameters.whole(value, split).detach()
                states[place][key] = whole.to("cpu", copy=True) if keep else None
    return {**given, "state": states} if keep else {}


def into_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
    """Put back what ``of_optimizer`` gave, here or on one process; every rank gets all of it."""
    states = {place: dict(own) for place, own in given["state"].items()}
    for place, share, parameter in _trained(model, optimizer):
        for key, value in states.get(place, {}).items():
            if isinstance(value, Tensor):
                states[place][key] = _as_parameter(value, parameter, share)
    optimizer.load_state_dict({**given, "state": states})


def _as_parameter(value: Tensor, parameter: Tensor, share: Stored | None) -> Tensor:
    """A whole tensor of the state, split as its parameter is."""
    room = state.like(parameter, value.dtype, tuple(value.shape))
    if not isinstance(room, DTensor):
        return value
    value = value.to(room.device)
    made = distribute_tensor(value, room.device_mesh, room.placements, src_data_rank=None)
    return state.in_ranks_order(made, share)


def _trained(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, Stored | None, Tensor]]:
    """The optimizer's parameters, numbered as in its state dict."""
    reshard(model)  # the optimizer's parameters are the shares
    names = {p: n for n, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, parameter in enumerate(parameters):
        yield place, state.stored(model, names[parameter]) if parameter in names else None, parameter
