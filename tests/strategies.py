"""Hypothesis strategies that compose random transformers."""

from __future__ import annotations

from typing import Any, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.models.case import seeded
from tests.models.spec import MAX_LENGTH, Kernel, Positions, Projection, Spec, repeats
from tests.models.transformer import IGNORED, RandomTransformer

__all__ = ["MAX_LENGTH", "RandomTransformer", "Spec", "build", "inputs", "specs"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
POSITIONS: tuple[Positions, ...] = get_args(Positions)


def _projections(heads: int, kv_heads: int) -> tuple[Projection, ...]:
    if heads == kv_heads:
        return ("separate", "split", "unbind", "per_head", "per_group")
    return ("separate", "split", "per_group")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Draw a spec of tiny and often odd sizes; it shrinks towards the default one."""
    heads = draw(st.sampled_from((2, 4, 8, 3, 6)))
    fewer = [count for count in range(heads - 1, 0, -1) if heads % count == 0]
    kv_heads = draw(st.one_of(st.just(heads), st.sampled_from(fewer)))
    positions = draw(st.sampled_from(POSITIONS))
    rotated = positions in ("rotary", "interleaved")
    head_dim = draw(st.sampled_from((4, 8, 6) if rotated else (4, 8, 5, 7)))
    kernel = draw(st.sampled_from(KERNELS))
    chosen: dict[str, Any] = {
        "layers": draw(st.integers(1, 2)),
        "hidden": draw(st.one_of(st.just(heads * head_dim), st.integers(8, 40))),
        "ffn": draw(st.one_of(st.just(16), st.integers(8, 48))),
        "vocabulary": draw(st.integers(16, 67)),
        "block": draw(st.sampled_from(("pre", "post", "parallel"))),
        "norm": draw(st.sampled_from(("layer", "rms"))),
        "projection": draw(st.sampled_from(_projections(heads, kv_heads))),
        "repeat": draw(st.sampled_from(repeats(kernel))),
        "qk_norm": draw(st.sampled_from(("none", "shared", "per_head"))),
        "mlp": draw(st.sampled_from(("plain", "gated", "fused"))),
        "activation": draw(st.sampled_from(("relu", "gelu", "silu"))),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "dropout": draw(st.sampled_from((0.0, 0.1))),
    }
    return Spec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        positions=positions,
        kernel=kernel,
        **chosen,
    )


def build(spec: Spec, *, seed: int = 0) -> RandomTransformer:
    """Return the transformer in train mode, with parameters drawn from the seed."""
    return seeded(lambda: RandomTransformer(spec), seed)


def inputs(spec: Spec, *, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Draw keyword arguments for its forward: token ids, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length)
    ids = torch.randint(spec.vocabulary, shape, generator=generator)
    labels = torch.randint(spec.vocabulary, shape, generator=generator)
    labels[0, -1] = IGNORED
    return {"ids": ids, "labels": labels}
