"""Fuse: a matmul and the collective beside it become one call, in what runs.

Before (one MLP, at degree 2)::

    norm_copy = ops.copy(norm, tp2)
    fc = aten.linear(norm_copy, w1, b1)
    act = aten.gelu(fc)
    out = aten.linear(act, w2)
    out_reduce = ops.reduce(out, tp2, True)
    out_add = aten.add(out_reduce, b2)

After::

    norm_copy = fused_ops.column_linear(norm, tp2, (w1,), (b1,), False)
    fc = operator.getitem(norm_copy, 0)
    act = aten.gelu(fc)
    out_add = fused_ops.row_linear((act,), tp2, (w2,), (b2,), False)

The graph that people read stays as it is. Fused is what is certain to be worth it and to be the same:

- all uses of a copy are matmuls by parameters, in one layout: q, k and v of separate weights are one
  call, with one sum for the three gradients of their input;
- a matmul by a parameter is used by an in-place sum alone, and that by an addition of a parameter with
  one dimension alone, if by any: the bias of the model's own operator, in the weight's dtype;
- two of these, used by their addition alone (attention and MLP side by side), are one, with one sum.

``proof/fused.py`` puts the calls back and compares with the proven graph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from autoshard import fused_ops, ops
from autoshard.sharded import Linked, Sharded

aten = torch.ops.aten

NONE = -1  # no such argument
# Matmuls: where their operand, weight and bias stand, and whether the weight is [in, out].
LINEARS: dict[Any, tuple[int, int, int, bool]] = {
    aten.linear.default: (0, 1, 2, False),
    aten.mm.default: (0, 1, NONE, True),
    aten.addmm.default: (1, 2, 0, True),
}


@dataclass(frozen=True)
class Linear:
    """A matmul by a parameter."""

    x: Any
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def fuse(sharded: Sharded, overlap: bool = True) -> Sharded:
    """The rank's graph with what runs, where anything can be fused; ``graph`` is unchanged.

    overlap: copies are fused with their matmuls, so that the sum of the input's gradient runs under
        the gradients of the weights: a choice of the plan.
    """
    before = sharded.unfused
    graphs = {name: _fused(body, overlap) for name, body in before.bodies.items()}
    graph = _fused(before.graph, overlap)
    if graph is None and not any(graphs.values()):
        return sharded
    bodies = {name: made or before.bodies[name] for name, made in graphs.items()}
    return replace(sharded, fused=Linked(graph or before.graph, bodies))


def linear_of(node: Any) -> Linear | None:
    """The node as a matmul by a parameter; None where it is something else."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return None
    if node.target not in LINEARS:
        return None
    x, weight, bias, transposed = LINEARS[node.target]
    args = dict(enumerate(node.args))
    found = Linear(args[x], cast(fx.Node, args[weight]), args.get(bias), transposed)  # type: ignore[arg-type]
    if not _is_parameter(found.weight, 2) or found.x in (found.weight, found.bias):
        return None
    fits = found.bias is None or (_is_parameter(found.bias, 1) and _fits(found.bias, found))
    return found if fits else None


