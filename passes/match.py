"""Match: which axes can be split, and which parts of the graph (regions) they run through.

Reads the classes of unified axes off the analysis. An axis can be split if nothing needs it whole,
it belongs to a parameter, and it stands at most once in every tensor. Axes that meet in one tensor
cannot both be split over the same ranks: of those, the one that needs the least communication for
its matmul FLOPs is taken. Megatron's scheme follows: ``ffn`` and ``heads`` need one all-reduce each
way; ``hidden`` would need one per linear.

Before: axes of every value. After: a tuple of ``Candidate``, each with its regions, e.g.
``transformer.h.0.mlp`` (mlp, axis 256: c_fc by columns, c_proj by rows).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import networkx as nx
from torch import fx

from autoshard.analysis import NOMINAL, Axes, Candidate, Found, Hints, Split, weights_of
from autoshard.axes import Axis, atoms_of, factors_of, freeze, parts_of
from autoshard.paths import module_path
from autoshard.rules import Call
from autoshard.rules.call import Dims

# An axis that only passes (a vocabulary) is padded where it does not divide, from so many rows a rank.
PADDED_FROM = 8


def match(graph: fx.Graph, axes: Axes, tp: int) -> tuple[Candidate, ...]:
    """The axes to split at ``tp`` ranks, and the regions that they run through.

    Args:
        graph: the analysed graph.
        axes: its analysis.
        tp: number of ranks; an axis that no divisor of it (but 1) divides is still reported.
    """
    hints = Hints(graph)
    _freeze_repeated(axes)
    usable = _usable(axes)
    uses = _Uses(axes, usable, Hints(graph, NOMINAL))
    chosen: list[Candidate] = []
    taken: set[Axis] = set()
    excluded: set[Axis] = set()
    for atom in uses.by_cost(tp):
        if atom in taken or atom in excluded:
            continue
        split = _with_companions(atom, uses, tp, excluded | taken)
        taken.update(split.atoms)
        for a in split.atoms:
            excluded |= uses.conflicts[a] - set(split.atoms)
        chosen.append(Candidate([split], [], 0))
    candidates = _tie(chosen, uses)
    owner = {atom: candidate for candidate in candidates for atom in candidate.atoms}
    for node in axes.calls:
        for candidate in {id(owner[a]): owner[a] for a in uses.atoms_at[node] if a in owner}.values():
            candidate.calls.append(node)
    for candidate in candidates:
        candidate.flops = sum(hints(axes.calls[n].flops) for n in candidate.calls)
    _find_regions(graph, axes, uses, candidates)
    return tuple(c for c in candidates if c.regions)


def slots(call: Call) -> Iterable[Dims]:
    """The axes of every operand and result of a call."""
    yield from call.operands.values()
    yield from (dims for dims in call.outputs if dims is not None)


def _occurrences(axis: Axis) -> Counter[Axis]:
    """How often each atom multiplies into the axis (parts of a concatenation count once)."""
    axis = axis.find()
    count: Counter[Axis] = Counter()
    if axis.is_atom:
        count[axis] = 1
    for factor in axis.factors or ():
        count += _occurrences(factor)
    for part in axis.parts or ():
        count |= _occurrences(part)
    return count


def _freeze_repeated(axes: Axes) -> None:
    """An axis that stands twice in one tensor cannot be split there."""
    for call in axes.calls.values():
        for dims in slots(call):
            if len(dims) == 1 and dims[0].find().is_atom:
                continue
            count: Counter[Axis] = Counter()
            for axis in dims:
                count += _occurrences(axis)
            for atom, times in count.items():
                if times > 1 and atom.frozen is None:
                    freeze(atom, f"the axis stands {times} times in one tensor ({call.node})")


def _usable(axes: Axes) -> dict[Axis, None]:
    """In the graph's order, which is the same on every rank."""
    found: dict[Axis, None] = {}
    for node in axes.parameters:
        for axis in axes.dims[node]:
            for atom in atoms_of(axis):
                if atom.frozen is None and isinstance(atom.size, int):
                    found[atom] = None
    return found


