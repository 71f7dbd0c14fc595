"""What a parallel module holds: the model's tensors on this rank, and whole tensors in and out of it.

Parameters lie under the model's own names, fused ones by rank; a state dict has them in the model's
order. Files and the model's own initialisation are read and drawn share by share (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from autoshard import parameters as stored_parameters
from autoshard import weights
from autoshard.capture import skeleton as make_skeleton
from autoshard.capture import tied_names
from autoshard.compat import share_specs
from autoshard.errors import AutoshardError
from autoshard.huggingface import body_prefix
from autoshard.layers import container, reshard
from autoshard.mesh import Mesh
from autoshard.parameters import Stored
from autoshard.progress import each
from autoshard.weights import Slot


class Holder(nn.Module):
    """The half of a ``ParallelModule`` that holds tensors; the other one runs."""

    def __init__(
        self,
        skeleton: nn.Module,
        tensors: Mapping[str, Tensor],
        stored: dict[str, Stored],
        mesh: Mesh,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.__dict__["_skeleton"] = skeleton
        self.__dict__["_mesh"] = mesh
        self._pre_norm = pre_norm
        self._stored = stored
        self._names = tied_names(skeleton)  # every name of a tensor -> the first of its names
        self._empty = {n for n, t in tensors.items() if t.is_meta}  # parameters without a value so far
        self._hold(skeleton, tensors)
        self.register_state_dict_post_hook(_to_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_state)  # type: ignore[no-untyped-call]

    def _hold(self, skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Register parameters and buffers under the model's names, tied ones once."""
        mesh: Mesh = self.__dict__["_mesh"]
        made: dict[str, Tensor] = {}
        hollows = list(skeleton.named_parameters(remove_duplicate=False))
        for name, hollow in each(hollows, len(hollows), "splitting parameters"):
            first = self._names[name]
            if first not in made:
                value = stored_parameters.make_parameter(tensors[first], self._stored.get(first), mesh)
                made[first] = nn.Parameter(value, requires_grad=hollow.requires_grad)
            module, last = container(self, skeleton, name)
            module.register_parameter(last, made[first])  # type: ignore[arg-type]
        share_specs(made.values())
        stored_parameters.notice_steps()
        for name, _ in skeleton.named_buffers(remove_duplicate=False):
            first = self._names[name]
            if first not in made:
                made[first] = tensors[first].detach().to(mesh.device, copy=True)
            owner = skeleton.get_submodule(name.rpartition(".")[0])
            module, last = container(self, skeleton, name)
            persistent = last not in owner._non_persistent_buffers_set
            module.register_buffer(last, made[first], persistent=persistent)

    def share_of(self, name: str) -> Stored | None:
        """How a parameter lies on the ranks: dimension, layout, degree; None where it is whole."""
        return self._stored.get(self._names.get(name, name))

    def state_dict_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """All parameters and buffers by name, as they lie on this rank."""
        yield from self.named_parameters(remove_duplicate=False)
        yield from self.named_buffers(remove_duplicate=False)

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Copies of the model's tensors, whole, under its own names and shapes. Every rank calls it.

        Args:
            rank0_only: other ranks get an empty dict, and nobody holds more than one whole tensor
                beside the result of rank 0 (on the CPU).
        """
        mesh: Mesh = self.__dict__["_mesh"]
        keep = not rank0_only or (mesh.tp_rank == 0 and mesh.dp_rank == 0)
        result: dict[str, Tensor] = {}
        state = super().state_dict(keep_vars=True)
        own = dict(self.state_dict_tensors())  # as they lie: the state's are in the model's order
        for name, value in state.items():
            first = self._names.get(name, name)
            if first != name and first in state:  # tied: one tensor
                if keep:
                    result[name] = result[first]
                continue
            share = self.share_of(name)
            whole = stored_parameters.whole(own.get(name, value), share).detach()
            if keep:
                copied = whole.clone() if share is None else whole  # a later step must not change it
                result[name] = copied.cpu() if rank0_only else copied
        return result

    def load_weights(self, path: str | Path, strict: bool = True) -> tuple[str, ...]:
        """Read parameters and buffers from safetensors, each rank its rows; every rank calls it.

        Args:
            path: a file, or a folder with ``model.safetensors``, or with several files and their index.
                Names are the model's, with or without the prefix of a Hugging Face model's body.
            strict: what is in the files and not in the model is an error.

        Returns:
            The names of what is in the files only.

        Raises:
            CheckpointError: a damaged file, a tensor of another shape, a parameter that no file has.
            AutoshardError: after ``fully_shard``.
        """
        aliases: dict[str, list[str]] = {}
        for name, first in self._names.items():
            aliases.setdefault(first, []).append(name)
        required = [name for name, _ in self.named_parameters()]
        prefix = body_prefix(self.__dict__["_skeleton"])
        mesh: Mesh = self.__dict__["_mesh"]
        rest = weights.load(Path(path), self._slots(), aliases, required, prefix, strict, mesh)
        self._empty.clear()
        return rest

    def init_weights(self, init: Callable[[nn.Module], Any] | None = None) -> None:
        """Draw the parameters as ``model.apply(init)`` would on one process, from torch's generator.

        Every rank calls it with the same seed. One module's parameters are whole at a time, on the CPU.

        Args:
            init: of one module; the model's ``_init_weights``, or every module's ``reset_parameters``,
                where not given.

        Raises:
            AutoshardError: parameters that it did not write and that have no value; after
                ``fully_shard``.
        """
        model = make_skeleton(self.__dict__["_skeleton"])
        mesh: Mesh = self.__dict__["_mesh"]
        whole = self.get_parameter
        self._empty -= weights.draw_into(
            model, init or weights.default_init(model), self._slots(), self._names, mesh,
            lambda name: stored_parameters.whole(whole(name), self.share_of(name)),
        )  # fmt: skip
        if self._empty:
            raise AutoshardError(
                f"{min(self._empty)} and {len(self._empty) - 1} other parameters were not initialised: "
                "pass an init= that writes them"
            )

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write what ``from_pretrained`` of the model's class reads; every rank calls it.

        Args:
            folder: the first rank writes it.
            options: of the model's own ``save_pretrained``.

        Raises:
            AttributeError: the model has no ``save_pretrained``.
            AutoshardError: with ``pre_norm=True``: the model's class would compute another function.
        """
        if self._pre_norm:
            raise AutoshardError(
                "these weights were trained with pre_norm=True, and from_pretrained would make a model "
                "with its norms where they were: use autoshard.save, or full_state_dict()"
            )
        skeleton: Any = self.__dict__["_skeleton"]
        write = skeleton.save_pretrained
        state = self.full_state_dict(rank0_only=True)
        if state:
            write(folder, state_dict=state, **options)

    def _slots(self) -> dict[str, Slot]:
        """Every parameter's and buffer's memory on this rank.

        Raises:
            AutoshardError: FSDP2 has it: a rank's share is split once more, or a copy stands there.
        """
        if any(isinstance(module, FSDPModule) for module in self.modules()):
            raise AutoshardError(
                "load_weights and init_weights fill a rank's own memory, which FSDP2 has split among "
                "the data parallel copies: call them before fully_shard, or load_state_dict after it"
            )
        found: dict[str, Slot] = {}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            share = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found[name] = Slot(share.detach(), tensor.shape, self.share_of(name))
        return found


def _to_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, Holder)
    for key in list(state):
        name = key[len(prefix) :]
        share = module.share_of(name)
        if share is not None and isinstance(state[key], Tensor):
            state[key] = stored_parameters.to_state(state[key], share)


def _from_state(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    assert isinstance(module, Holder)
    reshard(module)  # what is loaded goes into the shares
    mesh: Mesh = module.__dict__["_mesh"]
    own = dict(module.named_parameters(remove_duplicate=False))
    for key in list(state):
        name = key[len(prefix) :]
        if name in own and isinstance(state[key], Tensor):
            if tuple(state[key].shape) == tuple(own[name].shape):
                module._empty.discard(module._names[name])
                state[key] = stored_parameters.from_state(
                    state[key], module.share_of(name), own[name], mesh
                )
