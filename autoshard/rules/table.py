"""The table of operators. Adding one is adding one row; a brute-force test runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from autoshard.rules import arithmetic, structure, views
from autoshard.rules.call import Call
from autoshard.rules.local import Local
from autoshard.rules.notation import apply_row, parse


@dataclass(frozen=True)
class Rule:
    """What an operator does with axes.

    Attributes:
        text: the row, or the name of a computed row.
        apply: fills in a ``Call``.
        localize: the arguments that differ on a rank, or None.
    """

    text: str
    apply: Callable[[Call], None]
    localize: Callable[[Call, Local], dict[str, Any]] | None = None


def row(text: str) -> Rule:
    """A rule in the notation of ``notation.py``."""
    return Rule(text, partial(apply_row, parse(text)))


def computed(
    apply: Callable[[Call], None],
    localize: Callable[[Call, Local], dict[str, Any]] | None = None,
) -> Rule:
    """A rule that depends on the call's arguments."""
    return Rule(getattr(apply, "__name__", "along").rstrip("_"), apply, localize)


POINTWISE = computed(arithmetic.pointwise)
SAME = computed(arithmetic.like_first)
ALONG = computed(structure.along())
RESHAPE = computed(views.reshape, views.local_sizes("size"))
SUM = computed(arithmetic.reduction)
CONVOLUTION = computed(arithmetic.convolution, arithmetic.local_convolution)
SPLIT = computed(structure.split, structure.local_split("split_sizes"))

