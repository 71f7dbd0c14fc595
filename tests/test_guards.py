"""For which shapes of its inputs a captured graph holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import autoshard
from autoshard.guards import shape_guard


def _traced(*shape: int) -> Tensor:
    """A tensor with two symbolic sizes, as a capture has it."""
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(*shape))


def test_sizes_are_read_off_where_they_stand_alone() -> None:
    """Ranges, sizes made of others in whatever order, conditions of the trace."""
    alone = _traced(12, 5)
    n, m = alone.shape
    assert n % 4 == 0
    made = alone.new_empty(2 * n + m, 3)
    holds = shape_guard([made, None, alone], {str(m): (2, 9), str(n): (2, float("inf"))})

    def given(n: int, m: int, size: int, last: int = 3) -> bool:
        return holds([torch.empty(size, last), None, torch.empty(n, m)])

    assert given(12, 5, 29) and given(16, 9, 41)
    assert not given(16, 9, 42)  # is not 2 n + m
    assert not given(16, 10, 42) and not given(16, 1, 33)  # m is out of its range
    assert not given(14, 5, 33)  # 4 does not divide n
    assert not given(12, 5, 29, last=4)


class Floating(nn.Module):
    """A size that is made a float: the trace asks how many numbers there are below it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, 8] -> [B, S, 8]."""
        out: Tensor = self.mix(x) * torch.arange(x.shape[1] * 1.0)[:, None]
        return out


def test_conditions_on_floats_are_asked() -> None:
    """The guard's text calls functions of PyTorch's."""
    model = Floating()
    split = autoshard.parallelize(model, 1, (torch.randn(2, 6, 8),))
    for length in (6, 9, 130):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(split(x), model(x))


def test_a_size_that_stands_nowhere_alone_is_that_of_the_capture() -> None:
    """The graph holds for the number that it was captured with, other sizes vary; nothing fails."""
    hidden = _traced(12, 5)
    n, m = hidden.shape
    assert m < n
    made = hidden.new_empty(2 * n, m)
    holds = shape_guard([made, hidden.new_empty(n + m)], {})
    assert holds([torch.empty(24, 5), torch.empty(17)])
    assert holds([torch.empty(24, 7), torch.empty(19)])
    assert not holds([torch.empty(26, 5), torch.empty(18)])  # n would be 13
    assert not holds([torch.empty(24, 5), torch.empty(18)])
    assert not holds([torch.empty(24, 12), torch.empty(24)])  # m < n was a condition of the trace
