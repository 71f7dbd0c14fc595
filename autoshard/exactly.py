"""Running a model exactly: in float64, with dropout off, as captured graph and as eager module.

Models cast to float32 here and there (norms, softmax, the loss). A comparison to 1e-10 needs these
casts gone on both sides: in the graph by rewriting its dtypes, in eager by a torch mode.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
EXACT = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
EXACT |= dict.fromkeys((torch.complex32, torch.complex64), torch.complex128)


class _Exact(TorchDispatchMode):
    """Operators that ask for a lower floating dtype get ``dtype``; dropout's masks keep everything.

    Dropout is ``x * bernoulli(1 - p) / (1 - p)``, so a mask that is 1 - p everywhere is no dropout.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is aten.native_dropout_backward.default:
            return args[0].clone()
        args, kwargs = _without_dropout(func, args, kwargs)
        if func is aten._grouped_mm.default and args[0].dtype is torch.float64:
            return _grouped_mm(*args[:3])
        if self.dtype is torch.float64:
            args, kwargs = pytree.tree_map_only(torch.dtype, lambda d: EXACT.get(d, d), (args, kwargs))
        return func(*args, **kwargs)


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a fused attention kernel (or its backward) with its ``dropout_p`` zero."""
    if "dropout_p" in kwargs:
        return args, {**kwargs, "dropout_p": 0.0}
    schema = getattr(func, "_schema", None)
    for place, argument in enumerate(schema.arguments[: len(args)] if schema is not None else ()):
        if argument.name == "dropout_p":
            return (*args[:place], 0.0, *args[place + 1 :]), kwargs
    return args, kwargs


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The grouped matmul, whose kernels know no float64: groups end at ``offs`` along one axis.

    ``[T, k] x [E, k, n] -> [T, n]``, and ``[k, T] x [T, n] -> [E, k, n]`` in its backward.
    """
    ends = [0, *offs.tolist()]
    groups = [slice(i, j) for i, j in itertools.pairwise(ends)]
    if b.dim() == 2:
        return torch.stack([a[:, g] @ b[g] for g in groups])
    parts = [a[g] @ b[e] for e, g in enumerate(groups)]
    rest = a.new_zeros((a.shape[0] - ends[-1], b.shape[2]))
    return torch.cat([*parts, rest])


@contextlib.contextmanager
def exactly(dtype: torch.dtype) -> Iterator[None]:
    """Eager code runs without dropout, and in ``dtype`` where that is float64.

    Covers the backward too where it runs inside: what dropout saved for it is part of the forward.
    """
    with _Exact(dtype):
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that code makes without saying a dtype (``torch.full``) have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def edit_exactly(dtype: torch.dtype) -> Callable[[fx.Graph], None]:
    """The same for a captured graph, nested graphs included."""

    def edit(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op != "call_function":
                if node.op == "get_attr":
                    nested = getattr(graph.owning_module, str(node.target), None)
                    if isinstance(nested, fx.GraphModule):
                        edit(nested.graph)
                continue
            nested_call = isinstance(node.target, torch._ops.HigherOrderOperator)  # autocast's dtype
            if dtype is torch.float64 and not nested_call:
                node.args, node.kwargs = pytree.tree_map_only(
                    torch.dtype,
                    lambda d: EXACT.get(d, d),
                    (tuple(node.args), dict(node.kwargs)),
                )
            if node.target is aten.dropout.default:
                if node.args[1] and node.args[2]:  # a tensor of its own, as with its mask
                    node.target, node.args = aten.clone.default, node.args[:1]
            elif node.target is aten.scaled_dot_product_attention.default:
                if len(node.args) > 4:
                    node.args = (*node.args[:4], 0.0, *node.args[5:])
                elif "dropout_p" in node.kwargs:
                    node.kwargs = {**node.kwargs, "dropout_p": 0.0}

    return edit
