"""The programs of `autoshard.kernels`, in Triton. Imported when a GPU first needs one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def statistics(  # type: ignore[no-untyped-def]
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
def gradient(  # type: ignore[no-untyped-def]
    z, stride, width, classes, target, start, maximum, scale, hit, result, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    x = tl.load(z + row * stride + place, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.exp(x - tl.load(maximum + row)) * tl.load(scale + row)
    value -= tl.where(place == tl.load(target + row) - start, tl.load(hit + row), 0.0)
    value = tl.where(inside, value, 0.0)
    tl.store(result + row * classes + place, value.to(result.dtype.element_ty), mask=place < classes)
