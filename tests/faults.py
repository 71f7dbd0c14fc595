"""Faults: one change to a rewritten graph, at every place where it can be made."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autoshard import ops, shares
from autoshard.layouts import Concat, Layout, Leaf, Product
from autoshard.sharded import Sharded

aten = torch.ops.aten
CALLS = (
    ops.copy, ops.reduce, ops.leave, ops.gather, shares.local_part, shares.pad_to, shares.weighed,
    shares.in_order, shares.unpad, shares.own_rows, shares.joined,
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A changed graph: what was changed, at which node, and the first node that can show it."""

    kind: str
    node: str
    what: str
    sharded: Sharded


Change = Callable[[fx.Node, "Site"], None]


class Site:
    """A copy of the graph in which one node is changed."""

    def __init__(self, sharded: Sharded, name: str) -> None:
        self.sharded = sharded
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(sharded.graph, {}))
        self.node = next(n for n in self.graph.nodes if n.name == name)

    def group(self, degree: int) -> fx.Node:
        """The group of this degree, made where the graph has none."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == f"tp{degree}":
                return node
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.graph.create_node("get_attr", f"tp{degree}", name=f"tp{degree}")

    def insert(self, target: Any, args: tuple[Any, ...], after: fx.Node) -> fx.Node:
        """A new call behind a node."""
        with self.graph.inserting_after(after):
            new = self.graph.create_node("call_function", target, args)
        new.meta = dict(after.meta)
        return new


def _calls(sharded: Sharded, *targets: Any) -> list[fx.Node]:
    return [n for n in sharded.graph.nodes if n.op == "call_function" and n.target in targets]


def _operators(sharded: Sharded) -> list[fx.Node]:
    return [
        n
        for n in sharded.graph.nodes
        if n.op == "call_function"
        and (isinstance(n.target, torch._ops.OpOverload) or n.target is ops.with_stream)
    ]


def _made(
    kind: str, sharded: Sharded, node: fx.Node, what: str, change: Callable[[Site], Any]
) -> Fault:
    site = Site(sharded, node.name)
    change(site)
    return Fault(kind, node.name, what, replace(sharded, graph=site.graph))


def removed(sharded: Sharded) -> Iterator[Fault]:
    """Each collective or local part left out."""
    for node in _calls(sharded, *CALLS):

        def change(site: Site) -> None:
            site.node.replace_all_uses_with(site.node.args[0])
            site.graph.erase_node(site.node)

        yield _made("removed", sharded, node, f"without {node.target.__name__}", change)


def bypassed(sharded: Sharded) -> Iterator[Fault]:
    """One of several uses of a collective's result takes what the collective was given."""
    for node in _calls(sharded, *CALLS):
        for index, user in enumerate(node.users):
            if len(node.users) < 2 or user.op == "output":
                continue

            def change(site: Site, index: int = index) -> None:
                list(site.node.users)[index].replace_input_with(site.node, site.node.args[0])

            yield _made("bypassed", sharded, node, f"not used by {user}", change)


def duplicated(sharded: Sharded) -> Iterator[Fault]:
    """Each collective twice."""
    for node in _calls(sharded, ops.copy, ops.reduce, ops.leave, ops.gather, shares.weighed):

        def change(site: Site) -> None:
            users = list(site.node.users)
            new = site.insert(site.node.target, (site.node, *site.node.args[1:]), site.node)
            for user in users:
                user.replace_input_with(site.node, new)

        yield _made("duplicated", sharded, node, f"{node.target.__name__} twice", change)


def swapped(sharded: Sharded) -> Iterator[Fault]:
    """Each collective replaced by another."""
    for node in _calls(sharded, ops.copy, ops.reduce, ops.leave, ops.gather):
        group = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr").name
        for other in (ops.copy, ops.reduce, ops.leave, ops.gather, ops.scatter):
            if other is node.target:
                continue

            def change(site: Site, other: Any = other, group: str = group) -> None:
                named = next(n for n in site.graph.nodes if n.name == group)
                dim = (0,) if other in (ops.gather, ops.scatter) else ()
                site.node.target, site.node.args = other, (site.node.args[0], *dim, named)

            yield _made("swapped", sharded, node, f"{other.__name__}", change)


def moved_later(sharded: Sharded) -> Iterator[Fault]:
    """A reduction after its only user, a copy before what made its value."""
    for node in _calls(sharded, ops.reduce):
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function":
            continue
        if users[0].target not in (aten.add.Tensor, aten.mul.Tensor, ops.with_stream):
            continue

        def change(site: Site) -> None:
            user = next(iter(site.node.users))
            users = list(user.users)
            user.replace_input_with(site.node, site.node.args[0])
            new = site.insert(ops.reduce, (user, site.node.args[1]), user)
            for later in users:
                later.replace_input_with(user, new)
            site.graph.erase_node(site.node)

        yield _made("moved", sharded, node, f"after {users[0]}", change)


