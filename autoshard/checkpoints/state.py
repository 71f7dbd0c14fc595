"""What a checkpoint is made of: named tensors in the model's own order, and values.

model.<name>                            parameters and buffers, tied ones once
optimizer.<parameter>.<key>             the optimizer's tensors
random.<replica>.<degree>.<coordinate>  where a stream of dropout stands
extra.<path>                            the caller's tensors
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from autoshard import parameters as stored_parameters
from autoshard.errors import CheckpointError
from autoshard.module import ParallelModule
from autoshard.parameters import Stored

Tensors = dict[str, Tensor]
Values = dict[str, Any]
T = TypeVar("T")


def stored(model: nn.Module, name: str) -> Stored | None:
    """How a parameter lies on the ranks."""
    return model.share_of(name) if isinstance(model, ParallelModule) else None


# -- the model ------------------------------------------------------------------------------------


def of_model(model: nn.Module) -> Tensors:
    """Parameters and buffers by name; a tensor of several names by its first."""
    state = model.state_dict()
    first = dict([*model.named_parameters(), *model.named_buffers()])
    return {f"model.{n}": t for n, t in state.items() if n in first and isinstance(t, Tensor)}


def into_model(model: nn.Module, tensors: Tensors) -> None:
    """Put back what ``of_model`` gave, and was filled."""
    state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    model.load_state_dict(state, strict=False)


# -- the optimizer --------------------------------------------------------------------------------


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Values]:
    """Tensors in the model's order; numbers by parameter and key, and the groups' options."""
    tensors: Tensors = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in _trained(model, optimizer):
        numbers[name] = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = _in_model_order(value, stored(model, name))
            else:
                numbers[name][key] = _plain(value, f"{key} of the optimizer's {name}")
    groups = []
    for names, group in zip(_names(model, optimizer), optimizer.param_groups, strict=True):
        options = {k: _option(v, k) for k, v in group.items() if k != "params"}
        groups.append({**options, "params": names})
    return tensors, {"state": numbers, "groups": groups}


def room_for_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    there: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> Tensors:
    """Empty tensors for the state that a checkpoint has, split as the parameters are."""
    saved = _by_parameter(there)
    return {
        f"optimizer.{name}.{key}": like(parameter, *kind)
        for name, parameter in _trained(model, optimizer)
        for key, kind in saved.get(name, {}).items()
    }


def compare_groups(model: nn.Module, optimizer: torch.optim.Optimizer, values: Values) -> None:
    """Whether an optimizer has the parameter groups that were saved.

    Raises:
        CheckpointError: another number of groups, or other parameters in one.
    """
    saved, here = [g["params"] for g in values["groups"]], _names(model, optimizer)
    if len(saved) != len(here):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, this one {len(here)}: make "
            "it with the same groups"
        )
    for place, (own, other) in enumerate(zip(here, saved, strict=True)):
        if own != other:
            raise CheckpointError(
                f"parameter group {place} of the optimizer: {_some(set(own) - set(other))} only here, "
                f"{_some(set(other) - set(own))} only in the checkpoint, or in another order; make it "
                "with the same groups"
            )


def into_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, values: Values
) -> None:
    """Put the state back, in the order in which the ranks hold it."""
    saved_tensors = _by_parameter(tensors)
    state: dict[int, dict[str, Any]] = {}
    for place, (name, _) in enumerate(_trained(model, optimizer)):
        numbers, own = values["state"].get(name, {}), saved_tensors.get(name, {})
        if numbers or own:
            share = stored(model, name)
            state[place] = {**numbers, **{k: in_ranks_order(v, share) for k, v in own.items()}}
    groups: list[dict[str, Any]] = []
    first = 0
    for mine, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        options = {k: _restored(v, mine.get(k)) for k, v in saved.items() if k != "params"}
        places = list(range(first, first + len(mine["params"])))
        groups.append({**options, "params": places})
        first += len(places)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # load_state_dict gives a state its parameter's dtype, which may be coarser.
    for place, (_, parameter) in enumerate(_trained(model, optimizer)):
        for key, value in state.get(place, {}).items():
            if isinstance(value, Tensor) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's parameters, in its order, with their names in the model."""
    names = {p: n for n, p in model.named_parameters()}
    for place, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"parameter group {place} of the optimizer has a parameter of shape "
                    f"{list(parameter.shape)} that the model does not have: make the optimizer after "
                    "parallelize, from the parallel module's parameters"
                )
            yield names[parameter], parameter


