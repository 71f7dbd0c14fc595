"""Caches of keys and values on their way through a graph.

A graph takes tensors and gives tensors; a Hugging Face ``Cache`` is an object that a forward changes.
So a call that is given caches is captured on what is in them: each cache is taken apart into its
tensors, in the order in which they stand in it, and its *form*, all that is no tensor, which belongs to
what the graph is captured for. While the forward is traced the cache is put together again around the
traced tensors; what it holds afterwards leaves the graph as outputs, and goes into the caller's object.

Some caches count: a layer with a sliding window knows how many tokens it has seen. A number that a
forward changes would be another form after every token. Once seen to change it is a *counter*: it
enters the graph as the size of an empty tensor of shape ``[n, 0]``, which is symbolic.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoshard.errors import AutoshardError
from autoshard.huggingface import is_cache

Form: TypeAlias = tuple[Any, ...]
Counters: TypeAlias = set[tuple[type, str]]

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.layout, type)
LEAVES = (Tensor, bool, int, float, str)  # with nothing inside


@dataclass
class Apart:
    """An object taken apart.

    Attributes:
        tensors: in the order in which they stand in the object.
        numbers: counters, and sizes that are symbols of a graph, likewise.
        fixed: where a plain number stands -> (class, attribute) and the number.
    """

    counters: Counters
    tensors: list[Tensor] = field(default_factory=list)
    numbers: list[Any] = field(default_factory=list)
    fixed: dict[str, tuple[tuple[type, str], int]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def form(self, value: Any, path: str = "", owner: tuple[type, str] | None = None) -> Form:
        """All of the object that is no tensor and no counter; hashable.

        Raises:
            AutoshardError: something in it has no form (a stream, a method, a quantizer).
        """
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return ("tensor", len(self.tensors) - 1)
        if isinstance(value, torch.SymInt) or (type(value) is int and owner in self.counters):
            self.numbers.append(value)
            return ("number", len(self.numbers) - 1)
        if isinstance(value, torch.device):
            return ("device",)
        if isinstance(value, PLAIN):
            if type(value) is int and owner is not None:
                self.fixed[path] = (owner, value)
            return ("plain", value)
        if id(value) in self.seen:
            return ("same", self.seen[id(value)])
        self.seen[id(value)] = len(self.seen)
        if type(value) in (list, tuple):
            items = (self.form(v, f"{path}[{i}]", owner) for i, v in enumerate(value))
            return (type(value).__name__, *items)
        if type(value) is dict:
            return ("dict", *((k, self.form(v, f"{path}[{k!r}]", owner)) for k, v in value.items()))
        if not hasattr(value, "__dict__") or callable(value) or type(value).__module__ == "torch":
            raise AutoshardError(
                f"{path.lstrip('.') or 'the cache'} is {type(value).__name__}, which a graph cannot be "
                "given: pass a DynamicCache, which holds tensors and numbers only"
            )
        parts = (
            (name, self.form(v, f"{path}.{name}", (type(value), name)))
            for name, v in vars(value).items()
        )
        return ("object", type(value), *parts)


def together(
    form: Form,
    tensors: Sequence[Tensor],
    numbers: Sequence[Any],
    device: torch.device,
    into: Any = None,
) -> Any:
    """The object of a form around these tensors and numbers.

    into: an object whose parts are kept, where they are of the form's class, and changed.
    """
    made: list[Any] = []

    def make(form: Form, into: Any) -> Any:
        kind, rest = form[0], form[1:]
        if kind in ("tensor", "number"):
            return (tensors if kind == "tensor" else numbers)[rest[0]]
        if kind == "device":
            return device
        if kind == "plain":
            return rest[0]
        if kind == "same":
            return made[rest[0]]
        place = len(made)
        made.append(None)
        if kind == "object":
            cls, *parts = rest
            new = into if type(into) is cls else cls.__new__(cls)
            made[place] = new
            old = dict(vars(new))
            new.__dict__.clear()
            for name, part in parts:
                new.__dict__[name] = make(part, old.get(name))
            return new
        if kind == "dict":
            old = into if type(into) is dict else {}
            made[place] = {key: make(part, old.get(key)) for key, part in rest}
            return made[place]
        items = into if isinstance(into, (list, tuple)) else ()
        found = [make(p, items[i] if i < len(items) else None) for i, p in enumerate(rest)]
        made[place] = tuple(found) if kind == "tuple" else found
        return made[place]

    return make(form, into)


@dataclass(frozen=True)
class Given:
    """A call's arguments, their caches taken apart.

    Attributes:
        args, kwargs: a list of tensors where a cache was: its own, then one of shape ``[n, 0]`` for
            each of its counters.
        forms: of the caches, in order; what a graph is captured for beside the tensors.
        counts: tensors of each cache, its counters not included.
        caches: the caller's objects.
        outer: how arguments are put together, each cache one leaf.
        places: which leaves are caches.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forms: tuple[Form, ...] = ()
    counts: tuple[int, ...] = ()
    caches: tuple[Any, ...] = ()
    outer: pytree.TreeSpec | None = None
    places: tuple[int, ...] = ()


