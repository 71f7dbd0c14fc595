"""Operators that take tensors apart and put them together: slices, splits, concatenations."""

from __future__ import annotations

import sys
from typing import Any

from torch import fx

from autoshard import axes
from autoshard.axes import Axis
from autoshard.rules.call import Call
from autoshard.rules.local import Local


def _pieces(call: Call, axis: Axis, bounds: list[int]) -> list[Axis]:
    """The axis cut at bounds into consecutive pieces; fresh and frozen where it cannot be cut."""
    try:
        pieces = []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            if begin == end:
                pieces.append(Axis(0))
                continue
            _, rest = axes.cut(axis, begin)
            inside = axes.concatenation(rest)
            before, _ = axes.cut(inside, end - begin)
            pieces.append(axes.concatenation(before))
        return pieces
    except axes.AxisMismatch as mismatch:
        call.freeze((axis,), f"cut: {mismatch}")
        fresh = [Axis(end - begin) for begin, end in zip(bounds, bounds[1:], strict=False)]
        call.freeze(fresh, f"cut: {mismatch}")
        return fresh


def slice_(call: Call) -> None:
    """``x[..., a:b]``: the dimension is cut at a and b; ``x[..., i::n]`` is an index into ``[m·n]``."""
    dims = list(call.operand("self"))
    dim = call.dim(call.arguments["dim"], len(dims))
    axis, result = dims[dim], call.shape()[dim]
    size = axis.find().size
    start, end, step = slice_bounds(call, size)
    if axes.same_size(size, result):
        pass
    elif (
        isinstance(size, int)
        and isinstance(start, int)
        and isinstance(end, int)
        and isinstance(step, int)
    ):
        if step == 1:
            dims[dim] = _pieces(call, axis, [start, end])[0]
        else:
            dims[dim] = _every(call, axis, start, step, result)
    else:
        call.freeze((axis,), "a slice of symbolic size")
        dims[dim] = Axis(result)
        call.freeze((dims[dim],), "a slice of symbolic size")
    call.outputs = [tuple(dims)]


def _every(call: Call, axis: Axis, start: int, step: int, result: axes.Size) -> Axis:
    try:
        if start >= step:
            raise axes.AxisMismatch("a strided slice with an offset")
        outer = axes.ratio(axis.find().size, step)
        if outer is None:
            raise axes.AxisMismatch("a strided slice of a length that the stride does not divide")
        if not axes.same_size(outer, result):
            raise axes.AxisMismatch("a strided slice of a part of the axis")
        first, second = axes.divide_product(axis, outer)
        call.freeze((second,), "a strided slice")
        return first
    except axes.AxisMismatch as mismatch:
        fresh = Axis(result)
        call.freeze((axis, fresh), str(mismatch))
        return fresh


def slice_bounds(call: Call, size: axes.Size) -> tuple[Any, Any, Any]:
    """Start, end and step of a slice; ints are brought into 0..size where that is an int."""
    start, end, step = (call.arguments[n] for n in ("start", "end", "step"))
    start = 0 if start is None else start
    end = sys.maxsize if end is None else end
    if isinstance(size, int):
        if isinstance(start, int):
            start = min(max(start + size if start < 0 else start, 0), size)
        if isinstance(end, int):
            end = min(max(end + size if end < 0 else end, 0), size)
    return start, end, step


def local_slice(call: Call, local: Local) -> dict[str, Any]:
    """A slice's bounds on the rank: the local sizes of what lies before and inside."""
    dims, result = call.operand("self"), call.outputs[0]
    assert result is not None
    dim = call.dim(call.arguments["dim"], len(dims))
    return _local_bounds(call, local, dims[dim], result[dim])


def _local_bounds(call: Call, local: Local, axis: Axis, part: Axis) -> dict[str, Any]:
    size = axis.find().size
    start, end, step = slice_bounds(call, size)
    if local.size(axis) == size:
        return {}
    if axes.same_size(size, part.find().size):
        return {"start": 0, "end": sys.maxsize}
    if step != 1:
        return {"start": start, "end": sys.maxsize}
    if start >= end:
        return {"start": 0, "end": 0}
    before, _ = axes.cut(axis, start)
    first = sum(_int(local.size(p)) for p in before)
    return {"start": first, "end": first + _int(local.size(part))}


def _int(size: axes.Size) -> int:
    assert isinstance(size, int)
    return size


def select(call: Call) -> None:
    """``x[..., i]``: the dimension must be whole, and is gone."""
    dims = list(call.operand("self"))
    dim = call.dim(call.arguments["dim"], len(dims))
    call.freeze((dims[dim],), "an index into the axis")
    del dims[dim]
    call.outputs = [tuple(dims)]


