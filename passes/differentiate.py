"""Differentiate: a layer's graph and its backward pass, as one graph each.

Autograd asks Python twice for every function that is written in it, and each collective needs one. In
these two graphs a layer is one function of autograd, in whose inside nothing is recorded.

Before (one MLP, after ``fuse``)::

    norm_copy = fused_ops.column_linear(norm, tp2, (w1,), (b1,), False)
    fc = operator.getitem(norm_copy, 0)
    act = aten.gelu(fc)
    out_add = fused_ops.row_linear((act,), tp2, (w2,), (b2,), False)
    return out_add

After, forward (``size`` is ``Tensor.size``)::

    fc = F.linear(norm, w1, b1)
    act = F.gelu(fc)
    out_add = fused_ops.row_linear((act,), tp2, (w2,), (b2,), False)
    return (out_add,), (act, w2, act_size, fc, w1, tp2, norm_size, norm)

and backward (``act``, ``w2``, ... are popped from the list of what is kept where they are used first)::

    dy = flatten(d_out_add, 0, -2)
    d_w2 = mm(t(dy), flatten(act, 0, -2))
    d_act = view(mm(dy, w2), act_size)
    d_b2 = sum(dy, 0)
    d_fc = aten.gelu_backward(d_act, fc)
    d_norm, d_w1, d_b1 = fused_ops.column_gradients(norm, norm_size, tp2, (w1,), (d_fc,), False, ...)
    return (d_norm, d_w1, d_b1, d_w2, d_b2)

What stands between two collectives and has a call without a row in ``derivatives.py`` is *a part*,
from the first to the last such call: autograd differentiates it, by itself.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autoshard import layer_function, ops
from autoshard.analysis import WHOLE
from autoshard.bindings import operator_of
from autoshard.compat import is_composite
from autoshard.derivatives import (
    COMMUNICATING,
    DERIVATIVES,
    STOPS,
    Backward,
    Builder,
    Gradients,
    Made,
    is_own,
    results_behind,
)
from autoshard.layer_function import Differentiated
from autoshard.parts import graph_of, operands_of, place_in_model, results_of
from autoshard.products import as_tokens
from autoshard.rules.call import is_continuous


def differentiate(graph: fx.Graph, needed: Sequence[bool]) -> Differentiated | None:
    """The forward and the backward graph of a layer; ``graph`` is unchanged.

    Args:
        graph: a layer's, fused; its calls may be bindings.
        needed: for each placeholder, whether its gradient is asked for.

    Returns:
        None where autograd does as well, as nothing communicates; where a result may be the memory of
        an operand or of another one (written into, that is a change of both, which autograd follows);
        and where a collective's operands are not plain enough for its row.
    """
    nodes = _in_order(n for n in graph.nodes if n.op not in ("placeholder", "output"))
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    (returned,) = next(n for n in graph.nodes if n.op == "output").args
    results = list(returned) if isinstance(returned, tuple) else [returned]
    asked = [p for p, need in zip(placeholders, needed, strict=True) if need]
    flowing = _flowing(nodes, asked)
    reached = _reached(nodes, results, flowing)
    # What ends in indices has no gradient. Rows give all places of their results.
    flowing = {
        n for n in flowing
        if n in reached or (n.target is operator.getitem and n.args[0] in reached)
    }  # fmt: skip
    if not any(n.target in COMMUNICATING for n in nodes) or not flowing & set(results):
        return None
    memory = [_memory(result) for result in results if not _is_number(result)]
    if any(m is None or m.op == "placeholder" for m in memory) or len(set(memory)) < len(memory):
        return None
    if any(n.op != "call_function" for n in nodes):
        return None
    made = _Builder(flowing, placeholders)
    for unit in _units(nodes, flowing):
        if len(unit) > 1:
            fits = made.part(unit)
        elif unit[0] in flowing:
            alone = unit[0].target not in COMMUNICATING
            fits = made.by_row(unit[0]) or (alone and made.part(unit))
        else:
            fits = made.as_it_is(unit[0])
        if not fits:
            return None
    comes = [reached.get(p, frozenset()) for p in asked]
    views = [not _is_number(r) and _is_view(r) for r in results]
    return made.ended(results, views, needed, comes, isinstance(returned, tuple))


def _in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The calls, each with the places of its result right behind it."""
    found: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        found[node] = None
        for user in node.users:
            if user.target is operator.getitem:
                add(user)

    for node in nodes:
        if node not in found:
            add(node)
    return list(found)


