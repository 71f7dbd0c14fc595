"""One call of an operator, as its rule sees it: named arguments, and the axes of each use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from autoshard import axes
from autoshard.axes import Axis, Size
from autoshard.paths import module_path

Dims = tuple[Axis, ...]
Slot = tuple[str, int | None]  # an argument's name, and its place in a list of tensors


def size_of(value: int | torch.SymInt) -> Size:
    """A dimension's size as an int or a sympy expression."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_Integer else expression


def shape_of(value: torch.Tensor) -> tuple[Size, ...]:
    """A (fake) tensor's shape, symbolic sizes as sympy expressions."""
    return tuple(size_of(s) for s in value.shape)


@lru_cache(maxsize=4096)
def _parameters(op: torch._ops.OpOverload) -> tuple[tuple[str, bool, Any], ...]:
    return tuple((a.name, a.has_default_value(), a.default_value) for a in op._schema.arguments)


def bind(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of the operator's schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for index, (name, has_default, default) in enumerate(_parameters(node.target)):
        if index < len(node.args):
            bound[name] = node.args[index]
        elif name in node.kwargs:
            bound[name] = node.kwargs[name]
        elif has_default:
            bound[name] = default
    return bound


@dataclass(eq=False)
class Call:
    """A call on the walk of the analysis; a rule fills in what it finds.

    Attributes:
        node: the call in the graph.
        arguments: its arguments by name.
        operands: the axes of each tensor operand at this use.
        outputs: the axes of each result; None for a result that is no tensor.
        summed: axes contracted away: where one is split, the result is a partial sum.
        averaged: the sum is divided by the number of elements (``mean``).
        added_once: operands to be added after the reduction (a bias).
        settled: axes that the operator needs whole and gives back whole: what reads the result may
            take its own share of them, so each use has axes of its own there.
        lookup: axis whose global indices the operator uses (a vocabulary), or None.
        flops: multiply-adds of the matmul, times two.
    """

    node: fx.Node
    arguments: dict[str, Any]
    dims_of: Callable[[fx.Node], Dims]
    shape_of: Callable[[torch.Tensor], tuple[Size, ...]]
    operands: dict[Slot, Dims] = field(default_factory=dict)
    outputs: list[Dims | None] = field(default_factory=list)
    summed: list[Axis] = field(default_factory=list)
    averaged: bool = False
    added_once: list[Slot] = field(default_factory=list)
    settled: list[Axis] = field(default_factory=list)
    lookup: Axis | None = None
    flops: Size = 0

    def operand(self, name: str, index: int | None = None) -> Dims:
        """The axes of a tensor operand at this use."""
        slot = (name, index)
        if slot not in self.operands:
            self.operands[slot] = self.dims_of(self.tensor(name, index))
        return self.operands[slot]

    def tensor(self, name: str, index: int | None = None) -> fx.Node:
        """The node that is given for an argument (or for one place of a list)."""
        value: Any = self.arguments[name]
        node: fx.Node = value if index is None else value[index]
        return node

    def given(self, name: str) -> bool:
        """Whether a tensor is given for the argument."""
        return isinstance(self.arguments.get(name), fx.Node)

    def tensors(self) -> Iterable[Slot]:
        """The slots of all tensor operands, in the order of the schema."""
        for name, value in self.arguments.items():
            if is_tensor(value):
                yield name, None
            elif isinstance(value, (list, tuple)):
                for index, item in enumerate(value):
                    if is_tensor(item):
                        yield name, index

    def shape(self, result: int = 0) -> tuple[Size, ...]:
        """The shape of a result."""
        value = self.node.meta["val"]
        return self.shape_of(value[result] if isinstance(value, (list, tuple)) else value)

    def dim(self, value: int, rank: int) -> int:
        """A dimension's index, counted from the left."""
        return value % rank if rank else 0

    def freeze(self, dims: Iterable[Axis], why: str) -> None:
        """The operator needs these axes whole."""
        for axis in dims:
            axes.freeze(axis, f"{why} ({where(self.node)})")

    def unify(self, a: Axis, b: Axis) -> None:
        """Two dimensions are the same axis; frozen where they have no common refinement."""
        try:
            axes.unify(a, b)
        except axes.AxisMismatch as mismatch:
            self.freeze((a, b), f"dimensions do not align: {mismatch}")

    def broadcast(self, operands: Sequence[Dims], shape: Sequence[Size]) -> Dims:
        """The axes of a result of this shape, operands aligned from the right."""
        result: list[Axis] = []
        for offset, size in enumerate(reversed(shape), start=1):
            axis: Axis | None = None
            for dims in operands:
                if offset > len(dims) or dims[-offset].find().size == 1:
                    continue
                if axis is None:
                    axis = dims[-offset]
                else:
                    self.unify(axis, dims[-offset])
            result.append(Axis(size) if axis is None else axis)
        return tuple(reversed(result))


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node that gives one tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def is_continuous(value: Any) -> bool:
    """Whether a value is a tensor that gradients can flow to: of floating or of complex numbers."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def where(node: fx.Node) -> str:
    """An operator's place for messages: ``aten.softmax at transformer.h.0.attn (model.py:57)``."""
    line = source_line(node)
    return f"{node.target} at {module_path(node) or 'the model'}{line and f' ({line})'}"


def source_line(node: fx.Node) -> str:
    """The innermost line of the model that the node was traced from: ``model.py:57``, or nothing."""
    for row in reversed((node.meta.get("stack_trace") or "").splitlines()):
        if 'File "' in row:
            file, _, rest = row.partition('File "')[2].partition('", line ')
            return f"{file.rpartition('/')[2]}:{rest.split(',')[0].strip()}"
    return ""


def traced_call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
) -> fx.Node:
    """A new call at the insertion point, with its traced value, where ``like`` stands in the model."""
    name = getattr(target, "_schema", target)
    name = getattr(name, "name", getattr(name, "__name__", "call")).partition("::")[2]
    node = graph.create_node("call_function", target, args, kwargs, name=name or None)
    traced_args, traced_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta")}
    node.meta = meta | {"val": target(*traced_args, **traced_kwargs)}
    return node


def op_name(node: fx.Node) -> str:
    """``softmax`` for ``aten.softmax.int``, ``mine::softmax`` for another library's, else ``""``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.removeprefix("aten::"))
    return ""