class _Uses:
    """Where the usable axes stand, what they cost, and which exclude each other."""

    def __init__(self, axes: Axes, usable: dict[Axis, None], hints: Hints) -> None:
        self.axes, self.hints = axes, hints
        self.atoms_at: dict[fx.Node, set[Axis]] = {}
        self.flops: Counter[Axis] = Counter()
        self.comm: Counter[Axis] = Counter()
        self.conflicts: dict[Axis, set[Axis]] = defaultdict(set)
        self.ties: set[frozenset[Axis]] = set()
        self.factors: set[tuple[Axis, Axis]] = set()
        self.unpaddable: set[Axis] = set()
        self.lookups: dict[Axis, fx.Node] = {}
        self.usable = usable
        copied: set[tuple[Axis, fx.Node]] = set()
        for node, call in axes.calls.items():
            here: set[Axis] = set()
            for dims in slots(call):
                here |= self._read(dims)
            self.atoms_at[node] = here
            if not here:
                continue
            summed = {a for axis in call.summed for a in atoms_of(axis) if a in usable}
            self.unpaddable |= summed
            looked_up = {a for a in atoms_of(call.lookup) if a in usable} if call.lookup else set()
            if looked_up and call.lookup is not None and not call.lookup.find().is_atom:
                freeze(call.lookup, "a lookup along a composed axis")
                for atom in looked_up:
                    self.usable.pop(atom, None)
            elif looked_up and ("indices", None) in call.operands:
                for atom in looked_up:
                    self.lookups[atom] = node
                summed |= looked_up
            flops, size = hints(call.flops), hints.numel(call.outputs[0] or ())
            for atom in here:
                self.flops[atom] += flops
                if atom in summed:
                    self.comm[atom] += size
                for slot, dims in call.operands.items():
                    operand = call.tensor(*slot)
                    if operand not in axes.differentiable or (atom, operand) in copied:
                        continue
                    if not any(atom in atoms_of(axis) for axis in dims):
                        if slot not in call.added_once or atom not in summed:
                            copied.add((atom, operand))
                            self.comm[atom] += hints.numel(dims)
        for node in axes.outputs:
            for axis in axes.dims[node]:
                if not axis.find().is_atom:
                    self.unpaddable |= set(atoms_of(axis))

    def _read(self, dims: Dims) -> set[Axis]:
        found: list[set[Axis]] = []
        for axis in dims:
            terms = {a for a in atoms_of(axis) if a in self.usable}
            found.append(terms)
            if not axis.find().is_atom:
                self.unpaddable |= terms
            if len(terms) > 1:
                self._relate(axis)
        for i, left in enumerate(found):
            for right in found[i + 1 :]:
                for a in left:
                    for b in right:
                        self.conflicts[a].add(b)
                        self.conflicts[b].add(a)
        return set().union(*found) if found else set()

    def _relate(self, axis: Axis) -> None:
        """Parts of one concatenation are tied; factors of one product exclude each other."""
        parts = parts_of(axis)
        if len(parts) > 1:
            groups = [{a for a in atoms_of(p) if a in self.usable} for p in parts]
            for i, left in enumerate(groups):
                for right in groups[i + 1 :]:
                    self.ties |= {frozenset((a, b)) for a in left for b in right if a is not b}
            for part in parts:
                self._relate(part)
            return
        factors = factors_of(axis)
        if len(factors) > 1:
            groups = [{a for a in atoms_of(f) if a in self.usable} for f in factors]
            for i, left in enumerate(groups):
                for right in groups[i + 1 :]:
                    for a in left:
                        for b in right:
                            self.conflicts[a].add(b)
                            self.conflicts[b].add(a)
                            self.factors.add((a, b))
            for factor in factors:
                self._relate(factor)

    def by_cost(self, tp: int) -> list[Axis]:
        """Axes with matmuls by communication per FLOP, then lookup tables worth splitting.

        An axis that cannot be cut at all excludes none that can.
        """
        computing = [a for a in self.usable if self.flops[a]]
        computing.sort(
            key=lambda a: (not self.can_be_cut(a, tp), self.comm[a] / self.flops[a], -self.flops[a])
        )
        tables = [a for a in self.usable if a in self.lookups and not self.flops[a]]
        largest = max((a.size for a in self.lookups if isinstance(a.size, int)), default=0)
        # A table of positions or token types is small beside the vocabulary: not worth an all-reduce.
        tables = [
            a for a in tables
            if isinstance(a.size, int) and 2 * a.size >= largest and not self._constant(a)
        ]  # fmt: skip
        return computing + sorted(tables, key=lambda a: -int(a.size))

    def is_paddable(self, atom: Axis, tp: int) -> bool:
        """Whether shares of the axis may be padded to one size."""
        return atom not in self.unpaddable and atom.size >= PADDED_FROM * tp

    def can_be_cut(self, atom: Axis, tp: int) -> bool:
        """Whether the axis takes any degree beside 1."""
        return math.gcd(atom.size, tp) > 1 or self.is_paddable(atom, tp)

    def _constant(self, atom: Axis) -> bool:
        """Whether the indices of a lookup are the same in every step (positions)."""
        seen: set[fx.Node] = set()
        stack = [self.lookups[atom].args[1]]
        while stack:
            node = stack.pop()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            seen.add(node)
            if node in self.axes.inputs:
                return False
            target = str(node.target)
            if "sym_size" not in target:
                stack.extend(node.all_input_nodes)
        return True


