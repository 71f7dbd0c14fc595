"""The one place for private parts of PyTorch: why each is needed, and where it was tried.

- ``_disable_current_modes`` (torch 2.11, 2.13): a dispatch mode of the caller (``CommDebugMode``, a
  FLOP counter) would be traced into the captured graph. There is no public way to step outside.
- ``torch.autograd.function._is_setup_context_defined`` (torch 2.11, 2.13): every ``Function.apply``
  calls it. Replacing ``apply`` itself would miss ``f = MyFunction.apply`` stored before.
- ``DTensor._local_tensor``, ``DTensor._spec`` and the constructor (torch 2.11, 2.13): ``to_local``
  takes 150 us a parameter and step, forward and backward; ``shares`` takes 20.
- ``_get_default_store`` (torch 2.13): the key-value store by which the ranks found each other. Another
  one would need a port of its own.
- ``_set_pg_timeout`` and a backend's ``options`` (torch 2.13): a mesh gives its groups the backend's
  default timeout (30 minutes), whatever ``init_process_group`` was told.
- ``torch.utils.checkpoint.CheckpointFunction`` and ``_checkpoint_without_reentrant_generator`` (torch
  2.13): what ``checkpoint`` calls, by name. Models hold ``checkpoint`` itself since their import.
- ``UntypedStorage._cdata`` (torch 2.11, 2.13): which traced tensors share memory. Traced storages have
  no address, and storages do not compare.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.autograd.function as autograd_function
import torch.utils.checkpoint
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Outside all torch dispatch modes of the caller."""
    with _disable_current_modes():
        yield


@contextlib.contextmanager
def autograd_functions_applied(
    notice: Callable[[Any, tuple[Any, ...]], None],
) -> Iterator[None]:
    """Call ``notice(class, arguments)`` for every ``autograd.Function`` that is applied inside."""
    module: Any = autograd_function
    original = module._is_setup_context_defined

    def hook(setup_context: Any) -> Any:
        inside_apply = sys._getframe(1).f_locals
        if "cls" in inside_apply:
            notice(inside_apply["cls"], tuple(inside_apply.get("args", ())))
        return original(setup_context)

    module._is_setup_context_defined = hook
    try:
        yield
    finally:
        module._is_setup_context_defined = original


@contextlib.contextmanager
def checkpoints_entered(
    around: Callable[[], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Have ``torch.utils.checkpoint`` do no more than call its function, inside ``around()``."""
    module: Any = torch.utils.checkpoint
    reentrant, other = module.CheckpointFunction, module._checkpoint_without_reentrant_generator

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            with around():
                return function(*args)

    def plain(*args: Any, **kwargs: Any) -> Iterator[None]:
        with around():
            yield

    module.CheckpointFunction, module._checkpoint_without_reentrant_generator = Plain, plain
    try:
        yield
    finally:
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = reentrant, other


def shares(parameters: list[DTensor]) -> list[Tensor]:
    """What ``to_local`` of each gives, in one call: gradients flow back, as DTensors placed alike."""
    if not torch.is_grad_enabled():
        return [p._local_tensor for p in parameters]
    trained = [p for p in parameters if p.requires_grad]
    found = iter(_Shares.apply(*trained)) if trained else iter(())  # type: ignore[no-untyped-call]
    return [next(found) if p.requires_grad else p._local_tensor for p in parameters]


class _Shares(torch.autograd.Function):
    """DTensors -> their shares; shares' gradients -> DTensors."""

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.specs = [p._spec for p in parameters]
        ctx.strides = [p._local_tensor.stride() for p in parameters]
        return tuple(p._local_tensor.view_as(p._local_tensor) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = []
        for grad, spec, stride in zip(grads, ctx.specs, ctx.strides, strict=True):
            if grad is not None and grad.stride() != stride:
                grad = torch.empty_strided(
                    grad.shape, stride, dtype=grad.dtype, device=grad.device
                ).copy_(grad)
            result.append(None if grad is None else DTensor(grad, spec, requires_grad=False))
        return tuple(result)


def storage_key(tensor: Tensor) -> int | None:
    """The same number for tensors over the same memory; None for one inside ``vmap``."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


def default_store() -> distributed_c10d.Store | None:
    """A connection of its own to the store of the default process group; None where it has none."""
    try:
        store: distributed_c10d.Store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        return store
    except RuntimeError:  # a group without processes
        return None


def inherit_timeout(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give a process group the timeout of the default group, for collectives on `device`."""
    try:
        timeout: timedelta = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
        distributed_c10d._set_pg_timeout(timeout, group)
    except (AttributeError, RuntimeError):  # a backend without one
        return
