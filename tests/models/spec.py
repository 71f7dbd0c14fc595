"""The choices that authors of transformers make, as one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_LENGTH = 32

Block = Literal["pre", "post", "parallel"]
Norm = Literal["layer", "rms"]
Projection = Literal["separate", "split", "unbind", "per_head", "per_group"]
Repeat = Literal["interleave", "expand", "broadcast", "gqa"]
QKNorm = Literal["none", "shared", "per_head"]
Positions = Literal["none", "learned", "rotary", "interleaved", "alibi", "relative"]
Kernel = Literal["eager", "sdpa"]
MLPKind = Literal["plain", "gated", "fused"]
Activation = Literal["relu", "gelu", "silu"]


@dataclass(frozen=True)
class Spec:
    """A decoder-only transformer; the defaults are the simplest one.

    block: where the norms stand; "parallel" adds attention and MLP of the same normed input.
    projection: how queries, keys and values leave their weights; all but "separate" fuse them.
    repeat: how fewer key heads serve all query heads.
    qk_norm: norms of each query and key head, with one weight for all heads or one per head.
    positions: "rotary" rotates halves, "interleaved" rotates pairs, "alibi" and "relative" are
        added to the scores, the latter from a table that the layers share.
    kernel: attention by matrix products and softmax, or by scaled_dot_product_attention.
    mlp: "gated" has two input weights, "fused" has them in one.
    shift: whether the loss compares each position with the next label.
    """

    layers: int = 1
    hidden: int = 8
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    ffn: int = 16
    vocabulary: int = 16
    block: Block = "pre"
    norm: Norm = "layer"
    projection: Projection = "separate"
    repeat: Repeat = "interleave"
    qk_norm: QKNorm = "none"
    positions: Positions = "none"
    kernel: Kernel = "eager"
    mlp: MLPKind = "plain"
    activation: Activation = "relu"
    bias: bool = False
    tied: bool = False
    shift: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key heads do not divide {self.heads} heads")
        if self.projection in ("unbind", "per_head") and self.kv_heads != self.heads:
            raise ValueError(f"{self.projection!r} needs as many key heads as heads")
        if self.positions in ("rotary", "interleaved") and self.head_dim % 2:
            raise ValueError(f"cannot rotate a head of {self.head_dim}")
        if self.repeat not in repeats(self.kernel):
            raise ValueError(f"{self.repeat!r} does not go with {self.kernel!r}")

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads


def repeats(kernel: Kernel) -> tuple[Repeat, ...]:
    """Return the ways of serving all query heads that go with a kernel."""
    if kernel == "sdpa":
        return ("interleave", "expand", "gqa")
    return ("interleave", "expand", "broadcast")
