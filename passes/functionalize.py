"""Functionalize: what an operator writes into a value becomes a new value.

Before::

    scores = matmul(q, k)
    add_(scores, bias)                       # later uses read ``scores``
    row = select(slice(scores, 2, 0, 4), 1, 0)
    mul_(row, 2.0)                           # writes through two views

After::

    scores = matmul(q, k)
    scores_1 = add(scores, bias)
    part = slice(scores_1, 2, 0, 4)
    row = mul(select(part, 1, 0), 2.0)
    part_1 = select_scatter(part, row, 1, 0)
    scores_2 = slice_scatter(scores_1, part_1, 2, 0, 4)      # read by later uses and later views

Only memory that a parameter's value reaches is treated: what depends on no weight is computed on every
rank as it was written. Memory of the model's buffers and inputs stays written, which is meant.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import fx

from autoshard.errors import CaptureError
from autoshard.memory import SELF, storage, written
from autoshard.rules import bind, where
from autoshard.rules.call import op_name, traced_call

aten = torch.ops.aten

RESHAPES = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "view_as", "squeeze", *SELF)
PIECES = ("split", "split_with_sizes", "chunk", "unbind")


def functionalize(graph: fx.Graph, parameters: Collection[str]) -> fx.Graph:
    """No operator writes into a value that depends on a parameter; in place, the graph is returned.

    Args:
        graph: flat.
        parameters: placeholders of parameters.

    Raises:
        CaptureError: a write through a view that cannot be followed.
    """
    memories = _written_memories(graph, parameters)
    if memories:
        _Functionalizer(graph, memories).run()
    return graph


def _written_memories(graph: fx.Graph, parameters: Collection[str]) -> set[int]:
    """Memories made in the graph that are written, and hold what depends on a parameter."""
    writes = {storage(target) for n in graph.nodes if (target := written(n)) is not None}
    weighted: set[fx.Node] = set()
    reached: set[int | None] = set()  # a write makes all of its memory depend on what is written
    while True:
        for node in graph.nodes:
            depends = any(n in weighted or storage(n) in reached for n in node.all_input_nodes)
            if depends or (node.op == "placeholder" and node.name in parameters):
                weighted.add(node)
        more = {storage(n) for n in weighted} & writes
        if more == reached:
            break
        reached = more
    given = {storage(n) for n in graph.nodes if n.op == "placeholder"}
    return {m for m in reached - given if m is not None}


class _Functionalizer:
    """One walk over the graph; each use of a value in a written memory reads what it is by then."""

    def __init__(self, graph: fx.Graph, memories: set[int]) -> None:
        self.graph = graph
        self.members = {n: m for n in graph.nodes if (m := storage(n)) in memories}
        # A view's operand: of a piece, what was split. A write gives back what it wrote into.
        self.source: dict[fx.Node, fx.Node] = {}
        for node in self.members:
            source = node.args[0] if node.args else None
            if node.target is operator.getitem and isinstance(source, fx.Node) and source.args:
                source = source.args[0]
            if isinstance(source, fx.Node) and storage(source) == self.members[node]:
                self.source[node] = source
        self.versions = dict.fromkeys(memories, 0)
        self.now: dict[fx.Node, tuple[int, fx.Node]] = {}  # member -> its value at a version
        self.kept = {storage(t) for n in graph.nodes if (t := written(n)) is not None} - memories

    def run(self) -> None:
        """Writes become values; dead views and writes are erased."""
        for node in list(self.graph.nodes):
            target = written(node)
            with self.graph.inserting_before(node):
                if target is not None and target in self.members:
                    self._write(node, self._member(target))
                    continue
                version = self.versions.get(self.members.get(node, -1), 0)
                if version and node in self.source:
                    continue  # a later view: taken again where it is read
                node.args, node.kwargs = self._arguments(node)
                if node in self.members:
                    self.now[node] = (version, node)
        for node in reversed(self.members):
            if not node.users:
                self.graph.erase_node(node)

    def _member(self, node: fx.Node) -> fx.Node:
        while (target := written(node)) is not None:
            node = target
        return node

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def current(n: fx.Node) -> fx.Node:
            return self._value(n) if n in self.members else n

        args, kwargs = fx.map_arg((node.args, node.kwargs), current)
        return args, kwargs

    def _value(self, member: fx.Node) -> fx.Node:
        """The member's value at the insertion point."""
        member = self._member(member)
        version, value = self.now.get(member, (-1, member))
        current = self.versions[self.members[member]]
        if version == current:
            return value
        if member not in self.source:
            raise CaptureError(
                f"{where(member)} shows memory that is written into; it cannot be followed: clone it"
            )
        source = self._value(self.source[member])
        if member.target is operator.getitem:
            pieces = member.args[0]
            assert isinstance(pieces, fx.Node)
            whole = self._create(pieces.target, (source, *pieces.args[1:]), pieces.kwargs, pieces)
            value = self._create(operator.getitem, (whole, member.args[1]), {}, member)
        else:
            value = self._create(member.target, (source, *member.args[1:]), member.kwargs, member)
        self.now[member] = (current, value)
        return value

    def _create(
        self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: fx.Node
    ) -> fx.Node:
        return traced_call(self.graph, target, args, dict(kwargs), like)

    def _write(self, node: fx.Node, member: fx.Node) -> None:
        """``f_(m, ..)``: ``y = f(m, ..)``, then back through the views up to the first."""
        value = self._computed(node, member)
        written_back = {member: value}
        while member in self.source:
            parent = self._member(self.source[member])
            value = self._inverse(node, member, self._value(parent), value)
            written_back[parent] = value
            member = parent
        self.versions[self.members[member]] += 1
        for each, now in written_back.items():
            self.now[each] = (self.versions[self.members[member]], now)

    def _computed(self, node: fx.Node, member: fx.Node) -> fx.Node:
        """What the written operand holds afterwards."""
        args, kwargs = self._arguments(node)
        before = member.meta["val"]
        if op_name(node) == "copy_":
            value: fx.Node = args[1]
            if storage(value) in self.kept:  # may be written later
                value = self._create(aten.clone.default, (value,), {}, node)
        else:
            assert isinstance(node.target, torch._ops.OpOverload)
            packet = getattr(
                getattr(torch.ops, node.target.namespace), op_name(node).rpartition("::")[2][:-1], None
            )
            overload = getattr(packet, node.target._overloadname, None)
            if overload is None:
                raise CaptureError(f"{where(node)} has no form that does not write in place")
            value = self._create(overload, args, kwargs, node)
        if value.meta["val"].dtype != before.dtype:
            value = self._create(aten.to.dtype, (value, before.dtype), {}, node)
        if str(value.meta["val"].shape) != str(before.shape):
            value = self._create(aten.expand_as.default, (value, self._value(member)), {}, node)
        return value

    def _inverse(self, node: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """The parent whose view is ``value``, and which is as it was elsewhere."""
        name, like = op_name(view), view
        if view.target is operator.getitem:
            pieces, index = view.args[0], view.args[1]
            assert isinstance(pieces, fx.Node) and isinstance(index, int)
            if op_name(pieces) in PIECES:
                return self._put_piece(pieces, index, parent, value)
        elif name in RESHAPES:
            if str(parent.meta["val"].shape) == str(value.meta["val"].shape):
                return value
            return self._create(aten.reshape_as.default, (value, parent), {}, like)
        elif name in ("transpose", "t", "numpy_T", "permute", "unsqueeze", "slice", "narrow", "select"):
            given = bind(view)
            if name == "transpose":
                dims = (given["dim0"], given["dim1"])
                return self._create(aten.transpose.int, (value, *dims), {}, like)
            if name in ("t", "numpy_T"):
                return self._create(view.target, (value,), {}, like)
            if name == "permute":
                rank = len(given["dims"])
                order = [d % rank for d in given["dims"]]
                back = [order.index(d) for d in range(rank)]
                return self._create(aten.permute.default, (value, back), {}, like)
            if name == "unsqueeze":
                return self._create(aten.squeeze.dim, (value, given["dim"]), {}, like)
            if name == "select":
                args = (parent, value, given["dim"], given["index"])
                return self._create(aten.select_scatter.default, args, {}, like)
            if str(parent.meta["val"].shape) == str(value.meta["val"].shape):
                return value
            if name == "narrow":
                start, length = given["start"], given["length"]
                if not isinstance(start, int) or start < 0 or not isinstance(length, int):
                    return self._refuse(node, view)
                given = {"dim": given["dim"], "start": start, "end": start + length, "step": 1}
            return self._put_slice(parent, value, given, like)
        return self._refuse(node, view)

    def _refuse(self, node: fx.Node, view: fx.Node) -> NoReturn:
        raise CaptureError(
            f"{where(node)} writes through {where(view)}, which cannot be followed; compute a new value"
        )

    def _put_piece(self, pieces: fx.Node, index: int, parent: fx.Node, value: fx.Node) -> fx.Node:
        dim = bind(pieces)["dim"]
        if op_name(pieces) == "unbind":
            return self._create(aten.select_scatter.default, (parent, value, dim, index), {}, pieces)
        sizes = [piece.shape[dim] for piece in pieces.meta["val"]]
        start = sum(sizes[:index])
        if not isinstance(start + sizes[index], int):
            raise CaptureError(f"{where(pieces)}: a piece of symbolic size is written into; clone it")
        given = {"dim": dim, "start": start, "end": start + sizes[index], "step": 1}
        return self._put_slice(parent, value, given, pieces)

    def _put_slice(
        self, parent: fx.Node, value: fx.Node, given: Mapping[str, Any], like: fx.Node
    ) -> fx.Node:
        start, end = given["start"], given["end"]
        bounds = (0 if start is None else start, sys.maxsize if end is None else end, given["step"])
        args = (parent, value, given["dim"], *bounds)
        return self._create(aten.slice_scatter.default, args, {}, like)
