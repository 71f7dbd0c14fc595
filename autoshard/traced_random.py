"""Random numbers within torch.compile: pure functions of a seed that each forward draws once.

A compiler may fuse, reorder and repeat what it is given, and cannot follow a generator whose state is
lent and taken back. So a stream draws two words when a traced forward begins, outside of what is
compiled, and every operator computes its mask from these words, the number of the call (its *site*) and
the place of each element. Computed again in a backward pass it is the same mask. The numbers are others
than without torch.compile, as PyTorch's own are; they depend on the stream's seed and draws only, so
ranks agree, or differ, as without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from autoshard.compat import autograd_again

aten = torch.ops.aten

_M1, _M2 = 0x7FEB352D, 0x846CA68B - 2**32  # the lowbias32 hash of integers (Wellons 2018)
_SITE = 0x9E3779B9 - 2**32  # 2^32 / the golden ratio


class Stream(Protocol):
    """What draws: a `RandomStream`."""

    def fresh(self, device: torch.device) -> tuple[int, int]:
        """Two words that no other draw has; the stream goes on."""


_streams: WeakValueDictionary[int, Stream] = WeakValueDictionary()
_numbers = itertools.count()


def register(stream: Stream) -> int:
    """A number that stands for the stream in a compiled graph."""
    number = next(_numbers)
    _streams[number] = stream
    return number


# What Python does once a step, and a CUDA graph would not repeat: drawing words, seeding a generator.
_UNSAFE = torch.Tag.cudagraph_unsafe


@torch.library.custom_op(
    "autoshard::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded, _UNSAFE)
)
def draw(number: int, device: torch.device) -> Tensor:
    """Two words of a stream: int64 [2], each in [-2^31, 2^31), on the CPU."""
    return torch.tensor(_streams[number].fresh(device))


@draw.register_fake
def _(number: int, device: torch.device) -> Tensor:
    return torch.empty(2, dtype=torch.int64)


class _Sites:
    """Numbers the random calls of one traced forward, the same on all ranks."""

    numbers = itertools.count()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def first_site() -> int:
    """A traced forward begins."""
    _Sites.numbers = itertools.count()
    return 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _next_site() -> int:
    return next(_Sites.numbers)


def begin(number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A stream's words for one traced forward: on the CPU and on `device`."""
    words = draw(number, device)
    return words, words.to(device)


def uniform_bits(words: Tensor, site: int, shape: torch.Size) -> Tensor:
    """32 random bits for each element: int32 of `shape`."""
    count = 1
    for size in shape:
        count = count * size
    words = words.to(torch.int32)
    place = torch.arange(count, device=words.device, dtype=torch.int64).to(torch.int32)
    mixed = _mix(place ^ _mix(words[0] + _wrapped(_SITE * (site + 1))))
    return _mix(mixed + words[1]).view(shape)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every bit depends on all."""
    x = (x ^ _down(x, 16)) * _M1
    x = (x ^ _down(x, 15)) * _M2
    mixed: Tensor = x ^ _down(x, 16)
    return mixed


def _down(x: Tensor, bits: int) -> Tensor:
    """A shift that fills with zeros, of signed numbers."""
    shifted: Tensor = (x >> bits) & ((1 << (32 - bits)) - 1)
    return shifted


def _wrapped(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def _dropout(words: tuple[Tensor, Tensor], x: Tensor, p: float, train: bool) -> Tensor:
    """`y = keep · x / (1 - p)`, keep with probability 1 - p."""
    if not train or p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    bits = uniform_bits(words[1], _next_site(), x.shape)
    keep = bits >= min(round(p * 2**32), 2**32 - 1) - 2**31
    kept: Tensor = torch.where(keep, x, 0.0) * (1.0 / (1.0 - p))
    return kept


def _attention(
    words: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0.0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = (_under_autocast(x) for x in (query, key, value))
    mask = None if attn_mask is None else _under_autocast(attn_mask)
    out: Tensor = attention(
        words[0], _next_site(), query, key, value, mask, dropout_p, is_causal, scale, enable_gqa
    )
    return out


def _under_autocast(x: Tensor) -> Tensor:
    """What ``torch.autocast`` makes of an operand of PyTorch's own attention; of others nothing."""
    device = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


# Operator -> the same with random numbers made of words on the CPU and on the device:
# (words, *args, **kwargs).
FORMS: dict[Any, Callable[..., Any]] = {
    aten.dropout.default: _dropout,
    aten.scaled_dot_product_attention.default: _attention,
}


@torch.library.custom_op("autoshard::attention", mutates_args=(), tags=(_UNSAFE,))
def attention(
    words: Tensor,
    site: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    """PyTorch's attention with the dropout of a seed. query: [*, heads, s, e] -> [*, heads, s, e]."""
    with _seeded(words, site, query.device):
        return F.scaled_dot_product_attention(
            query, key, value, mask, p, causal, scale=scale, enable_gqa=gqa
        ).clone(memory_format=torch.contiguous_format)


@attention.register_fake
def _(
    words: Tensor, site: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    p: float, causal: bool, scale: float | None, gqa: bool,
) -> Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("autoshard::attention_backward", mutates_args=(), tags=(_UNSAFE,))
def attention_backward(
    grad: Tensor,
    words: Tensor,
    site: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, of the mask last (empty where it has none): the forward runs once more."""
    floating = mask is not None and mask.is_floating_point()
    with autograd_again():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        bias = mask.detach().requires_grad_() if mask is not None and floating else mask
        with _seeded(words, site, query.device):
            out = F.scaled_dot_product_attention(q, k, v, bias, p, causal, scale=scale, enable_gqa=gqa)
        wanted = [q, k, v] if bias is None or not floating else [q, k, v, bias]
        found = [g.contiguous() for g in torch.autograd.grad(out, wanted, grad)]
    return found[0], found[1], found[2], found[3] if floating else grad.new_empty(0)


@contextlib.contextmanager
def _seeded(words: Tensor, site: int, device: torch.device) -> Iterator[None]:
    """The default generator starts from the words and the site, and afterwards stands where it did."""
    text = repr((words.tolist(), site)).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


@attention_backward.register_fake
def _(
    grad: Tensor, words: Tensor, site: int, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, p: float, causal: bool, scale: float | None, gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = [x.new_empty(x.shape) for x in (query, key, value)]
    floating = mask is not None and mask.is_floating_point()
    last = mask.new_empty(mask.shape) if mask is not None and floating else grad.new_empty(0)
    return found[0], found[1], found[2], last


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    words, site, query, key, value, mask, *rest = inputs
    ctx.save_for_backward(words, query, key, value, mask)
    ctx.site, ctx.rest = site, rest


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, query, key, value, mask = ctx.saved_tensors
    found = attention_backward(grad, words, ctx.site, query, key, value, mask, *ctx.rest)
    last = found[3] if mask is not None and mask.is_floating_point() else None
    return None, None, found[0], found[1], found[2], last, None, None, None, None


attention.register_autograd(_gradients, setup_context=_keep)