def slice_scatter(call: Call) -> None:
    """A slice is replaced: the source's dimension is that piece of the operand's."""
    dims, source = call.operand("self"), call.operand("src")
    dim = call.dim(call.arguments["dim"], len(dims))
    for index, (a, b) in enumerate(zip(dims, source, strict=True)):
        if index != dim:
            call.unify(a, b)
    axis, part = dims[dim], source[dim]
    size = axis.find().size
    start, end, step = slice_bounds(call, size)
    if axes.same_size(size, part.find().size):
        call.unify(axis, part)
    elif all(isinstance(i, int) for i in (size, start, end)) and step == 1:
        call.unify(_pieces(call, axis, [start, end])[0], part)
    else:
        call.freeze((axis, part), "a slice of symbolic size, or with a stride")
    call.outputs = [dims]


def local_slice_scatter(call: Call, local: Local) -> dict[str, Any]:
    """The slice's bounds on the rank."""
    dim = call.dim(call.arguments["dim"], len(call.operand("self")))
    return _local_bounds(call, local, call.operand("self")[dim], call.operand("src")[dim])


def select_scatter(call: Call) -> None:
    """One index of a dimension is replaced: the dimension must be whole."""
    dims, source = call.operand("self"), call.operand("src")
    dim = call.dim(call.arguments["dim"], len(dims))
    call.freeze((dims[dim],), "an index into the axis")
    for a, b in zip((*dims[:dim], *dims[dim + 1 :]), source, strict=True):
        call.unify(a, b)
    call.outputs = [dims]


def unbind(call: Call) -> None:
    """All indices of a dimension, which must be whole."""
    dims = list(call.operand("self"))
    dim = call.dim(call.arguments["dim"], len(dims))
    call.freeze((dims[dim],), "an index into the axis")
    del dims[dim]
    call.outputs = [tuple(dims)] * len(call.node.meta["val"])


def split(call: Call) -> None:
    """``split``, ``chunk``, ``split_with_sizes``: a dimension becomes a concatenation."""
    dims = call.operand("self")
    dim = call.dim(call.arguments["dim"], len(dims))
    sizes = [call.shape(i)[dim] for i in range(len(call.node.meta["val"]))]
    if not all(isinstance(s, int) for s in sizes) or not isinstance(dims[dim].find().size, int):
        new = [Axis(size) for size in sizes]
        call.freeze((dims[dim], *new), "a split of symbolic size")
        call.outputs = [(*dims[:dim], piece, *dims[dim + 1 :]) for piece in new]
        return
    bounds = [0]
    for size in sizes:
        assert isinstance(size, int)
        bounds.append(bounds[-1] + size)
    pieces = _pieces(call, dims[dim], bounds)
    call.outputs = [(*dims[:dim], piece, *dims[dim + 1 :]) for piece in pieces]


def local_split(argument: str) -> Any:
    """Localization of a split by sizes."""

    def localize(call: Call, local: Local) -> dict[str, Any]:
        dim = call.dim(call.arguments["dim"], len(call.operand("self")))
        sizes = [local.size(out[dim]) for out in call.outputs if out is not None]
        return {argument: sizes} if all(isinstance(s, int) for s in sizes) else {}

    return localize


def cat(call: Call) -> None:
    """``[q | k | v]``."""
    operands = [call.operand("tensors", i) for i in range(len(call.arguments["tensors"]))]
    rank = len(call.shape())
    dim = call.dim(call.arguments["dim"], rank)
    result = list(operands[0])
    for other in operands[1:]:
        for i in range(rank):
            if i != dim:
                call.unify(result[i], other[i])
    parts = [o[dim] for o in operands]
    if all(isinstance(p.find().size, int) for p in parts):
        result[dim] = axes.concatenation(parts)
    else:
        call.freeze(parts, "a concatenation of symbolic size")
        result[dim] = Axis(call.shape()[dim])
        call.freeze((result[dim],), "a concatenation of symbolic size")
    call.outputs = [tuple(result)]


def stack(call: Call) -> None:
    """A new dimension over the operands, which stays whole."""
    operands = [call.operand("tensors", i) for i in range(len(call.arguments["tensors"]))]
    result = list(operands[0])
    for other in operands[1:]:
        for a, b in zip(result, other, strict=True):
            call.unify(a, b)
    new = Axis(len(operands))
    call.freeze((new,), "the axis of a stack")
    result.insert(call.dim(call.arguments["dim"], len(result) + 1), new)
    call.outputs = [tuple(result)]


