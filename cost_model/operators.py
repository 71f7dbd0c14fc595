"""Operators: the kernels, launches and kept bytes of one operator, forward and backward.

What autograd does with each operator, as a table: views launch and move nothing; a product has one
product per gradient; a pointwise operator reads its operands and writes its result, and its
gradients likewise; some kernels are known by name, because they are far from a plain copy's speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

from autoshard.cost_model.work import (
    Attention,
    Collective,
    D,
    Item,
    Phase,
    Product,
    Size,
    Traffic,
    Work,
)

# Of an axis: an int or expression; ("*", terms); ("+", terms); ("cut", ((degree, local size), ...)).
Term: TypeAlias = Any

VIEWS = frozenset(
    (
        "view", "_unsafe_view", "view_as", "reshape_as", "transpose", "permute", "t", "numpy_T",
        "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "slice", "select", "split",
        "split_with_sizes", "chunk", "unbind", "detach", "alias", "flatten", "unflatten",
        "view_as_real", "view_as_complex",
    )
)  # fmt: skip
VIEWS_IF_DENSE = frozenset(("reshape", "contiguous"))  # a copy otherwise
# Views whose gradient is gathered in a new tensor of the operand's size.
GATHERED = frozenset(("slice", "select", "split", "split_with_sizes", "chunk", "unbind"))
ADDITIONS = frozenset(("add", "sub", "subtract"))
BIASED = frozenset(("addmm", "baddbmm"))
BY_WEIGHT = frozenset(("linear", "mm", "addmm"))  # what `passes/fuse.py` fuses with a copy
BATCHED = frozenset(("bmm", "baddbmm", "matmul", "einsum"))
ATTENTION = "scaled_dot_product_attention"
# Measured by name -> what they keep: arguments, "" for the result, "mask" for a byte per element.
NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "layer_norm": ("layer_norm", ("input",)),
    "rms_norm": ("rms_norm", ("input",)),
    "softmax": ("softmax", ("",)),
    "_softmax": ("softmax", ("",)),
    "log_softmax": ("softmax", ("",)),
    "dropout": ("dropout", ("mask",)),
    "gelu": ("gelu", ("self",)),
    "cross_entropy_loss": ("cross_entropy", ("self",)),
    "embedding": ("embedding", ()),
}
KEEP_RESULT = frozenset(("exp", "tanh", "sigmoid", "sqrt", "rsqrt", "relu", "reciprocal"))
KEEP_NOTHING = frozenset(
    (
        "to", "_to_copy", "type_as", "cat", "concat", "concatenate", "stack", "clone", "contiguous",
        "reshape", "pad", "sum", "mean", "neg", *VIEWS, *ADDITIONS,
    )
)  # fmt: skip
LOSS = "loss"  # the result is all-reduced as a split loss: scalars per token
LOSS_LAUNCHES = {"forward": 31, "backward": 15}  # of the vocabulary-parallel cross entropy


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads: argument, axes, bytes of an element, does a gradient flow."""

    name: str
    dims: tuple[Term, ...]
    itemsize: int
    flows: bool

    @property
    def bytes(self) -> Size:
        """On a rank."""
        return numel(self.dims) * self.itemsize


@dataclass(frozen=True)
class Operator:
    """All that a call's work depends on; equal for equal layers.

    Attributes:
        name: of the operator, without namespace and overload.
        operands: its tensors.
        result, itemsize, dtype: of the first result.
        summed: axes contracted away.
        product: whether it is a matrix product (or attention).
        flows: whether a gradient flows through it.
        detail: ``view``; ``strided`` where operands lie in memory differently or with gaps; the
            attention's kernel; ``off`` for a dropout that does nothing.
        saved: axes and bytes of an element of what it is the first to keep for the backward.
        uses: differentiable consumers of the result.
        parameters: that it reads.
    """

    name: str
    operands: tuple[Operand, ...]
    result: tuple[Term, ...]
    itemsize: int
    dtype: str
    summed: tuple[Term, ...] = ()
    product: bool = False
    flows: bool = False
    detail: str = ""
    saved: tuple[tuple[tuple[Term, ...], int], ...] = ()
    uses: int = 0
    parameters: int = 0

    @property
    def bytes(self) -> Size:
        """Of the result."""
        return numel(self.result) * self.itemsize