RULES: dict[str, Rule] = {
    # products
    "aten.linear.default": row("* k+, n k+, n! -> * n"),
    "aten.addmm.default": row("m n!, m k+, k+ n -> m n"),
    "aten.mm.default": row("m k+, k+ n -> m n"),
    "aten.mv.default": row("m k+, k+ -> m"),
    "aten.dot.default": row("k+, k+ ->"),
    "aten.bmm.default": row("b m k+, b k+ n -> b m n"),
    "aten.baddbmm.default": row("b m n!, b m k+, b k+ n -> b m n"),
    "aten.matmul.default": computed(arithmetic.matmul),
    "aten.einsum.default": computed(arithmetic.einsum),
    "aten.scaled_dot_product_attention.default": computed(arithmetic.attention),
    "aten._grouped_mm.default": row("t^ k+, e^ k+ n, e^ -> t n"),
    "transformers.grouped_mm_fallback.default": row("t^ k+, e^ k+ n, e^ -> t n"),
    "aten.conv1d.default": CONVOLUTION,
    "aten.conv2d.default": CONVOLUTION,
    # normalization
    "aten.layer_norm.default": computed(arithmetic.norm),
    "aten.rms_norm.default": computed(arithmetic.norm),
    "aten.softmax.int": ALONG,
    "aten._softmax.default": ALONG,
    "aten.log_softmax.int": ALONG,
    "aten.logsumexp.default": ALONG,
    "aten.cumsum.default": ALONG,
    "aten.cumprod.default": ALONG,
    "aten.linalg_vector_norm.default": ALONG,
    "aten.var.dim": ALONG,
    "aten.var.correction": ALONG,
    "aten.std.dim": ALONG,
    "aten.std.correction": ALONG,
    "aten.amax.default": ALONG,
    "aten.amin.default": ALONG,
    "aten.max.dim": ALONG,
    "aten.min.dim": ALONG,
    "aten.argmax.default": ALONG,
    "aten.any.dim": ALONG,
    "aten.all.dim": ALONG,
    "aten.sort.default": ALONG,
    "aten.topk.default": ALONG,
    "aten.tril.default": computed(structure.last_two),
    "aten.triu.default": computed(structure.last_two),
    "aten.flip.default": computed(structure.along("dims")),
    "aten.roll.default": computed(structure.along("dims")),
    "aten.glu.default": ALONG,
    # reductions
    "aten.sum.dim_IntList": SUM,
    "aten.sum.default": SUM,
    "aten.mean.dim": computed(arithmetic.mean),
    "aten.mean.default": computed(arithmetic.mean),
    # lookups
    "aten.embedding.default": computed(arithmetic.embedding),
    "aten.cross_entropy_loss.default": computed(arithmetic.cross_entropy),
    "aten.index_select.default": computed(structure.indexed),
    "aten.index_put.default": computed(structure.index_put),
    "aten.index_add.default": computed(structure.index_add),
    "aten.gather.default": computed(structure.gather),
    "aten.scatter.src": computed(structure.scatter),
    "aten.scatter.value": computed(structure.scatter),
    "aten.view_as_complex.default": computed(structure.view_as_complex),
    "aten.view_as_real.default": computed(structure.view_as_real),
    "aten.index.Tensor": computed(structure.index),
    # views
    "aten.view.default": RESHAPE,
    "aten._unsafe_view.default": RESHAPE,
    "aten.reshape.default": computed(views.reshape, views.local_sizes("shape")),
    "aten.view_as.default": computed(views.reshape_as_other),
    "aten.reshape_as.default": computed(views.reshape_as_other),
    "aten.flatten.using_ints": computed(views.reshape),
    "aten.unflatten.int": computed(views.reshape, views.local_unflatten),
    "aten.transpose.int": computed(views.transpose),
    "aten.permute.default": computed(views.permute),
    "aten.t.default": computed(views.reverse),
    "aten.numpy_T.default": computed(views.reverse),
    "aten.unsqueeze.default": computed(views.unsqueeze),
    "aten.squeeze.default": computed(views.squeeze, views.local_squeeze),
    "aten.squeeze.dim": computed(views.squeeze, views.local_squeeze),
    "aten.squeeze.dims": computed(views.squeeze, views.local_squeeze),
    "aten.expand.default": computed(views.expand, views.local_sizes("size")),
    "aten.expand_as.default": computed(arithmetic.shaped_as_other),
    "aten.broadcast_to.default": computed(views.expand, views.local_sizes("size")),
    "aten.repeat.default": computed(views.repeat, views.local_tiles),
    "aten.repeat_interleave.self_int": computed(views.repeat_interleave, views.local_repeats),
    # structure
    "aten.slice.Tensor": computed(structure.slice_, structure.local_slice),
    "aten.select.int": computed(structure.select),
    "aten.slice_scatter.default": computed(structure.slice_scatter, structure.local_slice_scatter),
    "aten.select_scatter.default": computed(structure.select_scatter),
    "aten.unbind.int": computed(structure.unbind),
    "aten.split.Tensor": SPLIT,
    "aten.split.sizes": computed(structure.split, structure.local_split("split_size")),
    "aten.split_with_sizes.default": computed(structure.split, structure.local_split("split_sizes")),
    "aten.chunk.default": SPLIT,
    "aten.cat.default": computed(structure.cat),
    "aten.concat.default": computed(structure.cat),
    "aten.concatenate.default": computed(structure.cat),
    "aten.stack.default": computed(structure.stack),
    "aten.pad.default": computed(structure.pad),
    # pointwise without the tag, and operators that change no axis
    "aten.dropout.default": SAME,
    "aten.contiguous.default": SAME,
    "aten.clone.default": SAME,
    "aten.detach.default": SAME,
    "aten.alias.default": SAME,
    "aten.to.dtype": SAME,
    "aten.to.dtype_layout": SAME,
    "aten.to.device": SAME,
    "aten._to_copy.default": SAME,
    "aten.type_as.default": SAME,
    "aten.zeros_like.default": SAME,
    "aten.ones_like.default": SAME,
    "aten.full_like.default": SAME,
    "aten.empty_like.default": SAME,
    "aten.rand_like.default": SAME,
    "aten.bernoulli.p": SAME,
    "aten.where.self": POINTWISE,
    "aten.where.ScalarOther": POINTWISE,
    "aten.where.ScalarSelf": POINTWISE,
    "aten.masked_fill.Scalar": POINTWISE,
    "aten.masked_fill.Tensor": POINTWISE,
    "aten.square.default": POINTWISE,
    "aten.multiply.Tensor": POINTWISE,
    "aten.softplus.default": POINTWISE,
    "aten.relu6.default": POINTWISE,
    "aten.log_sigmoid.default": POINTWISE,
    "aten.selu.default": POINTWISE,
    "aten.subtract.Tensor": POINTWISE,
    "aten.divide.Tensor": POINTWISE,
}


def register_rule(op: torch._ops.OpOverload, rule: str | Callable[[Call], None]) -> None:
    """Say what an operator of your own does with axes, in one line::

        autoshard.register_rule(torch.ops.mine.scaled.default, "* h, h -> * h")

    The row is the promise that on a rank's share of each free axis the operator gives the share of
    the result; ``autoshard.verify`` checks it on a model.

    Args:
        op: an overload, as of ``torch.library.custom_op`` (with ``register_autograd`` for training).
        rule: a row in the notation of ``docs/rules.md``, or a function that fills in a ``Call``.

    Raises:
        ValueError: a malformed row, an operator that is no overload, or one that has a rule already.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise ValueError(f"{op} is no overload of an operator: pass {op}.default")
    name = _qualified(op)
    if name in RULES:
        raise ValueError(f"{name} has the rule {RULES[name].text!r} already")
    RULES[name] = row(rule) if isinstance(rule, str) else computed(rule)
    rule_for.cache_clear()


def _qualified(op: torch._ops.OpOverload) -> str:
    return f"{op.namespace}.{op._schema.name.partition('::')[2]}.{op._overloadname}"


@lru_cache(maxsize=4096)
def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """The operator's rule: its row, or pointwise by its tag, or None."""
    known = RULES.get(_qualified(op))
    if known is not None:
        return known
    mutates = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    if torch.Tag.pointwise in op.tags and not mutates:
        return POINTWISE
    return None