def _with_companions(atom: Axis, uses: _Uses, tp: int, barred: set[Axis]) -> Split:
    """The axis, and inner axes of the same dimension that take what its size does not divide.

    Fewer key/value heads than ranks: ``kv_heads`` are cut as far as they go, then the ``group`` of
    query heads that shares one. A companion must carry more than half of the axis's FLOPs: less
    would mostly repeat work.
    """
    assert isinstance(atom.size, int)
    if uses.is_paddable(atom, tp):
        return Split((atom,), paddable=True)
    atoms = [atom]
    missing = tp // math.gcd(atom.size, tp)
    inner = [b for b in uses.usable if (atom, b) in uses.factors and b not in barred]
    for other in sorted(inner, key=lambda b: -uses.flops[b]):
        assert isinstance(other.size, int)
        if missing == 1 or 2 * uses.flops[other] <= uses.flops[atom]:
            break
        step = math.gcd(other.size, missing)
        if step > 1 and not _summed_apart(atoms, other, uses):
            atoms.append(other)
            missing //= step
    return Split(tuple(atoms))


def _summed_apart(atoms: list[Axis], other: Axis, uses: _Uses) -> bool:
    """Whether an operator sums one of the axes and keeps the other."""
    together = {*atoms, other}
    for node, here in uses.atoms_at.items():
        if len(here & together) < 2:
            continue
        call = uses.axes.calls[node]
        summed = {a for axis in call.summed for a in atoms_of(axis)} & together
        kept = {a for dims in call.outputs if dims for axis in dims for a in atoms_of(axis)} & together
        if summed and kept:
            return True
    return False


def _tie(chosen: list[Candidate], uses: _Uses) -> list[Candidate]:
    """Candidates whose axes lie behind each other in one dimension have one degree."""
    ties = nx.Graph()
    owner = {a: c for c in chosen for a in c.atoms}
    ties.add_nodes_from(range(len(chosen)))
    index = {id(c): i for i, c in enumerate(chosen)}
    for pair in uses.ties:
        a, b = tuple(pair)
        if a in owner and b in owner:
            ties.add_edge(index[id(owner[a])], index[id(owner[b])])
    result = []
    for component in nx.connected_components(ties):
        members = [chosen[i] for i in sorted(component)]
        result.append(Candidate([s for m in members for s in m.splits], [], 0))
    return result