def shows_operand(name: str, dense: bool) -> bool:
    """Whether the result is a view of the first operand, which lies dense in memory or not."""
    return name in VIEWS or (name in VIEWS_IF_DENSE and dense)


def detail_of(name: str, arguments: Mapping[str, Any], dense: bool, strided: bool) -> str:
    """``Operator.detail``.

    Args:
        arguments: of the call, by name.
        dense: whether the first operand lies dense in memory.
        strided: whether operands lie in memory differently, or with gaps.
    """
    if name == ATTENTION:
        if arguments.get("attn_mask") is not None:
            return "masked"
        return "causal" if arguments.get("is_causal") else "full"
    if name == "dropout":
        return "" if arguments.get("p") and arguments.get("train", True) else "off"
    if name in VIEWS_IF_DENSE or name in VIEWS:
        return "view" if shows_operand(name, dense) else ""
    return "strided" if strided else ""


def keeps(name: str, product: bool, flowing: dict[str, bool]) -> tuple[str, ...]:
    """Which tensors an operator needs again in the backward.

    Args:
        flowing: argument -> whether a gradient flows to it.
    """
    if not any(flowing.values()) or name in KEEP_NOTHING:
        return ()
    if name in NAMED:
        return NAMED[name][1]
    if product:
        return (*flowing, "") if name == ATTENTION else tuple(flowing)
    if name in KEEP_RESULT:
        return ("",)
    if len(flowing) == 1 or sum(flowing.values()) > 1:
        return tuple(flowing)
    return tuple(s for s, flows in flowing.items() if not flows)


@lru_cache(maxsize=65536)
def work_of(op: Operator, reduced: str = "") -> Work:
    """The work of one call, with the all-reduce of its result where there is one."""
    forward, backward = _kernels(op, reduced)
    host = "view" if op.detail == "view" else "product" if op.product else "kernel"
    host = "attention" if op.name == ATTENTION else host
    hosts = Counter({host: 1}), Counter({host: 1} if op.flows else {})
    for counter in hosts:
        counter["parameter"] += op.parameters
    if op.flows and op.uses > 1:  # gradients of several uses are added
        backward += [Traffic(3 * op.bytes)] * (op.uses - 1)
        hosts[1]["kernel"] += op.uses - 1
    gradients: Size = sympy.Integer(0)
    if op.name == "cross_entropy_loss":
        gradients = op.operands[0].bytes
    if reduced == LOSS:
        logits = op.operands[0].dims  # [N, classes, ...] or [classes]
        tokens = numel(logits[:1] + logits[2:]) if len(logits) > 1 else sympy.Integer(1)
        forward += [Collective("all_reduce", 4 * tokens, D), Collective("all_reduce", 12 * tokens, D)]
        hosts[0]["collective"] += 2
        for counter, way in zip(hosts, ("forward", "backward"), strict=True):
            counter["kernel"] += LOSS_LAUNCHES[way]
    elif reduced:
        forward.append(Collective("all_reduce", op.bytes, D))
        hosts[0]["collective"] += 1
        # The bias is added once: in the first rank's product, or after the all-reduce.
        if not by_weight(op) and any(_is_bias(op, o) for o in op.operands):
            forward.append(Traffic(2 * op.bytes))
            hosts[0]["kernel"] += 1
            hosts[1]["kernel"] += 1
    kept = sum((numel(dims) * itemsize for dims, itemsize in op.saved), start=sympy.Integer(0))
    return Work(phase(forward, hosts[0]), phase(backward, hosts[1]), kept, gradients)


def phase(items: list[Item], host: Counter[str]) -> Phase:
    """Items and launches as a phase."""
    return Phase(tuple(items), tuple(sorted((k, n) for k, n in host.items() if n)))


