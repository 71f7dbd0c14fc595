"""Weights for a model that was built without memory: read or drawn share by share.

    with autoshard.meta_parameters():
        model = Model(config)                   # shapes; buffers are made as ever
    tp_model = autoshard.parallelize(model, tp=8)
    tp_model.load_weights("model/")             # or tp_model.init_weights(init)

No rank holds more than its shares and one whole parameter (of one module's, where they are drawn).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from autoshard import layouts
from autoshard.errors import AutoshardError, CheckpointError
from autoshard.mesh import Mesh
from autoshard.parameters import Stored
from autoshard.progress import each

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Inside, modules get their parameters on the meta device: shapes without memory.

    Buffers keep their values, unlike under ``torch.device("meta")``: those that are in no file, such
    as rotary frequencies, come from the model's own code and nowhere else.
    """

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(hollow)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Slot:
    """A parameter's place: this rank's memory, the whole shape, and how the share lies in it."""

    share: Tensor
    shape: torch.Size
    stored: Stored | None

    def runs(self, mesh: Mesh) -> list[tuple[int, int]]:
        """The share's rows of the split dimension, as ranges [begin, end) in order."""
        assert self.stored is not None
        _, layout, degree = self.stored
        rows = layouts.indices(layout, mesh.group(degree).coordinate)
        if not rows:
            return []
        breaks = [i for i, (a, b) in enumerate(pairwise(rows), 1) if b != a + 1]
        edges = [0, *breaks, len(rows)]
        return [(rows[a], rows[b - 1] + 1) for a, b in pairwise(edges)]


# -- from files -----------------------------------------------------------------------------------


def load(
    path: Path,
    slots: Mapping[str, Slot],
    names: Mapping[str, list[str]],
    required: Iterable[str],
    prefix: str,
    strict: bool,
    mesh: Mesh,
) -> tuple[str, ...]:
    """Fill what the files have; the names of what is in the files only.

    Raises:
        CheckpointError: before anything is changed: a damaged file, another shape, a required tensor
            that no file has; with `strict`, one that only the files have.
    """
    files = files_of(path)
    keys, rest = keys_for(names, files, prefix)
    missing = [name for name in required if name not in keys]
    if missing:
        first = next(iter(sorted(files)), "none")
        raise CheckpointError(
            f"{missing[0]} and {len(missing) - 1} other parameters are in no file of {path}, which has "
            f"{len(files)} tensors ({first}, ...): another model's weights, or other names"
        )
    if strict and rest:
        raise CheckpointError(
            f"{rest[0]} and {len(rest) - 1} other tensors of {path} are not in the model: pass "
            "strict=False if they are not needed"
        )
    read_into({n: s for n, s in slots.items() if n in keys}, keys, files, mesh)
    return tuple(rest)


def files_of(path: Path) -> dict[str, Path]:
    """Tensor -> file: of one safetensors file, or of a folder with one, or with several and an index.

    Raises:
        CheckpointError: there is none, or it cannot be read; names the file.
    """
    if path.is_dir():
        if (path / INDEX).exists():
            try:
                listed = json.loads((path / INDEX).read_text())["weight_map"]
                return {name: path / Path(file).name for name, file in listed.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path / INDEX} is not an index of weights ({error})") from error
        found = path / SINGLE
        if not found.exists():
            raise CheckpointError(
                f"{path} has neither {SINGLE} nor {INDEX}: pass the folder of a saved model, or a "
                ".safetensors file. Files of torch.save are not read, they can run code: convert them "
                "with safetensors.torch.save_file(torch.load(file, weights_only=True), ...)"
            )
        path = found
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file ({error})") from error


def keys_for(
    names: Mapping[str, list[str]], there: Mapping[str, Path], prefix: str
) -> tuple[dict[str, str], list[str]]:
    """Tensor of the model -> tensor in the files; and what is in the files only.

    Args:
        names: every tensor and its other names.
        prefix: of the body's names in a model with a head (``transformer.``, ``bert.``), which the
            files may have and the model not, or the other way round.
    """
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name, aliases in names.items():
        spelled = [s for n in aliases for s in (n, prefix + n, n.removeprefix(prefix))]
        known = [s for s in spelled if s in there]
        taken.update(known)
        if known:
            keys[name] = known[0]
    return keys, sorted(set(there) - taken)


def read_into(
    slots: Mapping[str, Slot], keys: Mapping[str, str], files: Mapping[str, Path], mesh: Mesh
) -> None:
    """Fill every slot from the files, reading this rank's rows only.

    Raises:
        CheckpointError: a tensor of another shape, or a damaged file. Shapes are compared first.
    """
    by_file: dict[Path, list[str]] = {}
    for name in slots:
        by_file.setdefault(files[keys[name]], []).append(name)
    for path, names in by_file.items():
        with _opened(path) as file:
            inside = set(file.keys())
            for name in names:
                if keys[name] not in inside:
                    raise CheckpointError(
                        f"{path} does not have {keys[name]}, which its index promises"
                    )
                shape = tuple(file.get_slice(keys[name]).get_shape())
                if shape != tuple(slots[name].shape):
                    raise CheckpointError(
                        f"{path}: {keys[name]} has the shape {list(shape)}, and {name} of the model "
                        f"{list(slots[name].shape)}: these are another model's weights"
                    )
    work = [(path, name) for path, names in by_file.items() for name in names]
    last: Path | None = None
    with ExitStack() as stack:
        for path, name in each(work, len(work), "reading weights"):
            if path != last:
                stack.close()  # a file that was read leaves this process's memory
                last, file = path, stack.enter_context(_opened(path))
            _read(file, keys[name], slots[name], mesh)


