"""Random numbers that agree, or differ, between ranks on purpose.

Megatron-LM (arXiv 1909.08053, appendix B.2): dropout outside split regions must draw the same
mask on every rank of a tensor parallel group, dropout inside them a different one on every rank.
A `RandomStream` is one such sequence of draws. It lends its state to PyTorch's default generator
while an operator runs, so operators without a `generator` argument (dropout, attention with
dropout) can use it, and the default generator goes on afterwards as if nothing had been drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from autoshard import traced_random

P = ParamSpec("P")
T = TypeVar("T")

# The default CPU generator belongs to the process; simulated ranks are threads of one process.
_CPU_GENERATOR_LOCK = threading.RLock()


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on every one of `parts`, in order.

    The first eight bytes (big endian, top bit cleared) of BLAKE2b over the parts' `repr`s joined
    by newlines: the same on every machine and in every process, unlike `hash`.
    """
    text = "\n".join(repr(part) for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def group_seed(seed: int, dp_rank: int, degree: int, coordinate: int) -> int:
    """The seed of one coordinate of a split in `degree` parts.

    The key is the coordinate, never the rank: ranks that compute the same thing draw the same
    numbers. Degree 1 has only coordinate 0, so all ranks of a tensor parallel group share it.
    """
    return derive_seed(seed, "dp", dp_rank, "degree", degree, "coordinate", coordinate)


class RandomStream:
    """A sequence of random draws of its own, on the CPU and on every CUDA device.

    `seed` is any int in [0, 2**63). Draws on different devices are independent sequences.
    """

    def __init__(self, seed: int) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        self._number = traced_random.register(self)
        self._words: tuple[Tensor, Tensor] | None = None  # while a forward is traced
        self.manual_seed(seed)

    @property
    def seed(self) -> int:
        """The seed that the stream started from."""
        return self._seed

    def manual_seed(self, seed: int) -> None:
        """Starts the stream anew, on every device."""
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is not in [0, 2**63)")
        self._seed = seed
        self._generators.clear()

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.manual_seed(self._seed)
            self._generators[device] = generator
        return self._generators[device]

    @contextlib.contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Within the block the default generator of `device` draws from this stream.

        On CUDA a pointer is swapped: no copy and no synchronisation. On the CPU the block holds a
        lock of the process, so it must not wait for another thread.
        """
        device = torch.device(device)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = self._generator(torch.device("cuda", index))
            default = torch.cuda.default_generators[index]
            before = default.graphsafe_get_state()
            default.graphsafe_set_state(generator)
            try:
                yield
            finally:
                default.graphsafe_set_state(before)
        else:
            generator = self._generator(torch.device("cpu"))
            with _CPU_GENERATOR_LOCK:
                default = torch.default_generator
                state = default.get_state()
                default.set_state(generator.get_state())
                try:
                    yield
                finally:
                    generator.set_state(default.get_state())
                    default.set_state(state)

    def run(self, op: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`op(*args, **kwargs)`, drawing from this stream.

        The device is the keyword `device` if one is given, else that of the first tensor among
        the arguments, else the CPU.
        """
        if torch.compiler.is_compiling() and self._words is not None and op in traced_random.FORMS:
            result: T = traced_random.FORMS[op](self._words, *args, **kwargs)
            return result
        with self.on(_device_of(args, kwargs)):
            return op(*args, **kwargs)

    def fresh(self, device: torch.device) -> tuple[int, int]:
        """Two numbers in [-2^31, 2^31) that depend on where the stream stands; it goes on.

        Nothing waits for a GPU: its generator's state is known on the CPU.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        generator = self._generator(device)
        state = hashlib.blake2b(generator.get_state().numpy().tobytes(), digest_size=8).digest()
        torch.rand((), device=device, generator=generator)
        return int.from_bytes(state[:4], signed=True), int.from_bytes(state[4:], signed=True)

    def state_dict(self) -> dict[str, Any]:
        """The seed and each used device's generator state, as uint8 tensors on the CPU."""
        states = {str(device): g.get_state() for device, g in self._generators.items()}
        return {"seed": self._seed, "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the stream that gave `state` stood."""
        self.manual_seed(state["seed"])
        states: dict[str, Tensor] = state["states"]
        for device, generator_state in states.items():
            self._generator(torch.device(device)).set_state(generator_state)

    def packed(self, device: torch.device | str) -> Tensor:
        """The seed and the state on one device, as bytes on the CPU: to compare, and for `unpack`."""
        seed = torch.tensor([self._seed]).view(torch.uint8)
        return torch.cat([seed, self._generator(torch.device(device)).get_state()])

    def unpack(self, state: Tensor, device: torch.device | str) -> None:
        """Goes on, on this device, where the stream that was packed stood; takes its seed too."""
        state = state.cpu()
        self._seed = int(state[:8].clone().view(torch.int64))
        self._generator(torch.device(device)).set_state(state[8:].clone())


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    for leaf in tree_iter((args, kwargs)):
        if isinstance(leaf, Tensor):
            return leaf.device
    return torch.device("cpu")


def begin_traced(streams: Sequence[RandomStream], device: torch.device) -> list[RandomStream]:
    """Within torch.compile, before a forward: the streams draw. Returns those that had not yet."""
    begun = [stream for stream in streams if stream._words is None]
    for stream in begun:
        stream._words = traced_random.begin(stream._number, device)
    if begun:
        traced_random.first_site()
    return begun


def end_traced(begun: Sequence[RandomStream]) -> None:
    """After the forward: nothing of it stays."""
    for stream in begun:
        stream._words = None


def checkpoint_contexts(
    streams: Iterable[RandomStream],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """The pair that `torch.utils.checkpoint.checkpoint(context_fn=...)` asks for.

    `checkpoint` replays the default generators by itself and knows nothing of streams: without
    this pair the recomputed forward would draw other masks than the first one did.

        checkpoint(layer, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, streams))
    """
    used = list(streams)
    first = _First(used)
    return first, _Again(used, first)


class _First(contextlib.AbstractContextManager[None]):
    """Remembers where the streams stand as the block begins."""

    def __init__(self, streams: list[RandomStream]) -> None:
        self.streams, self.states = streams, list[dict[str, Any]]()

    def __enter__(self) -> None:
        self.states = [stream.state_dict() for stream in self.streams]

    def __exit__(self, *raised: object) -> None:
        return None


class _Again(contextlib.AbstractContextManager[None]):
    """The streams stand there again, and afterwards where they stood. Entered once per backward pass
    over the same graph (`retain_graph`)."""

    def __init__(self, streams: list[RandomStream], first: _First) -> None:
        self.streams, self.first, self.now = streams, first, list[dict[str, Any]]()

    def __enter__(self) -> None:
        self.now = [stream.state_dict() for stream in self.streams]
        for stream, state in zip(self.streams, self.first.states, strict=True):
            stream.load_state_dict(state)

    def __exit__(self, *raised: object) -> None:
        for stream, state in zip(self.streams, self.now, strict=True):
            stream.load_state_dict(state)