def _by_parameter(entries: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What is the optimizer's: parameter -> key -> entry."""
    found: dict[str, dict[str, T]] = {}
    for full, entry in entries.items():
        if full.startswith("optimizer."):
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            found.setdefault(name, {})[key] = entry
    return found


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters of each group, by name."""
    names = {p: n for n, p in _trained(model, optimizer)}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _in_model_order(value: Tensor, share: Stored | None) -> Tensor:
    return stored_parameters.to_state(value, share) if is_split_in(value, share) else value


def in_ranks_order(value: Tensor, share: Stored | None) -> Tensor:
    if not is_split_in(value, share) or not isinstance(value, DTensor):
        return value
    return stored_parameters.in_ranks_order(value, share)


def is_split_in(value: Tensor, share: Stored | None) -> bool:
    """Whether a state has the dimension in which its parameter's rows lie by rank."""
    if share is None or not isinstance(value, DTensor):
        return False
    return any(p == Shard(share[0]) for p in value.placements)


def like(parameter: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor for a state: split in the dimensions that it shares with its parameter."""
    if not isinstance(parameter, DTensor) or not shape:
        device = parameter.device if shape else torch.device("cpu")
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype)
    placements = [
        p if isinstance(p, Shard) and p.dim < len(shape) and shape[p.dim] == parameter.shape[p.dim]
        else Replicate()
        for p in parameter.placements
    ]  # fmt: skip
    whole = torch.empty(shape, dtype=dtype, device=parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, placements, src_data_rank=None)


def _option(value: Any, name: str) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return _plain(list(value) if isinstance(value, tuple) else value, f"the optimizer's option {name}")


def _restored(value: Any, mine: Any) -> Any:
    """An option as JSON gave it, of the type that the optimizer has now."""
    if isinstance(mine, Tensor):
        return torch.full_like(mine, value)
    return tuple(value) if isinstance(mine, tuple) else value


# -- the caller's ---------------------------------------------------------------------------------


def of_extra(extra: Any) -> tuple[Tensors, Any]:
    """Tensors by path, and the rest with a note where each tensor was.

    Raises:
        CheckpointError: something that JSON does not have, by its path.
    """
    tensors: Tensors = {}
    return tensors, _without_tensors(extra, "extra", tensors)


def _without_tensors(value: Any, path: str, tensors: Tensors) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        wrong = [k for k in value if not isinstance(k, str)]
        if wrong or "tensor" in value:
            raise CheckpointError(
                f"{path} has the key {(wrong or ['tensor'])[0]!r}: keys are other strings"
            )
        return {k: _without_tensors(v, f"{path}.{k}", tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_tensors(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
    return _plain(value, path)


def _plain(value: Any, what: str) -> Any:
    """A value, if JSON gives it back as it is."""
    try:
        if json.loads(json.dumps(value)) == value or value != value:
            return value
    except (TypeError, ValueError):
        pass
    raise CheckpointError(
        f"{what} is a {type(value).__name__}, and a checkpoint holds tensors, numbers, strings, lists "
        "and dicts only: nothing is pickled. Save what it is made of"
    )


def into_extra(value: Any, tensors: Tensors) -> Any:
    """The inverse of ``of_extra``."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {k: into_extra(v, tensors) for k, v in value.items()}
    return [into_extra(v, tensors) for v in value] if isinstance(value, list) else value


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