def _flowing(nodes: Sequence[fx.Node], asked: Sequence[fx.Node]) -> set[fx.Node]:
    """The values that a gradient flows through: made of floating numbers from what one is asked of."""
    found = set(asked)
    for node in nodes:
        if operator_of(node) not in STOPS and any(n in found for n in node.all_input_nodes):
            value = node.meta.get(WHOLE, node.meta.get("val"))
            if isinstance(value, Tensor) and not is_continuous(value):
                continue
            if not _is_number(node):
                found.add(node)
    return found


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get(WHOLE, node.meta.get("val"))
    return isinstance(value, Tensor) and value.dtype.is_complex


def _reached(
    nodes: Sequence[fx.Node], results: Sequence[Any], flowing: set[fx.Node]
) -> dict[fx.Node, frozenset[int]]:
    """The values that a gradient comes to, and from which results."""
    found: dict[fx.Node, frozenset[int]] = {}
    for place, result in enumerate(results):
        if isinstance(result, fx.Node) and result in flowing:
            found[result] = found.get(result, frozenset()) | {place}
    for node in reversed(nodes):
        if node in found:
            for operand in node.all_input_nodes:
                for result in results_behind(node, operand):
                    if operand in flowing and result in found:
                        found[operand] = found.get(operand, frozenset()) | found[result]
    return found


def _is_number(node: Any) -> bool:
    """A size, or what is computed from sizes."""
    return isinstance(node, fx.Node) and isinstance(
        node.meta.get(WHOLE, node.meta.get("val")),
        (int, float, torch.SymInt, torch.SymFloat, torch.SymBool),
    )


def _is_several(node: fx.Node) -> bool:
    """Tensors in a tuple."""
    return isinstance(node.meta.get(WHOLE, node.meta.get("val")), (tuple, list))


def _memory(value: Any) -> fx.Node | None:
    """The node in whose memory a value lies, by its operators' schemas; None where that is unknown.

    A composite operator may give its operand, whatever its schema says (dropout that is off, a cast to
    its own dtype); those that have a row do not. A copy into a group is memory of its own to autograd:
    a view that refuses to be written into.
    """
    while isinstance(value, fx.Node):
        target = operator_of(value)
        if value.op == "placeholder" or target in (*COMMUNICATING, ops.copy, ops.reduce):
            return value
        schema = getattr(target, "_schema", None)
        if schema is None and target not in (operator.getitem, as_tokens):
            return None
        if schema is not None and all(r.alias_info is None for r in schema.returns):
            return value if target in DERIVATIVES or not is_composite(target) else None
        value = value.args[0]
        if isinstance(value, fx.Node) and value.target in COMMUNICATING:
            return value
    return None


def _is_view(result: fx.Node) -> bool:
    """Whether it lies in the memory of a value that nobody else sees, as another one's view.

    A copy is a view of what enters, and its views are: to write into them is an error.
    """
    memory = _memory(result)
    return memory is not None and memory is not result and memory.target is not ops.copy


