"""Workload: what each region computes, moves and communicates, at every degree that it can take.

Before: a graph with its axes and candidates. After: a ``Workload``, which the cost model reads and
which knows no graph. Sizes are local, in the batch ``B``, the sequence ``S`` and the degree ``d``;
equal layers give equal work and are worked out once.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from autoshard.analysis import Analysis, Candidate
from autoshard.assignment import Assignment, stored_numel
from autoshard.axes import Axis, atoms_of
from autoshard.cost_model.operators import (
    VIEWS,
    Operand,
    Operator,
    Term,
    by_weight,
    detail_of,
    gradient_products,
    keeps,
    numel,
    phase,
    shows_operand,
    work_of,
)  # fmt: skip
from autoshard.cost_model.work import (
    B,
    Collective,
    D,
    Item,
    S,
    Shared,
    SideBySide,
    Size,
    Traffic,
    Unit,
    Without,
    Work,
    Workload,
    total,
)  # fmt: skip
from autoshard.flow import SUM, flow, owners
from autoshard.paths import layer_of, module_path
from autoshard.rules import Call
from autoshard.rules.call import op_name, size_of

Place: TypeAlias = tuple[int, int]  # a candidate's number, a region's within it
Owner: TypeAlias = Place | bool  # a region; or none: whether in a layer


def workload(analysis: Analysis, tp: int) -> Workload:
    """The work of every region at each divisor of ``tp`` that it takes, and of the rest."""
    return _Builder(analysis, tp).run()


class _Builder:
    def __init__(self, analysis: Analysis, tp: int) -> None:
        self.analysis, self.axes, self.tp = analysis, analysis.axes, tp
        self.symbols = _symbols(analysis)
        self.cut = {
            atom: ("cut", local)
            for candidate in analysis.candidates
            for atom, local in _local_sizes(candidate, tp).items()
        }
        self.assignments = {d: _assignment(analysis, d, tp) for d in range(1, tp + 1) if tp % d == 0}
        self.flows = {d: flow(analysis.graph, self.axes, a) for d, a in self.assignments.items()}
        self.terms: dict[Axis, Term] = {}
        self.roots: dict[fx.Node, fx.Node] = {}
        self.kept: set[fx.Node] = set()
        self.known: dict[Any, Work] = {}
        self.operators: dict[fx.Node, Operator] = {}

    def run(self) -> Workload:
        nodes: dict[Owner, dict[fx.Node, Operator]] = defaultdict(dict)
        layers: set[str] = set()
        for node in self.analysis.graph.nodes:
            described = self._operator(node)
            if described is not None:
                layer = layer_of(module_path(node))
                layers |= {layer} if layer is not None else set()
                nodes[self.owner.get(node, layer is not None)][node] = described
                self.operators[node] = described
        units = []
        for tie, candidate in enumerate(self.analysis.candidates):
            for index, region in enumerate(candidate.regions):
                place = tie, index
                work = {d: self._work(nodes[place], d, place) for d in candidate.degrees(self.tp)}
                shared = {key: one for key, (one, users) in self.shared.items() if tie in users}
                units.append(Unit(region.name, tie, work, shared))
        rest = tuple(self._work(nodes[inside], 1, inside) for inside in (True, False))
        return Workload(tuple(units), rest, self._boundaries(), len(layers))

    # -- who owns what -------------------------------------------------------------------------

    @cached_property
    def owner(self) -> dict[fx.Node, Place]:
        """The region of each call, at whatever degree it is inside one."""
        return owners(self.analysis.candidates, self.flows.values())

    @cached_property
    def shared(self) -> dict[tuple[str, int], tuple[Shared, set[int]]]:
        """What regions of several candidates have together, one all-reduce for all of them.

        Backward of a value that enters them by one ``copy``, forward of the sum of their results.
        """
        shared = {}
        for d, found in self.flows.items():
            for (value, degree), calls in found.copied.items():
                users = self._ties(calls)
                if degree == d and len(users) > 1:
                    one = Shared(self._entering(value, calls, d), True)
                    shared[value.name, d] = one, users
            for value, calls in self.joined[d].items():
                one = Shared(Collective("all_reduce", self._bytes(value), D), False)
                shared[f"sum {value.name}", d] = one, self._ties(calls)
        return shared

    def _ties(self, calls: Collection[fx.Node]) -> set[int]:
        """The candidates that calls belong to."""
        return {self.owner[c][0] for c in calls if c in self.owner}

    @cached_property
    def entering(self) -> dict[int, dict[fx.Node, list[Item]]]:
        """By degree and first call: what values that enter one candidate alone take in the backward."""
        entering: dict[int, dict[fx.Node, list[Item]]] = {}
        for d, found in self.flows.items():
            entering[d] = defaultdict(list)
            for (value, degree), calls in found.copied.items():
                if degree == d and (value.name, d) not in self.shared:
                    own = self._entering(value, calls, d)
                    # The copy that is summed; a sum that runs under products needs none.
                    others = self._together(value, calls) if own.under else [Traffic(2 * own.bytes)]
                    entering[d][calls[0]] += [own, *others]
        return entering

    def _entering(self, value: fx.Node, calls: list[fx.Node], degree: int) -> Collective:
        """The all-reduce of a value's gradient; under the weights' where only matmuls use the copy."""
        known = [self.operators[c] for c in calls if c in self.operators]
        under = tuple(w for _, w in map(gradient_products, known) if w is not None)
        # A weight that is padded is computed, so that its product is not fused with the copy.
        fused = len(under) == len(calls) and not any(self._is_padded(c, degree) for c in calls)
        return Collective("all_reduce", self._bytes(value), D, under if fused else ())

    def _is_padded(self, call: fx.Node, degree: int) -> bool:
        """Whether an operand has other rows while computing: the same number on every rank."""
        cuts = self.assignments[degree].cuts
        axes = [axis for dims in self.axes.calls[call].operands.values() for axis in dims]
        atoms = {atom for axis in axes for atom in atoms_of(axis) if atom in cuts}
        return any(cuts[atom].padded * cuts[atom].parts != atom.size for atom in atoms)

    def _together(self, value: fx.Node, calls: list[fx.Node]) -> list[Item]:
        """What the gradients of several weights that a value is multiplied by take in one call.

        Each adds its product to the sum, where autograd adds what each gives; [in, out] stay apart.
        """
        if len(calls) == 1:
            return []
        added = self.operators.get(value)
        adds = [Without(Traffic(3 * added.bytes))] * (len(calls) - 1) if added and added.flows else []
        pairs = [gradient_products(self.operators[c]) for c in calls]
        of_input = tuple(x for x, _ in pairs if x is not None)
        of_weights = tuple(w for _, w in pairs if w is not None)
        if any(self.operators[c].name != "linear" for c in calls) or len(of_input) != len(calls):
            return [*adds]
        return [*adds, SideBySide(of_input, of_weights), *map(Without, of_input + of_weights)]

    @cached_property
    def joined(self) -> dict[int, dict[fx.Node, list[fx.Node]]]:
        """By degree and addition: products whose sums over the ranks are one, as they are added up."""
        return {d: self._joined(found.reduced) for d, found in self.flows.items()}

    def _joined(self, reduced: Mapping[fx.Node, str]) -> dict[fx.Node, list[fx.Node]]:
        """As ``passes/fuse.py``: additions of two, the second no sum itself, used by nothing else."""
        products = {
            node: [node] for node, why in reduced.items()
            if why == SUM and node in self.operators and by_weight(self.operators[node])
        }  # fmt: skip
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.analysis.graph.nodes:
            read = node.all_input_nodes
            if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(read) != 2:
                continue
            first, second = read
            ones = products.get(first, []), products.get(second, [])
            layouts = {self.operators[call].name == "linear" for own in ones for call in own}
            alone = len(first.users) == len(second.users) == len(layouts) == 1
            if all(ones) and len(ones[1]) == 1 and alone:
                products[node] = ones[0] + ones[1]
                found.pop(first, None)
                found[node] = products[node]
        return found

    @cached_property
    def parameters(self) -> dict[Owner, list[fx.Node]]:
        """Parameters that a region can split belong to it, the others to the rest."""
        found: dict[Owner, list[fx.Node]] = defaultdict(list)
        for node in self.axes.parameters:
            split = any(atom in self.cut for axis in self.axes.dims[node] for atom in atoms_of(axis))
            users = [self.owner[u] for u in node.users if u in self.owner]
            in_layer = layer_of(self.analysis.names[node.name]) is not None
            found[users[0] if split and users else in_layer].append(node)
        return found

    def _elements(self, owner: Owner, degree: int) -> tuple[tuple[int, int], ...]:
        """Bytes of an element -> elements of the owner's parameters on a rank."""
        assignment = self.assignments[degree]
        count: Counter[int] = Counter()
        for node in self.parameters[owner]:
            value = node.meta["val"]
            elements = stored_numel(self.axes.dims[node], value.shape, assignment)
            count[value.element_size()] += elements
        return tuple(sorted(count.items()))

    # -- operators -----------------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> Operator | None:
        value = node.meta.get("val")
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if node.op != "call_function" or node.target is operator.getitem:
            return None
        if not isinstance(first, torch.Tensor):
            return None
        name, dtype = op_name(node), str(first.dtype).removeprefix("torch.")
        call = self.axes.calls.get(node)
        if call is None:  # depends on no weight
            shape = tuple(self._size(size_of(s)) for s in first.shape)
            detail = "view" if name in VIEWS else ""
            return Operator(name, (), shape, first.element_size(), dtype, detail=detail)
        tensors = {slot: call.tensor(*slot) for slot in call.operands}
        differentiable = self.axes.differentiable
        flows = first.is_floating_point() and any(t in differentiable for t in tensors.values())
        operands = tuple(
            Operand(slot[0], self._dims(dims), tensors[slot].meta["val"].element_size(),
                    tensors[slot] in differentiable)
            for slot, dims in call.operands.items()
        )  # fmt: skip
        read = list(tensors.values())
        dense = bool(read) and _is_dense(read[0])
        detail = detail_of(name, call.arguments, dense, bool(read) and _is_strided(read))
        return Operator(
            name, operands, self._dims(call.outputs[0] or ()), first.element_size(), dtype,
            self._dims(tuple(call.summed)), bool(call.flops), flows, detail,
            self._saved(node, name, call, detail), sum(u in differentiable for u in node.users),
            sum(n in self.parameters_read for n in node.all_input_nodes),
        )  # fmt: skip

    @cached_property
    def parameters_read(self) -> Collection[fx.Node]:
        """The placeholders of parameters."""
        return frozenset(self.axes.parameters)

    def _saved(
        self, node: fx.Node, name: str, call: Call, detail: str
    ) -> tuple[tuple[tuple[Term, ...], int], ...]:
        """What the node is the first to keep; a view keeps all that it is a view of."""
        tensors = {slot[0]: call.tensor(*slot) for slot in call.operands}
        if detail == "off":
            return ()
        flowing = {slot: t in self.axes.differentiable for slot, t in tensors.items()}
        saved = []
        for slot in keeps(name, bool(call.flops), flowing):
            if slot == "mask":
                saved.append((self._dims(self.axes.dims[node]), 1))
                continue
            root = self._root(tensors.get(slot, node))
            if root not in self.kept and root in self.axes.calls and root in self.axes.dims:
                self.kept.add(root)
                itemsize = root.meta["val"].element_size()
                saved.append((self._dims(self.axes.dims[root]), itemsize))
        return tuple(saved)

    def _root(self, node: fx.Node) -> fx.Node:
        """The node whose memory a view shows."""
        if node not in self.roots:
            inputs = node.all_input_nodes if node.op == "call_function" else []
            is_view = bool(inputs) and (
                node.target is operator.getitem or shows_operand(op_name(node), _is_dense(inputs[0]))
            )
            self.roots[node] = self._root(inputs[0]) if is_view else node
        return self.roots[node]

    # -- work ----------------------------------------------------------------------------------

    def _work(self, nodes: dict[fx.Node, Operator], degree: int, owner: Owner) -> Work:
        """The sum over calls, worked out once for equal ones."""
        in_layer = owner if isinstance(owner, bool) else any(
            layer_of(module_path(node)) is not None for node in nodes
        )  # fmt: skip
        reduced = dict(self.flows[degree].reduced)
        for products in self.joined[degree].values():
            for node in products:
                del reduced[node]
        calls = tuple((op, reduced.get(node, "")) for node, op in nodes.items())
        entering = tuple(i for node in nodes for i in self.entering[degree].get(node, ()))
        key = calls, entering, self._elements(owner, degree), in_layer
        if key not in self.known:
            self.known[key] = _sum(*key)
        return self.known[key]

    def _boundaries(self) -> Size:
        """Bytes of the value that enters each layer: what checkpointing keeps."""
        sizes: dict[str, Size] = {}
        for node in self.axes.calls:
            layer = layer_of(module_path(node))
            outer = [n for n in node.all_input_nodes if n in self.axes.calls]
            if layer is not None and layer not in sizes and outer:
                sizes[layer] = self._bytes(outer[0])
        return total(sizes.values())

    # -- sizes ---------------------------------------------------------------------------------

    def _bytes(self, node: fx.Node) -> Size:
        val = node.meta["val"]
        if node in self.axes.dims:
            shape = self._dims(self.axes.dims[node])
        else:  # an input, which depends on no weight
            shape = tuple(self._size(size_of(s)) for s in val.shape)
        return numel(shape) * val.element_size()

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        plain = _plain(size)
        return self.analysis.hints(size) if plain is None else plain.xreplace(self.symbols)

    def _dims(self, dims: tuple[Axis, ...]) -> tuple[Term, ...]:
        return tuple(self._term(axis.find()) for axis in dims)

    def _term(self, axis: Axis) -> Term:
        if axis not in self.terms:
            if axis in self.cut:
                self.terms[axis] = self.cut[axis]
            elif axis.is_atom:
                self.terms[axis] = self._size(axis.size)
            else:
                kind, inner = ("*", axis.factors) if axis.factors is not None else ("+", axis.parts)
                self.terms[axis] = (kind, tuple(self._term(t.find()) for t in inner or ()))
        return self.terms[axis]


