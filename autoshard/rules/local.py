"""What one rank holds of an axis, for rules that must rewrite their sizes and offsets."""

from __future__ import annotations

from typing import Protocol

from torch import fx

from autoshard.axes import Axis, Size


class Local(Protocol):
    """The rank's view of axes under a plan."""

    def size(self, axis: Axis) -> Size:
        """Number of elements that the rank holds of the axis."""

    def size_argument(self, given: int | fx.Node, axis: Axis) -> int | fx.Node:
        """A size as it stands in a call, made local; -1 stays."""
