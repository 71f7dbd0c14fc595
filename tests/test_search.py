"""The search is exact: it is compared with every assignment there is."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost_model.search import Hub, NoFit, Option, Options, search

DEGREES = (1, 2, 4)


def cost(options: Options, hubs: list[Hub], degrees: tuple[int, ...]) -> tuple[float, float]:
    """Seconds and bytes, summed plainly."""
    chosen = [next(o for o in own if o.degree == d) for own, d in zip(options, degrees, strict=True)]
    seconds = sum(o.seconds for o in chosen)
    for hub in hubs:
        used = {degrees[tie] for tie in hub.users}
        seconds += sum(s for d, s in hub.seconds.items() if d in used)
    return seconds, sum(o.bytes for o in chosen)


def every_cost(options: Options, hubs: list[Hub]) -> list[tuple[float, float]]:
    """Seconds and bytes of every assignment."""
    return [cost(options, hubs, d) for d in product(*([o.degree for o in own] for own in options))]


numbers = st.integers(0, 12).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[tuple[Option, ...]], list[Hub], float]:
    """Some kinds of ties, repeated; values shared among some; a limit that may bind."""
    kinds = draw(
        st.lists(
            st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3).map(
                lambda own: tuple(Option(d, *pair) for d, pair in zip(DEGREES, own, strict=False))
            ),
            min_size=1,
            max_size=3,
        )
    )
    options = [draw(st.sampled_from(kinds)) for _ in range(draw(st.integers(1, 5)))]
    hubs = []
    for _ in range(draw(st.integers(0, 2))):
        users = (
            draw(st.sets(st.integers(0, len(options) - 1), min_size=2)) if len(options) > 1 else set()
        )
        if users:
            hubs.append(Hub(frozenset(users), {d: draw(numbers) for d in DEGREES[1:]}))
    return options, hubs, float(draw(st.integers(0, 40)))


@given(problems())
def test_the_choice_is_the_best_of_all(
    problem: tuple[list[tuple[Option, ...]], list[Hub], float],
) -> None:
    """Least seconds within the limit; or nothing fits, and the smallest says how much it takes."""
    options, hubs, limit = problem
    every = every_cost(options, hubs)
    fitting = [seconds for seconds, size in every if size <= limit]
    if not fitting:
        with pytest.raises(NoFit) as miss:
            search(options, hubs, limit)
        assert miss.value.bytes == min(size for _, size in every)
        assert cost(options, hubs, tuple(miss.value.degrees))[1] == miss.value.bytes
        return
    seconds, size = cost(options, hubs, tuple(search(options, hubs, limit)))
    assert seconds == min(fitting)
    assert size <= limit


@given(problems())
def test_without_a_limit_memory_does_not_count(
    problem: tuple[list[tuple[Option, ...]], list[Hub], float],
) -> None:
    """The fastest of all."""
    options, hubs, _ = problem
    every = every_cost(options, hubs)
    seconds, _ = cost(options, hubs, tuple(search(options, hubs, math.inf)))
    assert seconds == min(s for s, _ in every)


def test_many_equal_layers_under_a_limit() -> None:
    """A thousand layers: as many are split as the limit asks for, no more."""
    layer = (Option(1, 1.0, 10.0), Option(2, 3.0, 5.0))
    degrees = search([layer] * 1000, [], 10.0 * 1000 - 5.0 * 137)
    assert sorted(degrees) == [1] * 863 + [2] * 137
