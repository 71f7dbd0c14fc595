"""Triton kernels for a GPU, where PyTorch has none that fits: a vocabulary's two ends.

Two of them read the logits once each, and the second writes the gradient once:

    `statistics`    max_c z_c,  log sum_c exp(z_c - max),  z_y          2 or 4 bytes read a logit
    `gradient`      hit exp(z_c - maximum) / total - [c = y] hit        as many again, and written

against several passes of PyTorch's operators, some of them in float32. The others save launches,
the host's time: `targets`, `own_sum` and `losses` take one each in place of five to eight, `embedding`
one in place of nine, and one pass over the result in place of three. Computed in float32.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from autoshard.compat import is_capturing

BLOCK = 4096  # logits that a program has in registers
WARPS = 8
TOKENS = 1024  # of a program that has one number of each
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _programs() -> Any:
    """The programs; None where Triton is not installed."""
    try:
        from autoshard import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def fit(logits: Tensor, class_dim: int, width: int) -> bool:
    """Whether the kernels take these logits: [tokens, classes] on a GPU, of a dtype they know."""
    if torch.compiler.is_compiling() or not _on_gpu(logits) or _programs() is None:
        return False
    shaped = logits.dim() == 2 and class_dim == 1 and logits.stride(1) == 1
    return shaped and width > 0 and logits.shape[0] > 0 and logits.dtype in _DTYPES


def holds(weight: Tensor, ids: Tensor) -> bool:
    """Whether the kernel takes this embedding: rows on a GPU, and some of them."""
    if torch.compiler.is_compiling() or not _on_gpu(weight) or _programs() is None:
        return False
    return weight.stride(1) == 1 and weight.numel() > 0 and ids.numel() > 0


def embedding(
    weight: Tensor, ids: Tensor, start: int, rows: int, vocabulary: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rank's rows of the ids, 0 where an id's is elsewhere: [*ids, n]; each id's row here, -1 where
    it learns nothing, as elsewhere and at `padding`; and the `_flag`: each id is of the `vocabulary`.

    weight: [local, n], of which the first `rows` are those of the ids from `start` on.
    """
    ids, columns = ids.contiguous(), weight.shape[1]
    y = weight.new_empty((*ids.shape, columns))
    learnt, known = torch.empty_like(ids, dtype=torch.int64), _flag(ids)
    _run(
        "embedding", (ids.numel(), -(-columns // BLOCK)), BLOCK, WARPS, weight, weight.stride(0),
        columns, ids, start, rows, vocabulary, padding, y, learnt, known,
    )  # fmt: skip
    return y, learnt, known


def targets(given: Tensor, ignored: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The target of each token, 0 where it is `ignored`; whether it is not; that as float32; and the
    `_flag`: each is one of the `classes` or ignored. given: [N]."""
    given, target = given.contiguous(), torch.empty_like(given, dtype=torch.int64)
    weight = torch.empty_like(given, dtype=torch.float32)
    valid, known = torch.empty_like(given, dtype=torch.bool), _flag(given)
    _of_tokens("targets", given, len(given), ignored, classes, target, valid, weight, known)
    return target, valid, weight, known


def statistics(
    logits: Tensor, width: int, target: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token over the first `width` classes, float32: z's maximum, twice; the logarithm of the
    sum of exp(z - maximum); and z at the target, 0 where that is elsewhere, with room for a number
    behind it: [2, N].

    logits: [N, >= width]. target: [N], global numbers, the rank's first being `start`.
    """
    tokens = logits.shape[0]
    pair = logits.new_empty((2, tokens), dtype=torch.float32)
    largest, again, log_sum = logits.new_empty((3, tokens), dtype=torch.float32)
    _run(
        "statistics", (tokens, 1), BLOCK, WARPS, logits, logits.stride(0), width, target, start,
        largest, again, log_sum, pair,
    )  # fmt: skip
    return largest, again, log_sum, pair


def own_sum(largest: Tensor, log_sum: Tensor, maximum: Tensor, local: Tensor) -> None:
    """local = exp(largest - maximum + log_sum), this rank's part of the sum of exp(z - maximum); 0
    where all its logits are -inf."""
    _of_tokens("own_sum", largest, log_sum, maximum, len(local), local)


def losses(picked: Tensor, total: Tensor, maximum: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """weight (log total - (picked - maximum)), 0 where it is not `valid`: [N], float32."""
    loss = torch.empty_like(total)
    _of_tokens("losses", picked, total, maximum, weight, valid, len(loss), loss)
    return loss


def gradient(
    logits: Tensor, width: int, target: Tensor, start: int, maximum: Tensor, total: Tensor,
    weight: Tensor, valid: Tensor, dloss: Tensor,
) -> Tensor:  # fmt: skip
    """hit exp(z - maximum) / total - [class = target] hit for the first `width` classes, 0 for others,
    where hit = weight dloss, 0 where it is not `valid`.

    maximum, total, weight, dloss: [N], float32. Returns [N, classes], contiguous, in the dtype of
    `logits`.
    """
    tokens, classes = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _run(
        "gradient", (tokens, -(-classes // BLOCK)), BLOCK, WARPS, logits, logits.stride(0), width,
        classes, target, start, maximum, total, weight, valid, dloss, dloss.stride(0), result,
    )  # fmt: skip
    return result


def _flag(x: Tensor) -> Tensor:
    """One byte that is 1, and 0 once a kernel has met what must not be. An assertion on it follows,
    which ends a GPU's process; so it is one for all calls there, which is a launch saved."""
    if not x.is_cuda or is_capturing():
        return x.new_ones((), dtype=torch.bool)
    device = x.get_device()
    if device not in _flags:
        _flags[device] = x.new_ones((), dtype=torch.bool)
        torch.cuda.current_stream(device).synchronize()  # it is there, whatever stream asks next
    return _flags[device]


_flags: dict[int, Tensor] = {}


def _of_tokens(name: str, first: Tensor, *given: Any) -> None:
    """Run a program that has one number of each of `first`'s tokens."""
    _run(name, (-(-len(first) // TOKENS), 1), TOKENS, 4, first, *given)


def _run(name: str, grid: tuple[int, int], block: int, warps: int, first: Tensor, *given: Any) -> None:
    """Launch a program on the device of its first argument.

    Triton takes 40 us to find out which compiled form fits the arguments: by dtype, whether they are
    divisible by 16, 1, or longer than 32 bits. What it found is called again where these are the same.
    """
    device = first.get_device()
    there = device < 0 or device == torch.cuda.current_device()
    with contextlib.nullcontext() if there else torch.cuda.device(device):
        key = name, device, block, warps, *[_form(x) for x in (first, *given)]
        known = _compiled.get(key)
        if known is None:
            program = getattr(_programs(), name)
            known = program[grid](first, *given, BLOCK=block, num_warps=warps)
            if known is not None:  # it is, where Triton interprets
                _compiled[key] = known
        else:
            known[*grid, 1](first, *given, block)


def _form(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


_compiled: dict[Any, Any] = {}
