"""Repeated layers are traced twice and copied from then on.

Tracing a layer takes much longer than copying what was traced, and a transformer's layers are nearly
all equal. While a model is traced, a call of a numbered module (``transformer.h.7``) is compared with
those before: modules and tensors of the same shapes, types and flags, the same arguments, and the same
values of all that its Python code can see, but for attributes that were never read. If two other
layers that were called so gave the same nodes, this one's are a copy of theirs. Two: what tells layers
apart by means that are not compared mostly tells these two apart. The last of a kind is traced too: if
it is not what a copy would have been, no copy is trusted, and the model is traced again without.

Only layers of PyTorch and transformers are copied: code of others may keep state where nobody looks
(attributes of tensors, functions and namespaces; helpers in other packages). Of these, whatever is in
doubt is traced: hooks, a second call, arguments that can be changed, writes into what
is given, attributes set, random numbers drawn in Python, tensors from elsewhere, sizes of data.

What remains: a layer whose Python code finds out by other ways which layer it is (state behind a
dictionary of functions, in an object in a global object, in a file; the time), and does for the
first two and the last of its kind the same, but not for one between.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from autoshard.checkpoint_marks import Marks
from autoshard.compat import module_calls, size_facts, unwatched
from autoshard.paths import layer_of
from autoshard.traced_layer import Call, Traced, Unusual, call_of, traced_of
from autoshard.visible_globals import Surroundings, code_of
from autoshard.visible_state import Reads, State, attributes, random_state, reads_noticed

TRACED = 2  # layers of a kind


@contextlib.contextmanager
def repeated_layers_copied(model: nn.Module, marks: Marks) -> Iterator[Copies]:
    """Inside, what traces the model traces the first layers of each kind, and the last, only."""
    layers = {id(m): m for name, m in model.named_modules() if name and layer_of(name) == name}
    kinds = Counter(map(type, layers.values()))
    repeated = {key: m for key, m in layers.items() if kinds[type(m)] > TRACED}
    last = frozenset({type(m): key for key, m in repeated.items()}.values())
    copies = Copies()
    around = module_calls(_Layers(repeated, last, marks, copies))
    with around if repeated else contextlib.nullcontext():
        yield copies


@dataclass
class Copies:
    """What was copied.

    Attributes:
        made: how many layers.
        mistaken: a layer that was traced is not what its copy would have been: none is to be used.
    """

    made: int = 0
    mistaken: bool = False


@dataclass(frozen=True)
class _Seen:
    """A call that was traced, and what its code saw.

    Attributes:
        reads: the attributes that the trace read; `attributes`: what these were.
        around: what stood in globals and closures.
        common: which of its tensors are those of the other call that was traced alike.
    """

    traced: Traced
    reads: Reads
    attributes: State
    around: Hashable
    common: frozenset[int] = frozenset()

    def fits(self, call: Call, around: Hashable) -> bool:
        """Whether the call would see what this one saw."""
        return (
            all(self.traced.call.nodes[i] is call.nodes[i] for i in self.common)
            and self.around == around
            and self.attributes == attributes(call.layer, self.reads)
        )

    def confirmed_by(self, later: _Seen) -> _Seen | None:
        """The later of two calls of different layers, if both were traced alike."""
        if self.traced.text != later.traced.text or self.traced.call.layer is later.traced.call.layer:
            return None
        pairs = zip(self.traced.call.nodes, later.traced.call.nodes, strict=True)
        return replace(later, common=frozenset(i for i, (a, b) in enumerate(pairs) if a is b))


@dataclass
class _Layers:
    """Stands around every call of a module while the model is traced."""

    layers: Mapping[int, nn.Module]
    last: Set[int]
    marks: Marks
    copies: Copies
    inside: bool = False  # a layer that is being traced, with the layers in it
    once: dict[Hashable, list[_Seen]] = field(default_factory=lambda: defaultdict(list))
    twice: dict[Hashable, list[_Seen]] = field(default_factory=lambda: defaultdict(list))
    surroundings: dict[tuple[Any, ...], Surroundings] = field(default_factory=dict)

    def __call__(
        self, tracer: Any, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self.inside or id(module) not in self.layers or not self._surroundings(module).trusted:
            return forward(*args, **kwargs)
        given = functools.partial(forward, *args, **kwargs)
        try:
            with unwatched():
                call = call_of(tracer, module, args, kwargs, self.marks)
                known = self._known(call)
                if known is not None and id(module) not in self.last:
                    self.copies.made += 1
                    return known.copied(call, tracer, self.marks)
        except Unusual:
            return given()
        self.inside = True
        try:
            output, seen = self._traced(call, tracer, given)
        finally:
            self.inside = False
        if known is not None and (seen is None or seen.traced.text != known.text):
            self.copies.mistaken = True
        return output

    def _known(self, call: Call) -> Traced | None:
        around = self._around(call.layer) if self.twice[call.form] else None
        fitting = (seen.traced for seen in self.twice[call.form] if seen.fits(call, around))
        return next(fitting, None)

    def _traced(
        self, call: Call, tracer: Any, forward: Callable[[], Any]
    ) -> tuple[Any, _Seen | None]:
        """The call's output, and what others may be copied from."""
        seen = None
        with unwatched():
            before, sizes = self._sees(call), size_facts(call.tensors)
        nodes, mark = len(tracer.graph.nodes), self.marks.count
        with reads_noticed() as found:
            output = forward()
        with unwatched():
            # Where it changes what the next one sees, or looks at modules that are not its own, it is
            # not asked what was traced.
            names = {module: name for name, module in call.layer.named_modules()}
            found.pop(tracer.root, None)  # where the tracer keeps constants
            if before == self._sees(call) and found.keys() <= names.keys():
                reads = frozenset((names[m], name) for m, read in found.items() for name in read)
                made = tuple(tracer.graph.nodes)[nodes:]
                marks = mark, self.marks.count - mark
                learnt = sizes != size_facts(call.tensors)  # then the next may be traced otherwise
                with contextlib.suppress(Unusual):
                    traced = traced_of(call, made, output, tracer, marks)
                    seen = _Seen(traced, reads, attributes(call.layer, reads), before[1])
                    self._keep(seen, learnt)
        return output, seen

    def _keep(self, seen: _Seen, learnt: bool) -> None:
        form = seen.traced.call.form
        if not learnt:
            confirmed = (one.confirmed_by(seen) for one in self.once[form])
            self.twice[form] += list(filter(None, confirmed))[:1]
        self.once[form].append(seen)

    def _sees(self, call: Call) -> tuple[Hashable, ...]:
        return attributes(call.layer), self._around(call.layer), random_state()

    def _around(self, layer: nn.Module) -> Hashable:
        return self._surroundings(layer).now()

    def _surroundings(self, layer: nn.Module) -> Surroundings:
        code = code_of(layer)
        if code not in self.surroundings:
            self.surroundings[code] = Surroundings(code)
        return self.surroundings[code]
