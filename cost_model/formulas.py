"""Formulas: seconds of each kind of work, as sympy expressions in sizes and hardware constants.

    product      2 k |b m n| / rate (1 + m0/m + n0/n + k0/k) + kernel,  at least bytes / bandwidth
                 |b m n|: in whole tiles, the tiles in whole waves of the processors
    attention    flops / rate of its kernel + kernel
    traffic      bytes / bandwidth + kernel
    all-reduce   latency log2(d) + 2 (d-1)/d bytes / bus          (ring; Megatron's f and g)
    all-gather   latency log2(d) + (d-1)/d bytes / bus
    beside products of t seconds, a collective of c:   c - overlap min(c, t)
        where products leave it some multiprocessors and take s t:   max(c', s t) - t, if that is less
    n weights of one input, gradients:   2 n products, and the input's read again for all but the first;
        where that moves less memory, 2 products of all columns, and the columns laid side by side

The host's time is what Python and the launches take. Kernels run behind it, so a phase of a region
takes the longer of the two: ``Max(device, host)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import sympy

from autoshard.cost_model.hardware import BYTES, MOST_LANES, Hardware
from autoshard.cost_model.work import (
    Attention,
    Collective,
    Item,
    Phase,
    Product,
    SideBySide,
    Size,
    Traffic,
    Without,
    total,
)  # fmt: skip
from autoshard.products import one_moves_less

Expr: TypeAlias = Any

BANDWIDTH, KERNEL = sympy.symbols("bandwidth kernel", positive=True)
M0, N0, K0 = sympy.symbols("m0 n0 k0", nonnegative=True)
TILE_M, TILE_N, PROCESSORS = sympy.symbols("tile_m tile_n processors", positive=True, integer=True)
LATENCY, BUS = sympy.symbols("latency bus", positive=True)
OVERLAP = sympy.Symbol("overlap", nonnegative=True)
# Of each lane: c / c' without latency, and s. A machine that has fewer has some that never win.
LANES = tuple(sympy.symbols(f"lane{i}_share lane{i}_slower", positive=True) for i in range(MOST_LANES))
PHASES = ("forward", "backward")

COMPUTE, MEMORY, COMMUNICATION = "compute", "memory traffic", "communication"


def kind_of(item: Item) -> str:
    """What an item's time counts as."""
    if isinstance(item, Without):
        return kind_of(item.item)
    if isinstance(item, Collective):
        return COMMUNICATION
    return MEMORY if isinstance(item, Traffic) else COMPUTE


def seconds(item: Item) -> Expr:
    """The time of one item on the device."""
    match item:
        case Product(batch, m, n, k, dtype):
            fill = 1 + M0 / m + N0 / n + K0 / k
            tiles = batch * sympy.ceiling(m / TILE_M) * sympy.ceiling(n / TILE_N)
            waves = sympy.ceiling(tiles / PROCESSORS)
            flops = 2 * k * waves * PROCESSORS * TILE_M * TILE_N
            moved = BYTES.get(dtype, 4) * batch * (m * k + k * n + m * n)
            return sympy.Max(flops / _rate(dtype) * fill, moved / BANDWIDTH) + KERNEL
        case Attention(flops, kernel, backward):
            work = flops * sympy.Rational(5, 2) if backward else flops
            return work / sympy.Symbol(f"attention_{kernel}_{PHASES[backward]}", positive=True) + KERNEL
        case Traffic(size, operator, backward):
            times = sympy.Symbol(f"{operator}_{PHASES[backward]}", positive=True) if operator else 1
            return times * size / BANDWIDTH + KERNEL
        case Collective(kind, size, degree, under):
            ways = 2 if kind == "all_reduce" else 1
            hops = sympy.log(degree) / sympy.log(2)
            start, sent = LATENCY * hops, ways * (degree - 1) * size / (degree * BUS)
            return _beside(start, sent, device(under)) if under else start + sent
        case SideBySide():
            return sympy.Piecewise((as_one(item), moves_less(item)), (one_by_one(item), True))
        case Without(other):
            return -seconds(other)


def _beside(start: Expr, sent: Expr, products: Expr) -> Expr:
    """What a collective adds to the products that it runs beside, in the best way there is."""
    own = start + sent
    lanes = [
        sympy.Max(start + sent / share, products * slower, evaluate=False) - products
        for share, slower in LANES
    ]
    return sympy.Min(own - OVERLAP * sympy.Min(own, products), *lanes, evaluate=False)


def moves_less(item: SideBySide) -> Any:
    """Whether the products run as one each: a condition on sizes."""
    first = item.of_input[0]
    return one_moves_less(len(item.of_input), _columns(item), first.m, first.n)


def one_by_one(item: SideBySide) -> Expr:
    """Seconds of a product for each weight; the sum is read again by all but the first."""
    first = item.of_input[0]
    again = (len(item.of_input) - 1) * BYTES.get(first.dtype, 4) * first.m * first.n
    return device((*item.of_input, *item.of_weights)) + again / BANDWIDTH


def as_one(item: SideBySide) -> Expr:
    """Seconds of one product of all columns, whose gradients and weights are laid side by side."""
    first, columns = item.of_input[0], _columns(item)
    laid = 2 * BYTES.get(first.dtype, 4) * columns * (first.m + first.n)
    products = (replace(first, k=columns), replace(item.of_weights[0], n=columns))
    return device(products) + laid / BANDWIDTH + 2 * KERNEL


def _columns(item: SideBySide) -> Size:
    return total(product.k for product in item.of_input)


def device(items: Iterable[Item]) -> Expr:
    """The sum over items, equal ones counted once."""
    return total(count * seconds(item) for item, count in Counter(items).items())


def host(phase: Phase, backward: bool) -> Expr:
    """The host's time of a phase."""
    return total(
        count * sympy.Symbol(f"host_{kind}_{PHASES[backward]}", nonnegative=True)
        for kind, count in phase.host
    )


def phase_time(phase: Phase, backward: bool) -> Expr:
    """Seconds of a phase: the device's or the host's, whichever is longer."""
    return sympy.Max(device(phase.items), host(phase, backward))


def constants(hardware: Hardware, degree: int) -> dict[str, float]:
    """The numbers of all hardware symbols, for groups of so many ranks."""
    values = {
        "bandwidth": hardware.bandwidth, "kernel": hardware.kernel,
        "m0": hardware.fill[0], "n0": hardware.fill[1], "k0": hardware.fill[2],
        "tile_m": hardware.tile[0], "tile_n": hardware.tile[1], "processors": hardware.processors,
        "overlap": hardware.overlap,
    }  # fmt: skip
    for place, (share, slower) in enumerate(LANES):
        lane = hardware.lanes[place] if place < len(hardware.lanes) else None
        values[share.name] = 1e-9 if lane is None else lane.share
        values[slower.name] = 1.0 if lane is None else lane.slower
    for dtype in BYTES:
        values[f"rate_{dtype}"] = hardware.rate(dtype)
    for name, pair in hardware.attention.items():
        for way, value in zip(PHASES, pair, strict=True):
            values[f"attention_{name}_{way}"] = value
    for table, prefix in ((hardware.passes, ""), (hardware.host, "host_")):
        for name, pair in table.items():
            for way, value in zip(PHASES, pair, strict=True):
                values[f"{prefix}{name}_{way}"] = value
    values["latency"] = values["bus"] = 1.0
    if degree > 1:
        link = hardware.link(degree)
        values |= {"latency": link.latency, "bus": link.bandwidth}
    return values


def _rate(dtype: str) -> Expr:
    return sympy.Symbol(f"rate_{dtype if dtype in BYTES else 'float32'}", positive=True)