def _find_regions(graph: fx.Graph, axes: Axes, uses: _Uses, candidates: list[Candidate]) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    weights = weights_of(axes)
    for candidate in candidates:
        for calls in _components(candidate, axes):
            kind = _kind(calls, candidate, axes, weights)
            name = _common_path(calls, axes)
            candidate.regions.append(Found(name, kind, sorted(calls, key=order.__getitem__)))
    regions = [r for c in candidates for r in c.regions]
    by_name: dict[str, list[Found]] = defaultdict(list)
    for region in regions:
        by_name[region.name].append(region)
    for candidate in candidates:  # calls of one shared layer are one region
        merged: dict[tuple[str, str], Found] = {}
        for region in candidate.regions:
            key = region.name, region.kind
            if key in merged:
                merged[key].calls.extend(region.calls)
            else:
                merged[key] = region
        candidate.regions = list(merged.values())
    names = Counter(r.name for c in candidates for r in c.regions)
    for candidate in candidates:
        for region in candidate.regions:
            if names[region.name] > 1 or not region.name:
                region.name = f"{region.name}.{region.kind}".lstrip(".")
    names = Counter()
    for candidate in candidates:
        for region in candidate.regions:
            names[region.name] += 1
            if names[region.name] > 1:
                region.name += f".{names[region.name]}"


def _components(candidate: Candidate, axes: Axes) -> list[list[fx.Node]]:
    """The candidate's calls, grouped by the matmuls that they connect.

    A value that comes from no matmul (a table of position biases) joins no two groups.
    """
    members = set(candidate.calls)
    group = nx.utils.UnionFind()
    label: dict[fx.Node, fx.Node] = {}
    for node in candidate.calls:
        sources = [label[n] for n in _through_getitem(node) if n in label]
        if axes.calls[node].flops:
            sources.append(node)
        if sources:
            group.union(*sources)
            label[node] = sources[0]
    for node in reversed(candidate.calls):  # what feeds a group belongs to it
        if node not in label:
            users = [u for u in _users(node) if u in label and u in members]
            if users:
                label[node] = label[users[0]]
    found: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in candidate.calls:
        found[group[label[node]] if node in label else node].append(node)
    return list(found.values())


def _through_getitem(node: fx.Node) -> Iterable[fx.Node]:
    for source in node.all_input_nodes:
        yield source
        if source.op == "call_function" and "getitem" in str(source.target):
            yield from source.all_input_nodes


def _users(node: fx.Node) -> Iterable[fx.Node]:
    for user in node.users:
        yield user
        if user.op == "call_function" and "getitem" in str(user.target):
            yield from user.users


def _kind(calls: list[fx.Node], candidate: Candidate, axes: Axes, weights: set[fx.Node]) -> str:
    matmuls = [n for n in calls if axes.calls[n].flops]
    if not matmuls:
        return "embedding"
    for node in matmuls:
        operands = [n for n in node.all_input_nodes if n in axes.dims and n in axes.differentiable]
        if sum(1 for n in operands if n not in weights) > 1:
            return "attention"
    summing = (axes.calls[n] for n in calls if axes.calls[n].lookup is None)
    sums = {a for call in summing for axis in call.summed for a in atoms_of(axis)} & candidate.atoms
    return "mlp" if sums else "loss"


def _common_path(calls: list[fx.Node], axes: Axes) -> str:
    matmuls = [n for n in calls if axes.calls[n].flops] or calls
    paths = [module_path(n).split(".") for n in matmuls]
    common = paths[0]
    for path in paths[1:]:
        shared = 0
        while shared < min(len(common), len(path)) and common[shared] == path[shared]:
            shared += 1
        common = common[:shared]
    return ".".join(common)
