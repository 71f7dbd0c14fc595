"""Do ranks hold the same? Fingerprints of tensors, and the inputs of a call compared among ranks."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autoshard.errors import RanksDifferError
from autoshard.groups import Group, ProcessGroupComm
from autoshard.mesh import Mesh

CALLS = 3  # calls of every captured graph that check_inputs="first" compares
MODES = (True, False, "first")

_PART = 2**24  # words of 8 bytes that are hashed at a time
_GOLDEN = -7046029254386353131  # 2^64 / the golden ratio, odd
_MIX = -4417276706812531889  # 0xC2B2AE3D27D4EB4F, odd


def fingerprint(tensor: Tensor) -> Tensor:
    """A number that depends on every bit of a tensor and on where it stands: int64, [], on its device.

        sum over words i of mix((i · G) xor word_i),  mix(x) = y xor (y >> 32), y = x · M

    in wrapping 64-bit integers, over the bit pattern in words of 8 bytes: integer sums have no
    order, so equal tensors have equal fingerprints on every machine. Two tensors that differ by
    chance collide with a probability of about 2^-63. Dtype and shape are not in it; nothing waits
    for the device. Seven kernels for each 128 MiB.
    """
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _PART):
        part = words[start : start + _PART]
        mixed = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device)
        mixed.mul_(_GOLDEN).bitwise_xor_(part).mul_(_MIX)
        total = total + mixed.bitwise_xor_(mixed >> 32).sum()
    return total


def _words(tensor: Tensor) -> Tensor:
    """A tensor's memory as int64, the last word filled up with zeros."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    missing = -data.numel() % 8
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


@dataclass(frozen=True)
class _Item:
    """One thing that must be the same: an input, or a mode. ``text`` says all but a tensor's values."""

    name: str
    text: str
    tensor: Tensor | None = None