def _sum(
    calls: tuple[tuple[Operator, str], ...], entering: tuple[Item, ...],
    parameters: tuple[tuple[int, int], ...], in_layer: bool,
) -> Work:  # fmt: skip
    works = [work_of(op, reduced) for op, reduced in calls]
    forward: list[Item] = [i for w in works for i in w.forward.items]
    backward: list[Item] = [i for w in works for i in w.backward.items]
    hosts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for work in works:
        hosts[0].update(dict(work.forward.host))
        hosts[1].update(dict(work.backward.host))
    backward += entering
    hosts[1]["collective"] += sum(isinstance(item, Collective) for item in entering)
    hosts[1]["kernel"] -= sum(isinstance(i, Without) and isinstance(i.item, Traffic) for i in entering)
    return Work(
        phase(forward, hosts[0]), phase(backward, hosts[1]), total(w.saved for w in works),
        total(w.gradients for w in works), parameters, in_layer,
    )  # fmt: skip


@lru_cache(maxsize=65536)
def _plain(size: Any) -> Any:
    """A size in sympy's own functions (graphs have ``FloorDiv`` and others of PyTorch's), or None."""
    own = {"FloorDiv": lambda a, b: sympy.floor(a / b), "CeilDiv": lambda a, b: sympy.ceiling(a / b)}
    own |= {"PythonMod": sympy.Mod, "Mod": sympy.Mod, "Max": sympy.Max, "Min": sympy.Min}
    for kind in {type(f) for f in size.atoms(sympy.Function)}:
        if kind.__module__.startswith("torch."):
            if kind.__name__ not in own:
                return None
            size = size.replace(kind, own[kind.__name__])
    return size