def opened(args: tuple[Any, ...], kwargs: dict[str, Any], counters: Counters) -> Given:
    """Take apart the caches among a call's arguments."""
    if all(isinstance(x, LEAVES) for x in (*args, *kwargs.values())):
        return Given(args, kwargs)
    leaves, outer = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
    places = tuple(i for i, leaf in enumerate(leaves) if is_cache(leaf))
    if not places:
        return Given(args, kwargs)
    caches = tuple(leaves[i] for i in places)
    forms, counts = [], []
    for place in places:
        cache = leaves[place]
        if getattr(cache, "is_compileable", False):
            raise AutoshardError(
                f"{type(cache).__name__} has room for its longest sequence from the start, and would "
                "be copied for every token: pass a DynamicCache, or leave cache_implementation out"
            )
        apart = Apart(counters)
        forms.append(apart.form(cache))
        counts.append(len(apart.tensors))
        leaves[place] = [*apart.tensors, *(torch.empty(n, 0) for n in apart.numbers)]
    args, kwargs = pytree.tree_unflatten(leaves, outer)
    return Given(args, kwargs, tuple(forms), tuple(counts), caches, outer, places)


@dataclass
class Traced:
    """What a traced forward did to the caches that it was given.

    Attributes:
        forms: of each cache afterwards: the given ones, then others that are in the result.
        counts: tensors and numbers of each.
        learnt: plain numbers that the forward changed.
        outer: how the result is put together, each cache one leaf.
        caches: which leaf of the result is which cache.
    """

    forms: list[Form] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    learnt: Counters = field(default_factory=set)
    outer: pytree.TreeSpec | None = None
    caches: dict[int, int] = field(default_factory=dict)


@contextlib.contextmanager
def traced(model: nn.Module, given: Given, counters: Counters) -> Iterator[Traced]:
    """Inside, the model's forward takes `given` for its arguments, and gives a list: the contents of
    each cache afterwards, a list each, then the leaves of its result that are no cache."""
    found = Traced()
    if not given.places:
        yield found
        return
    forward = model.forward
    assert given.outer is not None
    outer = given.outer

    @functools.wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        leaves = _leaves_of(outer, (args, kwargs))
        caches = []
        for place, form, count in zip(given.places, given.forms, given.counts, strict=True):
            contents = leaves[place]
            numbers = [t.shape[0] for t in contents[count:]]
            leaves[place] = together(form, contents[:count], numbers, torch.device("cpu"))
            caches.append(leaves[place])
        again, named = pytree.tree_unflatten(leaves, outer)
        before = [_fixed(cache, counters) for cache in caches]
        result = forward(*again, **named)
        return _after(found, result, caches, before, counters)

    own = "forward" in model.__dict__
    model.forward = inner
    try:
        yield found
    finally:
        if own:
            model.forward = forward
        else:
            del model.__dict__["forward"]


def _leaves_of(outer: pytree.TreeSpec, value: Any) -> list[Any]:
    return list(outer.flatten_up_to(value))


def _fixed(cache: Any, counters: Counters) -> dict[str, tuple[tuple[type, str], int]]:
    apart = Apart(counters)
    apart.form(cache)
    return apart.fixed


def _after(
    found: Traced, result: Any, caches: list[Any], before: list[Any], counters: Counters
) -> list[Any]:
    """Note what the caches are after a forward, and give their contents and the rest of its result."""
    found.forms, found.counts, found.caches = [], [], {}
    leaves, found.outer = pytree.tree_flatten(result, is_leaf=is_cache)
    every = list(caches)
    rest = []
    for index, leaf in enumerate(leaves):
        if not is_cache(leaf):
            rest.append(leaf)
            continue
        if not any(leaf is cache for cache in every):
            every.append(leaf)
        found.caches[index] = next(i for i, cache in enumerate(every) if cache is leaf)
    contents = []
    for index, cache in enumerate(every):
        apart = Apart(counters)
        found.forms.append(apart.form(cache))
        found.counts.append((len(apart.tensors), len(apart.numbers)))
        contents.append([*apart.tensors, *apart.numbers])
        if index < len(before):
            found.learnt |= {
                owner for path, (owner, number) in before[index].items()
                if apart.fixed.get(path) != (owner, number) and owner not in counters
            }  # fmt: skip
    return [*contents, *rest]


def positions(found: Traced) -> tuple[int, ...]:
    """The flat outputs of a traced forward that are tensors of caches."""
    result: list[int] = []
    place = 0
    for tensors, numbers in found.counts:
        result += range(place, place + tensors)
        place += tensors + numbers
    return tuple(result)


def closed(found: Traced, given: Given, outputs: list[Any], device: torch.device) -> Any:
    """The result of a call: the caller's caches hold what they would after the model's own forward."""
    assert found.outer is not None
    every = []
    for index, (form, (tensors, numbers)) in enumerate(zip(found.forms, found.counts, strict=True)):
        contents = outputs[index]
        into = given.caches[index] if index < len(given.caches) else None
        every.append(together(form, contents[:tensors], contents[tensors:], device, into))
        assert len(contents) == tensors + numbers
    rest = iter(outputs[len(every) :])
    count = found.outer.num_leaves
    leaves = [every[found.caches[i]] if i in found.caches else next(rest) for i in range(count)]
    return pytree.tree_unflatten(leaves, found.outer)