def other_group(sharded: Sharded) -> Iterator[Fault]:
    """Each use of a group given another degree."""
    for node in sharded.graph.nodes:
        if node.op != "call_function":
            continue
        for group in node.all_input_nodes:
            if group.op != "get_attr":
                continue
            degree = int(str(group.target)[2:])
            for other in {1, 2, 4, 8, *sharded.degrees} - {degree}:

                def change(site: Site, group: fx.Node = group, other: int = other) -> None:
                    old = next(n for n in site.graph.nodes if n.name == group.name)
                    site.node.replace_input_with(old, site.group(other))

                yield _made("group", sharded, node, f"{degree} ranks -> {other}", change)


def other_numbers(sharded: Sharded) -> Iterator[Fault]:
    """Each number among the arguments of a call one more, and one less; each flag turned."""
    for node in sharded.graph.nodes:
        if node.op != "call_function":
            continue
        for place, _ in _numbers(node.args):
            for step in (1, -1):

                def change(site: Site, place: Any = place, step: int = step) -> None:
                    site.node.args = _stepped(site.node.args, place, step)

                yield _made("number", sharded, node, f"argument {place} {step:+d}", change)
        for key, value in node.kwargs.items():
            if isinstance(value, int | float):

                def change_kwarg(site: Site, key: str = key, value: Any = value) -> None:
                    new = not value if isinstance(value, bool) else value * 2 + 1
                    site.node.kwargs = {**site.node.kwargs, key: new}

                yield _made("number", sharded, node, f"{key} changed", change_kwarg)


def _numbers(value: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, (*place, index))
    elif isinstance(value, int | float) and value != 2**63 - 1:
        yield place, value


def _stepped(value: Any, place: tuple[int, ...], step: int) -> Any:
    if not place:
        return not value if isinstance(value, bool) else value + step
    items = list(value)
    items[place[0]] = _stepped(items[place[0]], place[1:], step)
    return tuple(items) if isinstance(value, tuple) else items


def exchanged(sharded: Sharded) -> Iterator[Fault]:
    """Two tensors of a call exchanged; numbers of a list exchanged."""
    for node in sharded.graph.nodes:
        if node.op != "call_function":
            continue
        given = [n for n in node.all_input_nodes if n.op != "get_attr"]
        for a, b in zip(given, given[1:], strict=False):

            def change(site: Site, a: str = a.name, b: str = b.name) -> None:
                x, y = (next(n for n in site.graph.nodes if n.name == s) for s in (a, b))
                site.node.args = fx.map_arg(site.node.args, lambda n: {x: y, y: x}.get(n, n))

            if node.target not in (aten.add.Tensor, aten.mul.Tensor, operator.mul, operator.add):
                yield _made("exchanged", sharded, node, f"{a} and {b}", change)


def another_operand(sharded: Sharded) -> Iterator[Fault]:
    """An operand replaced by another value of its kind."""
    earlier: dict[Any, list[fx.Node]] = {}
    for node in sharded.graph.nodes:
        if node.op == "call_function":
            for operand in node.all_input_nodes:
                others = [n for n in earlier.get(_kind(operand), []) if n is not operand]
                for other in others[-2:]:

                    def change(site: Site, a: str = operand.name, b: str = other.name) -> None:
                        x, y = (next(n for n in site.graph.nodes if n.name == s) for s in (a, b))
                        site.node.replace_input_with(x, y)

                    yield _made("operand", sharded, node, f"{other} for {operand}", change)
        if node.op in ("placeholder", "call_function"):
            earlier.setdefault(_kind(node), []).append(node)


def _kind(node: fx.Node) -> Any:
    value = node.meta.get("val")
    shape = tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else None
    return node.op == "placeholder", node.target if node.op != "placeholder" else None, shape


def without_stream(sharded: Sharded) -> Iterator[Fault]:
    """Random operators that draw from no stream."""
    for node in _calls(sharded, ops.with_stream):

        def change(site: Site) -> None:
            site.node.target, site.node.args = site.node.args[1], site.node.args[2:]

        yield _made("stream", sharded, node, "no stream", change)


