"""Operators that compute: pointwise, reductions, products, attention, lookups, the loss."""

from __future__ import annotations

from collections import Counter
from typing import Any

from autoshard import axes
from autoshard.axes import Axis
from autoshard.rules.call import Call, Dims
from autoshard.rules.local import Local
from autoshard.rules.notation import apply_row, parse
from autoshard.rules.views import frozen


def pointwise(call: Call) -> None:
    """Every operand broadcast against the others; each axis passes."""
    value = call.node.meta["val"]
    dims = call.broadcast([call.operand(*s) for s in call.tensors()], call.shape())
    call.outputs = [dims] * (len(value) if isinstance(value, (list, tuple)) else 1)


def like_first(call: Call) -> None:
    """The first operand's axes pass; the others lend only a dtype, a device or a shape."""
    call.outputs = [call.operand(*next(iter(call.tensors())))]


def shaped_as_other(call: Call) -> None:
    """``expand_as``: broadcast to the other's shape."""
    call.outputs = [call.broadcast([call.operand("self"), call.operand("other")], call.shape())]


def reduction(call: Call) -> None:
    """``sum``: the reduced axes are summed."""
    dims = call.operand("self")
    chosen = call.arguments.get("dim")
    if chosen is None or chosen == []:
        chosen = list(range(len(dims)))
    reduced = {call.dim(d, len(dims)) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    call.summed = [dims[d] for d in sorted(reduced)]
    if call.arguments.get("keepdim"):
        call.outputs = [tuple(Axis(1) if i in reduced else a for i, a in enumerate(dims))]
    else:
        call.outputs = [tuple(a for i, a in enumerate(dims) if i not in reduced)]


def mean(call: Call) -> None:
    """``mean``: a sum divided by the whole size, not the local one."""
    reduction(call)
    call.averaged = True


def matmul(call: Call) -> None:
    """``[.., m, k] @ [.., k, n]``, vectors too; leading dimensions are broadcast."""
    a, b = call.operand("self"), call.operand("other")
    left = "k+" if len(a) == 1 else "m k+" if len(a) == 2 else "* m k+"
    right = "k+" if len(b) == 1 else "k+ n" if len(b) == 2 else "* k+ n"
    stars = "*" if len(a) > 2 or len(b) > 2 else ""
    m, n = "m" if len(a) > 1 else "", "n" if len(b) > 1 else ""
    apply_row(parse(" ".join(f"{left}, {right} -> {stars} {m} {n}".split())), call)


def einsum(call: Call) -> None:
    """``einsum``: its equation is its row; ``...`` stands for dimensions aligned from the right."""
    equation = call.arguments["equation"].replace(" ", "")
    operands = [call.operand("tensors", i) for i in range(len(call.arguments["tensors"]))]
    left, arrow, right = equation.partition("->")
    names = [_letters(n, len(dims)) for n, dims in zip(left.split(","), operands, strict=True)]
    rank = max((sum(len(x) > 1 for x in n) for n in names), default=0)
    stars = [f"*{i}" for i in reversed(range(rank))]
    counts = Counter(x for n in names for x in n)
    once = [x for x in sorted(counts) if counts[x] == 1 and len(x) == 1]
    result = _letters(right, len(call.shape())) if arrow else [*stars, *once]
    if any(len(set(n)) != len(n) for n in names):
        frozen(call)  # a diagonal
        return
    bound: dict[str, Axis] = {}
    for name, dims in zip(names, operands, strict=True):
        for letter, axis in zip(name, dims, strict=True):
            if letter in bound and bound[letter].find().size != 1:
                if axis.find().size != 1:
                    call.unify(bound[letter], axis)
            else:
                bound[letter] = axis
    call.outputs = [tuple(bound[letter] for letter in result)]
    call.summed = [axis for letter, axis in bound.items() if letter not in result]
    if len(operands) > 1:
        call.flops = 2 * axes.product_of([a.find().size for a in bound.values()])


def _letters(names: str, rank: int) -> list[str]:
    """``...ij`` of a tensor of rank 4 is ``*1 *0 i j``."""
    before, dots, after = names.partition("...")
    missing = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"*{i}" for i in reversed(range(missing))), *after]


def attention(call: Call) -> None:
    """``b h s d^, b h t^ d^, b h t^ e^ -> b h s e``; mask broadcast; grouped heads are ``[kv·group]``.

    The value's width is frozen because the fused kernels ask for it to equal the key's.
    """
    q, k, v = (call.operand(n) for n in ("query", "key", "value"))
    call.freeze((q[-1], k[-1], v[-1], k[-2], v[-2]), "inside the attention kernel")
    if call.arguments.get("is_causal"):
        call.freeze((q[-2],), "a causal mask counts positions along the axis")
    if len(q) > 2 and call.arguments.get("enable_gqa"):
        group = axes.ratio(q[-3].find().size, k[-3].find().size)
        call.unify(k[-3], v[-3])
        call.unify(q[-3], axes.product([k[-3], Axis(group or 1)]))
        call.broadcast([q[:-3], k[:-3], v[:-3]], call.shape()[:-3])
    else:
        call.broadcast([q[:-2], k[:-2], v[:-2]], call.shape()[:-2])
    if call.given("attn_mask"):
        mask = call.operand("attn_mask")
        call.broadcast([q[:-1], mask[:-1]], call.shape()[:-1])
        call.freeze(mask[-1:], "inside the attention kernel")
    lead = call.broadcast([q[:-2]], call.shape()[:-2])
    call.outputs = [(*lead, q[-2], v[-1])]
    sizes = [a.find().size for a in (*lead, q[-2], k[-2])]
    call.flops = 2 * axes.product_of(sizes) * (q[-1].find().size + v[-1].find().size)