@torch.no_grad()
def _read(file: Any, key: str, slot: Slot, mesh: Mesh) -> None:
    if slot.stored is None:
        slot.share.copy_(file.get_tensor(key))
        return
    dim, done = slot.stored[0], 0
    piece = file.get_slice(key)
    before = (slice(None),) * dim
    for begin, end in slot.runs(mesh):
        rows = piece[(*before, slice(begin, end))]
        slot.share.narrow(dim, done, end - begin).copy_(rows)
        done += end - begin


# -- by the model's own functions -----------------------------------------------------------------


def draw_into(
    model: nn.Module,
    init: Callable[[nn.Module], Any],
    slots: Mapping[str, Slot],
    names: Mapping[str, str],
    mesh: Mesh,
    whole: Callable[[str], Tensor],
) -> set[str]:
    """``model.apply(init)`` with one module's parameters in memory at a time; the names it wrote.

    The numbers are those of ``model.apply(init)`` on one process: every rank draws all of them, in
    that order, and keeps its rows. An ``init`` that reaches into submodules is called again with all of
    the submodules' parameters in memory.

    Args:
        names: every name of a parameter -> the first of its names.
        whole: a parameter's present value, gathered; every rank calls it.
    """
    written: set[str] = set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not _is_hollow(parameter):
                parameter.fill_(float("nan"))  # a write through .data changes no version
    modules = [(path, module) for path, module in _children_first(model, "")]
    for path, module in each(modules, len(modules), "drawing weights"):
        state = torch.get_rng_state()
        own = {n: f"{path}.{n}" if path else n for n, _ in module.named_parameters(recurse=False)}
        others = [p for n, p in module.named_parameters() if n not in own]
        versions = [p._version for p in others]
        reached = False
        done: dict[str, Tensor] = {}
        try:
            with _in_memory(module, own, names, written, whole) as done:
                init(module)
        except RuntimeError:  # a write into memory that is not there
            if not others:
                raise
            reached = True
        moved = versions != [p._version for p in others]
        if reached or moved or not all(_is_hollow(p) or bool(p.isnan().all()) for p in others):
            torch.set_rng_state(state)
            deep = {n: f"{path}.{n}" if path else n for n, _ in module.named_parameters()}
            with _in_memory(module, deep, names, written, whole) as done:
                init(module)
        for name, value in done.items():
            _keep(slots[name], value, mesh)
            written.add(name)
    return written


def _is_hollow(parameter: Tensor) -> bool:
    """All its elements are one: a write raises an error."""
    return parameter.numel() > 1 and not any(parameter.stride())


def _children_first(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The order of ``nn.Module.apply``: a module that stands in two places comes twice."""
    for name, child in module.named_children():
        yield from _children_first(child, f"{path}.{name}" if path else name)
    yield path, module


@contextmanager
def _in_memory(
    module: nn.Module,
    own: Mapping[str, str],
    names: Mapping[str, str],
    written: set[str],
    whole: Callable[[str], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """Parameters with memory in place of hollow ones; inside an init, then what it wrote.

    What has no value yet is NaN: what still is afterwards was not written.
    """
    made: dict[str, nn.Parameter] = {}
    before: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    result: dict[str, Tensor] = {}
    for local, name in own.items():
        first = names[name]
        holder, _, last = local.rpartition(".")
        owner = module.get_submodule(holder)
        hollow = owner._parameters[last]
        assert hollow is not None
        if first not in made:
            value = whole(first).cpu() if first in written else torch.full(
                hollow.shape, float("nan") if hollow.is_floating_point() else 0, dtype=hollow.dtype
            )  # fmt: skip
            made[first] = nn.Parameter(value, requires_grad=hollow.requires_grad)
        before[local] = (owner, last, hollow)
        owner._parameters[last] = made[first]
    try:
        yield result
    finally:
        for owner, last, hollow in before.values():
            owner._parameters[last] = hollow
    result.update({n: p.detach() for n, p in made.items() if n in written or not bool(p.isnan().all())})


@torch.no_grad()
def _keep(slot: Slot, value: Tensor, mesh: Mesh) -> None:
    if slot.stored is not None:
        coordinate = mesh.group(slot.stored[2]).coordinate
        value = layouts.local_part(value, slot.stored[0], slot.stored[1], coordinate)
    slot.share.copy_(value)


def default_init(model: nn.Module) -> Callable[[nn.Module], Any]:
    """The model's own function for one module: Hugging Face's, or every module's ``reset_parameters``.

    Raises:
        AutoshardError: a module with parameters has neither.
    """
    own = getattr(model, "_init_weights", None)
    if callable(own):
        return own  # type: ignore[no-any-return]

    def reset(module: nn.Module) -> None:
        function = getattr(module, "reset_parameters", None) or getattr(
            module, "_reset_parameters", None
        )
        if function is not None:
            function()
        elif any(True for _ in module.parameters(recurse=False)):
            raise AutoshardError(
                f"{type(module).__name__} has parameters and no reset_parameters(): pass init=, the "
                "function that model.apply() would take"
            )

    return reset
