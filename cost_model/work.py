"""Work: what a part of a model computes, moves and communicates, as sizes. Knows no graph.

Sizes are ints or sympy expressions in the batch ``B``, the sequence ``S`` and the degree ``d``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy

Size: TypeAlias = Any

B = sympy.Symbol("B", positive=True, integer=True)
S = sympy.Symbol("S", positive=True, integer=True)
D = sympy.Symbol("d", positive=True, integer=True)


@dataclass(frozen=True)
class Product:
    """``batch`` products of [m, k] and [k, n]."""

    batch: Size
    m: Size
    n: Size
    k: Size
    dtype: str

    @property
    def flops(self) -> Size:
        """Multiply-adds, times two."""
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Attention:
    """The scores, softmax and sum in one kernel.

    Attributes:
        flops: of the two products, as if nothing were masked.
        kernel: ``causal``, ``full`` or ``masked`` (an explicit mask).
        backward: whether it is the gradient's kernel, which does 2.5 times the work.
    """

    flops: Size
    kernel: str
    backward: bool


@dataclass(frozen=True)
class Traffic:
    """An operator bound by memory.

    Attributes:
        bytes: read and written; or of the result, where ``operator`` is measured by name.
        operator: the name of a measured operator, or ``""``.
        backward: whether it is the gradient's kernel.
    """

    bytes: Size
    operator: str = ""
    backward: bool = False


@dataclass(frozen=True)
class Collective:
    """``all_reduce`` or ``all_gather`` of a tensor of so many bytes (whole) over ``degree`` ranks.

    under: products that it runs beside: of an input's gradient, those of the weights' gradients.
    """

    kind: str
    bytes: Size
    degree: Size
    under: tuple[Product, ...] = ()


@dataclass(frozen=True)
class SideBySide:
    """The gradients of several weights that one input is multiplied by, and of the input.

    One product each where that moves less memory (``products.one_moves_less``), else one for each
    weight. Attributes:
        of_input: the products whose sum is the gradient of the input, one for each weight.
        of_weights: the products that give the gradients of the weights.
    """

    of_input: tuple[Product, ...]
    of_weights: tuple[Product, ...]


@dataclass(frozen=True)
class Without:
    """Work that an operator counts by itself, and that is not done where it runs with others."""

    item: Product | Traffic


Item: TypeAlias = Product | Attention | Traffic | Collective | SideBySide | Without


@dataclass(frozen=True)
class Phase:
    """Forward or backward: kernels, and the nodes that the host launches, by kind."""

    items: tuple[Item, ...] = ()
    host: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Shared:
    """An all-reduce that several regions have together, and whether it is one of the backward."""

    collective: Collective
    backward: bool


@dataclass(frozen=True)
class Work:
    """One region, or what belongs to none, at one degree (or at a symbolic one).

    Attributes:
        forward, backward: of one step.
        saved: bytes of activations kept for the backward.
        gradients: bytes of the gradient of the logits, which exist whole at the peak.
        parameters: elements of parameters that a rank holds, by dtype's bytes.
        in_layer: whether activation checkpointing computes it again.
    """

    forward: Phase = Phase()
    backward: Phase = Phase()
    saved: Size = 0
    gradients: Size = 0
    parameters: tuple[tuple[int, Size], ...] = ()
    in_layer: bool = False


@dataclass(frozen=True)
class Unit:
    """A region's work at each degree that it can take.

    Attributes:
        name: the region's name.
        tie: regions with the same number (from 0 on) have one degree.
        work: degree -> work; sizes hold ``B`` and ``S``, and ``d`` for the degree.
        shared: what other regions of the same degree share, (value's name, degree) -> its all-reduce:
            forward of a value that is a sum of results, backward of one that enters. Not in ``work``.
    """

    name: str
    tie: int
    work: dict[int, Work] = field(hash=False)
    shared: dict[tuple[str, int], Shared] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Workload:
    """A whole model's work.

    Attributes:
        units: the regions.
        rest: what every rank computes whole, in layers and outside.
        boundaries: bytes of the values at the layers' inputs (kept under checkpointing).
        layers: number of repeated layers.
    """

    units: tuple[Unit, ...]
    rest: tuple[Work, ...]
    boundaries: Size = 0
    layers: int = 0


def one_after_other(workload: Workload) -> Workload:
    """The same where no sum runs under products: a copy is summed first, each weight for itself."""
    done: dict[int, Work] = {}

    def alone(work: Work) -> Work:
        if id(work) not in done:
            items: list[Item] = []
            for item in work.backward.items:
                if isinstance(item, Collective) and item.under:
                    items += [replace(item, under=()), Traffic(2 * item.bytes)]
                elif not isinstance(item, (SideBySide, Without)):
                    items.append(item)
            done[id(work)] = replace(work, backward=replace(work.backward, items=tuple(items)))
        return done[id(work)]

    def shared(one: Shared) -> Shared:
        return replace(one, collective=replace(one.collective, under=()))

    units = tuple(
        replace(
            unit, work={d: alone(work) for d, work in unit.work.items()},
            shared={key: shared(one) for key, one in unit.shared.items()},
        )
        for unit in workload.units
    )  # fmt: skip
    return replace(workload, units=units)


def again(forward: Phase) -> Phase:
    """What checkpointing computes again: all but the collectives, whose results outlive them."""
    items = tuple(i for i in forward.items if not isinstance(i, Collective))
    return Phase(items, tuple((kind, n) for kind, n in forward.host if kind != "collective"))


def total(sizes: Iterable[Size]) -> Size:
    """The sum of sizes."""
    return sum(sizes, start=sympy.Integer(0))