def norm(call: Call) -> None:
    """``layer_norm``, ``rms_norm``: the normalized dimensions are needed whole."""
    dims = call.operand("input")
    shape = call.arguments["normalized_shape"]
    whole = dims[len(dims) - len(shape) :]
    call.freeze(whole, "normalized over this axis")
    for name in ("weight", "bias"):
        if call.given(name):
            for a, b in zip(call.operand(name), whole, strict=True):
                call.unify(a, b)
    call.outputs = [dims]


def embedding(call: Call) -> None:
    """``v~ n, * -> * n``: rows looked up by global index."""
    table, ids = call.operand("weight"), call.operand("indices")
    if call.arguments.get("scale_grad_by_freq") or call.arguments.get("sparse"):
        frozen(call)
        return
    call.lookup = table[0]
    call.outputs = [(*ids, table[1])]


def cross_entropy(call: Call) -> None:
    """``n v~, n -> n`` or a scalar; the class axis has a distributed form."""
    logits, target = call.operand("self"), call.operand("target")
    classes = 1 if len(logits) > 1 else 0
    if call.node.meta["val"].dtype != call.tensor("self").meta["val"].dtype or (
        call.tensor("target").meta["val"].is_floating_point()
    ):
        frozen(call)
        return
    rest = [a for i, a in enumerate(logits) if i != classes]
    call.freeze(rest, "averaged over by the loss")
    for a, b in zip(rest, target, strict=True):
        call.unify(a, b)
    if call.given("weight"):
        call.freeze(call.operand("weight"), "class weights of the loss")
    call.lookup = logits[classes]
    call.outputs = [tuple(rest) if len(call.shape()) else ()]


def convolution(call: Call) -> None:
    """``b [g·i]+ l^, [g·o] i+ k^, [g·o]! -> b [g·o] l`` with g groups.

    A kernel that tiles its input (patches: stride k, no padding) is a product over ``[l·k]``, k summed.
    """
    x, weight = call.operand("input"), call.operand("weight")
    rank = len(weight) - 2
    shape, groups = call.shape(), call.arguments["groups"]
    channels, spatial, kernels = x[len(x) - rank - 1], x[len(x) - rank :], weight[2:]
    group, outer = Axis(groups), Axis(axes.ratio(weight[0].find().size, groups))
    call.unify(channels, axes.product([group, weight[1]]))
    call.unify(weight[0], axes.product([group, outer]))
    new = tuple(Axis(size) for size in shape[len(shape) - rank :])
    if _tiles(call, spatial, kernels):
        for before, length, kernel in zip(spatial, new, kernels, strict=True):
            call.unify(before, axes.product([length, kernel]))
        call.summed = [weight[1], *kernels]
    else:
        call.freeze((*spatial, *kernels, *new), "convolved over this axis")
        call.summed = [weight[1]]
    if call.given("bias"):
        call.unify(call.operand("bias")[0], weight[0])
        call.added_once.append(("bias", None))
    result = (*x[: len(x) - rank - 1], weight[0], *new)
    call.outputs = [result]
    sizes = [a.find().size for a in (*result, *weight[1:])]
    call.flops = 2 * axes.product_of(sizes)


def _tiles(call: Call, spatial: Dims, kernels: Dims) -> bool:
    rank = len(kernels)
    sizes = [(a.find().size, k.find().size) for a, k in zip(spatial, kernels, strict=True)]
    stride, padding, dilation = (
        [given] * rank if isinstance(given, int) else list(given) * (rank // len(given))
        for given in (call.arguments[name] for name in ("stride", "padding", "dilation"))
    )
    return (
        all(isinstance(n, int) and n % k == 0 for n, k in sizes)
        and stride == [k for _, k in sizes]
        and set(padding) == {0}
        and set(dilation) == {1}
    )


def local_convolution(call: Call, local: Local) -> dict[str, Any]:
    """The rank's groups; and its strides, where the kernel tiles the input."""
    x, weight = call.operand("input"), call.operand("weight")
    kernels = weight[2:]
    groups = axes.ratio(local.size(x[len(x) - len(kernels) - 1]), local.size(weight[1]))
    sizes = [local.size(k) for k in kernels]
    if sizes == [k.find().size for k in kernels]:
        return {"groups": groups}
    return {"groups": groups, "stride": sizes}
