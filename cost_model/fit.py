"""Fit: from measurements to a profile, by non-negative least squares on relative errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autoshard.cost_model.hardware import LEAST_PASSES, Hardware, Link, preset_of


def fit(measured: Mapping[str, Any], name: str, date: str) -> Hardware:
    """The constants that explain what ``measure`` found; lanes, which it does not try, are those of the
    device's preset.

    Raises:
        ValueError: too few measurements that the device, not the host, took the time of.
    """
    # A difference of two times may come out below zero.
    host = {k: (max(0.0, v[0]), max(0.0, v[1])) for k, v in measured["host"].items()}
    itemsize = measured["itemsize"]
    bandwidth, kernel, copy_error = _bandwidth(measured["passes"], itemsize)
    # A profile of an older measurement, or of a device that cannot be timed alone, has the host's
    # time in the smallest: they are left out.
    floor = 1.5 * host["product"][0] if _waits_for_host(measured) else 0.0
    rate, fill, product_error = _products(measured["gemms"], floor)
    start = min(row[4] for row in measured["operators"]) if _waits_for_host(measured) else 0.0
    host["step"] = (0.0, min(1e-4, host["step"][1]))
    attention, attention_error = _attention(measured["attention"])
    links, link_error = _links(measured["collectives"])
    preset = preset_of(measured["device"])
    return Hardware(
        name=name,
        device=measured["device"],
        memory=float(measured["memory"]),
        flops={measured["dtype"]: rate},
        fill=fill,
        bandwidth=bandwidth,
        kernel=kernel,
        attention=attention,
        passes=_passes(measured["operators"], bandwidth, itemsize, start),
        host=host,
        links=links,
        overlap=float(measured.get("overlap", 0.0)),
        multiprocessors=preset.multiprocessors if preset else 0,
        lanes=preset.lanes if preset else (),
        source="autoshard calibrate",
        date=date,
        versions=dict(measured["versions"]),
        fit_error={
            "products": product_error, "copies": copy_error, "attention": attention_error,
            "collectives": link_error,
        },
    )  # fmt: skip


def _waits_for_host(measured: Mapping[str, Any]) -> bool:
    """Whether the smallest kernels were timed with their launch, on a GPU."""
    if measured["device"] == "cpu":
        return False
    return bool(min(row[1] for row in measured["passes"]) > 6e-6)


def nonnegative(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 that minimise the squared relative error of ``features @ x`` to values.

    The most negative coefficient is dropped until none is left.
    """
    keep = list(range(features.shape[1]))
    scaled = features / values[:, None]
    while keep:
        x, *_ = np.linalg.lstsq(scaled[:, keep], np.ones(len(values)), rcond=None)
        if (x >= 0).all():
            break
        keep.pop(int(np.argmin(x)))
    result = np.zeros(features.shape[1])
    result[keep] = x if keep else 0.0
    return result


def _error(features: np.ndarray, x: np.ndarray, values: np.ndarray) -> float:
    """The mean absolute relative error."""
    return float(np.abs(features @ x / values - 1).mean()) if len(values) else 0.0


def _products(
    rows: list[tuple[float, float, float, float]], floor: float
) -> tuple[float, tuple[float, float, float], float]:
    """time = 2/rate (mnk + m0 nk + n0 mk + k0 mn) + constant."""
    table = np.array([r for r in rows if r[3] > floor], dtype=float)
    if len(table) < 6:
        raise ValueError(f"{len(table)} products took longer than their launch: measure larger ones")
    m, n, k, seconds = table.T
    features = np.stack([m * n * k, n * k, m * k, m * n, np.ones_like(m)], axis=1)
    x = nonnegative(features, seconds)
    if x[0] <= 0:
        raise ValueError("the products' times do not grow with their size")
    fill = tuple(float(c / x[0]) for c in x[1:4])
    return float(2 / x[0]), (fill[0], fill[1], fill[2]), _error(features, x, seconds)


def _bandwidth(rows: list[tuple[int, float]], itemsize: int) -> tuple[float, float, float]:
    """time = kernel + 3 bytes / bandwidth, of an addition.

    The bandwidth is that of the three largest, which no cache holds; the kernel's time the smallest's
    (at most 3 us: more is the host's).
    """
    table = np.array(sorted(rows), dtype=float)
    numel, seconds = table[-3:].T
    kernel = float(min(table[0, 1], 3e-6))
    rate = float(np.median(3 * itemsize * numel / (seconds - kernel)))
    predicted = 3 * itemsize * numel / rate + kernel
    return rate, kernel, float(np.abs(predicted / seconds - 1).mean())


def _attention(rows: list[Any]) -> tuple[dict[str, tuple[float, float]], float]:
    """kernel -> FLOP/s forward and backward; by the median of shapes that take the device's time."""
    found, errors = {}, []
    least = min(row[5] for row in rows), min(row[5] + row[6] for row in rows)
    for kind in ("causal", "full", "masked"):
        rates: list[float] = []
        for way in range(2):
            values = []
            for b, h, s, d, how, there, back in rows:
                long = there > 1.5 * least[0] and (way == 0 or there + back > 1.2 * least[1])
                if how == kind and long:
                    flops = 4.0 * b * h * s * s * d
                    values.append((2.5 * flops / back) if way else flops / there)
            rates.append(float(np.median(values)))
            errors += [abs(v / rates[-1] - 1) for v in values]
        found[kind] = rates[0], rates[1]
    return found, float(np.mean(errors))


def _passes(
    rows: list[Any], bandwidth: float, itemsize: int, start: float
) -> dict[str, tuple[float, float]]:
    """operator -> times that the result's bytes cross the memory, by the median."""
    found = dict(LEAST_PASSES)
    for name in {row[0] for row in rows} & set(found):
        times: tuple[list[float], list[float]] = ([], [])
        for op, count, columns, forward, backward in rows:
            if op == name:
                result = (8192 if op == "embedding" else count) * columns * itemsize
                gradient = result + count * columns * itemsize if op == "embedding" else result
                times[0].append(forward * bandwidth / result)
                if backward > 1.2 * start:
                    times[1].append(backward * bandwidth / gradient)
        found[name] = float(np.median(times[0])), float(np.median(times[1] or [found[name][1]]))
    return found


def _links(rows: list[Any]) -> tuple[tuple[Link, ...], float]:
    """time = latency log2(d) + 2 (d-1)/d bytes / bandwidth; one level per measured group size."""
    links, errors = [], []
    for degree in sorted({row[1] for row in rows}):
        table = np.array([(size, t) for _, d, size, t in rows if d == degree], dtype=float)
        # The smallest take the host's time, which the host's constants count.
        large = table[table[:, 1] > 1.2 * np.median(np.sort(table[:, 1])[: len(table) // 2])]
        large = large if len(large) >= 2 else table[-3:]
        hops, share = np.log2(degree), 2 * (degree - 1) / degree
        features = np.stack([share * large[:, 0], np.full(len(large), hops)], axis=1)
        x = nonnegative(features, large[:, 1])
        if x[0] <= 0:  # noise: the largest is all bandwidth
            x = np.array([large[-1, 1] / features[-1, 0], 0.0])
        links.append(Link(int(degree), float(x[1]), float(1 / x[0])))
        errors.append(_error(features, x, large[:, 1]))
    return tuple(links), float(np.mean(errors)) if errors else 0.0
