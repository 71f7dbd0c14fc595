"""Operators that only see the same elements in another shape."""

from __future__ import annotations

from typing import Any

from autoshard import axes
from autoshard.axes import Axis
from autoshard.rules.call import Call, Dims
from autoshard.rules.local import Local


def reshape(call: Call) -> None:
    """``[B, S, 3072] -> [B, S, 24, 128]``: the last axis is refined into a product."""
    dims = call.operand("self")
    result = tuple(Axis(size) for size in call.shape())
    old = [f for axis in dims for f in axes.factors_of(axis)]
    new = [f for axis in result for f in axes.factors_of(axis)]
    try:
        axes.unify_products(old, new)
    except axes.AxisMismatch as mismatch:
        call.freeze(mismatch.rest or (*dims, *result), f"a view across axes: {mismatch}")
    call.outputs = [result]


def reshape_as_other(call: Call) -> None:
    """``view_as``: a reshape whose result has the other's axes."""
    reshape(call)
    result = call.outputs[0]
    assert result is not None
    for a, b in zip(result, call.operand("other"), strict=True):
        call.unify(a, b)


def transpose(call: Call) -> None:
    """Swap two dimensions."""
    dims = list(call.operand("self"))
    a = call.dim(call.arguments["dim0"], len(dims))
    b = call.dim(call.arguments["dim1"], len(dims))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    call.outputs = [tuple(dims)]


def permute(call: Call) -> None:
    """Reorder the dimensions."""
    dims = call.operand("self")
    call.outputs = [tuple(dims[call.dim(d, len(dims))] for d in call.arguments["dims"])]


def reverse(call: Call) -> None:
    """Reverse the dimensions (``t``, ``numpy_T``)."""
    call.outputs = [tuple(reversed(call.operand("self")))]


def unsqueeze(call: Call) -> None:
    """A new dimension of one element."""
    dims = list(call.operand("self"))
    dims.insert(call.dim(call.arguments["dim"], len(dims) + 1), Axis(1))
    call.outputs = [tuple(dims)]


def squeeze(call: Call) -> None:
    """Dimensions of one element are dropped."""
    dims = call.operand("self")
    chosen: Any = call.arguments.get("dim")
    if chosen is None:
        chosen = range(len(dims))
    drop = {call.dim(d, len(dims)) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    call.outputs = [tuple(a for i, a in enumerate(dims) if i not in drop or a.find().size != 1)]


def expand(call: Call) -> None:
    """Dimensions of one element become new axes; the others stay."""
    call.outputs = [call.broadcast([call.operand("self")], call.shape())]


def repeat_interleave(call: Call) -> None:
    """``[.., kv, ..] -> [.., kv·group, ..]``: each element ``repeats`` times behind itself."""
    dims = list(call.operand("self"))
    repeats, dim = call.arguments["repeats"], call.arguments["dim"]
    if not isinstance(repeats, int) or dim is None:
        frozen(call)
        return
    dim = call.dim(dim, len(dims))
    dims[dim] = axes.product([dims[dim], Axis(repeats)])
    call.outputs = [tuple(dims)]


def repeat(call: Call) -> None:
    """Tiles: a repeated dimension ``n`` becomes ``[times·n]``."""
    dims = call.operand("self")
    times = call.arguments["repeats"]
    shape = call.shape()
    padded = [Axis(1)] * (len(times) - len(dims)) + list(dims)
    result = []
    for axis, size in zip(padded, shape, strict=True):
        count = axes.ratio(size, axis.find().size)
        result.append(axis if count == 1 or count is None else axes.product([Axis(count), axis]))
    call.outputs = [tuple(result)]


def frozen(call: Call) -> None:
    """All axes whole: what an operator without a rule gets."""
    for slot in call.tensors():
        call.freeze(call.operand(*slot), "no rule for this operator")
    value = call.node.meta["val"]
    results = value if isinstance(value, (list, tuple)) else [value]
    call.outputs = []
    for index, item in enumerate(results):
        dims: Dims | None = None
        if hasattr(item, "shape"):
            dims = tuple(Axis(size) for size in call.shape(index))
            call.freeze(dims, "no rule for this operator")
        call.outputs.append(dims)


def local_sizes(argument: str) -> Any:
    """Localization of an argument that gives the result's sizes."""

    def localize(call: Call, local: Local) -> dict[str, Any]:
        dims = call.outputs[0]
        assert dims is not None
        sizes = call.arguments[argument]
        return {argument: [local.size_argument(s, a) for s, a in zip(sizes, dims, strict=True)]}

    return localize


def local_squeeze(call: Call, local: Local) -> dict[str, Any]:
    """``squeeze``: the dimensions of one element in the model; on a rank others may be too."""
    dims = call.operand("self")
    chosen: Any = call.arguments.get("dim")
    if chosen is None:
        chosen = range(len(dims))
    chosen = [call.dim(d, len(dims)) for d in ([chosen] if isinstance(chosen, int) else chosen)]
    return {"dim": [d for d in chosen if dims[d].find().size == 1]}


def local_unflatten(call: Call, local: Local) -> dict[str, Any]:
    """``unflatten``: the sizes of the new dimensions."""
    dims, sizes = call.outputs[0], call.arguments["sizes"]
    assert dims is not None
    start = call.dim(call.arguments["dim"], len(call.operand("self")))
    new = dims[start : start + len(sizes)]
    return {"sizes": [local.size_argument(s, a) for s, a in zip(sizes, new, strict=True)]}


def local_repeats(call: Call, local: Local) -> dict[str, Any]:
    """``repeat_interleave``: the group's local size."""
    dims, result = call.operand("self"), call.outputs[0]
    if call.arguments["dim"] is None or result is None:
        return {}
    dim = call.dim(call.arguments["dim"], len(dims))
    inner, outer = local.size(dims[dim]), local.size(result[dim])
    repeats = axes.ratio(outer, inner)
    assert repeats is not None
    return {"repeats": repeats, "output_size": None}


def local_tiles(call: Call, local: Local) -> dict[str, Any]:
    """``repeat``: how often each local dimension is repeated."""
    dims, result = call.operand("self"), call.outputs[0]
    assert result is not None
    times = list(call.arguments["repeats"])
    offset = len(times) - len(dims)
    for index, value in enumerate(times):
        if not isinstance(value, int) or value == 1:
            continue
        before = local.size(dims[index - offset]) if index >= offset else 1
        count = axes.ratio(local.size(result[index]), before)
        assert isinstance(count, int)
        times[index] = count
    return {"repeats": times}
