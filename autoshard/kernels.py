"""Triton kernels for a GPU, where PyTorch has none that fits: the cross entropy of split classes.

Each reads the logits once, and the second writes the gradient once:

    `statistics`    max_c z_c,  log sum_c exp(z_c - max),  z_y      2 or 4 bytes read a logit
    `gradient`      scale exp(z_c - maximum) - [c = y] hit          as many again, and written

against several passes of PyTorch's operators, some of them in float32. Computed in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

BLOCK = 4096  # logits that a program has in registers
WARPS = 8
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


def statistics(logits: Tensor, width: int, target: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token over the first `width` classes, float32: z's maximum; the logarithm of the sum of
    exp(z - maximum); and z at the target, 0 where that is elsewhere.

    logits: [N, >= width]. target: [N], global numbers, the rank's first being `start`.
    """
    largest, log_sum, picked = logits.new_empty((3, logits.shape[0]), dtype=torch.float32).unbind()
    with _device_of(logits):
        _programs().statistics[logits.shape[0],](
            logits, logits.stride(0), width, target, start, largest, log_sum, picked,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return largest, log_sum, picked


def gradient(
    logits: Tensor, width: int, target: Tensor, start: int, maximum: Tensor, scale: Tensor, hit: Tensor
) -> Tensor:
    """scale exp(z - maximum) - [class = target] hit for the first `width` classes, 0 for the others.

    maximum, scale, hit: [N], float32. Returns [N, classes], contiguous, in the dtype of `logits`.
    """
    tokens, classes = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with _device_of(logits):
        _programs().gradient[tokens, -(-classes // BLOCK)](
            logits, logits.stride(0), width, classes, target, start,
            maximum.contiguous(), scale.contiguous(), hit.contiguous(), result,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return result


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(x)
