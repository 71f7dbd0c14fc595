"""Lanes: how many multiprocessors an all-reduce gets that runs beside products.

An all-reduce of the gradient of an input [tokens, in] runs beside the products that give the gradients
of weights with n columns in all (on this rank). With rate and bus as in ``formulas.py``, over d ranks,
e bytes an element, and a lane in which products take s times as long (`hardware.Lane`):

    products      t = 2 tokens in n / rate, and s t while they leave room
    all-reduce    c = 2 (d-1)/d tokens in e / (share bus)
    both          max(c, s t)

Tokens and in cancel: which lane is best depends on n alone. Few columns, a wide lane: the all-reduce is
what is waited for. Many columns, a narrow one: then the products are.
"""

from __future__ import annotations

import math

from autoshard.cost_model.hardware import BYTES, Hardware
from autoshard.groups import Room


def rooms(hardware: Hardware, degree: int, dtype: str) -> tuple[Room, ...]:
    """The machine's lanes by rising columns, the first from 0; none where nothing is split.

    A lane takes over from the one before where its all-reduce ends with the other's products:

        c = s t of the one before:   n = (d-1)/d e rate / (share bus s)

    All ranks choose one, as they have equal columns: shares of a vocabulary that does not divide are
    padded, and a weight that is padded is computed, so that its product is not fused with the sum.
    """
    if degree == 1 or not hardware.links:
        return ()
    bus, rate = hardware.link(degree).bandwidth, hardware.rate(dtype)
    found: list[Room] = []
    slower = math.inf
    for lane in hardware.lanes:
        columns = (degree - 1) / degree * BYTES.get(dtype, 4) * rate / (lane.share * bus)
        border, covers = math.ceil(columns / slower), math.ceil(columns / lane.slower)
        found.append(Room(border, covers, lane.multiprocessors, lane.left))
        slower = lane.slower
    return tuple(found)
