"""Shard: write the rank's own graph. Decides nothing; the same graph runs on every rank.

Before (one MLP)::

    fc = aten.addmm(b1, x, w1)          # [B·S, 4h]
    act = aten.gelu(fc)
    out = aten.addmm(b2, act, w2)       # [B·S, h]

After, at degree 2 (paper, figure 3a: f is ``copy``, g is ``reduce``)::

    x_copy = ops.copy(x, tp2)           # identity; all-reduce of the gradient
    fc = aten.addmm(b1, x_copy, w1)     # [B·S, 2h]   columns of w1
    act = aten.gelu(fc)
    out = aten.mm(act, w2)              # rows of w2: a partial sum
    out_reduce = ops.reduce(out, tp2, True)  # all-reduce, in place; identity for the gradient
    out_add = aten.add(out_reduce, b2)  # the bias once

A value is either *whole* (the same on every rank, its gradient whole) or *inside* a group of d ranks
(a share of its split axes; its gradient is a partial sum over the ranks that hold the same share).
Whole values enter through ``copy`` where a gradient can flow, and are sliced where they hold a split
axis; inside values leave through ``reduce`` where the axis was summed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from autoshard import ops, shares
from autoshard.analysis import AUTOCAST, CHECKPOINT, WHOLE, Axes
from autoshard.assignment import Assignment, stored_dim
from autoshard.axes import Axis, Size, atoms_of
from autoshard.errors import PlanError
from autoshard.flow import LOOKUP, LOSS, flow
from autoshard.layouts import Layout, chunks, is_contiguous, is_split, same_shares
from autoshard.rules import Call, rule_for, where
from autoshard.sharded import Sharded, SplitOutput

aten = torch.ops.aten

# The operator without its bias, which is added once after the reduction.
UNBIASED: dict[Any, tuple[Any, str]] = {
    aten.linear.default: (aten.linear.default, "bias"),
    aten.addmm.default: (aten.mm.default, "self"),
    aten.baddbmm.default: (aten.bmm.default, "self"),
    aten.conv1d.default: (aten.conv1d.default, "bias"),
    aten.conv2d.default: (aten.conv2d.default, "bias"),
}

CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2}

# The operator that says in full what the local one must do.
WITH_LOCAL_SIZES: dict[Any, Any] = {
    aten.chunk.default: aten.split_with_sizes.default,
    aten.split.Tensor: aten.split_with_sizes.default,
    aten.squeeze.default: aten.squeeze.dims,
    aten.squeeze.dim: aten.squeeze.dims,
}


def shard(
    graph: fx.Graph, axes: Axes, assignment: Assignment, keep_split: Collection[int] = ()
) -> Sharded:
    """Rewrite the captured graph into the graph that each rank runs.

    Args:
        graph: normalized, unchanged by this.
        axes: its analysis.
        assignment: which axes are cut.
        keep_split: positions of flat outputs that leave as shares where their layout allows it.
    """
    return _Sharder(graph, axes, assignment, keep_split).run()


class _Sharder:
    def __init__(
        self, graph: fx.Graph, axes: Axes, assignment: Assignment, keep_split: Collection[int]
    ) -> None:
        self.old, self.axes, self.assignment = graph, axes, assignment
        self.keep_split = keep_split
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.flow = flow(graph, axes, assignment)
        self.inside = self.flow.inside
        self.stored: dict[str, tuple[int, Layout, int]] = {}
        self.groups: dict[int, fx.Node] = {}
        self.entered: dict[tuple[Any, ...], fx.Node] = {}
        self.outputs: list[SplitOutput | None] = []

    def run(self) -> Sharded:
        placeholders = [n for n in self.old.nodes if n.op == "placeholder"]
        for node in placeholders:
            self._placeholder(node)
        for degree in sorted({1, *(c.degree for c in self.assignment.cuts.values())}):
            name = f"tp{degree}"
            self.groups[degree] = self.new.create_node("get_attr", name, name=name)
        for node in self.old.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                self._output(node)
            elif node in self.axes.calls:
                self._call(node, self.axes.calls[node])
            elif node.target is operator.getitem and node.args[0] in self.inside:
                self.env[node] = self._copied(node)
            elif node.target is aten.sym_size.int and node.args[0] in self.inside:
                self._global_size(node)
            else:
                self.env[node] = self._whole(node)
        for node, made in self.env.items():
            made.meta[WHOLE] = node.meta.get("val")
        self._under_autocast()
        for node in reversed(list(self.new.nodes)):
            if node.op == "get_attr" and not node.users:
                self.new.erase_node(node)
        self.new.lint()
        used = [d for d, n in self.groups.items() if n.users]
        return Sharded(self.new, self.stored, tuple(self.outputs), tuple(used))

    def _under_autocast(self) -> None:
        """What the model ran under ``torch.autocast`` runs so; our own operators need no cast."""
        for node in self.new.nodes:
            modes = node.meta.get(AUTOCAST)
            if modes is None:
                continue
            if node.target is ops.with_stream:
                node.args, node.target = (modes, *node.args), ops.with_autocast
            elif isinstance(node.target, torch._ops.OpOverload):
                node.args, node.target = (modes, None, node.target, *node.args), ops.with_autocast

    # -- nodes ---------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> None:
        self.env[node] = self._copied(node)
        if node not in self.axes.dims:
            return
        dims = self.axes.dims[node]
        if node in self.axes.held:
            self._given(node, dims, *self.axes.held[node])
            return
        dim = stored_dim(dims, self.assignment)
        if dim is not None:
            degree = self.assignment.degree(dims)
            self.stored[str(node.target)] = (dim, self.assignment.layout(dims[dim]), degree)

    def _given(
        self, node: fx.Node, dims: tuple[Axis, ...], dim: int, layout: Layout, degree: int
    ) -> None:
        """An input that the rank is given its share of is split as the plan splits its axes."""
        own = [self.assignment.layout(axis) for axis in dims]
        split = [i for i, one in enumerate(own) if is_split(one)]
        if split != [dim] or not same_shares(own[dim], layout, degree):
            needed = "; ".join(f"{own[i]} in dimension {i}" for i in split) or "whole"
            raise PlanError(
                f"the input {node.name} is given split as {layout} in dimension {dim} over {degree} "
                f"ranks, and the plan needs it {needed}: pass what this model gave, or a whole tensor"
            )

    def _whole(self, node: fx.Node) -> fx.Node:
        """The node as it was, on whole operands."""
        for operand in node.all_input_nodes:
            if operand in self.inside:
                raise PlanError(f"{where(node)} needs {operand} whole, which is split")
        if _is_random(node):
            return self._random(node, self.groups[1], node.target, node.args, node.kwargs)
        return self._copied(node)

    def _copied(self, node: fx.Node) -> fx.Node:
        new = self.new.node_copy(node, lambda n: self.env[n])
        new.meta = dict(node.meta)
        return new

    def _call(self, node: fx.Node, call: Call) -> None:
        degree = self.flow.degree.get(node, 1)
        if degree == 1:
            self.env[node] = self._whole(node)
            return
        summed = self.assignment.cuts_in(call.summed)
        arguments = self._operands(node, call, degree, bool(summed))
        group = self.groups[degree]
        if self.flow.reduced.get(node) in (LOOKUP, LOSS):
            self._lookup(node, call, arguments, group)
            return
        rule, target = rule_for(node.target), node.target
        if rule is not None and rule.localize is not None:
            sizes = rule.localize(call, _Local(self, node))
            arguments.update(sizes)
            target = WITH_LOCAL_SIZES.get(target, target) if sizes else target
        if summed:
            self._weigh(call, arguments, degree, group)
        result = self._emit(node, call, target, arguments, group, bool(summed))
        if summed:
            kept = self.assignment.cuts_in(call.outputs[0] or ())
            if kept:
                raise PlanError(f"{where(node)} sums one split axis and keeps another")
            result = self._reduced(node, call, result, arguments, group, summed, degree)
        self.env[node] = result

    def _weigh(self, call: Call, arguments: dict[str, Any], degree: int, group: fx.Node) -> None:
        """Where ranks hold some elements of a summed axis more often than others: one operand times
        the number of pieces that the element's part is cut in."""
        for axis in call.summed:
            if self.assignment.pieces(axis) is not None:
                continue
            for (name, index), dims in call.operands.items():
                found = [d for d, a in enumerate(dims) if a.find() is axis.find()]
                if not found or (name, index) in call.added_once:
                    continue
                value = arguments[name] if index is None else arguments[name][index]
                args = (value, found[0], str(self.assignment.layout(axis)), group)
                new = self._create(call.node, "weighed", shares.weighed, args)
                if index is None:
                    arguments[name] = new
                else:
                    arguments[name][index] = new
                break

    def _operands(self, node: fx.Node, call: Call, degree: int, summed: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, value in call.arguments.items():
            if isinstance(value, (list, tuple)):
                arguments[name] = [
                    self._operand(call, (name, i), v, degree, summed) for i, v in enumerate(value)
                ]
            else:
                arguments[name] = self._operand(call, (name, None), value, degree, summed)
        return arguments

    def _operand(
        self, call: Call, slot: tuple[str, int | None], value: Any, degree: int, summed: bool
    ) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if slot not in call.operands:
            return self.env[value]
        if summed and slot in call.added_once:
            return self._outside(call.node, value)
        dims = call.operands[slot]
        if self.inside.get(value) == degree:
            vocabulary = call.lookup if ("indices", None) in call.operands else None
            lookup = vocabulary is not None and bool(self.assignment.cuts_in([vocabulary]))
            if lookup:
                return self.env[value]
            if self._is_split(value):
                return self._padded(value, dims)
            return self._part(value, self.env[value], dims, degree)
        return self._enter(call.node, value, dims, degree)

    def _is_split(self, value: fx.Node) -> bool:
        """Whether a rank has a share of the value, and not all of it."""
        return any(is_split(self.assignment.layout(axis)) for axis in self.axes.dims.get(value, ()))

    def _outside(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """The value outside; one without a split axis leaves the group that it is inside of."""
        if value not in self.inside:
            return self.env[value]
        if self._is_split(value):
            raise PlanError(
                f"{where(node)} needs {value} whole, which is split over {self.inside[value]} ranks"
            )
        key = ("leave", value)
        if key not in self.entered:
            args = (self.env[value], self.groups[self.inside[value]])
            self.entered[key] = self._create(value, "leave", ops.leave, args)
        return self.entered[key]

    def _enter(
        self, node: fx.Node, value: fx.Node, dims: tuple[Axis, ...], degree: int
    ) -> fx.Node:
        """A whole value enters a group: ``copy``, then the rank's own part."""
        result = self._outside(node, value)
        if value in self.axes.differentiable:
            key = ("copy", value, degree)
            if key not in self.entered:
                args = (result, self.groups[degree])
                self.entered[key] = self._create(value, "copy", ops.copy, args)
            result = self.entered[key]
        return self._part(value, result, dims, degree)

    def _part(
        self, value: fx.Node, result: fx.Node, dims: tuple[Axis, ...], degree: int
    ) -> fx.Node:
        """The rank's own part of a value that it has whole."""
        group = self.groups[degree]
        key: tuple[Any, ...]
        for dim, axis in enumerate(dims):
            if axis.find().size == 1:
                continue
            layout = self.assignment.layout(axis)
            if not is_split(layout):
                continue
            key = ("part", result, dim, layout)
            if key not in self.entered:
                part = (result, dim, str(layout), group)
                self.entered[key] = self._create(value, "part", shares.local_part, part)
            result = self.entered[key]
            cut = self.assignment.cuts.get(axis.find())
            if cut is not None and cut.padded * cut.parts != axis.find().size:
                key = ("pad", result, dim, cut.padded)
                if key not in self.entered:
                    args = (result, dim, cut.padded)
                    self.entered[key] = self._create(value, "pad", shares.pad_to, args)
                result = self.entered[key]
        return result

    def _padded(self, value: fx.Node, dims: tuple[Axis, ...]) -> fx.Node:
        """A vocabulary-split parameter, its rows padded to the same number on every rank."""
        result = self.env[value]
        if value.op != "placeholder":
            return result
        for dim, axis in enumerate(dims):
            cut = self.assignment.cuts.get(axis.find())
            if cut is None or cut.padded * cut.parts == axis.find().size:
                continue
            key = ("pad", value, dim)
            if key not in self.entered:
                args = (result, dim, cut.padded)
                self.entered[key] = self._create(value, "pad", shares.pad_to, args)
            result = self.entered[key]
        return result

    def _emit(
        self, node: fx.Node, call: Call, target: Any, arguments: dict[str, Any], group: fx.Node,
        summed: bool,
    ) -> fx.Node:  # fmt: skip
        if summed and call.added_once:
            target, bias = UNBIASED[node.target]
            arguments = {**arguments}
            self._bias = arguments.pop(bias)
            if node.target in CONVOLUTIONS:  # [channels] beside [.., channels, length]
                shape = [-1] + [1] * CONVOLUTIONS[node.target]
                self._bias = self._create(node, "bias", aten.reshape.default, (self._bias, shape))
            arguments.pop("beta", None), arguments.pop("alpha", None)
        args, kwargs = _positional(target, arguments)
        if _is_random(node):
            missing = set(self.assignment.cuts_in(d for o in call.operands.values() for d in o))
            here = self.assignment.cuts_in(call.outputs[0] or ())
            dims = call.outputs[0] or ()
            if here and self.assignment.copies(dims, self.assignment.degree(dims)) != 1:
                raise PlanError(f"{where(node)} draws random numbers for shared heads: {missing}")
            return self._random(node, group, target, args, kwargs)
        new = self.new.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        return new

    def _random(self, node: fx.Node, group: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        args = fx.map_arg(args, lambda n: self.env.get(n, n))
        kwargs = fx.map_arg(kwargs, lambda n: self.env.get(n, n))
        new = self.new.create_node(
            "call_function", ops.with_stream, (group, target, *args), kwargs, name=node.name
        )
        new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        return new

    def _reduced(
        self, node: fx.Node, call: Call, result: fx.Node, arguments: dict[str, Any],
        group: fx.Node, summed: Mapping[Axis, Any], degree: int,
    ) -> fx.Node:  # fmt: skip
        # Ranks that hold the same piece all add it. A mean divides by the local size.
        pieces = [self.assignment.pieces(axis) for axis in call.summed]
        factor = math.prod(p for p in pieces if p is not None) / degree
        if call.averaged:
            for axis in call.summed:
                axis = axis.find()
                if self.assignment.cuts_in([axis]):
                    factor *= self.assignment.size(axis) / axis.size
        alpha, beta = arguments.get("alpha", 1), arguments.get("beta", 1)
        if call.added_once and alpha != 1:
            result = self._create(node, "scale", aten.mul.Tensor, (result, alpha))
        if factor != 1:
            result = self._create(node, "scale", aten.mul.Tensor, (result, factor))
        # A product's result is nobody else's and not kept for its gradient: reduced in its memory.
        args = (result, group, True) if call.flops else (result, group)
        result = self._create(node, "reduce", ops.reduce, args)
        if call.added_once:
            if AUTOCAST in node.meta:  # the product is in lower precision than the bias
                self._bias = self._create(node, "bias", aten.type_as.default, (self._bias, result))
            kwargs = {} if beta == 1 else {"alpha": beta}
            result = self._create(node, "add", aten.add.Tensor, (result, self._bias), kwargs)
        return result

    def _lookup(self, node: fx.Node, call: Call, arguments: dict[str, Any], group: fx.Node) -> None:
        assert call.lookup is not None
        vocab = call.lookup.find()
        cut = self.assignment.cuts[vocab]
        if ("indices", None) in call.operands:
            args: tuple[Any, ...] = (
                arguments["weight"], arguments["indices"], group, vocab.size, cut.rows,
                arguments["padding_idx"],
            )  # fmt: skip
            new = self._create(node, "", ops.vocab_embedding, args)
            self.env[node] = self._create(node, "reduce", ops.reduce, (new, group, True))
            return
        logits = arguments["self"]
        if AUTOCAST in node.meta:  # casts what PyTorch's loss would have cast
            logits = self._create(node, "logits", aten.to.dtype, (logits, node.meta["val"].dtype))
        args = (
            logits, arguments["target"], group, vocab.size, cut.rows,
            arguments["weight"], arguments["reduction"], arguments["ignore_index"],
            arguments["label_smoothing"],
            *([0] if len(call.operands["self", None]) == 1 else []),
        )  # fmt: skip
        self.env[node] = self._create(node, "", ops.vocab_cross_entropy, args)

    def _global_size(self, node: fx.Node) -> None:
        """A size read off a rank's share, as the model means it."""
        source, dim = node.args[0], node.args[1]
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        axis = self.axes.dims[source][dim]
        factor = math.prod(c.parts for c in self.assignment.cuts_in([axis]).values())
        new = self._copied(node)
        if factor > 1:
            new = self._create(node, "whole", operator.mul, (new, factor))
        self.env[node] = new

    def _output(self, node: fx.Node) -> None:
        flat: list[Any] = []
        for index, value in enumerate(node.args[0]):  # type: ignore[arg-type]
            split: SplitOutput | None = None
            result = value
            if isinstance(value, fx.Node):
                result = self.env[value]
                if value in self.inside:
                    result, split = self._leaving(value, index)
            flat.append(result)
            self.outputs.append(split)
        self.new.output(tuple(flat))

    def _leaving(self, value: fx.Node, index: int) -> tuple[fx.Node, SplitOutput | None]:
        result, degree = self._padded(value, self.axes.dims[value]), self.inside[value]
        group = self.groups[degree]
        dims = self.axes.dims[value]
        args: tuple[Any, ...]
        split = [i for i, a in enumerate(dims) if is_split(self.assignment.layout(a))]
        if index in self.keep_split and len(split) == 1:
            dim = split[0]
            axis = dims[dim].find()
            cut, layout = self.assignment.cuts.get(axis), self.assignment.layout(axis)
            if chunks(layout, degree) is not None:
                if cut is not None and cut.padded * cut.parts != axis.size:
                    args = (result, dim, group, cut.rows, axis.size)
                    result = self._create(value, "own", shares.own_rows, args)
                return result, SplitOutput(dim, layout, degree)
        if not split:
            return self._outside(value, value), None
        if len(split) > 1:
            texts = tuple(str(self.assignment.layout(dims[d])) for d in split)
            result = self._create(value, "new", aten.unsqueeze.default, (result, 0))
            result = self._create(value, "gather", ops.gather, (result, 0, group))
            args = (result, tuple(split), texts, degree)
            return self._create(value, "join", shares.joined, args), None
        for dim in split:
            axis = dims[dim].find()
            cut = self.assignment.cuts.get(axis)
            result = self._create(value, "gather", ops.gather, (result, dim, group))
            if cut is not None and cut.padded * cut.parts != axis.size:
                args = (result, dim, cut.padded, cut.rows, axis.size)
                result = self._create(value, "unpad", shares.unpad, args)
            else:
                layout = self.assignment.layout(axis)
                if not is_contiguous(layout, degree):
                    args = (result, dim, str(layout), degree)
                    result = self._create(value, "order", shares.in_order, args)
        return result, None

    # -- helpers -------------------------------------------------------------------------------

    def _create(
        self, origin: fx.Node, suffix: str, target: Any, args: tuple[Any, ...], kwargs: Any = None
    ) -> fx.Node:
        name = f"{origin.name}_{suffix}" if suffix else origin.name
        if origin.op == "placeholder" and name.startswith("p_"):
            name = name[2:]
        new = self.new.create_node("call_function", target, args, kwargs or {}, name=name)
        for key in ("nn_module_stack", "stack_trace", AUTOCAST, CHECKPOINT):
            if key in origin.meta:
                new.meta[key] = origin.meta[key]
        return new


class _Local:
    """A rule's view of the rank (``autoshard.rules.local.Local``)."""

    def __init__(self, sharder: _Sharder, node: fx.Node) -> None:
        self.sharder, self.node = sharder, node

    def size(self, axis: Axis) -> Size:
        return self.sharder.assignment.size(axis)

    def size_argument(self, given: int | fx.Node, axis: Axis) -> int | fx.Node:
        assignment = self.sharder.assignment
        if isinstance(given, fx.Node):
            given = self.sharder.env.get(given, given)
            parts = math.prod(c.parts for c in assignment.cuts_in([axis]).values())
            if parts == 1:
                return given
            return self.sharder._create(self.node, "local", operator.floordiv, (given, parts))
        if given == -1 or not set(atoms_of(axis)) & set(assignment.cuts):
            return given
        size = assignment.size(axis)
        assert isinstance(size, int)
        return size


def _positional(target: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as a call: positional where the schema has them so, defaults left out."""
    names = list(target._schema.arguments)
    given = dict(arguments)
    if target in (aten.mm.default, aten.bmm.default) and "mat1" in given:
        given = {"self": given["mat1"], "mat2": given["mat2"]}
    if target is aten.bmm.default and "batch1" in given:
        given = {"self": given["batch1"], "mat2": given["batch2"]}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for spec in names:
        if spec.name not in given and not spec.has_default_value():
            continue
        value = given.get(spec.name, spec.default_value)
        if spec.kwarg_only:
            if value is not None and not (spec.has_default_value() and _same(value, spec)):
                kwargs[spec.name] = value
        else:
            args.append(value)
    while args and len(args) > 1 and names[len(args) - 1].has_default_value():
        if not _same(args[-1], names[len(args) - 1]):
            break
        args.pop()
    return tuple(args), kwargs


def _same(value: Any, spec: Any) -> bool:
    default = spec.default_value
    return type(value) is type(default) and bool(value == default)


def _is_random(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return torch.Tag.nondeterministic_seeded in node.target.tags
