"""A model as a value: what is printed of a failure builds the model that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.models.spec import Spec

SIMPLEST = Spec()

NormKind = Literal["none", "layer", "rms"]
Place = Literal["pre", "post", "parallel", "bare"]
Head = Literal["both", "loss", "logits", "states", "mean", "smooth", "weighted", "dict"]


@dataclass(frozen=True)
class Step:
    """One operation among the values of a program.

    op: a name in ``steps.STEPS``.
    at: the value it reads, counted back from the last.
    other: a second value, counted back among those of its shape.
    n: what the operation leaves open: a size, a place, a function.

    A step that does not fit where it stands does nothing, so that any list of steps is a program.
    """

    op: str
    at: int = 0
    other: int = 0
    n: int = 0


@dataclass(frozen=True)
class Steps:
    """A program between two linear layers; ``join``: its result is all that nothing else reads."""

    steps: tuple[Step, ...] = ()
    width: int = 16
    join: bool = False


@dataclass(frozen=True)
class Attend:
    """Self-attention."""

    spec: Spec = SIMPLEST


@dataclass(frozen=True)
class Feed:
    """An MLP."""

    spec: Spec = SIMPLEST


@dataclass(frozen=True)
class Cross:
    """Attention to the states of the embedding."""

    heads: int = 2
    head_dim: int = 4
    fused: bool = False
    kernel: Literal["eager", "sdpa", "module"] = "eager"
    bias: bool = False


@dataclass(frozen=True)
class Experts:
    """MLPs that a router chooses among, or weighs."""

    form: Literal["loop", "batched", "einsum", "modules", "slices"] = "loop"
    experts: int = 4
    ffn: int = 8
    top: int = 0
    gated: bool = False


@dataclass(frozen=True)
class Mix:
    """A causal convolution over the sequence between two linear layers."""

    channels: int = 16
    kernel: int = 3
    grouped: bool = True
    gated: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Again:
    """An earlier block once more: the same module."""

    back: int = 0


Block = Steps | Attend | Feed | Cross | Experts | Mix | Again


@dataclass(frozen=True)
class Placed:
    """A block in the residual stream; "parallel": its result is added with that of the next one."""

    block: Block
    place: Place = "pre"
    norm: NormKind = "layer"
    dropout: float = 0.0
    scaled: bool = False


@dataclass(frozen=True)
class Net:
    """A language model of unlike blocks.

    frozen: parameters that are not trained, counted modulo their number.
    shift: the loss compares each position with the next label.
    """

    blocks: tuple[Placed, ...] = ()
    hidden: int = 8
    vocabulary: int = 16
    tied: bool = False
    positions: Literal["none", "learned", "buffer"] = "none"
    norm: NormKind = "layer"
    head: Head = "both"
    head_bias: bool = False
    shift: bool = False
    softcap: bool = False
    frozen: tuple[int, ...] = ()