def _is_strided(tensors: list[fx.Node]) -> bool:
    """Whether operands of one shape lie differently in memory, or with gaps."""
    layouts = [_memory(t.meta["val"]) for t in tensors]
    shape, stride = layouts[0]
    if any(own == shape and other != stride for own, other in layouts):
        return True
    return not _dense(*_outermost_first(shape, stride))


def _is_dense(node: fx.Node) -> bool:
    """Whether a tensor is contiguous, by its symbolic strides."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and _dense(*_memory(value))


def _memory(value: torch.Tensor) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Shape and strides, symbolic ones as sympy expressions."""
    return tuple(map(size_of, value.shape)), tuple(map(size_of, value.stride()))


@lru_cache(maxsize=65536)
def _dense(shape: tuple[Size, ...], stride: tuple[Size, ...]) -> bool:
    expected: Size = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and sympy.expand(step - expected) != 0:
            return False
        expected = expected * size
    return True


@lru_cache(maxsize=65536)
def _outermost_first(shape: Any, stride: Any) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Dimensions by falling stride; a symbol counts as large."""
    large = [s if isinstance(s, int) else s.subs(dict.fromkeys(s.free_symbols, 10**6)) for s in stride]
    order = sorted(range(len(shape)), key=lambda d: -large[d])
    return tuple(shape[d] for d in order), tuple(stride[d] for d in order)


def _local_sizes(candidate: Candidate, tp: int) -> dict[Axis, tuple[tuple[int, int], ...]]:
    """Each axis's elements on a rank, by degree."""
    sizes: dict[Axis, list[tuple[int, int]]] = {a: [] for s in candidate.splits for a in s.atoms}
    for degree in candidate.degrees(tp):
        assignment = Assignment()
        if degree > 1:
            assignment.cut_all(candidate.splits, degree)
        for atom, found in sizes.items():
            found.append((degree, assignment.size(atom)))
    return {atom: tuple(found) for atom, found in sizes.items()}


