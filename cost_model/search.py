"""Search: the degrees of least time that fit in memory. Exact.

Each tie (regions with one degree) has options (degree, seconds, bytes). Ties are independent but for
*hubs*: a value that enters regions of several ties by one ``copy`` costs one all-reduce per degree
that is used, not one per tie. A hub is settled by trying every set of degrees that may use it.

Without a limit each tie takes its fastest option. With one, the sums of options form a front of
points (bytes, seconds) of which none is better in both; fronts of equal ties are doubled, not
repeated, so a thousand equal layers take ten steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import networkx as nx
import numpy as np


@dataclass(frozen=True)
class Option:
    """One degree of a tie: what it takes on a rank."""

    degree: int
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Hub:
    """A value that several ties share.

    Attributes:
        users: numbers of the ties.
        seconds: degree -> the time of its one all-reduce, if any tie has this degree.
    """

    users: frozenset[int]
    seconds: Mapping[int, float]


class NoFit(Exception):
    """No choice fits. ``bytes`` is what the smallest takes, ``degrees`` its degrees."""

    def __init__(self, degrees: list[int], bytes: float) -> None:
        super().__init__(f"{bytes} bytes at the least")
        self.degrees, self.bytes = degrees, bytes


Options: TypeAlias = Sequence[tuple[Option, ...]]
Choice: TypeAlias = tuple[tuple[int, int], ...]  # (tie, degree)


def search(options: Options, hubs: Sequence[Hub], limit: float) -> list[int]:
    """The degree of each tie, of least summed seconds with summed bytes within the limit.

    Raises:
        NoFit: nothing fits.
    """
    components = _components(options, hubs)
    fastest = [_front(part, options, own, fastest_only=True) for part, own in components]
    if sum(front.bytes[-1] for front in fastest) <= limit:
        return _chosen([(front, len(front.bytes) - 1) for front in fastest], len(options))
    fronts = [_front(part, options, own, fastest_only=False) for part, own in components]
    least = [(front, 0) for front in fronts]
    need = sum(front.bytes[0] for front in fronts)
    if need > limit:
        raise NoFit(_chosen(least, len(options)), float(need))
    total = _sum_of(fronts, limit)
    fitting = int(np.flatnonzero(total.bytes <= limit * (1 + 1e-12))[-1])
    return _chosen([(total, fitting)], len(options))


@dataclass(eq=False)
class _Front:
    """Points by rising bytes and falling seconds, and how each is made.

    A point is a choice (a leaf), or a point of each of two fronts, or one of an alternative front;
    ``shift`` renames the ties of a front that is used again for equal ones.
    """

    bytes: np.ndarray
    seconds: np.ndarray
    leaves: list[Choice] | None = None
    pairs: tuple[_Front, _Front, np.ndarray, np.ndarray] | None = None
    alternatives: tuple[list[_Front], np.ndarray, np.ndarray] | None = None
    names: tuple[_Front, dict[int, int]] | None = None

    def choice(self, point: int) -> Choice:
        """The degrees that make a point."""
        if self.leaves is not None:
            return self.leaves[point]
        if self.pairs is not None:
            a, b, i, j = self.pairs
            return a.choice(int(i[point])) + b.choice(int(j[point]))
        if self.names is not None:
            front, names = self.names
            return tuple((names[tie], degree) for tie, degree in front.choice(point))
        assert self.alternatives is not None
        fronts, which, where = self.alternatives
        return fronts[int(which[point])].choice(int(where[point]))


def _best(bytes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats, by rising bytes."""
    order = np.lexsort((seconds, bytes))
    falling = np.minimum.accumulate(seconds[order])
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = seconds[order][1:] < falling[:-1]
    return order[keep]


def _leaf(tie: int, options: Sequence[Option]) -> _Front:
    bytes = np.array([o.bytes for o in options])
    seconds = np.array([o.seconds for o in options])
    best = _best(bytes, seconds)
    return _Front(bytes[best], seconds[best], leaves=[((tie, options[i].degree),) for i in best])