def _kernels(op: Operator, reduced: str) -> tuple[list[Item], list[Item]]:
    size = op.bytes
    if op.detail == "off":
        return [], []
    if op.detail == "view":
        if op.flows and op.name in GATHERED:
            return [], [Traffic(2 * op.operands[0].bytes)]
        return [], []
    if op.name == ATTENTION:
        return _attention(op)
    if op.product:
        return _products(op)
    if op.name in NAMED:
        name, moved = NAMED[op.name][0], size
        if name == "cross_entropy":
            moved = op.operands[0].bytes
            name = "vocab_cross_entropy" if reduced == LOSS else name
        # The gradient of a table is zeros, then the rows.
        back = moved + op.operands[0].bytes if name == "embedding" else moved
        return [Traffic(moved, name)], [Traffic(back, name, True)] if op.flows else []
    backward: list[Item] = []
    if op.detail == "strided" or len({o.bytes for o in op.operands}) > 1:  # a slower kernel
        backward = [Traffic(size, "broadcast", True)] * sum(o.flows and op.flows for o in op.operands)
        return [Traffic(size, "broadcast")], backward
    for operand in op.operands if op.flows else ():
        if operand.flows and op.name not in ADDITIONS:
            backward.append(Traffic(2 * size + operand.bytes))
        elif operand.flows and operand.bytes != size:  # broadcast: the gradient is summed
            backward.append(Traffic(size + operand.bytes))
    return [Traffic(sum((o.bytes for o in op.operands), start=size))], backward


def _is_bias(op: Operator, operand: Operand) -> bool:
    return operand.name == "bias" or (op.name in BIASED and operand.name == "self")


def _products(op: Operator) -> tuple[list[Item], list[Item]]:
    """[m, k] x [k, n] forward; [m, n] x [n, k] and [k, m] x [m, n] for the gradients."""
    factors = [o for o in op.operands if not _is_bias(op, o)]
    k = numel(op.summed)
    second = factors[1] if len(factors) > 1 else factors[0]
    batched = op.name in BATCHED and len(second.dims) > 2
    batch = numel(second.dims[:-2]) if batched else sympy.Integer(1)
    n = sympy.cancel(numel(second.dims) / k / batch)
    m = sympy.cancel(numel(op.result) / n / batch)
    backward: list[Item] = []
    for place, factor in enumerate(factors[:2]):
        if factor.flows:
            shape = (m, k, n) if place == 0 else (k, n, m)
            backward.append(Product(batch, *shape, op.dtype))
    if any(_is_bias(op, o) and o.flows for o in op.operands):
        backward.append(Traffic(op.bytes))
    return [Product(batch, m, n, k, op.dtype)], backward


def by_weight(op: Operator) -> bool:
    """Whether it is a product by a parameter, of the kind that is fused with a collective."""
    return bool(op.name in BY_WEIGHT and op.product and op.parameters)


def gradient_products(op: Operator) -> tuple[Product | None, Product | None]:
    """The products that give the gradients of the input and of the weight that it is multiplied by."""
    factors = [o for o in op.operands if not _is_bias(op, o)]
    if not (by_weight(op) and op.flows) or len(factors) != 2:
        return None, None
    found = iter(item for item in _products(op)[1] if isinstance(item, Product))
    of_input, of_weight = (next(found) if factor.flows else None for factor in factors)
    return of_input, of_weight


def _attention(op: Operator) -> tuple[list[Item], list[Item]]:
    dims = {o.name: o.dims for o in op.operands}
    width = numel(dims["query"][-1:]) + numel(dims["value"][-1:])
    flops = 2 * numel(op.result[:-1]) * numel(dims["key"][-2:-1]) * width
    forward, backward = (Attention(flops, op.detail, back) for back in (False, True))
    return [forward], [backward] if op.flows else []


@lru_cache(maxsize=65536)
def numel(dims: tuple[Term, ...]) -> Size:
    """Elements that a rank holds of a tensor with these axes."""
    return sympy.Mul(*(expression(term) for term in dims))


@lru_cache(maxsize=65536)
def expression(term: Term) -> Size:
    """A local size as an expression."""
    if not isinstance(term, tuple):
        return sympy.sympify(term)
    kind, inner = term
    if kind == "cut":
        return _by_degree(inner)
    terms = [expression(t) for t in inner]
    return sympy.Mul(*terms) if kind == "*" else sympy.Add(*terms)


def _by_degree(local: tuple[tuple[int, int], ...]) -> Size:
    """``N/d`` where that is what it is, else case by case."""
    size = local[0][1]
    if all(own * degree == size for degree, own in local):
        return sympy.Integer(size) / D
    cases = [(sympy.Integer(own), sympy.Eq(D, degree)) for degree, own in local[:-1]]
    return sympy.Piecewise(*cases, (sympy.Integer(local[-1][1]), True))