def _assignment(analysis: Analysis, degree: int, tp: int) -> Assignment:
    """Every candidate that can be, cut over ``degree`` ranks."""
    assignment = Assignment()
    for candidate in analysis.candidates:
        if degree > 1 and degree in candidate.degrees(tp):
            assignment.cut_all(candidate.splits, degree)
    return assignment


def input_sizes(analysis: Analysis) -> dict[Any, int]:
    """Batch and sequence where the capture fixed them."""
    fixed: dict[Any, int] = {}
    known = set(_symbols(analysis).values())
    for node in analysis.graph.nodes:
        value = node.meta.get("val")
        if node in analysis.axes.inputs and isinstance(value, torch.Tensor):
            for symbol, size in zip((B, S), value.shape, strict=False):
                if isinstance(size, int) and symbol not in known:
                    fixed.setdefault(symbol, size)
    return fixed


def _symbols(analysis: Analysis) -> dict[Any, Any]:
    """The graph's symbols: dimension 0 of an input is the batch, dimension 1 the sequence."""
    found: dict[Any, Any] = {}
    for node in analysis.graph.nodes:
        value = node.meta.get("val")
        if node in analysis.axes.inputs and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape[:2]):
                symbol = size_of(size)
                if not isinstance(symbol, int) and symbol.is_Symbol:
                    found.setdefault(symbol, (B, S)[dim])
    return {s: sympy.Integer(hint) for s, hint in analysis.hints.symbols.items()} | found