def _is_parameter(node: Any, dim: int) -> bool:
    """A placeholder of so many dimensions: it is there wherever the call is put."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == dim


def _fused(graph: fx.Graph, overlap: bool) -> fx.Graph | None:
    """The graph with fused calls; None where there are none."""
    rows = _rows(graph)
    gone = {node for row in rows.values() for node in row.nodes}
    candidates = graph.nodes if overlap else ()
    columns = {n: c for n in candidates if (c := _column(n, gone)) is not None}
    if not rows and not columns:
        return None
    placed = {linear: (copy, i) for copy, found in columns.items() for i, linear in enumerate(found)}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in columns:
            env[node] = _emit_column(new, node, list(columns[node]), env)
        elif node in placed:
            copy, place = placed[node]
            env[node] = new.create_node(
                "call_function", operator.getitem, (env[copy], place), {}, name=node.name
            )
        elif node in rows:
            env[node] = _emit_row(new, rows[node], env)
        elif node in gone:
            continue
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    new.lint()
    return new


@dataclass(frozen=True)
class _Row:
    """Calls that are one: matmuls, their sums, the additions of biases, and of all of these."""

    nodes: tuple[fx.Node, ...]
    linears: tuple[Linear, ...]
    biases: tuple[fx.Node | None, ...]
    group: Any

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def _rows(graph: fx.Graph) -> dict[fx.Node, _Row]:
    """By their last calls; additions of two are joined in the order of the graph."""
    rows = {row.last: row for node in graph.nodes if (row := _row(node)) is not None}
    for node in graph.nodes:
        if node.target is not aten.add.Tensor or node.kwargs or len(set(node.args)) != 2:
            continue
        first, second = (rows.get(x) if isinstance(x, fx.Node) else None for x in node.args)
        if first is None or second is None or first.group is not second.group:
            continue
        if len(second.linears) > 1:  # sums are taken from the left
            continue
        layouts = {linear.transposed for linear in (*first.linears, *second.linears)}
        if len(layouts) == 1 and all(_only_user(row.last) is node for row in (first, second)):
            del rows[first.last], rows[second.last]
            rows[node] = _Row(
                (*first.nodes, *second.nodes, node), first.linears + second.linears,
                first.biases + second.biases, first.group,
            )  # fmt: skip
    return rows


def _row(node: fx.Node) -> _Row | None:
    """The calls that begin with this matmul."""
    linear = linear_of(node)
    total = _only_user(node)
    if linear is None or linear.bias is not None or total is None or total.target is not ops.reduce:
        return None
    if total.args[2:] != (True,):
        return None
    add = _only_user(total)
    if add is not None and add.target is aten.add.Tensor and not add.kwargs and add.args[0] is total:
        bias: Any = add.args[1]
        if _is_parameter(bias, 1) and _fits(bias, linear):
            return _Row((node, total, add), (linear,), (bias,), total.args[1])
    return _Row((node, total), (linear,), (None,), total.args[1])


def _column(node: fx.Node, gone: set[fx.Node]) -> tuple[fx.Node, ...] | None:
    """The matmuls that are all the uses of a copy, in the order of the graph."""
    if node.target is not ops.copy or not node.users or gone & node.users.keys():
        return None
    found = [linear_of(user) for user in node.users]
    if any(one is None or one.x is not node for one in found):
        return None
    layouts = {one.transposed for one in found if one is not None}
    return tuple(node.users) if len(layouts) == 1 else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fits(bias: fx.Node, linear: Linear) -> bool:
    """Whether it is one number for each column of the product, in its dtype: nothing is broadcast."""
    one, matrix = bias.meta["val"], linear.weight.meta["val"]
    columns = matrix.shape[1 if linear.transposed else 0]
    return bool(one.shape[0] == columns and one.dtype == matrix.dtype)


def _emit_column(
    new: fx.Graph, copy: fx.Node, linears: list[fx.Node], env: dict[fx.Node, fx.Node]
) -> fx.Node:
    found = [one for one in map(linear_of, linears) if one is not None]
    weights = tuple(one.weight for one in found)
    biases = tuple(one.bias for one in found)
    x, group = copy.args
    args = fx.map_arg((x, group, weights, biases, found[0].transposed), lambda n: env[n])
    return new.create_node("call_function", fused_ops.column_linear, args, {}, name=copy.name)


def _emit_row(new: fx.Graph, row: _Row, env: dict[fx.Node, fx.Node]) -> fx.Node:
    xs, weights = tuple(n.x for n in row.linears), tuple(n.weight for n in row.linears)
    given = (xs, row.group, weights, row.biases, row.linears[0].transposed)
    args = fx.map_arg(given, lambda n: env[n])
    total = next(n for n in reversed(row.nodes) if n.target is ops.reduce)
    return new.create_node("call_function", fused_ops.row_linear, args, {}, name=total.name)
