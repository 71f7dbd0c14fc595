"""Where ``torch.distributed.checkpoint`` writes: safetensors in a new folder, then the index."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from autoshard.checkpoints import index
from autoshard.checkpoints.index import Chunk, Index


@dataclass(frozen=True)
class _Written:
    """One chunk, the file that it is in, and the file's bytes."""

    file: str
    size: int
    chunk: Chunk


def _read_back(path: Path, offsets: dict[str, tuple[int, ...]]) -> dict[str, _Written]:
    size = path.stat().st_size
    return {c.tensor: _Written(path.name, size, c) for c in index.chunks_of(path, offsets)}


class Writer(HuggingFaceStorageWriter):
    """Every rank writes its chunks into one file; the first one the index, when all have written.

    Args:
        folder: of the checkpoint.
        data: name of the new folder within it.
        values: what is not a tensor, for the index.
    """

    def __init__(self, folder: Path, data: str, values: dict[str, Any]) -> None:
        super().__init__(str(folder / data), save_distributed=True)
        self._folder, self._data, self._values = folder, data, values

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, and read back: the index gets what is in the file."""
        written = super().write_data(plan, planner).wait()
        offsets: dict[str, dict[str, tuple[int, ...]]] = {}
        for result in written:
            named = offsets.setdefault(result.storage_data.relative_path, {})
            # A file has one tensor of a name: a second chunk would have overwritten the first.
            assert result.index.fqn not in named, f"two chunks of {result.index.fqn} on one rank"
            named[result.index.fqn] = tuple(result.index.offset or ())
        files = {name: _read_back(self._folder / self._data / name, o) for name, o in offsets.items()}
        future: Future[list[WriteResult]] = Future()
        future.set_result([
            replace(r, storage_data=files[r.storage_data.relative_path][r.index.fqn]) for r in written
        ])  # fmt: skip
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when every rank has written and synced its file."""
        files: dict[str, tuple[int, list[Chunk]]] = {}
        dtypes: dict[str, str] = {}
        for rank in results:
            for result in rank:
                written: _Written = result.storage_data
                files.setdefault(written.file, (written.size, []))[1].append(written.chunk)
                dtypes[written.chunk.tensor] = written.chunk.dtype
        tensors = {
            name: (dtypes[name], tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        listed = {name: (size, tuple(chunks)) for name, (size, chunks) in files.items()}
        index.write(self._folder, Index(self._data, listed, tensors, self._values))