def _both(a: _Front, b: _Front, limit: float = np.inf) -> _Front:
    """All sums of a point of each."""
    bytes = (a.bytes[:, None] + b.bytes[None, :]).ravel()
    seconds = (a.seconds[:, None] + b.seconds[None, :]).ravel()
    within = np.flatnonzero(bytes <= limit)
    best = within[_best(bytes[within], seconds[within])]
    return _Front(bytes[best], seconds[best], pairs=(a, b, best // len(b.bytes), best % len(b.bytes)))


def _either(fronts: list[_Front], extra: list[float]) -> _Front:
    """The better points of several fronts, each with seconds added."""
    bytes = np.concatenate([f.bytes for f in fronts])
    seconds = np.concatenate([f.seconds + e for f, e in zip(fronts, extra, strict=True)])
    which = np.concatenate([np.full(len(f.bytes), i) for i, f in enumerate(fronts)])
    where = np.concatenate([np.arange(len(f.bytes)) for f in fronts])
    best = _best(bytes, seconds)
    return _Front(bytes[best], seconds[best], alternatives=(fronts, which[best], where[best]))


def _chosen(points: list[tuple[_Front, int]], count: int) -> list[int]:
    degrees = [1] * count
    for front, point in points:
        for tie, degree in front.choice(point):
            degrees[tie] = degree
    return degrees


def _components(options: Options, hubs: Sequence[Hub]) -> list[tuple[list[int], list[Hub]]]:
    """Ties that share hubs, and the hubs that they share."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(options)))
    for hub in hubs:
        nx.add_path(graph, sorted(hub.users))
    parts = [sorted(part) for part in nx.connected_components(graph)]
    place = {tie: i for i, part in enumerate(parts) for tie in part}
    own: list[list[Hub]] = [[] for _ in parts]
    for hub in hubs:
        own[place[min(hub.users)]].append(hub)
    return list(zip(parts, own, strict=True))


def _front(part: list[int], options: Options, hubs: Sequence[Hub], fastest_only: bool) -> _Front:
    """The points of one component."""
    if not hubs:
        fronts = [_leaf(tie, _fast(options[tie]) if fastest_only else options[tie]) for tie in part]
        total = fronts[0]
        for front in fronts[1:]:
            total = _both(total, front)
        return total
    hub = max(hubs, key=lambda h: len(h.users))
    others = [h for h in hubs if h is not hub]
    found, extra = [], []
    for count in range(len(hub.seconds) + 1):
        for used in combinations(sorted(hub.seconds), count):
            barred = set(hub.seconds) - set(used)
            limited = list(options)
            for tie in hub.users:
                limited[tie] = tuple(o for o in options[tie] if o.degree not in barred)
            if not all(limited[tie] for tie in hub.users):
                continue
            local = {tie: i for i, tie in enumerate(part)}
            subset = [limited[tie] for tie in part]
            renamed = [Hub(frozenset(local[t] for t in h.users), h.seconds) for h in others]
            fronts = [
                _Front(f.bytes, f.seconds, names=(f, dict(enumerate(part))))
                for f in (
                    _front(p, subset, own, fastest_only) for p, own in _components(subset, renamed)
                )
            ]
            total = fronts[0]
            for front in fronts[1:]:
                total = _both(total, front)
            found.append(total)
            extra.append(sum(hub.seconds[d] for d in used))
    both = _either(found, extra)
    if fastest_only:
        last = slice(len(both.bytes) - 1, None)
        assert both.alternatives is not None
        fronts, which, where = both.alternatives
        return _Front(
            both.bytes[last], both.seconds[last], alternatives=(fronts, which[last], where[last])
        )
    return both


def _fast(options: Sequence[Option]) -> tuple[Option, ...]:
    return (min(options, key=lambda o: (o.seconds, o.bytes)),)


def _sum_of(fronts: list[_Front], limit: float) -> _Front:
    """The sums over all components: equal ones doubled, points that cannot fit left out."""
    kinds: dict[bytes, list[_Front]] = {}
    for front in fronts:
        kinds.setdefault(front.bytes.tobytes() + front.seconds.tobytes(), []).append(front)
    counts = Counter({key: len(found) for key, found in kinds.items()})
    rest = sum(float(kinds[key][0].bytes[0]) * n for key, n in counts.items())
    total: _Front | None = None
    for equal in kinds.values():
        rest -= float(equal[0].bytes[0]) * len(equal)
        own = _power(equal)
        total = own if total is None else _both(total, own, limit - rest)
    assert total is not None
    return total


def _power(equal: list[_Front]) -> _Front:
    """The sums over equal fronts, by halves: each half's points are worked out once."""
    shapes: dict[int, _Front] = {}

    def summed(first: int, count: int) -> _Front:
        if count == 1:
            return equal[first]
        half = count // 2
        if count not in shapes:
            shapes[count] = _both(summed(first, half), summed(first + half, count - half))
            return shapes[count]
        known = shapes[count]
        assert known.pairs is not None
        a, b = summed(first, half), summed(first + half, count - half)
        return _Front(known.bytes, known.seconds, pairs=(a, b, known.pairs[2], known.pairs[3]))

    return summed(0, len(equal))