class InputCheck:
    """Compares the inputs of each call among the ranks of a tensor parallel group.

    The cost of a call that is compared: the fingerprints of the inputs, one all-gather of 8 bytes,
    and one wait for the device. The collective is the same whatever the inputs are, so ranks with
    other shapes or other arguments meet in it, and all of them raise.

    mode: True: every call; False: none; ``"first"``: the first `CALLS` calls of every captured
        graph, and every call that has to capture. Nothing is compared under torch.compile.
    """

    def __init__(self, mode: bool | str, forward: Callable[..., Any], mesh: Mesh) -> None:
        self.mode = mode
        self._names = _argument_names(forward)
        self._mesh = mesh
        self._seen: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def __call__(self, graph: object, args: Sequence[Any], kwargs: dict[str, Any], train: bool) -> None:
        """Compare, where it is due for the captured `graph` (None: it has still to be captured).

        Raises RanksDifferError on every rank of the group, with the inputs and the ranks that differ.
        """
        if not torch.compiler.is_compiling() and self._due(graph):
            self.compare(args, kwargs, train)

    def _due(self, graph: object) -> bool:
        if self._mesh.tp == 1 or self.mode is False:
            return False
        if self.mode is True or graph is None:
            return True
        seen = self._seen.get(graph, 0)
        self._seen[graph] = seen + 1
        return seen < CALLS

    def agree_on(self, tokens: Tensor) -> None:
        """Compare tokens that every rank chose for itself: one all-gather of 8 bytes, and a wait.

        Raises RanksDifferError on every rank of the group where they are not the same on all.
        """
        if self._mesh.tp == 1 or self.mode is False:
            return
        group = self._mesh.group(self._mesh.tp)
        everyone = torch.stack(group.all_gather(fingerprint(tokens).to(self._mesh.device))).tolist()
        if len(set(everyone)) > 1:
            assert isinstance(group, ProcessGroupComm)
            others = [r for r, v in zip(group.ranks, everyone, strict=True) if v != everyone[0]]
            raise RanksDifferError(
                f"rank {_listed(others)} chose other tokens than rank {group.ranks[0]}. Sampling draws "
                "from torch's generator: call torch.manual_seed with the same seed on every rank of a "
                "group, before generate. Without sampling, replicated parameters differ: call "
                "check_replicas()"
            )

    def compare(self, args: Sequence[Any], kwargs: dict[str, Any], train: bool) -> None:
        """Compare now, whatever the mode."""
        if self._mesh.tp == 1:
            return
        group = self._mesh.group(self._mesh.tp)
        items = [*self._items(args, kwargs), *_modes(train, self._mesh.device)]
        signature = _hash([(item.name, item.text) for item in items])
        prints = [fingerprint(i.tensor).to(self._mesh.device) for i in items if i.tensor is not None]
        if prints:
            mine = fingerprint(torch.stack(prints)) + signature
        else:
            mine = torch.tensor(signature, device=self._mesh.device)
        everyone = torch.stack(group.all_gather(mine)).tolist()
        if len(set(everyone)) > 1:
            raise RanksDifferError(self._explained(group, items))

    def _items(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[_Item]:
        """The flat inputs by the names of `forward`, sorted: passed by position or by name."""
        given = {**{self._names(i): value for i, value in enumerate(args)}, **kwargs}
        items = []
        for argument, value in sorted(given.items()):
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                name = argument + pytree.keystr(path)
                if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                    grad = ", requires grad" if leaf.requires_grad else ""
                    text = f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}{grad}"
                    items.append(_Item(name, text, leaf))
                else:
                    items.append(_Item(name, _in_words(leaf)))
        return items

    def _explained(self, group: Group, items: list[_Item]) -> str:
        assert isinstance(group, ProcessGroupComm)
        mine = {
            i.name: (i.text, None if i.tensor is None else int(fingerprint(i.tensor))) for i in items
        }
        everyone: list[dict[str, tuple[str, int | None]]] = group.gather_objects(mine)
        ranks = group.ranks
        lines = []
        for name in dict.fromkeys(name for one in everyone for name in one):
            values = [one.get(name, ("not given", None)) for one in everyone]
            kinds = {kind for kind, _ in values}
            if len(set(values)) == 1:
                continue
            if len(kinds) == 1:
                others = [r for r, v in zip(ranks, values, strict=True) if v != values[0]]
                lines.append(
                    f"{name}: other values on rank {_listed(others)} than on rank {ranks[0]} "
                    f"({values[0][0]} on all)"
                )
            else:
                by_kind = {
                    kind: [r for r, v in zip(ranks, values, strict=True) if v[0] == kind]
                    for kind in sorted(kinds, key=[kind for kind, _ in values].index)
                }
                told = [f"{kind} on rank {_listed(on)}" for kind, on in by_kind.items()]
                lines.append(f"{name}: {', '.join(told)}")
        mesh = self._mesh
        replicas = 1 if mesh.device_mesh is None else mesh.device_mesh.size() // mesh.tp
        return (
            f"the ranks {_listed(ranks)} of one tensor parallel group were called with different "
            "inputs:\n  " + "\n  ".join(lines) + "\n"
            "All ranks of a group need the same batch. A sampler takes the data parallel coordinate, "
            f"not the rank: DistributedSampler(data, num_replicas={replicas}, rank={mesh.dp_rank}) on "
            "all of these; and the same seed where batches are drawn at random"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> InputCheck:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, _seen=WeakKeyDictionary(self._seen))
        return copied


def _modes(train: bool, device: torch.device) -> list[_Item]:
    """What else decides which collectives a step runs."""
    autocast = torch.is_autocast_enabled(device.type)
    low = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if autocast else "off"
    return [
        _Item("train or eval mode", "train" if train else "eval"),
        _Item("gradient mode", "on" if torch.is_grad_enabled() else "off"),
        _Item("autocast", low),
    ]


def _argument_names(forward: Callable[..., Any]) -> Callable[[int], str]:
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return lambda i: names[i] if i < len(names) else f"{rest}[{i - len(names)}]"


def _in_words(value: Any) -> str:
    """A value that is no tensor, the same text in every process."""
    if isinstance(value, DTensor):
        return f"DTensor {tuple(value.shape)}"
    text = value.type if isinstance(value, torch.device) else repr(value)
    return f"{type(value).__name__} object" if " at 0x" in text else _short(text)


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters, {_hash(text):x})"


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
