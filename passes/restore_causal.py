"""Restore causal: a mask that is proven to be the lower triangle becomes ``is_causal=True``.

What models of Hugging Face leave to the attention kernel when they run, they write out when they are
traced: S·S elements of memory traffic, and a slower kernel. Before::

    positions = arange(S)
    allowed   = le(view(positions, [1, 1, 1, S]), view(positions, [1, 1, S, 1]))
    mask      = expand(allowed, [B, -1, S, S])
    y         = scaled_dot_product_attention(q, k, v, mask, 0.1, scale=0.125)

After::

    y         = scaled_dot_product_attention(q, k, v, None, 0.1, scale=0.125, is_causal=True)

and just ``None`` where every key is allowed. The mask's element at batch b, head h, query i and key j
is written as a formula of these and of the sizes (``elements``); it is the triangle where

    allowed and j > i            is impossible
    not allowed and j <= i       is impossible

for all 0 <= i < S, 0 <= j < S and all sizes (``inequalities``). A floating mask allows where it adds 0,
and forbids where it adds -inf or its dtype's least number: the triangle allows every query its own key,
so what is forbidden has the weight 0 either way. Whatever is not known ends the proof, and the mask
stays: an input, a parameter, a buffer, more keys than queries, a window. A mask that is proven is at
last made at some sizes and compared: this can only refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from autoshard.elements import Elements, Unknown, aligned, same
from autoshard.inequalities import Formula, at_least, negated, some
from autoshard.memory import written
from autoshard.rules import bind
from autoshard.rules.call import is_tensor, op_name, shape_of, size_of

ATTENTION = "scaled_dot_product_attention"
SAMPLES = (5, 8)  # the smallest of the sizes that a proven mask is made at
LARGE = 2**22  # elements of a mask that is not made
RANDOM = torch.Tag.nondeterministic_seeded

Causal = bool | None  # the triangle, all keys, or neither as far as is known


def restore_causal(graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.Graph:
    """Attention under a mask that is the lower triangle, or that is true everywhere, in place.

    Args:
        graph: normalized; what is written to counts as unknown.
        constants: placeholder -> value of tensors made in ``forward``.
    """
    elements = Elements(graph, constants)
    verdicts: dict[Any, Causal] = {}
    for node in list(graph.nodes):
        if op_name(node) != ATTENTION:
            continue
        given = bind(node)
        mask = given["attn_mask"]
        if not is_tensor(mask) or given["is_causal"]:
            continue
        key = (mask, *(shape_of(given[name].meta["val"])[:-1] for name in ("query", "key")))
        if key not in verdicts:
            verdicts[key] = _proven(elements, mask, given["query"], given["key"])
        causal = verdicts[key]
        if causal is not None:
            _without_mask(node, causal)
            _drop(mask)
    graph.lint()
    return graph


def _without_mask(node: fx.Node, causal: bool) -> None:
    places = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in (("attn_mask", None), ("is_causal", causal)):
        place = places.index(name)
        if place < len(node.args):
            node.update_arg(place, value)
        elif value or name in node.kwargs:
            node.update_kwarg(name, value)


def _drop(node: fx.Node) -> None:
    """Erase what was computed for this value alone; draws of random numbers stay."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.op != "call_function" or node.users or node._erased:
            continue
        tags = getattr(node.target, "tags", ())
        operator = isinstance(node.target, torch._ops.OpOverload)
        if operator and RANDOM not in tags and written(node) is None:
            stack += node.all_input_nodes
            node.graph.erase_node(node)


# -- the proof ------------------------------------------------------------------------------------


def _proven(elements: Elements, mask: fx.Node, query: fx.Node, key: fx.Node) -> Causal:
    """Whether the mask is the triangle (True) or allows all (False), at all sizes."""
    queries, keys = (tuple(map(sympy.sympify, shape_of(n.meta["val"]))) for n in (query, key))
    scores = (*queries[:-1], keys[-2])  # the mask may not make more of them
    place, inside = zip(*map(elements.index, scores), strict=True)
    elements.facts, elements.read = inside, set()
    try:
        allowed, forbidden = _allowed(elements, mask, aligned(mask, scores, place))
    except Unknown:
        return None
    i, j = place[-2:]
    above = at_least(j - 1, i)
    if elements.refuted(forbidden):
        causal = False
    elif not same(queries[-2], keys[-2]) or not (
        elements.refuted(allowed, above) and elements.refuted(forbidden, negated(above))
    ):
        return None
    else:
        causal = True
    return causal if _as_sampled(elements, mask, causal) else None


def _allowed(elements: Elements, mask: fx.Node, place: tuple[Any, ...]) -> tuple[Formula, Formula]:
    """Where scores stay as they are, and where they are forbidden."""
    dtype, element = mask.meta["val"].dtype, elements.at(mask, place)
    if not isinstance(element, tuple):
        return element, negated(element)
    if not dtype.is_floating_point:
        raise Unknown(f"{mask.name} is neither bool nor floating")
    if any(n != 0 and n > torch.finfo(dtype).min for _, n in element):
        raise Unknown(f"{mask.name} adds to scores")
    return some(*(g for g, n in element if n == 0)), some(*(g for g, n in element if n != 0))


# -- a mask that is proven, made at some sizes ----------------------------------------------------


def _as_sampled(elements: Elements, mask: fx.Node, causal: bool) -> bool:
    symbols = {s for n in elements.read for size in shape_of(n.meta["val"])
               for s in sympy.sympify(size).free_symbols}  # fmt: skip
    ordered = sorted(symbols, key=str)
    for least in SAMPLES:
        sizes = {s: least + 3 * place for place, s in enumerate(ordered)}
        try:
            found = _Made(elements, sizes).tensor(mask)
        except Exception:
            return False
        if found is None:
            continue
        allowed = found if found.dtype is torch.bool else found == 0
        right = torch.ones(found.shape[-2:], dtype=torch.bool)
        if not torch.equal(allowed, (right.tril() if causal else right).expand(found.shape)):
            return False
    return True


class _Made:
    """Values of a graph at these sizes; what the proof has not read is zero."""

    def __init__(self, elements: Elements, sizes: Mapping[Any, int]) -> None:
        self._read, self._constants, self._sizes = elements.read, elements.constants, sizes
        self._values: dict[fx.Node, Any] = {}

    def tensor(self, node: fx.Node) -> Tensor | None:
        """Its value; None where that is large."""
        if any(sympy.prod(self._shape(n)) > LARGE for n in self._read):
            return None
        found: Tensor = self._value(node)
        return found

    def _shape(self, node: fx.Node) -> list[int]:
        return [self._size(size) for size in shape_of(node.meta["val"])]

    def _size(self, size: Any) -> int:
        return int(sympy.sympify(size).subs(self._sizes))

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            traced = node.meta["val"]
            if not isinstance(traced, Tensor):
                self._values[node] = self._size(size_of(traced))
            elif node in self._read and node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif node.name in self._constants:
                self._values[node] = self._constants[node.name]
            else:
                self._values[node] = torch.zeros((), dtype=traced.dtype).expand(self._shape(node))
        return self._values[node]
