"""The index of a checkpoint: which files it has, which part of which tensor is where, and all numbers.

    folder/checkpoint.json                  the index, replaced in one step
    folder/<data>/*.safetensors             what each rank wrote

The index names the folder of its data, which nothing writes into again: whoever reads finds the last
checkpoint that was complete, whatever became of a later one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autoshard.agreement import fingerprint
from autoshard.errors import CheckpointError

NAME = "checkpoint.json"
FORMAT = "autoshard checkpoint 1"


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor in a file: its place in the whole, its shape, and a number of its bytes."""

    tensor: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    fingerprint: int


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        data: name of the folder with the files.
        files: file -> (bytes, chunks).
        tensors: tensor -> (dtype, whole shape).
        values: all that is not a tensor, as JSON has it.
    """

    data: str
    files: dict[str, tuple[int, tuple[Chunk, ...]]]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    values: dict[str, Any]


def chunks_of(path: Path, offsets: dict[str, tuple[int, ...]]) -> Iterator[Chunk]:
    """What a file really holds, read back from it."""
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            yield Chunk(
                name, offsets[name], tuple(tensor.shape), file.get_slice(name).get_dtype(),
                int(fingerprint(tensor)),
            )  # fmt: skip


def write(folder: Path, index: Index) -> None:
    """Make this the folder's checkpoint, in one step; then remove what belongs to no index."""
    text = {"format": FORMAT, **asdict(index)}
    new = folder / f"{NAME}.{index.data}"
    with new.open("w") as file:
        json.dump(text, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder / index.data)
    os.replace(new, folder / NAME)
    _sync(folder)
    for other in folder.iterdir():
        if other.is_dir() and other.name.startswith("data-") and other.name != index.data:
            shutil.rmtree(other, ignore_errors=True)
        elif other.name.startswith(f"{NAME}.data-"):
            other.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """What was renamed or made in the folder survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> Index:
    """The folder's checkpoint.

    Raises:
        CheckpointError: there is none, or the file is not an index.
    """
    path = folder / NAME
    try:
        text = json.loads(path.read_text())
        if text["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has the format {text['format']!r}, this version reads {FORMAT!r}: load it "
                "with the version that wrote it"
            )
        files = {
            name: (size, tuple(Chunk(**_tuples(chunk)) for chunk in chunks))
            for name, (size, chunks) in text["files"].items()
        }
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in text["tensors"].items()}
        return Index(text["data"], files, tensors, text["values"])
    except FileNotFoundError:
        raise CheckpointError(_instead(folder)) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the index of a checkpoint, or is damaged ({error}): load another checkpoint"
        ) from error


def _tuples(chunk: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in chunk.items()}


def _instead(folder: Path) -> str:
    """Why a folder without an index is none of ours."""
    if not folder.is_dir():
        return f"there is no folder {folder}: no checkpoint was saved there"
    if (folder / ".metadata").exists():
        return (
            f"{folder} was written by torch.distributed.checkpoint itself, whose index is a pickle "
            "file, and unpickling runs whatever code is in it: if you trust it, call "
            "torch.distributed.checkpoint.load with tp_model.state_dict()"
        )
    if any(folder.glob("*.safetensors")):
        return (
            f"{folder} holds safetensors files but no {NAME}: weights, not a checkpoint; "
            "tp_model.load_weights reads them"
        )
    return f"{folder} holds no {NAME}: no save to it was ever completed, or it is another folder"


def check(folder: Path, index: Index, compared: Collection[str]) -> None:
    """Whether the files hold what the index says.

    Args:
        compared: the files whose every byte is looked at; of others the header is.

    Raises:
        CheckpointError: a file that is missing, truncated, or another one, with the first tensor that
            is not as it was written.
    """
    for name, (size, chunks) in sorted(index.files.items()):
        path = folder / index.data / name
        if not path.exists():
            raise _damaged(path, "is missing", chunks[0], len(chunks))
        there = path.stat().st_size
        if there != size:
            lost = _first_lost(path, chunks)
            raise _damaged(path, f"has {there} bytes, {size} were written", lost, len(chunks))
        try:
            with safe_open(path, "pt") as file:
                found = set(file.keys())
                for chunk in chunks:
                    if chunk.tensor not in found:
                        raise _damaged(path, "is another file, without it", chunk, len(chunks))
                    piece = file.get_slice(chunk.tensor)
                    is_ = (piece.get_dtype(), tuple(piece.get_shape()))
                    if is_ != (chunk.dtype, chunk.shape):
                        what = f"is another file: there it is {is_[0]} {list(is_[1])}"
                        raise _damaged(path, what, chunk, len(chunks))
                    if name in compared and _number(file, chunk) != chunk.fingerprint:
                        raise _damaged(path, "holds other values than were written", chunk, len(chunks))
        except SafetensorError as error:
            raise _damaged(path, f"cannot be read ({error})", chunks[0], len(chunks)) from error


def _number(file: Any, chunk: Chunk) -> int:
    return int(fingerprint(file.get_tensor(chunk.tensor)))


def _first_lost(path: Path, chunks: tuple[Chunk, ...]) -> Chunk:
    """The first tensor whose bytes are not all there, by the header of a truncated file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
            there = path.stat().st_size - 8 - length
            ends = {c.tensor: header[c.tensor]["data_offsets"][1] for c in chunks}
        except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
            return chunks[0]
    lost = [c for c in chunks if ends[c.tensor] > there]
    return min(lost or chunks, key=lambda c: ends[c.tensor])


def _damaged(path: Path, what: str, chunk: Chunk, count: int) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}: {chunk.tensor} ({chunk.dtype} {list(chunk.shape)}; the file has {count} "
        "tensors) cannot be loaded. Nothing was changed; load another checkpoint"
    )
