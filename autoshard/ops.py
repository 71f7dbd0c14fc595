"""What a rewritten graph calls on every rank: typed collectives and split forms of operators.

The collectives come in pairs, each the other's transpose, under the convention that a replicated
value has its full gradient on every rank (Megatron-LM, arXiv 1909.08053, section 3, where `copy`
is f and `reduce` is g):

    op        forward        backward
    copy      identity       all-reduce
    reduce    all-reduce     identity
    gather    all-gather     own slice
    scatter   own slice      all-gather

All functions take any floating dtype. Gradients of gradients are not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from autoshard import kernels
from autoshard.compat import apply_own, once
from autoshard.failures import Line, line_of_graph
from autoshard.groups import Group
from autoshard.random_streams import checkpoint_contexts

P = ParamSpec("P")
T = TypeVar("T")
Autocast = tuple[str, torch.dtype | None, bool, bool]  # device type, dtype, enabled, cache_enabled

NONE, MEAN, SUM = 0, 1, 2  # at::Reduction
PART_BYTES = 128 * 2**20  # of the temporary tensors of the cross entropy


def copy(x: Tensor, group: Group) -> Tensor:
    """Identity forward, all-reduce backward: `y = x`, `dx = sum over ranks of dy`.

    Stands where a replicated value enters a split region: each rank's part of the region knows
    only a part of the gradient.
    """
    return x if group.degree == 1 else _apply(_Copy, x, group)


def reduce(x: Tensor, group: Group, inplace: bool = False) -> Tensor:
    """All-reduce forward, identity backward: `y = sum over ranks of x`, `dx = dy`.

    Stands where a split axis was summed over. `inplace` allows `x`'s memory to be reused, which
    saves one copy; only for an `x` that nothing else uses (views and leaves are copied anyway).
    """
    return x if group.degree == 1 else _apply(_Reduce, x, group, inplace)


def leave(x: Tensor, group: Group) -> Tensor:
    """Identity forward, 1/degree backward: `y = x`, `dx = dy / degree`.

    Stands where a value that is the same on all ranks, but whose gradient is a sum over them,
    leaves a region: `dy` is whole on every rank and must be counted once.
    """
    return x if group.degree == 1 else _apply(_Leave, x, group.degree)


def shared(x: Tensor, copies: int) -> Tensor:
    """Identity forward, 1/copies backward, where a share leaves that so many ranks hold: each is given
    the whole gradient of it, and their parts are to add up to that once."""
    return _apply(_Leave, x, copies)


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """All-gather forward, own slice backward: `y = cat(x of every rank, dim)`, `dx = dy[own]`.

    `dy` is the whole gradient on every rank, so nothing is summed.
    """
    return x if group.degree == 1 else _apply(_Gather, x, dim % x.ndim, group)


def scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Own slice forward, all-gather backward: `y = x[own]`, `dx = cat(dy of every rank, dim)`.

    Raises ValueError where the degree does not divide the size of `dim`.
    """
    if group.degree == 1:
        return x
    if x.shape[dim] % group.degree:
        raise ValueError(
            f"dimension {dim} of {tuple(x.shape)} cannot be split in {group.degree} equal parts"
        )
    return _apply(_Scatter, x, dim % x.ndim, group)


