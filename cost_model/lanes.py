"""What products and all-reduces that run beside each other do for one another.

With rate and bus as in ``formulas.py``, over d ranks, e bytes an element, and a lane of the machine in
which products take s times as long (`hardware.Lane`):

**Backward.** The all-reduce of the gradient of an input [tokens, in] runs beside the products that give
the gradients of weights with n columns in all (on this rank):

    products      t = 2 tokens in n / rate, and s t while they leave room
    all-reduce    c = 2 (d-1)/d tokens in e / (share bus)
    both          max(c, s t)

Tokens and in cancel: which lane is best depends on n alone. Few columns, a wide lane: the all-reduce is
what is waited for. Many columns, a narrow one: then the products are.

**Forward.** A row-parallel product [tokens, k] x [k, out] can be computed in p pieces of the tokens,
each summed over the ranks under the next one. With t = 2 tokens k out / rate and the all-reduce c:

    in pieces     t / p + max((p-1)/p s t, (p-1)/p c / share) + c / p

That wins c / 2 or more where t is a few times c; below, pieces are too small to fill the device; far
above, leaving room costs more than it hides, and two pieces that leave none are better. t / c depends
on k alone; the borders were measured on two H200 (hidden 1920, 3072 and 8192: docs/performance.md).
"""

from __future__ import annotations

import math

from autoshard.cost_model.hardware import BYTES, Hardware
from autoshard.groups import Cut, Room, Sharing

# Products that take at least so many times as long as their sum: how many pieces; do they leave room?
CUTS = ((1.5, 3, True), (4.0, 2, False))


def sharing(hardware: Hardware, degree: int, dtype: str) -> Sharing:
    """By rising columns and widths; nothing where nothing is split, and on a machine without lanes.

    A lane takes over from the one before where its all-reduce ends with the other's products:

        c = s t of the one before:   n = (d-1)/d e rate / (share bus s)
    """
    if degree == 1 or not hardware.links or not hardware.lanes:
        return Sharing()
    # Columns, or a width, of a product that takes as long as the all-reduce by itself.
    bus, rate = hardware.link(degree).bandwidth, hardware.rate(dtype)
    equal = (degree - 1) / degree * BYTES.get(dtype, 4) * rate / bus
    rooms: list[Room] = []
    slower = math.inf
    for lane in hardware.lanes:
        columns = equal / lane.share
        border, covers = math.ceil(columns / slower), math.ceil(columns / lane.slower)
        rooms.append(Room(border, covers, lane.multiprocessors, lane.left))
        slower = lane.slower
    cuts = tuple(Cut(math.ceil(times * equal), pieces, leave) for times, pieces, leave in CUTS)
    return Sharing(tuple(rooms), cuts)
