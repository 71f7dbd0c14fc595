"""Real ranks compared with the model itself: the whole model, run on one rank of each group.

The first rank of a tensor parallel group puts the whole parameters into a copy of the model and runs
it, forward and backward, with dropout off on both sides. Each rank compares its own outputs and its
own shares of the gradients.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from autoshard import parameters as stored_parameters
from autoshard.compat import shares
from autoshard.errors import AutoshardError
from autoshard.exactly import exactly
from autoshard.groups import ProcessGroupComm
from autoshard.measures import TOLERANCE, largest_of, objective, relative_error
from autoshard.mesh import Mesh
from autoshard.parameters import Stored
from autoshard.plans import Plan
from autoshard.rank import local_share
from autoshard.verification import Report, judged

T = TypeVar("T")
_Spec = tuple[torch.Size, torch.dtype] | None


@dataclass(frozen=True)
class Subject:
    """A parallel module as the comparison needs it.

    run: its forward. model: a copy of the model, without memory, in the same mode. names: the names
    of so many flat outputs of the last call. parameters, buffers: as they lie on this rank.
    stored: how a parameter is split.
    """

    run: Callable[..., Any]
    model: nn.Module
    names: Callable[[int], list[str]]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    stored: Callable[[str], Stored | None]
    mesh: Mesh
    plan: Plan


def verify_ranks(
    subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Report:
    """The relative error of every output and gradient; every rank calls it and gets the same report.

    device: where the first rank runs the whole model. Parameters, their gradients, buffers and random
    states are as before. Raises AutoshardError on every rank where the whole model cannot run.
    """
    mesh, first = subject.mesh, subject.mesh.tp_rank == 0
    for name, parameter in subject.parameters.items():
        if isinstance(parameter, DTensor) and parameter.device_mesh != mesh.tp_mesh:
            raise AutoshardError(
                f"{name} is split over data parallel ranks too (on {parameter.device_mesh}), which sum "
                "its gradient over batches that differ: call verify before fully_shard"
            )
    dtype = _lowest(subject.parameters.values(), mesh.device)
    with _left_alone(subject), exactly(dtype):
        outputs = [_whole(r) for r in pytree.tree_leaves(subject.run(*_own(args), **_own(kwargs)))]
        objective(outputs).backward()
        gradients = {name: p.grad for name, p in subject.parameters.items()}
    whole = _gathered(subject, device)
    reference: list[Any] = []
    expected: dict[str, Tensor] = {}
    failure = ""
    if first:
        try:
            with _left_alone(subject), exactly(dtype):
                reference, expected = _replayed(subject, whole, args, kwargs, device)
        except Exception:
            failure = traceback.format_exc(limit=-2)
    specs = [(r.shape, r.dtype) if isinstance(r, Tensor) else None for r in reference]
    failure, specs, largest = _firsts(mesh, (failure, specs, largest_of(expected)))
    if failure:
        raise AutoshardError(
            f"the whole model did not run on {device}, on the first rank of the group; where memory is "
            f'short there, pass device="cpu":\n{failure}'
        )
    output_errors: dict[str, float] = {}
    for index, (name, spec) in enumerate(zip(subject.names(len(specs)), specs, strict=True)):
        if spec is not None:
            right = _broadcast(mesh, reference[index] if first else None, spec)
            output_errors[name] = relative_error([outputs[index].detach()], right, 0.0)
    gradient_errors: dict[str, float] = {}
    for name, parameter in subject.parameters.items():
        right = _broadcast(mesh, expected.get(name), (parameter.shape, parameter.dtype))
        gradient_errors[name] = _gradient_error(
            gradients[name], right, subject.stored(name), mesh, largest
        )
    worst = _worst(mesh, [*output_errors.values(), *gradient_errors.values()])
    output_errors = dict(zip(output_errors, worst, strict=False))
    gradient_errors = dict(zip(gradient_errors, worst[len(output_errors) :], strict=True))
    return judged(output_errors, gradient_errors, dtype, subject.plan)


def _replayed(
    subject: Subject, whole: dict[str, Tensor], args: Any, kwargs: Any, device: torch.device
) -> tuple[list[Any], dict[str, Tensor]]:
    """The model's own outputs, and the gradient of every parameter."""
    buffers = {n: b.detach().to(device, copy=True) for n, b in subject.buffers.items()}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (_own(args), _own(kwargs)))
    for name, parameter in whole.items():
        parameter.requires_grad_(subject.parameters[name].requires_grad)
    tensors = {f"model.{name}": t for name, t in {**whole, **buffers}.items()}
    outputs = functional_call(_Step(subject.model), tensors, (args, kwargs))
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.items()}
    return [r.detach() if isinstance(r, Tensor) else r for r in outputs], gradients