def with_stream(group: Group, op: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`op(*args, **kwargs)` for a random operator, drawing from `group.stream`.

    A group of degree 1 draws the same on all ranks of a tensor parallel group, any other group
    differently on each coordinate (arXiv 1909.08053, appendix B.2). `op` must not communicate.
    """
    return group.stream.run(op, *args, **kwargs)


def with_autocast(
    modes: Autocast, group: Group | None, op: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """`op(*args, **kwargs)` under `torch.autocast(*modes)`; a random operator with its group."""
    device, dtype, enabled, cache = modes
    with torch.autocast(device, dtype, enabled, cache):
        return op(*args, **kwargs) if group is None else group.stream.run(op, *args, **kwargs)


def checkpointed(
    body: Callable[..., tuple[T, ...]], streams: tuple[Group, ...], *operands: Any
) -> tuple[T, ...]:
    """`body(*operands)`, computed again in the backward pass: of its values only `operands` are kept.

    body: communicates in its backward pass only, so that what is computed again needs no other rank.
    streams: the groups whose random numbers it draws; the second time it draws the same, and the
    streams go on afterwards as if nothing had been drawn. The second run stops at the last value that
    a gradient needs, so the last matmul is not run again. Where no gradients are taken: `body` itself.
    """
    if not torch.is_grad_enabled():
        return body(*operands)
    again = partial(checkpoint, body, *operands, use_reentrant=False, preserve_rng_state=False)
    if not streams or torch.compiler.is_compiling():  # there masks are functions of their seeds
        return cast(tuple[T, ...], again())
    contexts = partial(checkpoint_contexts, [group.stream for group in streams])
    return cast(tuple[T, ...], again(context_fn=contexts))


def call_layer(
    layer: Callable[..., T], body: Callable[..., T], names: tuple[str, ...], *operands: Any
) -> T:
    """`layer(body, names, *operands)`: a module of the model runs its part of the graph.

    layer: gives `body(*parameters, *operands)` with its own parameters of these names (`layers.Layer`).
    """
    return layer(body, names, *operands)


def vocab_embedding(
    weight: Tensor, ids: Tensor, group: Group, vocab: int, rows: int, padding_idx: int = -1
) -> Tensor:
    """This rank's part of an embedding whose vocabulary is split; the caller reduces it.

        y[i] = weight[ids[i] - start]  if start <= ids[i] < start + rows  else 0
        dweight[r] = sum of dy[i] over ids[i] == start + r,  start = coordinate * rows

    weight: [local, n], rows [start, start + rows) of the whole table; rows past `rows` or past
    the true size `vocab` are padding, never read, gradient 0. ids: any shape, global numbers.
    padding_idx: the global row that gets no gradient, -1 for none. Returns [*ids.shape, n].

    Raises IndexError for an id outside [0, vocab); on CUDA a device assertion, as in PyTorch.
    Source: arXiv 1909.08053, section 3.
    """
    start = group.coordinate * rows
    if not kernels.holds(weight, ids):
        _check_indices(ids, vocab, "id", "the vocabulary")
    return _apply(_VocabEmbedding, weight, ids, start, rows, vocab, padding_idx)


def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group,
    vocab: int,
    rows: int,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_dim: int = 1,
) -> Tensor:
    """`aten.cross_entropy_loss` over classes that are split over the group.

    With z the whole logits, y the target, w the class weights, C = `vocab`, e the smoothing:

        lse    = log sum_c exp z_c
        loss_i = (1 - e) w_y (lse - z_y) + e/C sum_c w_c (lse - z_c)         0 where ignored
        dz_c   = ((1 - e) w_y + e/C sum_k w_k) softmax(z)_c - (1 - e) w_y [c = y] - e/C w_c

    and the mean is over the summed w_y of the targets that are not ignored. Three numbers per
    token are exchanged, in two all-reduces (the maximum; the sums), none in the backward pass.
    The whole logits exist nowhere; what is kept for the backward pass is `logits` itself.

    logits: [N, local, d1, ...] (class_dim 1) or [local] (class_dim 0); the rank holds the classes
    [coordinate * rows, coordinate * rows + rows) of `vocab`, and whatever its tensor has past
    `rows` or past the last true class is padding: not read, gradient 0. target: class indices,
    global, [N, d1, ...] or []. weight: whole, [vocab]. reduction: 0 none, 1 mean, 2 sum.
    float16 and bfloat16 are computed in float32; results have the dtype of `logits`, float32 under
    `torch.autocast`.

    Raises NotImplementedError for targets that are probabilities, IndexError for a target outside
    [0, vocab) that is not `ignore_index` (on CUDA a device assertion), ValueError for shapes that
    do not fit. Source: arXiv 1909.08053, section 3.
    """
    if target.is_floating_point():
        raise NotImplementedError("targets that are probabilities need the whole vocabulary")
    expected = (*logits.shape[:class_dim], *logits.shape[class_dim + 1 :])
    if target.shape != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} with classes in dimension {class_dim} need a target "
            f"{expected}, got {tuple(target.shape)}"
        )
    if weight is not None and weight.shape != (vocab,):
        raise ValueError(f"weight must be [{vocab}], the whole vocabulary, got {weight.shape}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in (NONE, MEAN, SUM):
        raise ValueError(f"reduction must be {NONE}, {MEAN} or {SUM}, got {reduction}")
    compute = torch.promote_types(logits.dtype, torch.float32)
    width = max(0, min(rows, vocab - group.coordinate * rows))
    if kernels.fit(logits, class_dim, width):
        target, valid, token_weight, known = kernels.targets(target, ignore_index, vocab)
        _assert(known, vocab, "target", "the classes")
    else:
        valid = target != ignore_index
        target = torch.where(valid, target, 0).long()
        _check_indices(target, vocab, "target", "the classes")
        token_weight = valid.to(compute)
    if weight is not None:
        weight = weight.to(compute)
        token_weight = token_weight * weight[target]
    split = _SplitClasses(group, vocab, group.coordinate * rows, width, class_dim)
    losses = _apply(
        _VocabCrossEntropy, logits, target, valid, token_weight, weight, split, label_smoothing
    )
    if reduction == MEAN:
        losses = losses.sum() / token_weight.sum()
    elif reduction == SUM:
        losses = losses.sum()
    # Under autocast cross entropy gives float32, as PyTorch's does.
    low = logits.dtype in (torch.float16, torch.bfloat16)
    cast = low and torch.is_autocast_enabled(logits.device.type)
    return losses.to(torch.float32 if cast else logits.dtype)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return cast(Tensor, apply_own(function, *args))


def line() -> Line | None:
    """Which line of the graph this is, for the error where the backward's collective fails."""
    return None if torch.compiler.is_compiling() else line_of_graph()


def _check_indices(indices: Tensor, size: int, name: str, of: str) -> None:
    """Raises IndexError for an index outside [0, size); asserts without waiting on CUDA."""
    if indices.is_meta or indices.numel() == 0 or torch.compiler.is_compiling():
        return
    if indices.is_cuda:
        _assert(((indices >= 0) & (indices < size)).all(), size, name, of)
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise IndexError(f"{name} {wrong} is out of range: {of} has {size} entries")


def _assert(known: Tensor, size: int, name: str, of: str) -> None:
    """Raises where not all indices are `known`, one bool, to be below the size: later, on CUDA."""
    torch._assert_async(known, f"{name} out of range: {of} has {size} entries")


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.line = group, line()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce(dy), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, inplace: bool) -> Tensor:
        inplace = inplace and not torch.compiler.is_compiling()  # functional collectives there
        inplace = inplace and x.is_contiguous() and not x._is_view() and not _is_leaf(x)
        if inplace:
            ctx.mark_dirty(x)
        y = group.all_reduce(x, inplace=inplace)
        return x if inplace else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, degree: int) -> Tensor:
        ctx.degree = degree
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy / ctx.degree, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.start, ctx.size = dim, group.coordinate * x.shape[dim], x.shape[dim]
        return torch.cat(group.all_gather(x), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.narrow(ctx.dim, ctx.start, ctx.size), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group, ctx.line = dim, group, line()
        size = x.shape[dim] // group.degree
        # A copy, so that the whole `x` is not kept alive by its slice.
        return x.narrow(dim, group.coordinate * size, size).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return torch.cat(ctx.group.all_gather(dy), ctx.dim), None, None


class _VocabEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, start: int, rows: int, vocab: int, padding_idx: int
    ) -> Tensor:
        ctx.local_rows = weight.shape[0]
        if kernels.holds(weight, ids):
            y, learnt, known = kernels.embedding(weight, ids, start, rows, vocab, padding_idx)
            _assert(known, vocab, "id", "the vocabulary")
            ctx.save_for_backward(learnt)
            return y
        inside = (ids >= start) & (ids < start + rows)
        local = torch.where(inside, ids - start, 0)
        # embedding_dense_backward skips the index that it is told is padding.
        learnt = inside if padding_idx < 0 else inside & (ids != padding_idx)
        ctx.save_for_backward(torch.where(learnt, local, -1))
        if not ctx.local_rows:
            return weight.new_zeros(*ids.shape, weight.shape[1])
        return F.embedding(local, weight).masked_fill(~inside.unsqueeze(-1), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (local,) = ctx.saved_tensors
        dweight = torch.ops.aten.embedding_dense_backward(dy, local, ctx.local_rows, -1, False)
        return dweight, None, None, None, None, None


@dataclass(frozen=True)
class _SplitClasses:
    """This rank's classes: the first `width` along `dim`, which are `start` .. of `classes`."""

    group: Group
    classes: int
    start: int
    width: int
    dim: int

    def own(self, logits: Tensor) -> Tensor:
        """The logits of true classes, a view."""
        return logits.narrow(self.dim, 0, self.width)

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's place along `dim`, kept as a dimension, and whether it is here."""
        inside = (target >= self.start) & (target < self.start + self.width)
        place = torch.where(inside, target - self.start, 0)
        return place.unsqueeze(self.dim), inside

    def own_weight(self, weight: Tensor, ndim: int) -> Tensor:
        """The weights of this rank's classes, to be broadcast against logits of `ndim`."""
        shape = [1] * ndim
        shape[self.dim] = self.width
        return weight[self.start : self.start + self.width].view(shape)


class _VocabCrossEntropy(torch.autograd.Function):
    """Loss per token, in the dtype of `token_weight`; ignored tokens have loss and gradient 0.

    With m the maximum and s the sum of exp(z - m): lse = m + log s, and all of the loss is written
    in z - m, which is exact where the logits are large. This rank's part of s is exp(m_r - m) s_r,
    with its own maximum and sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        token_weight: Tensor,
        weight: Tensor | None,
        split: _SplitClasses,
        smoothing: float,
    ) -> Tensor:
        dim, dtype = split.dim, token_weight.dtype
        own = split.own(logits)
        ctx.split, ctx.smoothing = split, smoothing
        in_kernels = kernels.fit(logits, dim, split.width)
        if in_kernels:
            largest, again, log_sum, pair = kernels.statistics(logits, split.width, target, split.start)
            maximum, picked = split.group.all_reduce(again, "max", inplace=True), pair[0]
        else:
            largest, log_sum, picked = _statistics(own, target, split, dtype)
            maximum = split.group.all_reduce(largest, "max")
        if in_kernels and not smoothing:  # what follows, in two launches
            kernels.own_sum(largest, log_sum, maximum, pair[1])
            picked, total = split.group.all_reduce(pair, inplace=True)
            ctx.save_for_backward(logits, target, valid, token_weight, weight, maximum, total)
            return kernels.losses(picked, total, maximum, token_weight, valid)

        local = torch.where(largest == -torch.inf, 0, (largest - maximum + log_sum).exp())
        sums = [picked, local]
        if smoothing:
            sums.append(_spread(own, maximum, weight, split))
        picked, total, *smooth = split.group.all_reduce(torch.stack(sums), inplace=True).unbind()
        picked = picked - maximum  # exact, where the two are near each other

        log_total = total.log()
        loss = (1 - smoothing) * token_weight * (log_total - picked)
        if smoothing:
            mass = split.classes if weight is None else weight.sum()
            loss = loss + smoothing / split.classes * (mass * log_total - smooth[0])
        ctx.save_for_backward(logits, target, valid, token_weight, weight, maximum, total)
        return torch.where(valid, loss, 0)

    @staticmethod
    @once
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, valid, token_weight, weight, maximum, total = ctx.saved_tensors
        split, smoothing = ctx.split, ctx.smoothing
        dim, dtype = split.dim, token_weight.dtype
        if not smoothing and kernels.fit(logits, dim, split.width):
            dz = kernels.gradient(
                logits, split.width, target, split.start, maximum, total, token_weight, valid, dloss
            )
            return dz, None, None, None, None, None, None
        mass = split.classes if weight is None else weight.sum()
        hit = torch.where(valid, (1 - smoothing) * token_weight * dloss, 0)
        spread = torch.where(valid, smoothing / split.classes * dloss, 0)
        scale = (hit + mass * spread) / total
        scale, maximum = scale.unsqueeze(dim), maximum.unsqueeze(dim)
        if torch.compiler.is_compiling():
            dz = _one_expression(split, logits, target, maximum, scale, hit, spread, weight)
            return dz, None, None, None, None, None, None

        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        dlogits.narrow(dim, split.width, logits.shape[dim] - split.width).zero_()
        if split.width:
            own, down = split.own(logits), split.own(dlogits)
            for some in _parts(own, dim):
                if own.dtype == dtype:
                    dz = torch.sub(own[some], maximum[some], out=down[some])
                else:
                    dz = own[some].to(dtype).sub_(maximum[some])
                dz.exp_().mul_(scale[some])
                if smoothing:
                    even = spread[some].unsqueeze(dim)
                    if weight is not None:
                        even = even * split.own_weight(weight, own.ndim)
                    dz.sub_(even)
                place, inside = split.local(target[some])
                dz.scatter_add_(dim, place, -torch.where(inside, hit[some], 0).unsqueeze(dim))
                if own.dtype != dtype:
                    down[some] = dz
        return dlogits, None, None, None, None, None, None


def _statistics(
    own: Tensor, target: Tensor, split: _SplitClasses, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token over the rank's classes, as `kernels.statistics` gives it: z's maximum; the
    logarithm of the sum of exp(z - maximum); z at the target, 0 where that is elsewhere."""
    dim = split.dim
    log_sum = torch.zeros(target.shape, dtype=dtype, device=own.device)
    if not split.width:
        return torch.full_like(log_sum, -torch.inf), log_sum, torch.zeros_like(log_sum)
    place, inside = split.local(target)
    picked = torch.where(inside, own.gather(dim, place).squeeze(dim), 0).to(dtype)
    for some in _parts(own, dim):
        # log_softmax of the largest logit is -log s_r, and one fused kernel gives it.
        log_sum[some] = -F.log_softmax(own[some], dim, dtype=dtype).amax(dim)
    return own.amax(dim).to(dtype), log_sum, picked


def _spread(own: Tensor, maximum: Tensor, weight: Tensor | None, split: _SplitClasses) -> Tensor:
    """sum over the rank's classes of w_c (z_c - maximum), for each token."""
    spread = torch.zeros_like(maximum)
    if split.width:
        for some in _parts(own, split.dim):
            shifted = own[some] - maximum[some].unsqueeze(split.dim)
            if weight is not None:
                shifted.mul_(split.own_weight(weight, own.ndim))
            spread[some] = shifted.sum(split.dim)
    return spread


def _one_expression(
    split: _SplitClasses,
    logits: Tensor,
    target: Tensor,
    maximum: Tensor,
    scale: Tensor,
    hit: Tensor,
    spread: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """The gradient without a write into memory, which the compiler makes one kernel of."""
    dim, own = split.dim, split.own(logits)
    place, inside = split.local(target)
    shape = [1] * own.ndim
    shape[dim] = split.width
    classes = torch.arange(split.width, device=own.device).view(shape)
    even = spread.unsqueeze(dim)
    if weight is not None:
        even = even * split.own_weight(weight, own.ndim)
    here = (classes == place) & inside.unsqueeze(dim)
    dz = (own.to(maximum.dtype) - maximum).exp() * scale - even
    dz = dz - torch.where(here, hit.unsqueeze(dim), 0)
    after = [0] * (2 * own.ndim)
    after[2 * (own.ndim - 1 - dim) + 1] = logits.shape[dim] - split.width
    return F.pad(dz.to(logits.dtype), after)


def _parts(logits: Tensor, class_dim: int) -> list[Any]:
    """Indices that cut the tokens in parts whose float32 logits take about PART_BYTES.

    Temporary tensors then stay small beside the logits. The compiler needs no such help.
    """
    size = 4 * logits.numel()
    if class_dim == 0 or size <= PART_BYTES or torch.compiler.is_compiling():
        return [...]
    step = max(1, logits.shape[0] * PART_BYTES // size)
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def _is_leaf(x: Tensor) -> bool:
    return x.is_leaf and x.requires_grad
