"""Elements: what stands at a place of a tensor that is made of sizes alone, as a formula of the place.

A tensor is a function from a place, one integer term for each dimension, to a scalar. So views rename
indices, and an operator that gathers composes two functions::

    arange(S)[i]               i
    x.unsqueeze(0)[0, i]       x[i]
    x.expand(B, S)[b, i]       x[0, i]
    x[rows, columns][i, j]     x[rows[i, j], columns[i, j]]
    (x <= y)[i, j]             x[i, j] <= y[i, j], a formula of i, j and the sizes
    where(c, x, y)[i]          the cases: x[i] where c[i], y[i] elsewhere

Scalars are formulas (bool), and cases of numbers: integer terms of indices and sizes, or constants. An
operator on constants is itself run, on one element of the operands' dtypes and ranks, so its arithmetic
needs no description here. All else, first of all a value of an input or a parameter, is ``Unknown``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from autoshard.inequalities import (
    FALSE,
    TRUE,
    Formula,
    NotLinear,
    Term,
    at_least,
    equal,
    every,
    impossible,
    negated,
    some,
)
from autoshard.memory import storage, written
from autoshard.rules import bind
from autoshard.rules.call import is_tensor, op_name, shape_of, size_of

Place = tuple[Term, ...]
Number = Any  # a sympy term of an integer tensor's element, a float of a floating one's
Cases = tuple[tuple[Formula, Number], ...]  # of which exactly one holds
Scalar = Formula | Cases

MOST_CASES = 8
LARGEST = 2**31  # of a coefficient: sums of such multiples of sizes stay within int64


class Unknown(Exception):
    """A value that is not known for every place and every size; says which and why."""


class Elements:
    """The elements of a graph's tensors.

    Attributes:
        facts: what holds of the indices and sizes.
        constants: placeholder -> value of tensors made in ``forward``.
        read: the nodes whose elements were asked for.
    """

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        self.facts: tuple[Formula, ...] = ()
        self.read: set[fx.Node] = set()
        self.constants = constants
        self._names = itertools.count()
        self._known: dict[Any, Scalar] = {}
        self._written = {storage(w) for n in graph.nodes if (w := written(n)) is not None} - {None}

    def index(self, size: Term) -> tuple[Term, Formula]:
        """A new index of a dimension, and that it lies inside."""
        index = sympy.Dummy(f"i{next(self._names)}", integer=True)
        return index, every(at_least(index, 0), at_least(size - 1, index))

    def refuted(self, *formulas: Formula) -> bool:
        """Whether it is proven that they never hold together."""
        return impossible([*self.facts, *formulas])

    def at(self, node: fx.Node, place: Place) -> Scalar:
        """The element at a place that lies inside.

        Raises:
            Unknown: it depends on more than sizes, or on an operator that is not described here.
        """
        key = (node, place, self.facts)
        if key not in self._known:
            self.read.add(node)
            try:
                self._known[key] = self._at(node, place)
            except NotLinear as error:
                raise Unknown(f"{node.name}: {error}") from error
        return self._known[key]

    def _at(self, node: fx.Node, place: Place) -> Scalar:
        if not is_tensor(node) or storage(node) in self._written:
            raise Unknown(f"{node.name} is no tensor, or written to")
        if node.op == "placeholder":
            value = self.constants.get(node.name)
            if value is None or value.numel() != 1:
                raise Unknown(f"{node.name} is a value that the model is given")
            return self.cast(value.item(), value.dtype, value.dtype)
        name = op_name(node)
        if not name or not str(node.target).startswith("aten."):
            raise Unknown(f"{node.name} is no operator of PyTorch")
        if name in RULES:
            return RULES[name](self, node, bind(node), place)
        tags = node.target.tags  # type: ignore[union-attr]
        known = name in LOGIC or name in ARITHMETIC or name in COMPARISONS
        if torch.Tag.nondeterministic_seeded in tags or not (known or torch.Tag.pointwise in tags):
            raise Unknown(f"nothing is known of {node.target}")
        return self._pointwise(node, name, place)

    # -- scalars ----------------------------------------------------------------------------------

    def decided(self, formula: Formula) -> Formula:
        """The formula; TRUE or FALSE where that is proven."""
        if formula in (TRUE, FALSE):
            return formula
        if self.refuted(formula):
            return FALSE
        return TRUE if self.refuted(negated(formula)) else formula

    def cases(self, scalar: Scalar) -> Cases:
        """A formula as 1 where it holds and 0 elsewhere; numbers as they are."""
        if isinstance(scalar, tuple):
            return scalar
        return self.merged([(scalar, sympy.Integer(1)), (negated(scalar), sympy.Integer(0))])

    def merged(self, cases: Sequence[tuple[Formula, Number]]) -> Cases:
        """Equal numbers are one case; what never holds is none."""
        guards: dict[str, tuple[Formula, Number]] = {}
        for guard, number in cases:
            before = guards.get(repr(number), (FALSE, number))[0]  # 0.0 is not -0.0
            guards[repr(number)] = some(before, guard), number
        found = tuple((g, n) for g, n in guards.values() if not self.refuted(g))
        if not 0 < len(found) <= MOST_CASES:
            raise Unknown(f"{len(found)} cases")
        return found if len(found) > 1 else ((TRUE, found[0][1]),)

    def either(self, condition: Formula, yes: Scalar, no: Scalar) -> Scalar:
        """``yes`` where the condition holds, ``no`` elsewhere."""
        condition = self.decided(condition)
        if condition in (TRUE, FALSE):
            return yes if condition == TRUE else no
        contrary = negated(condition)
        if not isinstance(yes, tuple) and not isinstance(no, tuple):
            return some(every(condition, yes), every(contrary, no))
        return self.merged(
            [(every(condition, g), n) for g, n in self.cases(yes)]
            + [(every(contrary, g), n) for g, n in self.cases(no)]
        )

    def cast(self, scalar: Any, source: torch.dtype, target: torch.dtype) -> Scalar:
        """A scalar (or a number of Python, or a size) of one dtype as one of another."""
        if isinstance(scalar, (bool, int)):
            scalar = sympy.Integer(scalar)
        if isinstance(scalar, (float, sympy.Expr)):
            scalar = ((TRUE, scalar),)
        if target is torch.bool:
            return self._nonzero(scalar)
        return self.merged([(g, _cast(n, source, target)) for g, n in self.cases(scalar)])

    def _nonzero(self, scalar: Scalar) -> Formula:
        if not isinstance(scalar, tuple):
            return scalar
        return self.decided(some(*(every(guard, _is_nonzero(n)) for guard, n in scalar)))

    # -- operators of each element ----------------------------------------------------------------

    def _pointwise(self, node: fx.Node, name: str, place: Place) -> Scalar:
        """Each element of the result from those of the operands, which are broadcast."""
        given = bind(node)
        operands = {key: value for key, value in given.items() if is_tensor(value)}
        if set(operands.values()) != {n for n in node.all_input_nodes if is_tensor(n)}:
            raise Unknown(f"{node.target} takes lists")
        scalars = [self.at(n, aligned(n, _sizes(node), place)) for n in operands.values()]
        formulas = [s for s in scalars if not isinstance(s, tuple)]
        arity, combine = LOGIC.get(name, (0, every))
        if len(formulas) == len(scalars) == arity:
            return self.decided(combine(*formulas))
        found: list[tuple[Formula, Scalar]] = []
        for case in itertools.product(*map(self.cases, scalars)):
            guard = every(*(g for g, _ in case))
            if not self.refuted(guard):
                numbers = dict(zip(operands, (n for _, n in case), strict=True))
                found.append((guard, self._computed(node, name, given, numbers)))
        if node.meta["val"].dtype is torch.bool:
            return self.decided(some(*(every(g, self._nonzero(s)) for g, s in found)))
        return self.merged([(every(g, h), n) for g, s in found for h, n in self.cases(s)])

    def _computed(
        self, node: fx.Node, name: str, given: dict[str, Any], numbers: dict[str, Number]
    ) -> Scalar:
        """One element of the result, of these numbers in the operands' place."""
        sizes = [_integer(n) for n in node.all_input_nodes if not is_tensor(n)]
        if all(map(_is_constant, (*numbers.values(), *sizes))):
            return self._run(node, numbers)
        dtypes = {given[key].meta["val"].dtype for key in numbers} | {node.meta["val"].dtype}
        if not dtypes <= {torch.int64, torch.bool} or name not in (*ARITHMETIC, *COMPARISONS):
            raise Unknown(f"{node.target} of a term that is no constant")
        left, right = (
            numbers[key] if key in numbers else _integer(given[key])
            for key in ("self", "other")
            if key in given
        )
        if name in COMPARISONS:
            return self.decided(COMPARISONS[name](left, right))
        return ((TRUE, _term(ARITHMETIC[name](left, right, _integer(given.get("alpha", 1))))),)

    def _run(self, node: fx.Node, numbers: dict[str, Number]) -> Scalar:
        """What the operator itself makes of constants."""
        given = bind(node)
        operands = {given[key]: number for key, number in numbers.items()}

        def value(argument: fx.Node) -> Any:
            if argument not in operands:
                return int(_integer(argument))
            traced, number = argument.meta["val"], operands[argument]
            plain = number if isinstance(number, float) else int(number)
            return torch.full((1,) * traced.dim(), plain, dtype=traced.dtype)

        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError as error:
            raise Unknown(f"{node.target} does not run: {error}") from error
        if result.dtype != node.meta["val"].dtype or result.numel() != 1:
            raise Unknown(f"{node.target} of one element gives something else")
        return self.cast(result.item(), result.dtype, result.dtype)


