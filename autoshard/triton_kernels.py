"""The programs of `autoshard.kernels`, in Triton. Imported when a GPU first needs one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["start", "rows", "vocabulary", "padding"])  # type: ignore
def embedding(  # type: ignore[no-untyped-def]
    weight, stride, columns, ids, start, rows, vocabulary, padding, y, learnt, known,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(ids + token).to(tl.int64)
    own = at - start
    here = (own >= 0) & (own < rows)
    tl.store(learnt + token, tl.where(here & (at != padding), own, -1))
    tl.store(known, False, mask=(at < 0) | (at >= vocabulary))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    read = tl.where(here, columns, 0)
    x = tl.load(weight + own * stride + column, mask=column < read, other=0.0)
    tl.store(y + token * columns + column, x, mask=column < columns)


@triton.jit(do_not_specialize=["count", "ignored", "classes"])  # type: ignore[untyped-decorator]
def targets(  # type: ignore[no-untyped-def]
    given, count, ignored, classes, target, valid, weight, known, BLOCK: tl.constexpr
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    at = tl.load(given + token, mask=inside, other=0).to(tl.int64)
    counts = at != ignored
    tl.store(target + token, tl.where(counts, at, 0), mask=inside)
    tl.store(valid + token, counts, mask=inside)
    tl.store(weight + token, counts.to(tl.float32), mask=inside)
    wrong = inside & counts & ((at < 0) | (at >= classes))
    tl.store(known + tl.zeros([BLOCK], tl.int32), False, mask=wrong)


@triton.jit  # type: ignore[untyped-decorator]
def statistics(  # type: ignore[no-untyped-def]
    z, stride, width, target, start, largest, again, log_sum, picked, BLOCK: tl.constexpr
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
    tl.store(again + row, top)
    tl.store(log_sum + row, tl.log(total))
    tl.store(picked + row, tl.load(z + own, mask=here, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def own_sum(largest, log_sum, maximum, count, local, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    top = tl.load(largest + token, mask=inside, other=0.0)
    shift = top - tl.load(maximum + token, mask=inside, other=0.0)
    value = tl.exp(shift + tl.load(log_sum + token, mask=inside, other=0.0))
    tl.store(local + token, tl.where(top == -float("inf"), 0.0, value), mask=inside)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def losses(  # type: ignore[no-untyped-def]
    picked, total, maximum, weight, valid, count, loss, BLOCK: tl.constexpr
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    own = tl.load(picked + token, mask=inside, other=0.0)
    own -= tl.load(maximum + token, mask=inside, other=0.0)
    value = tl.log(tl.load(total + token, mask=inside, other=1.0)) - own
    value *= tl.load(weight + token, mask=inside, other=0.0)
    counts = tl.load(valid + token, mask=inside, other=0) != 0
    tl.store(loss + token, tl.where(counts, value, 0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def gradient(  # type: ignore[no-untyped-def]
    z, stride, width, classes, target, start, maximum, total, weight, valid, dloss, apart, result,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(valid + row) != 0
    hit = tl.where(counts, tl.load(weight + row) * tl.load(dloss + row * apart), 0.0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    x = tl.load(z + row * stride + place, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.exp(x - tl.load(maximum + row)) * (hit / tl.load(total + row))
    value -= tl.where(place == tl.load(target + row) - start, hit, 0.0)
    value = tl.where(inside, value, 0.0)
    tl.store(result + row * classes + place, value.to(result.dtype.element_ty), mask=place < classes)