def _units(nodes: Sequence[fx.Node], flowing: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """Calls that have a row, or need no gradient, one by one; and parts, in order."""
    stretch: list[fx.Node] = []
    for node in nodes:
        if node.target in COMMUNICATING:
            yield from _between(stretch, flowing)
            yield [node]
            stretch = []
        else:
            stretch.append(node)
    yield from _between(stretch, flowing)


def _between(stretch: list[fx.Node], flowing: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """What stands between two collectives."""
    unknown = [
        place for place, node in enumerate(stretch)
        if node in flowing and node.target is not operator.getitem and not _has_row(node)
    ]  # fmt: skip
    first, end = (unknown[0], unknown[-1] + 1) if unknown else (len(stretch), len(stretch))
    while end < len(stretch) and stretch[end].target is operator.getitem:
        end += 1  # the results of the last one
    yield from ([node] for node in stretch[:first])
    if unknown:
        yield stretch[first:end]
    yield from ([node] for node in stretch[end:])


def _original(node: fx.Node) -> fx.Node:
    """The layer's own node that a node on rows stands for."""
    original: fx.Node = node.meta.get("stands_for", node)
    return original


def _made_by_row(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Made | None:
    """What the row of a call makes of it; None where there is none for these operands."""
    rule = DERIVATIVES.get(operator_of(node))
    if rule is None or any(map(_is_complex, (node, *node.all_input_nodes))):
        return None  # rows conjugate nothing
    try:
        given = inspect.signature(rule).bind(b, *args, **kwargs)
    except TypeError:  # an argument that the row does not know
        return None
    return rule(*given.args, **given.kwargs)


class _Nowhere:
    """A builder whose graphs nobody reads."""

    def __init__(self) -> None:
        self._graph = fx.Graph()

    def now(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Some node."""
        return self._graph.create_node("placeholder", "x")

    then = now

    def flows(self, value: Any) -> bool:
        """A gradient is asked of everything."""
        return True


def _has_row(node: fx.Node) -> bool:
    return _made_by_row(_Nowhere(), node, node.args, node.kwargs) is not None


class _Builder:
    """The two graphs while they are written (``derivatives.Builder``)."""

    def __init__(self, flowing: set[fx.Node], placeholders: Sequence[fx.Node]) -> None:
        self._before = flowing  # nodes of the graph before
        self._flowing: set[fx.Node] = set()  # and of the forward graph
        self._forward, self._backward = fx.Graph(), fx.Graph()
        self._env: dict[fx.Node, fx.Node] = {}
        self._parts: dict[str, fx.Graph] = {}
        # Node, its results, and how their gradients become those of its operands.
        self._steps: list[tuple[fx.Node, list[fx.Node], Backward]] = []
        self._kept: dict[fx.Node, fx.Node] = {}  # of the forward graph -> of the backward graph
        self._list = self._backward.placeholder("kept")
        self._at: fx.Node | None = None
        for node in placeholders:
            self._stands_for(node, self._forward.node_copy(node))

    # -- what a row uses -------------------------------------------------------------------------

    def now(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the forward pass."""
        return self._emit(self._forward, target, args, kwargs)

    def then(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the backward pass, which keeps what it needs."""
        given: Any = fx.map_arg((args, kwargs), self._keep)
        return self._emit(self._backward, target, *given)

    def flows(self, value: Any) -> bool:
        """Whether a gradient is asked of this value of the forward pass."""
        return value in self._flowing

    def _emit(self, graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> fx.Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        made = graph.create_node(op, target, tuple(args), dict(kwargs))
        if self._at is not None:
            made.meta.update(place_in_model(self._at), stands_for=_original(self._at))
        return made

    def _keep(self, node: fx.Node) -> fx.Node:
        if node.graph is self._backward:
            return node
        if node not in self._kept:  # taken in the order of their first use
            self._kept[node] = self._backward.create_node(
                "call_method", "pop", (self._list,), name=node.name
            )
        return self._kept[node]

    # -- forward: each says whether it could -----------------------------------------------------

    def as_it_is(self, node: fx.Node) -> bool:
        """A call that no gradient flows through."""
        self._stands_for(node, self._forward.node_copy(node, lambda n: self._env[n]))
        return True

    def by_row(self, node: fx.Node) -> bool:
        """A call that has a row; or the place of a result of one, which has been taken."""
        if node in self._env:
            return True
        self._at = node
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._env[n])
        users = list(node.users)
        made = _made_by_row(self, node, args, kwargs)
        if made is None:
            return False
        results, backward = made
        if isinstance(results, list):
            if any(user.target is not operator.getitem for user in users):
                return False
            for user in users:
                place: Any = user.args[1]
                self._stands_for(user, results[place])
        else:
            self._stands_for(node, results)
            results = [results]
        self._steps.append((node, results, backward))
        return True

    def part(self, nodes: list[fx.Node]) -> bool:
        """Calls that autograd differentiates."""
        operands, results = operands_of(nodes), results_of(nodes)
        if any(map(_is_several, (*operands, *results))):
            return False
        name, self._at = f"part_{len(self._parts)}", nodes[-1]
        self._parts[name] = graph_of(nodes, operands)
        body = self._forward.create_node("get_attr", name, name=name)
        asked = tuple(n in self._before for n in operands)
        found = self.now(layer_function.recorded, body, asked, *(self._env[n] for n in operands))
        for place, result in enumerate(results):
            self._stands_for(result, self.now(operator.getitem, found, place))
        record = self.now(operator.getitem, found, len(results))
        leaves = [self._env[n] for n in operands if n in self._before]

        def backward(*dys: fx.Node | None) -> Gradients:
            made = self.then(layer_function.played_back, record, *dys)
            for place, leaf in enumerate(leaves):
                yield leaf, self.then(operator.getitem, made, place)

        self._steps.append((nodes[-1], [self._env[n] for n in results], backward))
        return True

    def _stands_for(self, node: fx.Node, made: fx.Node) -> None:
        made.meta = {**node.meta, "stands_for": _original(node)}
        self._env[node] = made
        if node in self._before:
            self._flowing.add(made)

    # -- backward --------------------------------------------------------------------------------

    def ended(
        self,
        results: Sequence[fx.Node],
        views: Sequence[bool],
        needed: Sequence[bool],
        reached: Sequence[Collection[int]],
        several: bool,
    ) -> Differentiated:
        """The backward graph written, and both closed."""
        gradients: dict[fx.Node, fx.Node] = {}
        made = [self._env[n] for n in results]
        flows = [n in self._flowing for n in made]
        dys = [self._backward.placeholder(f"d_{node.name}") for node in made]
        for node, dy, flowing in zip(made, dys, flows, strict=True):
            if flowing:
                gradients[node] = self.then(torch.add, gradients[node], dy) if node in gradients else dy
        for node, values, backward in reversed(self._steps):
            found = [gradients.pop(value, None) for value in values]
            if all(dy is None for dy in found):
                continue
            self._at = node
            for operand, gradient in backward(*found):
                if operand in self._flowing:
                    before = gradients.get(operand)
                    gradients[operand] = (
                        gradient if before is None else self.then(torch.add, before, gradient)
                    )
        operands = [n for n in self._forward.nodes if n.op == "placeholder"]
        asked = [gradients.get(n) for n, need in zip(operands, needed, strict=True) if need]
        self._backward.output(tuple(asked))
        own = [is_own(gradient) and asked.count(gradient) == 1 for gradient in asked]
        # A view that leaves a function of autograd must not be written into; what is detached may.
        made = [
            self.now(Tensor.detach, n) if view else n for n, view in zip(made, views, strict=True)
        ]
        self._forward.output((tuple(made), tuple(self._kept)))
        for graph in (self._forward, self._backward):
            graph.lint()
        given = [node in made for node in self._kept]
        kept = [place for place, node in enumerate(operands) if node in self._kept]
        return Differentiated(
            self._forward, self._backward, self._parts, needed, flows, given, kept, reached, own,
            several,
        )  # fmt: skip
