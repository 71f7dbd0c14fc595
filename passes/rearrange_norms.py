"""Rearrange norms: a stack with its norms after the residual additions gets them before the sublayers.

Figure 7 of the Megatron-LM paper (arXiv 1909.08053): BERT as it was published, (a), does not train
when it is deep; with its norms moved, (b), it does. This is another function, on purpose.

Before, (a): every sum is normed, and what goes on, into the sublayer and past it, is normed::

    h0 = dropout(norm_0(e))              # e: the sum of the embeddings
    x1 = h0 + attention(h0)
    h1 = norm_1(x1)
    x2 = h1 + mlp(h1)
    h2 = norm_2(x2)                      # the stack's result, or the next layer's h0

After, (b): what goes past the sublayers is the sum itself::

    x0 = dropout(e)
    h0 = norm_0(x0)
    x1 = x0 + attention(h0)
    h1 = norm_1(x1)
    x2 = x1 + mlp(h1)
    h2 = norm_2(x2)                      # the final norm, or the next layer's first one

So each norm stays where it is on the way into the sublayer behind it, with its name and parameters, and
the way past the sublayer leaves it out. What each of them normalises then (names as in BERT):

- ``embeddings.LayerNorm``: what the first attention reads. The stack carries the embeddings' sum.
- ``layer.i.attention.output.LayerNorm``: what the MLP of layer i reads.
- ``layer.i.output.LayerNorm``: what the attention of layer i + 1 reads; the last layer's is the final
  norm, of what leaves the stack.

Any other reader of a norm's result (a list of all hidden states) still gets what is normed. Dropout of
the first norm's result becomes dropout of what is carried, with the same masks.

All is found by structure: a residual addition is ``x + f(x)`` with a weight in ``f``; it is rearranged
where x is a norm's result and a norm alone reads the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from autoshard.errors import AutoshardError
from autoshard.paths import layer_of, module_path
from autoshard.rules import bind
from autoshard.rules.call import is_tensor, op_name, shape_of

NORMS = ("layer_norm", "rms_norm")
CARRIERS = ("dropout", "clone")  # a norm's result all the same; dropout that is off is a clone
SCALINGS = (*CARRIERS, "mul", "div", "to", "contiguous")
SHOWN = 6


@dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition: ``carried + f(root)``, where carried is root, scaled or not."""

    node: fx.Node
    carried: fx.Node
    root: fx.Node


def rearrange_norms(graph: fx.Graph, parameters: Collection[str], inputs: Collection[str]) -> fx.Graph:
    """Move every norm from behind its residual addition to before the next sublayer, in place.

    Args:
        graph: normalized.
        parameters: placeholders of parameters.
        inputs: placeholders of the model's inputs.

    Raises:
        AutoshardError: no residual addition is as in figure 7a, or some are not; names their layers.
    """
    values = _values(graph, parameters, inputs)
    norms: dict[Sum, fx.Node] = {}
    faults: dict[fx.Node, str] = {}
    for found in _sums(graph, values):
        norm, reason = _norm_before(found)
        if norm is None:
            faults[found.node] = reason
        else:
            norms[found] = norm
    _check(graph, norms, faults, values)
    for norm in dict.fromkeys(norms.values()):
        _carry_input(norm)
    for found, norm in norms.items():
        found.node.replace_input_with(norm, _input(norm))
    graph.lint()
    return graph


# -- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Values:
    """What depends on the model's inputs, and what on parameters alone; sizes are neither."""

    data: set[fx.Node]
    weights: set[fx.Node]
    order: dict[fx.Node, int]

    def flows(self, node: fx.Node) -> bool:
        """Whether it is a floating tensor that an input has gone into."""
        return node in self.data and is_tensor(node) and node.meta["val"].is_floating_point()


def _values(graph: fx.Graph, parameters: Collection[str], inputs: Collection[str]) -> _Values:
    found = _Values(set(), set(), {node: place for place, node in enumerate(graph.nodes)})
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "placeholder" and node.name in parameters:
            found.weights.add(node)
        elif node.op == "placeholder" and node.name in inputs:
            found.data.add(node)
        elif any(o in found.data for o in operands):
            if not isinstance(node.meta.get("val"), (int, torch.SymInt)):
                found.data.add(node)
        elif any(o in found.weights for o in operands):
            found.weights.add(node)
    return found


def _sums(graph: fx.Graph, values: _Values) -> Iterator[Sum]:
    """The residual additions, in the graph's order."""
    for node in graph.nodes:
        if op_name(node) != "add" or not is_tensor(node):
            continue
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and values.flows(a)]
        if len(operands) < 2 or not _alike(*operands):
            continue
        for carried, branch in (operands, reversed(operands)):
            root = next((r for r in _beneath(carried, values) if _feeds(r, branch, values)), None)
            if root is not None:
                yield Sum(node, carried, root)
                break


def _alike(left: fx.Node, right: fx.Node) -> bool:
    """Whether neither is broadcast to the other (a mask to scores)."""
    a, b = shape_of(left.meta["val"]), shape_of(right.meta["val"])
    return len(a) == len(b) and all((i == 1) == (j == 1) for i, j in zip(a, b, strict=True))


