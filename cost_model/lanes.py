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
from typing import NamedTuple

from autoshard.cost_model.formulas import BYTES
from autoshard.cost_model.hardware import Hardware


class Room(NamedTuple):
    """What a lane is for, on some machine, at some degree.

    Attributes:
        columns: of the first product, from which on the lane is the best.
        covers: of all products, that take as long as the all-reduce: the others need leave no room.
        multiprocessors, left: of `hardware.Lane`.
    """

    columns: int
    covers: int
    multiprocessors: int
    left: int


def rooms(hardware: Hardware, degree: int, dtype: str) -> tuple[Room, ...]:
    """The machine's lanes by rising columns, the first from 0; none where nothing is split.

    A lane takes over from the one before where its all-reduce ends with the other's products:

        c = s t of the one before:   n = (d-1)/d e rate / (share bus s)
    """
    if degree == 1 or not hardware.links:
        return ()
    bus, rate = hardware.link(degree).bandwidth, hardware.rate(dtype)
    found: list[Room] = []
    slower = math.inf
    for lane in hardware.lanes:
        columns = (degree - 1) / degree * BYTES.get(dtype, 4) * rate / (lane.share * bus)
        found.append(
            Room(
                math.ceil(columns / slower), math.ceil(columns / lane.slower),
                lane.multiprocessors, lane.left,
            )
        )  # fmt: skip
        slower = lane.slower
    return tuple(found)
