"""An assignment: the plan in terms of axes. Into how many parts each axis is cut, by which ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autoshard.analysis import Split
from autoshard.axes import Axis, Size, atoms_of
from autoshard.layouts import Concat, Layout, Leaf, Product, is_disjoint, is_split, share_size

ALIGNMENT = 128  # a rank's rows of a vocabulary are padded to a multiple (paper, section 5.1)
ALIGNED_FROM = 1024  # fewer rows than this are not worth it


@dataclass(frozen=True)
class Cut:
    """One axis over the ranks of a group.

    Attributes:
        degree: ranks in the group.
        parts: pieces of the axis; rank r holds piece ``r // stride % parts``.
        stride: see parts.
        rows: elements of one piece (ceil where padded).
        padded: elements of one piece while computing, >= rows (a vocabulary).
    """

    degree: int
    parts: int
    stride: int
    rows: int
    padded: int


@dataclass(eq=False)
class Assignment:
    """Which axes are cut. Axes that it does not hold are whole."""

    cuts: dict[Axis, Cut] = field(default_factory=dict)

    def cut(self, atom: Axis, degree: int, parts: int, stride: int, paddable: bool) -> None:
        """Cut an axis; a vocabulary that does not divide well is padded."""
        assert isinstance(atom.size, int)
        rows = -(-atom.size // parts)
        padded = rows
        if paddable and rows >= ALIGNED_FROM and (atom.size % parts or rows % 8):
            padded = -(-rows // ALIGNMENT) * ALIGNMENT
        self.cuts[atom] = Cut(degree, parts, stride, rows, padded)

    def cut_all(self, splits: Iterable[Split], degree: int) -> None:
        """Cut the axes of all splits over ``degree`` ranks, the outermost slowest."""
        for split in splits:
            parts = split.parts(degree)
            assert parts is not None
            stride = degree
            for atom, count in zip(split.atoms, parts, strict=True):
                stride //= count
                if count > 1:
                    self.cut(atom, degree, count, stride, split.paddable)

    def cuts_in(self, dims: Iterable[Axis]) -> dict[Axis, Cut]:
        """The cut axes among some dimensions."""
        return {a: self.cuts[a] for axis in dims for a in atoms_of(axis) if a in self.cuts}

    def degree(self, dims: Iterable[Axis]) -> int:
        """The degree over which some dimensions are split (1: whole)."""
        return max((c.degree for c in self.cuts_in(dims).values()), default=1)

    def copies(self, dims: Iterable[Axis], degree: int) -> int | None:
        """How many ranks hold each element; None where that differs between elements."""
        pieces = 1
        for axis in dims:
            one = self.pieces(axis)
            if one is None:
                return None
            pieces *= one
        return degree // pieces

    def pieces(self, axis: Axis) -> int | None:
        """In how many pieces an axis is cut; None where its parts differ in that."""
        axis = axis.find()
        if axis in self.cuts:
            return self.cuts[axis].parts
        terms = [self.pieces(t) for t in axis.factors or axis.parts or ()]
        if axis.factors is not None:
            return None if None in terms else math.prod(t for t in terms if t is not None)
        return 1 if not terms else terms[0] if len(set(terms)) == 1 else None

    def size(self, axis: Axis) -> Size:
        """Number of elements that a rank holds of an axis while computing."""
        axis = axis.find()
        if axis in self.cuts:
            return self.cuts[axis].padded
        result: Size
        if axis.factors is not None:
            result = 1
            for factor in axis.factors:
                result = result * self.size(factor)
            return result
        if axis.parts is not None:
            result = 0
            for part in axis.parts:
                result = result + self.size(part)
            return result
        return axis.size

    def layout(self, axis: Axis) -> Layout:
        """Which elements of a dimension the ranks hold."""
        axis = axis.find()
        if axis.factors is not None:
            factors = tuple(self.layout(f) for f in axis.factors if f.find().size != 1)
            return _simplified(factors)
        if axis.parts is not None:
            parts = tuple(self.layout(p) for p in axis.parts)
            if all(isinstance(p, Leaf) and p.parts == 1 and p.size >= 0 for p in parts):
                return Leaf(sum(p.size for p in parts if isinstance(p, Leaf)))
            return Concat(parts)
        size = axis.size if isinstance(axis.size, int) else -1
        if axis in self.cuts:
            return Leaf(size, self.cuts[axis].parts, self.cuts[axis].stride)
        return Leaf(size)


def _simplified(factors: tuple[Layout, ...]) -> Layout:
    """A product with neighbouring uncut axes merged."""
    flat: list[Layout] = []
    for factor in factors:
        for f in factor.factors if isinstance(factor, Product) else (factor,):
            last = flat[-1] if flat else None
            if isinstance(f, Leaf) and isinstance(last, Leaf) and f.parts == last.parts == 1:
                flat[-1] = Leaf(last.size * f.size if min(f.size, last.size) >= 0 else -1)
            else:
                flat.append(f)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def stored_numel(dims: tuple[Axis, ...], shape: Sequence[int], assignment: Assignment) -> int:
    """Elements of a parameter on the rank that holds most."""
    dim = stored_dim(dims, assignment)
    if dim is None:
        return math.prod(shape)
    return math.prod(shape) // shape[dim] * share_size(assignment.layout(dims[dim]), 0)


def stored_dim(dims: tuple[Axis, ...], assignment: Assignment) -> int | None:
    """The dimension by which a parameter is stored split, or None where it is stored whole.

    It is stored split only where every rank of the group holds a share of its own: key/value heads
    fewer than the ranks stay whole, each rank using the rows of its heads.
    """
    split = [i for i, axis in enumerate(dims) if is_split(assignment.layout(axis))]
    if len(split) != 1:
        return None
    axis = dims[split[0]]
    cuts = assignment.cuts_in([axis])
    degree = max(c.degree for c in cuts.values())
    return split[0] if is_disjoint(assignment.layout(axis), degree) else None
