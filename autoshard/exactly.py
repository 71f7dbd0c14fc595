"""Running a model exactly: in float64, with dropout off, as captured graph and as eager module.

Models cast to float32 here and there (norms, softmax, the loss). A comparison to 1e-10 needs these
casts gone on both sides: in the graph by rewriting its dtypes, in eager by two torch modes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LOWER = (torch.float16, torch.bfloat16, torch.float32)


class _WithoutDropout(TorchFunctionMode):
    """Calls of functional dropout do nothing; attention drops nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d"):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class _Promoted(TorchDispatchMode):
    """Every operator that asks for a lower floating dtype gets this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.dtype, lambda d: self.dtype if d in LOWER else d, (args, kwargs or {})
        )
        return func(*args, **kwargs)


@contextlib.contextmanager
def exactly(dtype: torch.dtype) -> Iterator[None]:
    """Eager code runs without dropout, and in ``dtype`` where that is float64."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_WithoutDropout())
        if dtype is torch.float64:
            stack.enter_context(_Promoted(dtype))
        yield


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
            if dtype is torch.float64:
                node.args, node.kwargs = pytree.tree_map_only(
                    torch.dtype,
                    lambda d: dtype if d in LOWER else d,
                    (tuple(node.args), dict(node.kwargs)),
                )
            if node.target is torch.ops.aten.dropout.default:
                node.args = (node.args[0], 0.0, *node.args[2:])
            elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
                if len(node.args) > 4:
                    node.args = (*node.args[:4], 0.0, *node.args[5:])
                elif "dropout_p" in node.kwargs:
                    node.kwargs = {**node.kwargs, "dropout_p": 0.0}

    return edit
