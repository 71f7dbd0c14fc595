"""What is known of a value of the rewritten graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from autoshard.proof.placements import Dim, Split, said
from autoshard.proof.rows import Factors

OUTSIDE = 1


@dataclass(frozen=True)
class Held:
    """Of which original value each rank holds which elements, and what its gradient is.

    *Outside*, every rank has the same tensor, and autograd gives each the same gradient, the true one.
    *Inside* a group, the true gradient of an element is the sum of what autograd gives for it to the
    ranks of the group that hold it.

    Attributes:
        of: the original value.
        dims: what each rank holds of its dimensions.
        inside: ranks of the group; 1 is outside.
        gradient: whether a gradient can flow to it.
        times: of a partial sum: the sum over the group is this many times the original.
        pending: the original operator adds a bias (times ``beta``) that is not added yet.
        weighed: a dimension, and what each of its elements was multiplied with.
        cast: the dtype that it was cast to on the way.
        trailing: dimensions of one element behind its own (a bias beside ``[channels, length]``).
        stacked: a new first dimension: 1 of one element, or the group's ranks once gathered.
    """

    of: fx.Node
    dims: tuple[Dim, ...]
    inside: int = OUTSIDE
    gradient: bool = False
    times: float | None = None
    pending: bool = False
    weighed: tuple[int, Factors] | None = None
    cast: torch.dtype | None = None
    trailing: int = 0
    stacked: int = 0

    @property
    def is_split(self) -> bool:
        """Whether not every rank holds everything in order."""
        return any(isinstance(d, Split) for d in self.dims)

    @property
    def is_plain(self) -> bool:
        """Whether each rank holds true elements of the original, and nothing is still to be done."""
        return (
            self.times is None
            and not self.pending
            and self.weighed is None
            and self.cast is None
            and not self.trailing
            and not self.stacked
        )

    def __str__(self) -> str:
        name = f"{self.of.name}: {said(self.dims)}"
        if self.times is not None:
            name = f"a partial sum of {self.of.name}"
            if abs(self.times - 1) > 1e-9:
                name += f", which the ranks together add {self.times:g} times"
        if self.pending:
            name += ", without its bias"
        if self.weighed is not None:
            name += f", weighed along dimension {self.weighed[0]}"
        if self.cast is not None:
            name += f", cast to {self.cast}"
        place = "outside" if self.inside == OUTSIDE else f"inside a group of {self.inside}"
        return f"{name} ({place})"


@dataclass(frozen=True)
class Number:
    """A size, or another number: what it is with numbers for the symbols."""

    value: Any


@dataclass(frozen=True)
class Several:
    """An operator's results."""

    of: fx.Node
    items: tuple[Held | None, ...]


Known: TypeAlias = Held | Number | Several | None