def other_layouts(sharded: Sharded) -> Iterator[Fault]:
    """Local parts, weights and orders by other layouts."""
    for node in _calls(sharded, shares.local_part, shares.weighed, shares.in_order):
        text = str(node.args[2])
        parts = text.split(" | ")
        factors = text.split("·")
        found = {text.replace("@2", "@1"), text.replace("@2", "@4"), text.replace("/2", "/4")}
        found |= {text.replace("/4", "/2"), text.replace("/2", ""), text.replace("/4", "")}
        found |= {" | ".join([*parts[1:], parts[0]]), "·".join([*factors[1:], factors[0]])}
        found |= {text.replace("/2", "/2@2", 1), text.replace("/4", "/4@2", 1)}
        for other in sorted(found - {text}):

            def change(site: Site, other: str = other) -> None:
                site.node.args = (*site.node.args[:2], other, *site.node.args[3:])

            yield _made("layout", sharded, node, f"{text} -> {other}", change)


def bias_on_every_rank(sharded: Sharded) -> Iterator[Fault]:
    """A bias added before the sum over ranks."""
    for node in _calls(sharded, ops.reduce):
        later = [n for n in node.users if n.target is aten.add.Tensor]
        if not later or "_add" not in later[0].name:
            continue

        def change(site: Site) -> None:
            (add,) = site.node.users
            partial, bias = site.node.args[0], add.args[1]
            new = site.insert(aten.add.Tensor, (partial, bias), partial)
            site.node.args = (new, *site.node.args[1:])
            add.replace_all_uses_with(site.node)
            site.graph.erase_node(add)

        yield _made("bias", sharded, node, "added on every rank", change)

        def twice(site: Site) -> None:
            (add,) = site.node.users
            users = list(add.users)
            new = site.insert(aten.add.Tensor, (add, add.args[1]), add)
            for user in users:
                user.replace_input_with(add, new)

        yield _made("bias", sharded, node, "added twice", twice)

        def never(site: Site) -> None:
            (add,) = site.node.users
            add.replace_all_uses_with(site.node)
            site.graph.erase_node(add)

        yield _made("bias", sharded, node, "never added", never)


def scaled(sharded: Sharded) -> Iterator[Fault]:
    """A partial sum, or a value that enters, scaled."""
    for node in _calls(sharded, ops.reduce, ops.copy):
        for factor in (2, 0.5):

            def change(site: Site, factor: float = factor) -> None:
                source = site.node.args[0]
                new = site.insert(aten.mul.Tensor, (source, factor), source)
                site.node.args = (new, *site.node.args[1:])

            if node.args[0].op != "placeholder":
                yield _made("scaled", sharded, node, f"by {factor}", change)


def stored_otherwise(sharded: Sharded) -> Iterator[Fault]:
    """Parameters placed otherwise than the graph was made for."""
    for name, (dim, layout, degree) in sharded.stored.items():
        node = next(n for n in sharded.graph.nodes if n.target == name)
        others: list[tuple[int, Layout, int]] = [(dim, layout, degree * 2), (1 - dim, layout, degree)]
        size = _size(layout)
        others += [(dim, Leaf(size, degree), degree)] if layout != Leaf(size, degree) else []
        others += [(dim, _reversed(layout), degree)] if _reversed(layout) != layout else []
        if size % (2 * degree) == 0:
            half = Product((Leaf(size // degree // 2), Leaf(degree, degree), Leaf(2)))
            others.append((dim, half, degree))
        for other in others:
            stored = {**sharded.stored, name: other}
            yield Fault("stored", node.name, f"{layout} -> {other}", replace(sharded, stored=stored))
        without = {k: v for k, v in sharded.stored.items() if k != name}
        yield Fault("stored", node.name, "whole", replace(sharded, stored=without))


def _reversed(layout: Layout) -> Layout:
    if isinstance(layout, Concat):
        return Concat(tuple(reversed(layout.parts)))
    if isinstance(layout, Product):
        return Product(tuple(reversed(layout.factors)))
    return layout


def _size(layout: Layout) -> int:
    if isinstance(layout, Leaf):
        return layout.size
    if isinstance(layout, Product):
        return math.prod(map(_size, layout.factors))
    return sum(map(_size, layout.parts))


def segments_exchanged(sharded: Sharded) -> Iterator[Fault]:
    """Results of a split taken in another order."""
    for node in _calls(sharded, operator.getitem):

        def change(site: Site) -> None:
            source, index = site.node.args
            items = sorted({u.args[1] for u in source.users if u.target is operator.getitem})
            site.node.args = (source, items[(items.index(index) + 1) % len(items)])

        if len([u for u in node.args[0].users if u.target is operator.getitem]) > 1:
            yield _made("segments", sharded, node, "the next one", change)


KINDS: dict[str, Callable[[Sharded], Iterator[Fault]]] = {
    f.__name__: f
    for f in (
        removed, bypassed, duplicated, swapped, moved_later, other_group, other_numbers, exchanged,
        another_operand, without_stream, other_layouts, bias_on_every_rank, scaled, stored_otherwise,
        segments_exchanged,
    )
}  # fmt: skip
