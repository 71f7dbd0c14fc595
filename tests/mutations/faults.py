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
from autoshard.layouts import Concat, Layout, Leaf, Product, indices, leaves
from autoshard.sharded import Sharded

aten = torch.ops.aten

REMOVED = "collective removed"
DUPLICATED = "collective duplicated"
SWAPPED = "collective swapped for another"
MOVED = "collective moved"
GROUP = "wrong group"
DEGREE = "wrong degree"
GATHERED = "all-gather for all-reduce"
SLICED = "slice of the wrong dimension or offset"
VOCABULARY = "vocabulary offset or mask off by one"
PADDING = "padding rows not masked"
BIAS = "bias added on every rank"
SCALED = "wrong scale by tp"
UNCOPIED = "copy missing on a value or a weight"
HEADS = "key heads of other queries"
SEGMENTS = "q, k, v in the wrong order"
UNTIED = "tied weight untied"
STREAM = "dropout of another stream"
NUMBER = "other number"
OPERAND = "other operand"

COLLECTIVES = (ops.copy, ops.reduce, ops.leave, ops.gather)
PARTS = (
    shares.local_part, shares.pad_to, shares.weighed, shares.in_order, shares.unpad, shares.own_rows,
    shares.joined,
)  # fmt: skip
VOCABULARIES = (ops.vocab_embedding, ops.vocab_cross_entropy)
ATTENTION = aten.scaled_dot_product_attention.default
PROJECTIONS = (aten.linear.default, aten.addmm.default, aten.mm.default)
GROUPS = (1, 2, 4)
VIEWS = (
    aten.view.default, aten.reshape.default, aten.slice.Tensor, aten.transpose.int,
    aten.unsqueeze.default, aten.to.dtype, aten.contiguous.default,
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A changed graph: the kind of its fault, the node that was changed, and how."""

    kind: str
    node: str
    what: str
    make: Callable[[], Sharded]

    @property
    def sharded(self) -> Sharded:
        """The changed graph, made anew each time."""
        return self.make()

    def __str__(self) -> str:
        return f"{self.kind}: {self.node}, {self.what}"


class Site:
    """A copy of the graph in which one node is changed."""

    def __init__(self, sharded: Sharded, name: str) -> None:
        self.sharded = sharded
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(sharded.graph, {}))
        self.node = self.named(name)

    def named(self, name: str) -> fx.Node:
        """The node of this name."""
        return next(n for n in self.graph.nodes if n.name == name)

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

    def before(self, target: Any, *args: Any) -> fx.Node:
        """A new call in front of the node."""
        with self.graph.inserting_before(self.node):
            new = self.graph.create_node("call_function", target, args)
        new.meta = dict(self.node.meta)
        return new

    def behind(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call on a node's value, which all its users take in its place."""
        users = list(node.users)
        new = self.insert(target, (node, *args), node)
        for user in users:
            user.replace_input_with(node, new)
        return new

    def drop(self) -> None:
        """The node left out."""
        self.node.replace_all_uses_with(self.node.args[0])
        self.graph.erase_node(self.node)


def _calls(sharded: Sharded, *targets: Any) -> list[fx.Node]:
    return [n for n in sharded.graph.nodes if n.op == "call_function" and n.target in targets]


def _group_of(node: fx.Node) -> fx.Node:
    return next(n for n in node.all_input_nodes if n.op == "get_attr")


def _degree_of(node: fx.Node) -> int:
    return int(str(_group_of(node).target)[2:])


def _made(
    kind: str, sharded: Sharded, node: fx.Node, what: str, change: Callable[[Site], Any]
) -> Fault:
    def make() -> Sharded:
        site = Site(sharded, node.name)
        change(site)
        return replace(sharded, graph=site.graph)

    return Fault(kind, node.name, what, make)


def _missing(node: fx.Node) -> str:
    return UNCOPIED if node.target is ops.copy else REMOVED


# -- collectives ----------------------------------------------------------------------------------


def removed(sharded: Sharded) -> Iterator[Fault]:
    """Each collective or local part left out."""
    for node in _calls(sharded, *COLLECTIVES, *PARTS):
        kind = SLICED if node.target in PARTS else _missing(node)
        kind = PADDING if node.target is shares.unpad else kind
        yield _made(kind, sharded, node, f"without {node.target.__name__}", Site.drop)


def bypassed(sharded: Sharded) -> Iterator[Fault]:
    """One of several uses of a collective's result takes what the collective was given."""
    for node in _calls(sharded, *COLLECTIVES):
        for index, user in enumerate(node.users):
            if len(node.users) < 2 or user.op == "output":
                continue

            def change(site: Site, index: int = index) -> None:
                list(site.node.users)[index].replace_input_with(site.node, site.node.args[0])

            yield _made(_missing(node), sharded, node, f"not used by {user}", change)


def duplicated(sharded: Sharded) -> Iterator[Fault]:
    """Each collective twice."""
    for node in _calls(sharded, *COLLECTIVES, shares.weighed):

        def change(site: Site) -> None:
            site.behind(site.node, site.node.target, *site.node.args[1:])

        yield _made(DUPLICATED, sharded, node, f"{node.target.__name__} twice", change)


def swapped(sharded: Sharded) -> Iterator[Fault]:
    """Each collective replaced by another; an all-gather for an all-reduce along each dimension."""
    for node in _calls(sharded, *COLLECTIVES):
        group = _group_of(node).name
        for other in (*COLLECTIVES, ops.scatter):
            if other is node.target:
                continue
            gathered = node.target is ops.reduce and other is ops.gather
            for dim in (0, 1, -1) if gathered else (0,):

                def change(site: Site, other: Any = other, group: str = group, dim: int = dim) -> None:
                    along = (dim,) if other in (ops.gather, ops.scatter) else ()
                    site.node.target = other
                    site.node.args = (site.node.args[0], *along, site.named(group))

                kind = GATHERED if gathered else SWAPPED
                along = f" along {dim}" if gathered else ""
                yield _made(kind, sharded, node, f"{other.__name__}{along}", change)


TAKEN: dict[str, tuple[Any, ...]] = {
    "the first": (aten.select.int, 0, 0),
    "the last": (aten.select.int, 0, -1),
    "the mean": (aten.mean.dim, [0]),
    "the largest": (aten.amax.default, [0]),
}


def gathered(sharded: Sharded) -> Iterator[Fault]:
    """All terms of a sum over ranks, of which one is taken, or their mean, or the largest."""
    for node in _calls(sharded, ops.reduce):
        degree = _degree_of(node)
        for how, taken in TAKEN.items():

            def change(site: Site, degree: int = degree, taken: tuple[Any, ...] = taken) -> None:
                x, group = site.node.args[:2]
                together = site.before(ops.gather, x, 0, group)
                terms = site.before(aten.unflatten.int, together, 0, [degree, -1])
                site.node.replace_all_uses_with(site.before(taken[0], terms, *taken[1:]))
                site.graph.erase_node(site.node)

            yield _made(GATHERED, sharded, node, f"{how} of what is gathered", change)


def moved(sharded: Sharded) -> Iterator[Fault]:
    """A collective after one of its users, or before what made its value."""
    for node in _calls(sharded, *COLLECTIVES):
        users = [u for u in node.users if u.op == "call_function" and u.target is not operator.getitem]

        for index, user in enumerate(users):

            def later(site: Site, name: str = user.name) -> None:
                user = site.named(name)
                user.replace_input_with(site.node, site.node.args[0])
                site.behind(user, site.node.target, *site.node.args[1:])

            if index == 0 and _tensor(user):
                yield _made(MOVED, sharded, node, f"after {user}", later)

        chain = [node.args[0]]  # a collective moves over views freely: over the first that is none
        while chain[-1].target in VIEWS and chain[-1].args:
            chain.append(chain[-1].args[0])
        source = chain[-1]
        if source.op != "call_function" or source.target is operator.getitem:
            continue
        for operand in source.all_input_nodes[:2]:
            if not _tensor(operand):
                continue
            names = [n.name for n in reversed(chain)]

            def earlier(site: Site, name: str = operand.name, names: list[str] = names) -> None:
                old = site.named(name)
                new = site.before(site.node.target, old, *site.node.args[1:])
                for one in map(site.named, names):
                    again = site.before(one.target, *one.args)
                    again.kwargs = one.kwargs
                    again.replace_input_with(old, new)
                    old, new = one, again
                site.node.replace_all_uses_with(new)
                site.graph.erase_node(site.node)

            yield _made(MOVED, sharded, node, f"before {source}, to {operand}", earlier)


def _tensor(node: fx.Node) -> bool:
    return node.op != "get_attr" and "sym_size" not in str(node.target)


def other_group(sharded: Sharded) -> Iterator[Fault]:
    """Each use of a group given another degree."""
    for node in sharded.graph.nodes:
        if node.op != "call_function":
            continue
        for group in node.all_input_nodes:
            if group.op != "get_attr":
                continue
            degree = int(str(group.target)[2:])
            for other in sorted({*GROUPS, *sharded.degrees} - {degree}):

                def change(site: Site, group: str = group.name, other: int = other) -> None:
                    site.node.replace_input_with(site.named(group), site.group(other))

                kind = GROUP if node.target in (*COLLECTIVES, *VOCABULARIES) else DEGREE
                kind = STREAM if node.target is ops.with_stream else kind
                yield _made(kind, sharded, node, f"{degree} ranks -> {other}", change)


def other_degree(sharded: Sharded) -> Iterator[Fault]:
    """All parameters of a region stored for another degree; all its collectives of another group."""
    for node in _calls(sharded, ops.reduce):
        degree = _degree_of(node)
        inside, copies = _region(node)
        split = [n for n in inside if str(n.target) in sharded.stored]
        for other in sorted({*GROUPS, *sharded.degrees} - {degree}):
            stored = dict(sharded.stored)
            for n in split:
                dim, layout, _ = stored[str(n.target)]
                stored[str(n.target)] = dim, _of_parts(layout, degree, other), other
            if split:
                what = f"{len(split)} parameters of {degree} ranks stored for {other}"
                changed = replace(sharded, stored=stored)
                yield Fault(DEGREE, node.name, what, lambda changed=changed: changed)

            def change(site: Site, other: int = other, copies: Any = copies) -> None:
                for one in (site.node, *(site.named(c.name) for c in copies)):
                    one.replace_input_with(_group_of(one), site.group(other))

            yield _made(DEGREE, sharded, node, f"its region's borders: {degree} -> {other}", change)


def _region(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a reduction sums over ranks: values inside, and the copies by which others enter."""
    inside: dict[fx.Node, None] = {}
    copies: dict[fx.Node, None] = {}
    waiting = [node.args[0]]
    while waiting:
        value = waiting.pop()
        if value in inside or value.op == "get_attr":
            continue
        if value.target is ops.copy:
            copies[value] = None
        elif value.target is not ops.reduce:
            inside[value] = None
            waiting += value.all_input_nodes
    return list(inside), list(copies)


def _of_parts(layout: Layout, degree: int, other: int) -> Layout:
    if isinstance(layout, Leaf):
        return Leaf(layout.size, other if layout.parts == degree else layout.parts, layout.stride)
    if isinstance(layout, Product):
        return Product(tuple(_of_parts(f, degree, other) for f in layout.factors))
    return Concat(tuple(_of_parts(p, degree, other) for p in layout.parts))


def scaled(sharded: Sharded) -> Iterator[Fault]:
    """What a collective is given times or over tp: the value, or its gradient alone."""
    for node in _calls(sharded, *COLLECTIVES):
        degree = _degree_of(node)
        for factor in (degree, 1 / degree):

            def change(site: Site, factor: float = factor) -> None:
                new = site.before(aten.mul.Tensor, site.node.args[0], factor)
                site.node.args = (new, *site.node.args[1:])

            def gradient(site: Site, factor: float = factor) -> None:
                x = site.node.args[0]  # x·f + (1 - f)·x.detach() is x
                part = site.before(aten.mul.Tensor, x, factor)
                rest = site.before(aten.mul.Tensor, site.before(aten.detach.default, x), 1 - factor)
                site.node.args = (site.before(aten.add.Tensor, part, rest), *site.node.args[1:])

            yield _made(SCALED, sharded, node, f"by {factor:g}", change)
            yield _made(SCALED, sharded, node, f"its gradient by {factor:g}", gradient)


def bias_on_every_rank(sharded: Sharded) -> Iterator[Fault]:
    """A bias added before the sum over ranks; or as often as it should, with another gradient."""
    for node in _calls(sharded, ops.reduce):
        adds = [n for n in node.users if n.target is aten.add.Tensor and "_add" in n.name]
        if not adds:
            continue

        def every(site: Site, factor: float = 1.0) -> None:
            (add,) = site.node.users
            bias = add.args[1]
            if factor != 1.0:
                bias = site.before(aten.mul.Tensor, bias, factor)
            new = site.before(aten.add.Tensor, site.node.args[0], bias)
            site.node.args = (new, *site.node.args[1:])
            add.replace_all_uses_with(site.node)
            site.graph.erase_node(add)

        def share(site: Site, degree: int = _degree_of(node)) -> None:
            every(site, 1 / degree)

        def summed(site: Site) -> None:
            (add,) = site.node.users
            with site.graph.inserting_before(add):
                new = site.graph.create_node(
                    "call_function", ops.copy, (add.args[1], _group_of(site.node))
                )
            new.meta = dict(add.meta)
            add.args = (add.args[0], new)

        def twice(site: Site) -> None:
            (add,) = site.node.users
            site.behind(add, aten.add.Tensor, add.args[1])

        def never(site: Site) -> None:
            (add,) = site.node.users
            add.replace_all_uses_with(site.node)
            site.graph.erase_node(add)

        yield _made(BIAS, sharded, node, "added on every rank", every)
        yield _made(BIAS, sharded, node, "a share of it on every rank", share)
        yield _made(BIAS, sharded, node, "added once, its gradient summed", summed)
        yield _made(BIAS, sharded, node, "added twice", twice)
        yield _made(BIAS, sharded, node, "never added", never)


# -- slices and layouts ---------------------------------------------------------------------------


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

            heads = node.target is shares.local_part and "@" in text
            yield _made(HEADS if heads else SLICED, sharded, node, f"{text} -> {other}", change)


def other_slices(sharded: Sharded) -> Iterator[Fault]:
    """Shares joined or cut along another dimension, or from another place."""
    for node in _calls(sharded, ops.gather):
        dim = node.args[1]
        for other in {0, 1, 2} - {dim}:

            def change(site: Site, other: int = other) -> None:
                site.node.args = (site.node.args[0], other, site.node.args[2])

            yield _made(SLICED, sharded, node, f"along {other}", change)

        def rolled(site: Site, dim: int = dim) -> None:
            site.behind(site.node, aten.roll.default, [1], [dim])

        yield _made(SLICED, sharded, node, "one element further", rolled)
    for node in _calls(sharded, shares.local_part, shares.unpad):

        def further(site: Site) -> None:
            new = site.before(aten.roll.default, site.node.args[0], [1], [site.node.args[1]])
            site.node.args = (new, *site.node.args[1:])

        yield _made(SLICED, sharded, node, "one element further", further)


def stored_otherwise(sharded: Sharded) -> Iterator[Fault]:
    """Parameters placed otherwise than the graph was made for."""
    for name, (dim, layout, degree) in sharded.stored.items():
        node = next(n for n in sharded.graph.nodes if n.target == name)
        value = node.meta.get("val")
        rank = value.dim() if isinstance(value, torch.Tensor) else 2
        others: list[tuple[str, tuple[int, Layout, int]]] = [(DEGREE, (dim, layout, degree * 2))]
        others += [(SLICED, (d, layout, degree)) for d in range(rank) if d != dim]
        size = _size(layout)
        flat, turned = Leaf(size, degree), _reversed(layout)
        others += [(SLICED, (dim, flat, degree))] if layout != flat else []
        order = SEGMENTS if isinstance(layout, Concat) else SLICED
        others += [(order, (dim, turned, degree))] if turned != layout else []
        if size % (2 * degree) == 0:
            half = Product((Leaf(size // degree // 2), Leaf(degree, degree), Leaf(2)))
            others.append((SLICED, (dim, half, degree)))
        for kind, other in others:
            if other[::2] == (dim, degree) and _same_parts(other[1], layout, degree):
                continue
            changed = replace(sharded, stored={**sharded.stored, name: other})
            what = f"{layout}, dimension {dim} of {degree} -> {other[1]}, {other[0]} of {other[2]}"
            yield Fault(kind, node.name, what, lambda changed=changed: changed)
        without = {k: v for k, v in sharded.stored.items() if k != name}
        whole = replace(sharded, stored=without)
        yield Fault(DEGREE, node.name, "whole", lambda whole=whole: whole)


def _same_parts(layout: Layout, other: Layout, degree: int) -> bool:
    """``8/2·8`` is the first half, as ``64/2`` is."""
    return all(indices(layout, r) == indices(other, r) for r in range(degree))


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


# -- vocabularies ---------------------------------------------------------------------------------


def vocabulary(sharded: Sharded) -> Iterator[Fault]:
    """Offsets and masks one off; tokens of the rank before; padding before the rows."""
    for node in _calls(sharded, *VOCABULARIES):
        for place, _ in _numbers(node.args):
            for step in (1, -1):

                def change(site: Site, place: Any = place, step: int = step) -> None:
                    site.node.args = _stepped(site.node.args, place, step)

                yield _made(VOCABULARY, sharded, node, f"argument {place[0]} {step:+d}", change)

        vocab = node.args[3]
        for step in (1, vocab - 1):

            def shifted(site: Site, step: int = step, vocab: int = vocab) -> None:
                tokens = site.node.args[1]
                further = site.before(aten.add.Tensor, tokens, step)
                around = site.before(aten.remainder.Scalar, further, vocab)
                new = site.before(
                    aten.where.self, site.before(aten.lt.Scalar, tokens, 0), tokens, around
                )
                site.node.args = (site.node.args[0], new, *site.node.args[2:])

            yield _made(VOCABULARY, sharded, node, f"tokens {step:+d} of {vocab}", shifted)
    for node in _calls(sharded, shares.pad_to):

        def rolled(site: Site) -> None:
            site.behind(site.node, aten.roll.default, [1], [site.node.args[1]])

        yield _made(VOCABULARY, sharded, node, "rows one further", rolled)


def padding(sharded: Sharded) -> Iterator[Fault]:
    """Rows behind the vocabulary counted as if they were of it."""
    for node in _calls(sharded, ops.vocab_cross_entropy):
        degree, vocab, rows = _degree_of(node), node.args[3], node.args[4]
        if vocab == rows * degree:
            continue

        def counted(site: Site, size: int = rows * degree) -> None:
            site.node.args = (*site.node.args[:3], size, *site.node.args[4:])

        yield _made(PADDING, sharded, node, f"{vocab} -> {rows * degree} classes", counted)

        def gathered(site: Site) -> None:
            logits, target, group, _, _, weight, *rest = site.node.args
            whole = site.before(ops.gather, logits, 1, group)
            loss = site.before(aten.cross_entropy_loss.default, whole, target, weight, *rest)
            site.node.replace_all_uses_with(loss)
            site.graph.erase_node(site.node)

        yield _made(PADDING, sharded, node, "the loss of all rows, gathered", gathered)
    for node in _calls(sharded, shares.unpad):
        _, _, padded, rows, size = node.args

        def between(site: Site, padded: int = padded) -> None:
            site.node.args = (*site.node.args[:3], padded, site.node.args[4])

        if padded != rows:
            yield _made(PADDING, sharded, node, f"{padded} of {rows} rows of each rank", between)

        def longer(site: Site, size: int = size) -> None:
            site.node.args = (*site.node.args[:4], size + 1)

        def first(site: Site) -> None:
            site.node.args = (site.before(aten.flip.default, site.node.args[0], [site.node.args[1]]),
                              *site.node.args[1:])  # fmt: skip
            site.behind(site.node, aten.flip.default, [site.node.args[1]])

        yield _made(PADDING, sharded, node, f"{size + 1} of {size} rows", longer)
        yield _made(PADDING, sharded, node, "the last rows in place of the first", first)


def untied(sharded: Sharded) -> Iterator[Fault]:
    """One use of a weight that has several has a weight of its own: its gradient is not added."""
    for node in sharded.graph.nodes:
        if node.op != "placeholder" or not str(node.target).startswith("p_"):
            continue
        users = [u for u in node.users if "sym_size" not in str(u.target)]
        for user in users if len(users) > 1 else ():

            def alone(site: Site, name: str = user.name, step: float = 0.0) -> None:
                user = site.named(name)
                with site.graph.inserting_before(user):
                    own = site.graph.create_node("call_function", aten.detach.default, (site.node,))
                    own.meta = dict(site.node.meta)
                    if step:
                        own = site.graph.create_node("call_function", aten.add.Tensor, (own, step))
                        own.meta = dict(site.node.meta)
                user.replace_input_with(site.node, own)

            def drifted(site: Site, name: str = user.name) -> None:
                alone(site, name, 0.01)

            def other(site: Site, name: str = user.name) -> None:
                user = site.named(name)
                with site.graph.inserting_before(user):
                    new = site.graph.create_node(
                        "call_function", aten.roll.default, (site.node, [1], [0])
                    )
                new.meta = dict(site.node.meta)
                user.replace_input_with(site.node, new)

            yield _made(UNTIED, sharded, node, f"{user} has its own", alone)
            yield _made(UNTIED, sharded, node, f"{user} has its own, a step apart", drifted)
            yield _made(UNTIED, sharded, node, f"{user} has its rows one further", other)


# -- heads and segments ---------------------------------------------------------------------------


def key_heads(sharded: Sharded) -> Iterator[Fault]:
    """Each repeated key head, or value head, given to the queries of another."""
    for node in _calls(sharded, ATTENTION):
        for places in ((1,), (2,), (1, 2)):
            repeated = [node.args[p] for p in places]
            if not all(
                r.target in (aten.reshape.default, aten.view.default)
                and r.args[0].target in (aten.expand.default, aten.clone.default)
                for r in repeated
            ):
                continue
            names = [r.name for r in repeated]
            which = " and ".join({1: "keys", 2: "values"}[p] for p in places)

            def tiled(site: Site, names: list[str] = names) -> None:
                for name in names:
                    merged = site.named(name)
                    with site.graph.inserting_before(merged):
                        new = site.graph.create_node(
                            "call_function", aten.transpose.int, (merged.args[0], 1, 2)
                        )
                    new.meta = dict(merged.meta)
                    merged.target = aten.reshape.default
                    merged.args = (new, merged.args[1])

            def rolled(site: Site, names: list[str] = names) -> None:
                for name in names:
                    site.behind(site.named(name), aten.roll.default, [1], [1])

            def flipped(site: Site, names: list[str] = names) -> None:
                for name in names:
                    site.behind(site.named(name), aten.flip.default, [1])

            yield _made(HEADS, sharded, node, f"{which}: a b a b for a a b b", tiled)
            yield _made(HEADS, sharded, node, f"{which}: one head further", rolled)
            yield _made(HEADS, sharded, node, f"{which}: in reverse", flipped)
    for name, (dim, layout, degree) in sharded.stored.items():
        if not isinstance(layout, Product) or not isinstance(layout.factors[0], Leaf):
            continue
        heads, *rest = layout.factors
        split = [leaf.size for leaf in leaves(layout) if leaf.parts > 1]
        if len(split) != 1 or heads.parts != degree or heads.size % degree or heads.size == degree:
            continue
        turns = Product((Leaf(heads.size // degree), Leaf(degree, degree), *rest))
        node = next(n for n in sharded.graph.nodes if n.target == name)
        changed = replace(sharded, stored={**sharded.stored, name: (dim, turns, degree)})
        yield Fault(HEADS, node.name, f"{layout} -> {turns}", lambda changed=changed: changed)


def segments_exchanged(sharded: Sharded) -> Iterator[Fault]:
    """Segments taken in another order; the projections of one value exchanged."""
    for node in _calls(sharded, operator.getitem):
        source = node.args[0]
        taken = [u for u in source.users if u.target is operator.getitem]
        if len(taken) < 2 or source.target is not aten.split_with_sizes.default:
            continue

        def change(site: Site) -> None:
            source, index = site.node.args
            items = sorted({u.args[1] for u in source.users if u.target is operator.getitem})
            site.node.args = (source, items[(items.index(index) + 1) % len(items)])

        yield _made(SEGMENTS, sharded, node, "the next one", change)
    for node in _calls(sharded, aten.select.int):
        alike = [u for u in node.args[0].users if u.target is aten.select.int]
        for other in sorted({u.args[2] for u in alike} - {node.args[2]}):

            def selected(site: Site, other: int = other) -> None:
                site.node.args = (*site.node.args[:2], other)

            yield _made(SEGMENTS, sharded, node, f"segment {other}", selected)
    for node in _calls(sharded, *PROJECTIONS):
        x, weight = _projected(node)
        for other in _calls(sharded, *PROJECTIONS):
            _, its = _projected(other)
            same = _projected(other)[0] is x and its is not weight and other.target is node.target
            if not same or _shape(its) != _shape(weight):
                continue

            def exchange(site: Site, a: str = weight.name, b: str = its.name) -> None:
                order = list(site.graph.nodes)
                last = max((site.named(a), site.named(b)), key=order.index)
                if order.index(last) > order.index(site.node):
                    _bring(site, last)
                site.node.replace_input_with(site.named(a), site.named(b))

            yield _made(SEGMENTS, sharded, node, f"{its} for {weight}", exchange)
    for node in _calls(sharded, ATTENTION):
        for a, b in ((0, 1), (0, 2), (1, 2)):

            def operands(site: Site, a: int = a, b: int = b) -> None:
                args = list(site.node.args)
                args[a], args[b] = args[b], args[a]
                site.node.args = tuple(args)

            yield _made(SEGMENTS, sharded, node, f"operands {a} and {b}", operands)


def _bring(site: Site, value: fx.Node) -> None:
    """What makes a value comes before the site's node."""
    if value.op in ("placeholder", "get_attr"):
        return
    for operand in value.all_input_nodes:
        if list(site.graph.nodes).index(operand) > list(site.graph.nodes).index(site.node):
            _bring(site, operand)
    site.node.prepend(value)


def _projected(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    x, weight = node.args[1:3] if node.target is aten.addmm.default else node.args[:2]
    return x, weight


def _shape(node: fx.Node) -> Any:
    while node.op != "placeholder" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else None


# -- random state ---------------------------------------------------------------------------------


def without_stream(sharded: Sharded) -> Iterator[Fault]:
    """Random operators that draw from no stream."""
    for node in _calls(sharded, ops.with_stream):

        def change(site: Site) -> None:
            site.node.target, site.node.args = site.node.args[1], site.node.args[2:]

        yield _made(STREAM, sharded, node, "no stream", change)


# -- anything else --------------------------------------------------------------------------------


def other_numbers(sharded: Sharded) -> Iterator[Fault]:
    """Each number among the arguments of a call one more, and one less; each flag turned."""
    for node in sharded.graph.nodes:
        if node.op != "call_function" or node.target in VOCABULARIES:
            continue
        kind = SLICED if node.target in (*PARTS, ops.gather) else NUMBER
        for place, value in _numbers(node.args):
            if _says_nothing(node, place, value):
                continue
            for step in (1, -1):

                def change(site: Site, place: Any = place, step: int = step) -> None:
                    site.node.args = _stepped(site.node.args, place, step)

                yield _made(kind, sharded, node, f"argument {place} {step:+d}", change)
        for key, value in node.kwargs.items():
            if isinstance(value, int | float):

                def change_kwarg(site: Site, key: str = key, value: Any = value) -> None:
                    new = not value if isinstance(value, bool) else value * 2 + 1
                    site.node.kwargs = {**site.node.kwargs, key: new}

                yield _made(kind, sharded, node, f"{key} changed", change_kwarg)


def _says_nothing(node: fx.Node, place: tuple[int, ...], value: Any) -> bool:
    """A float that one is lost in; whether memory is reused; the dimension of a slice of all."""
    if isinstance(value, float) and value + 1 == value:
        return True
    if node.target is ops.reduce:
        return True
    return node.target is aten.slice.Tensor and place == (1,) and node.args[2:] == (0, 2**63 - 1)


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
    """Two tensors of a call exchanged."""
    commutes = (aten.add.Tensor, aten.mul.Tensor, operator.mul, operator.add)
    for node in sharded.graph.nodes:
        if node.op != "call_function" or node.target in (*commutes, ATTENTION):
            continue
        given = [n for n in node.all_input_nodes if n.op != "get_attr"]
        for a, b in zip(given, given[1:], strict=False):

            def change(site: Site, a: str = a.name, b: str = b.name) -> None:
                x, y = site.named(a), site.named(b)
                site.node.args = _mapped(site.node.args, {x: y, y: x})

            yield _made(OPERAND, sharded, node, f"{a} and {b} exchanged", change)


def _mapped(args: Any, other: dict[fx.Node, fx.Node]) -> Any:
    return fx.map_arg(args, lambda n: other.get(n, n))


def another_operand(sharded: Sharded) -> Iterator[Fault]:
    """An operand replaced by another value of its kind."""
    earlier: dict[Any, list[fx.Node]] = {}
    for node in sharded.graph.nodes:
        if node.op == "call_function":
            for operand in node.all_input_nodes:
                others = [n for n in earlier.get(_kind(operand), []) if n is not operand]
                for other in others[-2:]:

                    def change(site: Site, a: str = operand.name, b: str = other.name) -> None:
                        site.node.replace_input_with(site.named(a), site.named(b))

                    yield _made(OPERAND, sharded, node, f"{other} for {operand}", change)
        if node.op in ("placeholder", "call_function"):
            earlier.setdefault(_kind(node), []).append(node)


def _kind(node: fx.Node) -> Any:
    value = node.meta.get("val")
    shape = tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else None
    return node.op == "placeholder", node.target if node.op != "placeholder" else None, shape


GENERATORS: tuple[Callable[[Sharded], Iterator[Fault]], ...] = (
    removed, bypassed, duplicated, swapped, gathered, moved, other_group, other_degree, scaled,
    bias_on_every_rank, other_layouts, other_slices, stored_otherwise, vocabulary, padding, untied,
    key_heads, segments_exchanged, without_stream, other_numbers, exchanged, another_operand,
)  # fmt: skip
KINDS = (
    REMOVED, DUPLICATED, SWAPPED, MOVED, GROUP, DEGREE, GATHERED, SLICED, VOCABULARY, PADDING, BIAS,
    SCALED, UNCOPIED, HEADS, SEGMENTS, UNTIED, STREAM, NUMBER, OPERAND,
)  # fmt: skip


def faults(sharded: Sharded) -> list[Fault]:
    """Every fault of a graph, always in the same order."""
    return [fault for generator in GENERATORS for fault in generator(sharded)]