def _beneath(node: fx.Node, values: _Values) -> Iterator[fx.Node]:
    """The value, and what it is a multiple of."""
    yield node
    while op_name(node) in SCALINGS:
        operands = [o for o in node.all_input_nodes if values.flows(o) and _alike(o, node)]
        if len(operands) != 1:
            return
        node = operands[0]
        yield node


def _feeds(source: fx.Node, branch: fx.Node, values: _Values) -> bool:
    """Whether a way leads from the source to the branch on which a matrix of weights is read."""
    between: set[fx.Node] = set()
    stack = [branch]
    while stack:
        node = stack.pop()
        if values.order[node] > values.order[source] and node not in between:
            between.add(node)
            stack.extend(node.all_input_nodes)
    after: set[fx.Node] = {source}  # what the source goes into
    weighted: set[fx.Node] = set()  # after a matrix was read
    for node in sorted(between, key=values.order.__getitem__):
        operands = node.all_input_nodes
        if any(o in after for o in operands):
            after.add(node)
            if any(o in weighted or (o in values.weights and _is_matrix(o)) for o in operands):
                weighted.add(node)
    return branch in weighted


def _is_matrix(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dim() > 1


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _input(norm: fx.Node) -> fx.Node:
    source = bind(norm)["input"]
    assert isinstance(source, fx.Node)
    return source


# -- what is as in figure 7a ----------------------------------------------------------------------


def _norm_before(found: Sum) -> tuple[fx.Node | None, str]:
    """The norm whose result is carried past the sublayer; or why there is none."""
    if found.carried is not found.root or bind(found.node)["alpha"] != 1:
        return None, "it adds a multiple of what the sublayer reads"
    readers = list(found.node.users)
    if len(readers) != 1 or not _reads(readers[0], found.node):
        return None, "a norm alone should read the sum"
    norm = found.carried
    while op_name(norm) in CARRIERS:
        norm = norm.all_input_nodes[0]
        if len(norm.users) != 1:
            return None, "it adds the dropout of what others read as it is"
    if op_name(norm) not in NORMS:
        return None, "what goes past the sublayer should be a norm's result"
    if norm.meta["val"].dtype != _input(norm).meta["val"].dtype:
        return None, "the norm before it changes the dtype"
    return norm, ""


def _reads(node: fx.Node, value: fx.Node) -> bool:
    return op_name(node) in NORMS and _input(node) is value


def _check(
    graph: fx.Graph, norms: dict[Sum, fx.Node], faults: dict[fx.Node, str], values: _Values
) -> None:
    """All residual additions of a stack are rearranged, or none."""
    if not norms:
        told = "; ".join(_told(faults)) or "it has no residual addition x + f(x)"
        raise AutoshardError(
            "pre_norm=True moves norms that follow residual additions, norm(x + f(x)) where x is a "
            f"norm's result, as in BERT; this model has none: {told}. Leave pre_norm out"
        )
    carried, summed = set(norms.values()), {found.node for found in norms}
    behind: set[fx.Node] = set()  # what depends on a norm that is carried
    for node in graph.nodes:
        if any(o in behind for o in node.all_input_nodes):
            behind.add(node)
            if op_name(node) in NORMS and (source := _input(node)) not in summed:
                terms = [o for o in source.all_input_nodes if values.flows(o)]
                if node in carried or (_is_pointwise(source) and len(terms) > 1):
                    reason = "a norm reads it, and it is no residual addition x + f(x)"
                    faults.setdefault(source, reason)
        elif node in carried:
            behind.add(node)
    if faults:
        raise AutoshardError(
            f"pre_norm=True can rearrange {len(norms)} residual additions of this model, and not: "
            f"{'; '.join(_told(faults))}. All layers must be norm(x + f(x)) where x is a norm's "
            "result, the first layer's x too"
        )


def _told(faults: dict[fx.Node, str]) -> Iterable[str]:
    """A line for each layer that does not fit."""
    lines: dict[str, str] = {}
    for node, reason in faults.items():
        path = module_path(node)
        lines.setdefault(layer_of(path) or path or "the top of the model", f"{reason} ({node.name})")
    told = [f"{layer}: {reason}" for layer, reason in lines.items()]
    return [*told[:SHOWN], *([f"and {len(told) - SHOWN} more layers"] if len(told) > SHOWN else [])]


# -- what becomes of it ---------------------------------------------------------------------------


def _carry_input(norm: fx.Node) -> None:
    """``dropout(norm(e))`` becomes ``norm(dropout(e))``: what is carried is dropped out."""
    after = list(norm.users)
    while len(after) == 1 and op_name(after[0]) in CARRIERS:
        carrier, source = after[0], _input(norm)
        carrier.replace_input_with(norm, source)
        carrier.replace_all_uses_with(norm)
        norm.prepend(carrier)
        norm.replace_input_with(source, carrier)
        after = list(norm.users)
