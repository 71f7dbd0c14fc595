"""Hypothesis strategies for models; everything shrinks towards one linear layer and no block."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from tests.fuzz.spec import (
    Again,
    Attend,
    Block,
    Cross,
    Experts,
    Feed,
    Head,
    Mix,
    Net,
    Placed,
    Step,
    Steps,
)
from tests.fuzz.steps import STEPS
from tests.strategies import specs

few = st.sampled_from


def steps() -> st.SearchStrategy[Steps]:
    """Programs of a few steps, each most often on the last value."""
    place = st.one_of(st.just(0), st.integers(0, 3))
    one = st.builds(Step, few(sorted(STEPS)), place, st.integers(0, 2), st.integers(0, 11))
    return st.builds(
        Steps, st.lists(one, min_size=3, max_size=12).map(tuple), few((16, 8, 24, 32)), st.booleans()
    )


def blocks() -> st.SearchStrategy[Block]:
    """All kinds of blocks; programs most often."""
    cross = st.builds(
        Cross,
        few((2, 4, 3)),
        few((4, 6)),
        st.booleans(),
        few(("eager", "sdpa", "module")),
        st.booleans(),
    )
    experts = st.builds(
        Experts, few(("loop", "batched", "einsum", "modules", "slices")), few((4, 2, 3)), few((8, 6)),
        few((0, 1, 2)), st.booleans(),
    )  # fmt: skip
    mix = st.builds(Mix, few((16, 8, 12)), few((3, 1, 4)), st.booleans(), st.booleans(), st.booleans())
    return st.one_of(
        steps(), steps(), steps(), st.builds(Feed, specs()), st.builds(Attend, specs()), cross, experts,
        mix, st.builds(Again, st.integers(0, 2)),
    )  # fmt: skip


def placed() -> st.SearchStrategy[Placed]:
    """A block in its place."""
    return st.builds(
        Placed, blocks(), few(("pre", "post", "parallel", "bare")), few(("layer", "rms", "none")),
        few((0.0, 0.0, 0.1)), st.booleans(),
    )  # fmt: skip


def nets() -> st.SearchStrategy[Net]:
    """Models of up to four blocks."""
    return st.builds(
        Net, st.lists(placed(), min_size=1, max_size=4).map(tuple), few((8, 16, 12)),
        few((16, 17, 23, 40, 66)), st.booleans(), few(("none", "learned", "buffer")),
        few(("layer", "rms", "none")), few(get_args(Head)), st.booleans(), st.booleans(), st.booleans(),
        st.one_of(st.just(()), st.lists(st.integers(0, 15), max_size=3).map(tuple)),
    )  # fmt: skip
