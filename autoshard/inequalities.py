"""Formulas over linear inequalities of integers, and the question whether one can hold at all.

``k <= q`` is ``Holds(q - k)``, its negation ``k > q`` is ``Holds(k - q - 1)``, so there is no "not".
``impossible`` eliminates one variable after the other (Fourier and Motzkin): from a lower and an upper
bound of x follows one inequality without x, and a false one among constants ends the proof. What is
impossible over fractions is so over integers; what is no linear term counts as a variable of its own,
which only widens what is possible. So ``True`` is a proof, for all values of all variables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy

Term = Any  # a sympy expression of integers
Bound = tuple[tuple[tuple[Term, int], ...], int]  # Σ coefficient · variable + constant >= 0
Bounds = dict[Bound, None]  # a set that keeps its order: all ranks conclude the same
MOST = 500  # inequalities; beyond it nothing is proven


class NotLinear(Exception):
    """An expression that is no integer sum of terms."""


@dataclass(frozen=True)
class Holds:
    """``term >= 0``."""

    term: Term


@dataclass(frozen=True)
class Every:
    """All parts hold; without parts, true."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Some:
    """One of the parts holds; without parts, false."""

    parts: tuple[Formula, ...]


Formula = Holds | Every | Some
TRUE, FALSE = Every(()), Some(())


def at_least(a: Term, b: Term) -> Formula:
    """``a >= b``."""
    difference = sympy.expand(sympy.sympify(a) - b)
    if difference.is_Integer:
        return TRUE if difference >= 0 else FALSE
    _bound(difference)
    return Holds(difference)


def equal(a: Term, b: Term) -> Formula:
    """``a == b``."""
    return every(at_least(a, b), at_least(b, a))


def every(*parts: Formula) -> Formula:
    """All of them hold."""
    kept = tuple(p for p in dict.fromkeys(parts) if p != TRUE)
    return FALSE if FALSE in kept else kept[0] if len(kept) == 1 else Every(kept)


def some(*parts: Formula) -> Formula:
    """One of them holds."""
    kept = tuple(p for p in dict.fromkeys(parts) if p != FALSE)
    return TRUE if TRUE in kept else kept[0] if len(kept) == 1 else Some(kept)


def negated(formula: Formula) -> Formula:
    """Its contrary, for integers: ``not (a >= 0)`` is ``-a - 1 >= 0``."""
    if isinstance(formula, Holds):
        return at_least(-formula.term - 1, 0)
    if isinstance(formula, Every):
        return some(*map(negated, formula.parts))
    return every(*map(negated, formula.parts))


def impossible(formulas: Iterable[Formula]) -> bool:
    """Whether it is proven that no integers make all formulas hold."""
    return _impossible({}, list(formulas))


def _impossible(known: Bounds, rest: list[Formula]) -> bool:
    known, rest = dict(known), list(rest)
    choices: list[Some] = []
    while rest:
        formula = rest.pop()
        if isinstance(formula, Holds):
            known[_bound(formula.term)] = None
        elif isinstance(formula, Every):
            rest += formula.parts
        else:
            choices.append(formula)
    if _contradicts(known):
        return True
    if not choices:
        return False
    first, *others = choices
    return all(_impossible(known, [part, *others]) for part in first.parts)


def _bound(term: Term) -> Bound:
    """An inequality of integers in its sharpest form: coefficients without a common divisor."""
    if term.is_integer is not True:
        raise NotLinear(f"{term} is no integer")
    coefficients = sympy.expand(term).as_coefficients_dict()
    if not all(c.is_Integer for c in coefficients.values()):
        raise NotLinear(f"{term} has fractions")
    constant = int(coefficients.pop(sympy.Integer(1), 0))
    return _sharpest({v: int(c) for v, c in coefficients.items() if c != 0}, constant)


def _sharpest(coefficients: dict[Term, int], constant: int) -> Bound:
    divisor = math.gcd(*coefficients.values()) or 1
    pairs = sorted(((v, c // divisor) for v, c in coefficients.items()), key=lambda p: str(p[0]))
    return tuple(pairs), constant // divisor if coefficients else constant


def _contradicts(bounds: Bounds) -> bool:
    while True:
        if any(not pairs and constant < 0 for pairs, constant in bounds):
            return True
        variable = next((pairs[0][0] for pairs, _ in bounds if pairs), None)
        if variable is None or len(bounds) > MOST:
            return False
        bounds = dict.fromkeys(_without(variable, bounds))


def _without(variable: Term, bounds: Iterable[Bound]) -> Iterator[Bound]:
    below, above = list[tuple[int, Bound]](), list[tuple[int, Bound]]()
    for bound in bounds:
        coefficient = dict(bound[0]).get(variable, 0)
        if coefficient == 0:
            yield bound
        else:
            (below if coefficient > 0 else above).append((abs(coefficient), bound))
    for a, (lower, low) in below:
        for b, (upper, high) in above:
            total = {v: b * c for v, c in lower}
            for v, c in upper:
                total[v] = total.get(v, 0) + a * c
            yield _sharpest({v: c for v, c in total.items() if c}, b * low + a * high)