class _Step(nn.Module):
    """Forward and backward: what is checkpointed reads the parameters again in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The model's flat outputs."""
        outputs = pytree.tree_leaves(self.model(*args, **kwargs))
        objective(outputs).backward()
        return outputs


@contextlib.contextmanager
def _left_alone(subject: Subject) -> Iterator[None]:
    """Gradients start at None inside; they, buffers and random states are as before afterwards."""
    mesh = subject.mesh
    streams = [mesh.group(degree).stream for degree in mesh.degrees]
    states = [stream.state_dict() for stream in streams]
    gradients = {n: p.grad for n, p in subject.parameters.items()}
    buffers = {n: b.detach().clone() for n, b in subject.buffers.items()}
    for parameter in subject.parameters.values():
        parameter.grad = None
    devices = [mesh.device] if mesh.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        for name, parameter in subject.parameters.items():
            parameter.grad = gradients[name]
        with torch.no_grad():
            for name, buffer in subject.buffers.items():
                buffer.copy_(buffers[name])
        for stream, state in zip(streams, states, strict=True):
            stream.load_state_dict(state)


@torch.no_grad()
def _gathered(subject: Subject, device: torch.device) -> dict[str, Tensor]:
    """The whole parameters on the first rank; other ranks hold one at a time."""
    found: dict[str, Tensor] = {}
    for name, parameter in subject.parameters.items():
        whole = stored_parameters.whole(parameter, subject.stored(name)).detach()
        if subject.mesh.tp_rank == 0:
            found[name] = whole.to(device, copy=True)
    return found


@torch.no_grad()
def _gradient_error(
    gradient: Tensor | None, right: Tensor, stored: Stored | None, mesh: Mesh, largest: float
) -> float:
    """This rank's share against its share of the right one, by the largest element of the whole."""
    if not right.numel() or not right.is_floating_point():
        return 0.0
    share = right if stored is None else local_share(right, stored, mesh.group(stored[2]).coordinate)
    own = torch.zeros_like(share) if gradient is None else gradient
    own = shares([own])[0] if isinstance(own, DTensor) else own
    return relative_error([own], share, max(largest, 1e6 * right.abs().max().item()))


def _whole(output: Any) -> Any:
    return output.full_tensor() if isinstance(output, DTensor) else output


def _own(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def _lowest(parameters: Iterable[Tensor], device: torch.device) -> torch.dtype:
    """The coarsest floating dtype of parameters and autocast: what the comparison is judged by."""
    dtypes = {p.dtype for p in parameters} & set(TOLERANCE)
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes or {torch.float32}, key=lambda d: TOLERANCE.get(d, math.inf))


def _firsts(mesh: Mesh, value: T) -> T:
    """The first rank's value, on every rank of the group."""
    if mesh.tp == 1:
        return value
    group = mesh.group(mesh.tp)
    assert isinstance(group, ProcessGroupComm)
    return group.gather_objects(value)[0]


def _broadcast(mesh: Mesh, value: Tensor | None, spec: tuple[torch.Size, torch.dtype]) -> Tensor:
    """The first rank's tensor, on this rank's device; `value` is looked at on the first rank only."""
    if value is None:
        value = torch.empty(spec[0], dtype=spec[1], device=mesh.device)
    value = value.to(mesh.device).contiguous()
    if mesh.tp > 1:
        group = mesh.group(mesh.tp)
        assert isinstance(group, ProcessGroupComm)
        group.broadcast(value)
    return value


def _worst(mesh: Mesh, errors: list[float]) -> list[float]:
    """The largest error of any rank; infinite for what is not a number."""
    values = torch.tensor([math.inf if e != e else e for e in errors], dtype=torch.float64)
    if mesh.tp > 1:
        values = mesh.group(mesh.tp).all_reduce(values.to(mesh.device), "max")
    return [float(v) for v in values]