def pad(call: Call) -> None:
    """``pad``: padded dimensions must be whole; the others pass."""
    dims = list(call.operand("self"))
    for index in range(len(call.arguments["pad"]) // 2):
        if list(call.arguments["pad"][2 * index : 2 * index + 2]) == [0, 0]:
            continue
        dim = len(dims) - 1 - index
        call.freeze((dims[dim],), "padding along the axis")
        dims[dim] = Axis(call.shape()[dim])
        call.freeze((dims[dim],), "padding along the axis")
    call.outputs = [tuple(dims)]


def last_two(call: Call) -> None:
    """``tril``, ``triu``: the last two dimensions are needed whole; the others pass."""
    dims = call.operand("self")
    call.freeze(dims[-2:], "needs its last two dimensions whole")
    call.outputs = [dims]


def along(name: str = "dim") -> Any:
    """Operators that need one dimension whole (``softmax``, ``cumsum``, ``roll``...); others pass."""

    def apply(call: Call) -> None:
        dims = call.operand("self")
        chosen = call.arguments.get(name)
        if chosen is None or isinstance(chosen, fx.Node):
            chosen = list(range(len(dims)))
        chosen = [chosen] if isinstance(chosen, int) else chosen
        whole = {call.dim(d, len(dims)) for d in (chosen or range(len(dims)))}
        call.freeze([dims[d] for d in whole], "needs this axis whole")
        call.settled = [dims[d] for d in whole]
        value = call.node.meta["val"]
        results = value if isinstance(value, (list, tuple)) else [value]
        call.outputs = []
        for index in range(len(results)):
            shape = call.shape(index)
            if len(shape) == len(dims):
                kept = tuple(
                    axis if axes.same_size(axis.find().size, size) else Axis(size)
                    for axis, size in zip(dims, shape, strict=True)
                )
                made = [new for new, axis in zip(kept, dims, strict=True) if new is not axis]
                call.freeze(made, "needs this axis whole")  # the largest of a share are others
                call.settled += made
            else:
                kept = tuple(a for i, a in enumerate(dims) if i not in whole)
            call.outputs.append(kept)

    return apply


def indexed(call: Call) -> None:
    """``index_select``: the dimension must be whole; the result has a new one."""
    dims = list(call.operand("self"))
    dim = call.dim(call.arguments["dim"], len(dims))
    call.operand("index")
    call.freeze((dims[dim],), "an index into the axis")
    dims[dim] = Axis(call.shape()[dim])
    call.freeze((dims[dim],), "an index into the axis")
    call.outputs = [tuple(dims)]


def index(call: Call) -> None:
    """``x[i, :, j]``: indexed dimensions must be whole; the indices' dimensions stand for them."""
    dims = call.operand("self")
    indices = call.arguments["indices"]
    given = [d for d, i in enumerate(indices) if i is not None]
    call.freeze([dims[d] for d in given], "an index into the axis")
    kept = [a for d, a in enumerate(dims) if d not in given]
    shape = call.shape()
    new = [Axis(1)] * (len(shape) - len(kept))
    adjacent = given == list(range(given[0], given[-1] + 1))
    at = given[0] if adjacent else 0
    new = [Axis(size) for size in shape[at : at + len(new)]]
    call.freeze(new, "an index into the axis")
    call.outputs = [(*kept[:at], *new, *kept[at:])]


def index_put(call: Call) -> None:
    """``x[i] = v``: indexed dimensions must be whole; the others are those of the values."""
    dims = call.operand("self")
    given = [d for d, i in enumerate(call.arguments["indices"]) if i is not None]
    call.freeze([dims[d] for d in given], "an index into the axis")
    kept = [a for d, a in enumerate(dims) if d not in given]
    values = call.operand("values")
    adjacent = given == list(range(given[0], given[-1] + 1))
    if adjacent and given[0] > 0 and len(values) > len(kept):
        call.freeze((*dims, *values), "an index between other dimensions")
    call.freeze(values[: max(0, len(values) - len(kept))], "an index into the axis")
    for axis, value in zip(reversed(kept), reversed(values), strict=False):
        if value.find().size != 1:
            call.unify(axis, value)
    call.outputs = [dims]


def index_add(call: Call) -> None:
    """``x[i] += v`` along one dimension, which must be whole."""
    dims, source = call.operand("self"), call.operand("source")
    dim = call.dim(call.arguments["dim"], len(dims))
    call.freeze((dims[dim], source[dim]), "an index into the axis")
    for i, (a, b) in enumerate(zip(dims, source, strict=True)):
        if i != dim:
            call.unify(a, b)
    call.outputs = [dims]


def gather(call: Call) -> None:
    """``out[i, j] = x[index[i, j], j]``: the dimension must be whole, the others pass."""
    dims, index = call.operand("self"), call.operand("index")
    dim = call.dim(call.arguments["dim"], len(dims))
    call.freeze((dims[dim], index[dim]), "an index into the axis")
    for i, (a, b) in enumerate(zip(dims, index, strict=True)):
        if i == dim:
            continue
        if axes.same_size(a.find().size, b.find().size):
            call.unify(a, b)
        else:
            call.freeze((a, b), "an index into a part of the axis")
    call.outputs = [index]


def scatter(call: Call) -> None:
    """``out[index[i, j], j] = v[i, j]``: as ``gather``; the result has x's axes."""
    gather(call)
    if call.given("src"):
        for a, b in zip(call.operand("index"), call.operand("src"), strict=True):
            call.unify(a, b)
    dims = call.operand("self")
    call.settled = [dims[call.dim(call.arguments["dim"], len(dims))]]
    call.outputs = [dims]


def view_as_complex(call: Call) -> None:
    """``[.., 2]`` to complex numbers."""
    dims = call.operand("self")
    call.freeze(dims[-1:], "real and imaginary part")
    call.outputs = [dims[:-1]]


def view_as_real(call: Call) -> None:
    """Complex numbers to ``[.., 2]``."""
    new = Axis(2)
    call.freeze((new,), "real and imaginary part")
    call.outputs = [(*call.operand("self"), new)]
