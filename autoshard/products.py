"""Products by a weight, which lies as `F.linear` takes it, [out, in], or transposed, [in, out]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`x W + b`. x: [..., in], or [tokens, in] where the weight is transposed."""
    if not transposed:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [tokens, n]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def as_tokens(rows: Tensor, size: Sequence[int]) -> Tensor:
    """[tokens, n] -> [..., n]; size: of a tensor of this shape, but for its last dimension."""
    return rows.view(*size[:-1], rows.shape[1])


def gradient_of_weight(x: Tensor, dy: Tensor, transposed: bool) -> Tensor:
    """`xᵀ dy`, as the weight lies. x: [tokens, in], dy: [tokens, out]."""
    return x.t() @ dy if transposed else dy.t() @ x


def side_by_side(
    dys: Sequence[Tensor], weights: Sequence[Tensor], transposed: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`dys` and `weights` of `dx = sum_i dy_i W_iᵀ`; as one each where that moves less memory.

    dys: [tokens, out_i]. Weights [in, out_i] are left alone, as pieces of their gradient
    would not be contiguous; and what is compiled, as its sizes may be symbols.
    """
    if transposed or len(dys) < 2 or torch.compiler.is_compiling():
        return dys, weights
    tokens, size = dys[0].shape[0], weights[0].shape[1]
    columns = sum(weight.shape[0] for weight in weights)
    if not one_moves_less(len(dys), columns, tokens, size):
        return dys, weights
    return [torch.cat(tuple(dys), 1)], [torch.cat(tuple(weights))]


def one_moves_less(count: int, columns: Any, tokens: Any, size: Any) -> Any:
    """Whether one product of all the columns of so many weights moves less memory than one for each.

    In elements, with the columns of all n weights together:

        one product    2 columns (tokens + in)     gradients and weights, read and written
        n products     2 (n - 1) tokens in         dx, read and written again for each but the first

    Small products wait for memory, not for arithmetic: of 8 kv heads over 8 ranks k and v have 128
    columns each. Sizes are numbers, or expressions of sympy: then a condition on them.
    """
    return columns * (tokens + size) < (count - 1) * tokens * size


def gradient_of_input(dys: Sequence[Tensor], weights: Sequence[Tensor], transposed: bool) -> Tensor:
    """`sum_i dy_i W_iᵀ`. dys: [tokens, out_i]. Returns [tokens, in]."""
    pairs = [(dy, w.t() if transposed else w) for dy, w in zip(dys, weights, strict=True)]
    dx = torch.mm(*pairs[0])
    for dy, weight in pairs[1:]:
        dx.addmm_(dy, weight)
    return dx