# -- terms ----------------------------------------------------------------------------------------


def _integer(value: Any) -> Term:
    """A number, or a symbolic size, as a term."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if not isinstance(value, (int, torch.SymInt)):
        raise Unknown(f"{value} is no integer")
    return sympy.sympify(size_of(int(value) if isinstance(value, bool) else value))


def _term(term: Term) -> Term:
    """A sum of indices and sizes that int64 holds."""
    term = sympy.expand(term)
    for variable, factor in term.as_coefficients_dict().items():
        atom = variable == 1 or variable.is_Symbol or variable.is_Function
        if not (atom and factor.is_Integer and abs(factor) <= LARGEST):
            raise Unknown(f"{term} may be too large")
    return term


def _is_constant(number: Number) -> bool:
    return isinstance(number, float) or number.is_Integer


def _is_nonzero(number: Number) -> Formula:
    if isinstance(number, float):
        return TRUE if number != 0 else FALSE
    return negated(equal(number, 0))


def _cast(number: Number, source: torch.dtype, target: torch.dtype) -> Number:
    if not _is_constant(number):
        if not source is target is torch.int64:
            raise Unknown(f"{number} as {target}")
        return _term(number)
    found = _as(number if isinstance(number, float) else int(number), source, target)
    return found if isinstance(found, float) else sympy.Integer(found)


def _as(value: float, source: torch.dtype, target: torch.dtype) -> float:
    """A number of one dtype as one of another."""
    try:
        found = torch.tensor(value, dtype=source).to(target).item()
    except RuntimeError as error:
        raise Unknown(f"{value} as {source}: {error}") from error
    if isinstance(found, complex) or found != found:
        raise Unknown(f"{found} is no real number")
    return found


def same(a: Term, b: Term) -> bool:
    """Whether two sizes are equal, whatever the symbols stand for."""
    return bool(sympy.expand(a - b) == 0)


def aligned(source: fx.Node, shape: Sequence[Term], place: Place) -> Place:
    """The place in a tensor that is broadcast to a shape."""
    sizes = _sizes(source)
    behind = len(shape) - len(sizes)
    if behind < 0:
        raise Unknown(f"{source.name} has more dimensions than what it is broadcast to")
    found = []
    for size, whole, index in zip(sizes, shape[behind:], place[behind:], strict=True):
        if size != 1 and not same(size, whole):
            raise Unknown(f"{source.name} of {size} is broadcast to {whole}")
        found.append(index if size != 1 else sympy.Integer(0))
    return tuple(found)


def _sizes(node: fx.Node) -> tuple[Term, ...]:
    return tuple(map(sympy.sympify, shape_of(node.meta["val"])))


LOGIC: dict[str, tuple[int, Callable[..., Formula]]] = {
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and", "mul"), (2, every)),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), (2, some)),
    **dict.fromkeys(("bitwise_not", "logical_not"), (1, negated)),
}

COMPARISONS: dict[str, Callable[[Term, Term], Formula]] = {
    "le": lambda a, b: at_least(b, a),
    "lt": lambda a, b: at_least(b - 1, a),
    "ge": at_least,
    "gt": lambda a, b: at_least(a - 1, b),
    "eq": equal,
    "ne": lambda a, b: negated(equal(a, b)),
}

ARITHMETIC: dict[str, Callable[[Term, Term, Term], Term]] = {
    "add": lambda a, b, alpha: a + alpha * b,
    "sub": lambda a, b, alpha: a - alpha * b,
    "rsub": lambda a, b, alpha: b - alpha * a,
    "mul": lambda a, b, _: a * b,
}


# -- operators that know places -------------------------------------------------------------------


def _broadcast(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    return elements.at(given["self"], aligned(given["self"], _sizes(node), place))


def _regrouped(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """A view that adds and drops dimensions of size 1 only."""
    source = given["self"]
    if source.meta["val"].dtype != node.meta["val"].dtype:
        raise Unknown(f"{node.name} reads the bits of {source.name} as another dtype")
    sizes, new = _sizes(source), _sizes(node)
    wide = [(size, index) for size, index in zip(new, place, strict=True) if size != 1]
    before = [size for size in sizes if size != 1]
    if len(wide) != len(before) or not all(same(a, b) for a, (b, _) in zip(before, wide, strict=True)):
        raise Unknown(f"{node.name} regroups dimensions")
    indices = iter([index for _, index in wide])
    return elements.at(source, tuple(sympy.Integer(0) if s == 1 else next(indices) for s in sizes))


def _permuted(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    order = list(range(len(place)))
    if op_name(node) == "permute":
        order = [d % len(place) for d in given["dims"]]
    elif op_name(node) == "t":
        order.reverse()
    else:
        a, b = given["dim0"], given["dim1"]
        order[a], order[b] = order[b], order[a]
    return elements.at(given["self"], tuple(place[order.index(d)] for d in range(len(place))))


def _sliced(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    dim, source = given["dim"] % len(place), given["self"]
    start = _from_left(elements, given["start"] or 0, _sizes(source)[dim])
    moved = start + _integer(given["step"]) * place[dim]
    return elements.at(source, (*place[:dim], _term(moved), *place[dim + 1 :]))


def _selected(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    source, rank = given["self"], len(place) + 1
    dim = given["dim"] % rank
    index = _from_left(elements, given["index"], _sizes(source)[dim])
    return elements.at(source, (*place[:dim], index, *place[dim:]))


def _from_left(elements: Elements, position: Any, size: Term) -> Term:
    """A position counted from the left, proven not to be cut off there."""
    term = _integer(position)
    if elements.refuted(at_least(-1, term)):
        return term
    if elements.refuted(at_least(term, 0)) and elements.refuted(at_least(-1, term + size)):
        return term + size
    raise Unknown(f"{position} may be on either side of the start")


def _gathered(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """``x[:, i, j]``: neighbouring dimensions are looked up, in range as it is proven."""
    source, indices = given["self"], list(given["indices"])
    sizes = _sizes(source)
    indices += [None] * (len(sizes) - len(indices))
    dims = [d for d, index in enumerate(indices) if index is not None]
    if not dims or dims != list(range(dims[0], dims[-1] + 1)):
        raise Unknown(f"{node.name} looks up dimensions that are no neighbours")
    if any(indices[d].meta["val"].dtype is not torch.int64 for d in dims):
        raise Unknown(f"{node.name} is not indexed by integers")
    rank = max(indices[d].meta["val"].dim() for d in dims)
    inner = slice(dims[0], dims[0] + rank)
    shape, there = _sizes(node)[inner], place[inner]
    found = []
    for d in dims:
        cases = elements.cases(elements.at(indices[d], aligned(indices[d], shape, there)))
        index = cases[0][1]
        if len(cases) > 1 or not elements.refuted(some(at_least(-1, index), at_least(index, sizes[d]))):
            raise Unknown(f"{node.name} may look up what is out of range")
        found.append(index)
    return elements.at(source, (*place[: dims[0]], *found, *place[dims[0] + rank :]))


def _repeated(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """``repeat`` of dimensions of size 1, or once."""
    source, sizes = given["self"], _sizes(given["self"])
    behind = len(place) - len(sizes)
    found = []
    for size, times, index in zip(sizes, given["repeats"][behind:], place[behind:], strict=True):
        if size != 1 and times != 1:
            raise Unknown(f"{node.name} repeats {size} elements")
        found.append(index if size != 1 else sympy.Integer(0))
    return elements.at(source, tuple(found))


def _triangle(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    right, diagonal = place[-1] - place[-2], _integer(given["diagonal"])
    kept = at_least(right, diagonal) if op_name(node) == "triu" else at_least(diagonal, right)
    dtype = node.meta["val"].dtype
    return elements.either(kept, elements.at(given["self"], place), elements.cast(0, dtype, dtype))


def _filled(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    name, dtype = op_name(node), node.meta["val"].dtype
    if name == "scalar_tensor":
        return _given(elements, given["s"], dtype)
    if "full" in name:
        return _given(elements, given["fill_value"], dtype)
    return elements.cast(1 if "ones" in name else 0, dtype, dtype)


def _given(elements: Elements, value: Any, dtype: torch.dtype) -> Scalar:
    """A number of Python, or a symbolic size, as an element."""
    if isinstance(value, (bool, int, float)):
        return elements.cast(_as(value, dtype, dtype), dtype, dtype)
    return elements.cast(_integer(value), torch.int64, dtype)


def _operand(elements: Elements, value: Any, node: fx.Node, place: Place) -> Scalar:
    """A tensor that is broadcast to the node's shape, or a number, in the node's dtype."""
    dtype = node.meta["val"].dtype
    if not is_tensor(value):
        return _given(elements, value, dtype)
    found = elements.at(value, aligned(value, _sizes(node), place))
    return elements.cast(found, value.meta["val"].dtype, dtype)


def _chosen(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """``where``, ``masked_fill``."""
    if "condition" in given:
        condition, yes, no = given["condition"], given.get("self"), given.get("other")
    else:
        condition, yes, no = given["mask"], given["value"], given["self"]
    if yes is None or condition.meta["val"].dtype is not torch.bool:
        raise Unknown(f"{node.name} does not choose by bools")
    allowed = elements.at(condition, aligned(condition, _sizes(node), place))
    assert not isinstance(allowed, tuple)
    return elements.either(
        allowed, _operand(elements, yes, node, place), _operand(elements, no, node, place)
    )


def _counted(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """``arange``."""
    if node.meta["val"].dtype is not torch.int64:
        raise Unknown(f"{node.name} does not count in int64")
    start, step = _integer(given.get("start", 0)), _integer(given.get("step", 1))
    return ((TRUE, _term(start + step * place[0])),)


def _converted(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    source = given["self"]
    return elements.cast(elements.at(source, place), source.meta["val"].dtype, node.meta["val"].dtype)


def _joined(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    parts = given["tensors"]
    dtype = node.meta["val"].dtype
    if any(p.meta["val"].dtype != dtype or p.meta["val"].dim() != len(place) for p in parts):
        raise Unknown(f"{node.name} joins unlike tensors")
    return _side_by_side(elements, parts, given["dim"] % len(place), place)


def _side_by_side(elements: Elements, parts: Sequence[fx.Node], dim: int, place: Place) -> Scalar:
    first, *others = parts
    if not others:
        return elements.at(first, place)
    size = _sizes(first)[dim]
    inside = elements.decided(at_least(size - 1, place[dim]))
    behind = (*place[:dim], _term(place[dim] - size), *place[dim + 1 :])
    if inside == TRUE:
        return elements.at(first, place)
    if inside == FALSE:
        return _side_by_side(elements, others, dim, behind)
    return elements.either(
        inside, elements.at(first, place), _side_by_side(elements, others, dim, behind)
    )


def _differences(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """``diff``: y[i] = x[i + 1] - x[i], with what is put before x."""
    dim = given["dim"] % len(place)
    parts = [p for p in (given["prepend"], given["self"], given["append"]) if p is not None]
    if given["n"] != 1 or any(p.meta["val"].dtype is not torch.int64 for p in parts):
        raise Unknown(f"{node.name} is not the first difference of int64")
    after = (*place[:dim], place[dim] + 1, *place[dim + 1 :])
    high, low = (elements.cases(_side_by_side(elements, parts, dim, p)) for p in (after, place))
    return elements.merged([(every(g, h), _term(m - n)) for g, m in high for h, n in low])


def _sums_so_far(elements: Elements, node: fx.Node, given: dict[str, Any], place: Place) -> Scalar:
    """``cumsum`` of what is the same along the dimension: y[i] = (i + 1) x."""
    source, dim = given["self"], given["dim"] % len(place)
    if node.meta["val"].dtype is not torch.int64 or source.meta["val"].is_floating_point():
        raise Unknown(f"{node.name} does not sum integers")
    facts = elements.facts
    index, inside = elements.index(_sizes(source)[dim])
    elements.facts = (*facts, inside)  # there is one, as the place lies inside
    try:
        cases = elements.cases(elements.at(source, (*place[:dim], index, *place[dim + 1 :])))
    finally:
        elements.facts = facts
    number = cases[0][1]
    if len(cases) > 1 or index in number.free_symbols:
        raise Unknown(f"{node.name} sums what is not the same everywhere")
    return ((TRUE, _term((place[dim] + 1) * number)),)


Rule = Callable[[Elements, fx.Node, dict[str, Any], Place], Scalar]

RULES: dict[str, Rule] = {
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _broadcast),
    **dict.fromkeys(
        ("view", "view_as", "reshape", "reshape_as", "_unsafe_view", "flatten", "unflatten",
         "squeeze", "unsqueeze", "contiguous", "clone", "detach", "alias"),
        _regrouped,
    ),
    **dict.fromkeys(("transpose", "permute", "t"), _permuted),
    "slice": _sliced,
    "select": _selected,
    "index": _gathered,
    "repeat": _repeated,
    **dict.fromkeys(("triu", "tril"), _triangle),
    **dict.fromkeys(
        ("ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like",
         "full_like", "scalar_tensor"),
        _filled,
    ),
    **dict.fromkeys(("where", "masked_fill"), _chosen),
    "arange": _counted,
    **dict.fromkeys(("to", "_to_copy", "type_as"), _converted),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "diff": _differences,
    "cumsum": _sums_so_far,
}  # fmt: skip
