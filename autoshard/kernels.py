"""Triton kernels for a GPU, where PyTorch has none that fits: the cross entropy of split classes.

Each reads the logits once, and the second writes the gradient once:

    `statistics`    max_c z_c,  log sum_c exp(z_c - max),  z_y      2 or 4 bytes read a logit
    `gradient`      scale exp(z_c - maximum) - [c = y] hit          as many again, and written

against nine passes of PyTorch's operators, some of them in float32. Computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 4096  # logits that a program has in registers
WARPS = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch for CPUs
    triton = None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def fit(logits: Tensor, class_dim: int, width: int) -> bool:
    """Whether the kernels take these logits: [tokens, classes] on a GPU, of a dtype they know."""
    if triton is None or torch.compiler.is_compiling() or not _on_gpu(logits):
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
        _statistics[logits.shape[0],](
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
        _gradient[tokens, triton.cdiv(classes, BLOCK)](
            logits, logits.stride(0), width, classes, target, start,
            maximum.contiguous(), scale.contiguous(), hit.contiguous(), result,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return result


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(x)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _statistics(  # type: ignore[no-untyped-def]
        z, stride, width, target, start, largest, log_sum, picked, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        z += row * stride
        place = tl.arange(0, BLOCK)
        # Each lane has a maximum m and a sum s of exp(z - m) of its own; s = 0 where it met none.
        m = tl.full([BLOCK], -float("inf"), tl.float32)
        s = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            inside = first + place < width
            x = tl.load(z + first + place, mask=inside, other=-float("inf")).to(tl.float32)
            new = tl.maximum(m, x)
            shift = tl.where(new == -float("inf"), 0.0, new)
            s = s * tl.exp(m - shift) + tl.exp(x - shift)
            m = new
        top = tl.max(m, 0)
        total = tl.sum(s * tl.exp(m - tl.where(top == -float("inf"), 0.0, top)), 0)
        own = tl.load(target + row) - start
        here = (own >= 0) & (own < width)
        tl.store(largest + row, top)
        tl.store(log_sum + row, tl.log(total))
        tl.store(picked + row, tl.load(z + own, mask=here, other=0.0).to(tl.float32))

    @triton.jit  # type: ignore[untyped-decorator]
    def _gradient(  # type: ignore[no-untyped-def]
        z, stride, width, classes, target, start, maximum, scale, hit, result, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = place < width
        x = tl.load(z + row * stride + place, mask=inside, other=-float("inf")).to(tl.float32)
        value = tl.exp(x - tl.load(maximum + row)) * tl.load(scale + row)
        value -= tl.where(place == tl.load(target + row) - start, tl.load(hit + row), 0.0)
        value = tl.where(inside, value, 0.0)
        tl.store(
            result + row * classes + place, value.to(result.dtype.element_ty), mask=place < classes
        )
