"""Lanes: how many multiprocessors an all-reduce gets that runs beside products.

An all-reduce of the gradient of an input [tokens, in] runs beside the products that give the gradients
of weights with n columns in all (on this rank). With rate and bus as in ``formulas.py``, over d ranks,
e bytes an element, a lane of m of M multiprocessors at a share of the bus:

    products      t = 2 tokens in n / rate, and t M / (M - m) on what is left to them
    all-reduce    c = 2 (d-1)/d tokens in e / (share bus)
    both          max(c, t M / (M - m))

Tokens and in cancel: which lane is best depends on n alone. Few columns, a wide lane: the all-reduce is
what is waited for. Many columns, a narrow one: then the products are.
"""

from __future__ import annotations

import math

from autoshard.cost_model.formulas import BYTES
from autoshard.cost_model.hardware import Hardware, Lane


def lanes_by_columns(hardware: Hardware, degree: int, dtype: str) -> tuple[tuple[int, Lane], ...]:
    """From how many columns on each lane is the best; the first from 0. None where nothing is split.

    A lane takes over from the one before where its all-reduce ends with the other's products:

        c = t M / (M - m of the one before),  n = (d-1)/d e rate (M - m) / (share bus M)
    """
    if degree == 1 or not hardware.lanes or not hardware.links:
        return ()
    bus, rate = hardware.link(degree).bandwidth, hardware.rate(dtype)
    found: list[tuple[int, Lane]] = []
    for lane in hardware.lanes:
        columns = 0.0
        if found:
            left = 1 - found[-1][1].multiprocessors / hardware.multiprocessors
            columns = (degree - 1) / degree * BYTES.get(dtype, 4) * rate * left / (lane.share * bus)
        found.append((math.ceil(columns), lane))
    return tuple(found)
