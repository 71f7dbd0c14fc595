"""Checkpoints: all that a run needs to go on, in files that are read without running code.

    autoshard.save("run/checkpoint", tp_model, optimizer, {"step": step})
    step = autoshard.load("run/checkpoint", tp_model, optimizer)["step"]

Tensors are safetensors under the model's own names, in the model's own order, so that what four ranks
wrote is read by two, by one, and by the plain model; the rest is JSON. The tensors are written and read
by ``torch.distributed.checkpoint``. A save goes to a new folder and becomes the checkpoint in one step,
so one that is killed, at any moment, leaves the one before.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from autoshard.checkpoints import index, state
from autoshard.checkpoints.index import Index
from autoshard.checkpoints.storage import Writer
from autoshard.errors import CheckpointError
from autoshard.module import ParallelModule
from autoshard.random_streams import derive_seed

T = TypeVar("T")

_DTYPES = {  # safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip

_group: tuple[Any, Any] = (None, None)  # the default group, and the one made beside it


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; every rank calls it.

    Args:
        folder: one for all ranks. What it held before is replaced when all is written.
        model: a parallel module, also under FSDP2, or any other module.
        optimizer: its state is saved in the model's order too.
        extra: numbers, strings, tensors, and lists and dicts of them, the same on every rank: the step,
            a scheduler's and a scaler's ``state_dict()``.

    Raises:
        CheckpointError: something in ``extra`` that would have to be pickled.
    """
    tensors, writer = _prepared(folder, model, optimizer, extra)
    _transferred(state_dict_saver.save, tensors, storage_writer=writer)


def async_save(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict[str, Any] | None = None,
) -> Future[Any]:
    """``save`` in a thread, from a copy on the CPU that is made before this returns.

    Returns:
        A future. Wait for its ``result()`` before the next save to the folder, and before the end.
    """
    tensors, writer = _prepared(folder, model, optimizer, extra)
    return _transferred(state_dict_saver.async_save, tensors, storage_writer=writer)  # type: ignore[no-any-return]


def load(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model and its optimizer; every rank calls it.

    The number of ranks may be another one than that which saved. Dropout goes on where it stood, if
    the ranks are split as they were; else with new random numbers, which a warning says. Files are
    compared with the index before anything is changed: each rank reads its part of them.

    Returns:
        The ``extra`` that was saved.

    Raises:
        CheckpointError: on every rank; no checkpoint, a file that is missing, truncated or another one,
            a tensor that the model does not have, or has in another shape or dtype.
    """
    folder = Path(folder)
    found = _agreed(lambda: _checked(folder))
    there = {n: (_DTYPES[dtype], shape) for n, (dtype, shape) in found.tensors.items()}
    wanted = state.of_model(model)
    _agreed(lambda: _compared(folder, there, wanted))
    if optimizer is not None:
        if "optimizer" not in found.values:
            raise CheckpointError(f"{folder} was saved without an optimizer: call load without one")
        state.compare_groups(model, optimizer, found.values["optimizer"])
        wanted |= state.room_for_optimizer(model, optimizer, there)
    wanted |= {n: torch.empty(s, dtype=t) for n, (t, s) in there.items() if n.startswith("extra.")}
    streams = {n: t.clone() for n, t in _streams(model).items()}
    alike = _split(model) == found.values["split"]
    known = alike and all(n in there and there[n][1] == tuple(t.shape) for n, t in streams.items())
    known = all(_gathered(known))
    if known:
        wanted |= streams
    reader = HuggingFaceStorageReader(str(folder / found.data))
    _transferred(state_dict_loader.load, wanted, storage_reader=reader)
    state.into_model(model, wanted)
    if optimizer is not None:
        state.into_optimizer(model, optimizer, wanted, found.values["optimizer"])
    if isinstance(model, ParallelModule):
        if known:
            model.load_random_state({n.removeprefix("random."): wanted[n] for n in streams})
        else:
            model.manual_seed(derive_seed(0, "loaded", found.data))
            warnings.warn(
                f"{folder} was written by ranks that were split in another way: dropout goes on "
                "with new random numbers",
                stacklevel=2,
            )
    return state.into_extra(found.values["extra"], wanted)  # type: ignore[no-any-return]


def _prepared(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any] | None,
) -> tuple[dict[str, Tensor], Writer]:
    """All tensors by name, and what writes them."""
    tensors, rest = state.of_extra({} if extra is None else extra)
    tensors |= state.of_model(model) | _streams(model)
    values: dict[str, Any] = {"extra": rest, "split": _split(model)}
    if optimizer is not None:
        own, values["optimizer"] = state.of_optimizer(model, optimizer)
        tensors |= own
    folder = Path(folder)
    data = _gathered(f"data-{uuid.uuid4().hex}")[0]
    (folder / data).mkdir(parents=True, exist_ok=True)
    return tensors, Writer(folder, data, values)


def _split(model: nn.Module) -> dict[str, int]:
    """Into how many parts each region is split: whether streams of dropout mean the same."""
    if not isinstance(model, ParallelModule):
        return {}
    return {"": model.plan.tp, **model.plan.degrees}


def _streams(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, ParallelModule):
        return {}
    return {f"random.{name}": value for name, value in model.random_state().items()}


def _checked(folder: Path) -> Index:
    """The index; every file is there, and this rank's part of them holds what was written."""
    found = index.read(folder)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    index.check(folder, found, sorted(found.files)[rank::world])
    return found


def _compared(
    folder: Path, there: dict[str, tuple[torch.dtype, tuple[int, ...]]], wanted: dict[str, Tensor]
) -> None:
    """Whether the model has just the tensors of the checkpoint."""
    saved = {n for n in there if n.startswith("model.")}
    for names, where in (
        (wanted.keys() - saved, "is not in the checkpoint, and is in the model"),
        (saved - wanted.keys(), "is in the checkpoint, and not in the model"),
    ):
        if names:
            first, more = min(names).removeprefix("model."), len(names) - 1
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: {first} {where} ({more} more such)"
            )
    for name, tensor in wanted.items():
        dtype, shape = there[name]
        if shape != tuple(tensor.shape) or dtype != tensor.dtype:
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: {name.removeprefix('model.')} is "
                f"{dtype} {list(shape)} there, and {tensor.dtype} {list(tensor.shape)} here; make the "
                "model as it was, and convert it after loading"
            )


def _transferred(transfer: Any, tensors: dict[str, Tensor], **storage: Any) -> Any:
    """A call of torch.distributed.checkpoint among all processes, or in this one alone."""
    processes = _processes()
    with warnings.catch_warnings():
        if processes is None:  # it warns that it does what no_dist asks for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return transfer(tensors, process_group=processes, no_dist=processes is None, **storage)


def _processes() -> dist.ProcessGroup | None:
    """All processes, in a group on the CPU that nothing else uses: a thread may write through it."""
    global _group
    if not dist.is_initialized():
        return None
    if _group[0] is not dist.group.WORLD:
        _group = (dist.group.WORLD, dist.new_group(backend="gloo"))
    return _group[1]  # type: ignore[no-any-return]


def _gathered(value: T) -> list[T]:
    """Every rank's value."""
    processes = _processes()
    if processes is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=processes)
    return values


def _agreed(step: Callable[[], T]) -> T:
    """A step of this rank's own; an error of one rank is raised on all."""
    result, message = None, None
    try:
        result = step()
    except CheckpointError as error:
        message = str(error)
    messages = [m for m in _gathered(message) if m]
    if messages:
        raise CheckpointError(messages[0])
    return result  # type: ignore[return-value]
