"""A layer's call while a model is traced: what it was given, what the trace made of it, and copies.

Before, in the tracer's graph::

    layer_norm_2 = aten.layer_norm(add_7, [768], arg14, arg15)    # h.1: given add_7, has arg14, ...
    ...
    add_14 = aten.add(add_11, dropout_4)

After a copy for ``h.2``, as if it had been traced::

    layer_norm_4 = aten.layer_norm(add_14, [768], arg26, arg27)
    ...
    add_21 = aten.add(add_18, dropout_6)

The copy stands where the trace would stand, so whatever ``torch.export`` does with a traced graph it
does with this one. Traced values of a copy have the sizes of the first and memory of their own, shared
among them, and with what is given, as in the first.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autoshard.analysis import CHECKPOINT
from autoshard.checkpoint_marks import Marks
from autoshard.compat import (
    MODES_ENTERED,
    attach_node,
    constant_node,
    function_modes,
    has_global_hooks,
    is_traced_constant,
    new_traced,
    storage_key,
    traced_like,
    traced_node,
    untraced,
)
from autoshard.memory import written
from autoshard.visible_state import scalar

aten = torch.ops.aten

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
SIZE_OF = (
    aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default,
)  # fmt: skip
CONSTANT = "_tensor_constant"  # what the tracer calls a tensor that was made from numbers
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class Unusual(Exception):
    """This call is to be traced: something in it cannot be compared or copied."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with.

    Attributes:
        tensors: the layer's own, then those among the arguments.
        nodes: what stands for them in the graph.
        form: equal for calls that differ in nothing but which tensors these are; without the layer's
            attributes.
        stack: the modules that are being called, this layer last.
        checkpoint: the call of ``torch.utils.checkpoint`` that is going on.
    """

    layer: nn.Module
    tensors: tuple[Tensor, ...]
    nodes: tuple[fx.Node, ...]
    form: Hashable
    stack: Mapping[str, tuple[str, str]]
    checkpoint: int | None

    @property
    def path(self) -> str:
        """The layer's path as the tracer has it."""
        return list(self.stack)[-1]


def call_of(
    tracer: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], marks: Marks
) -> Call:
    """Describe a call that is about to be traced.

    Raises:
        Unusual: it has hooks, is not the layer's first, or is given what is neither tensor nor number.
    """
    stack = {key: (path, _name(kind)) for key, (path, kind) in tracer.module_stack.items()}
    path = next(reversed(stack))
    if path != stack[path][0] or has_global_hooks():
        raise Unusual
    tensors: list[Tensor] = []
    parts = list(layer.named_modules(remove_duplicate=False))
    modules = tuple(_module_form(name, module, tensors) for name, module in parts)
    called = tuple(
        tracer.num_calls.get(f"{path}.{name}", 0) for name, _ in layer.named_modules() if name
    )
    given = tuple(_given(v, tensors) for v in (*args, *kwargs.values()))
    nodes = tuple(_node(t, tracer) for t in tensors)
    form = (
        modules, _pattern(id(module) for _, module in parts), called,
        (len(args), *kwargs), given, tuple(map(_tensor_form, tensors)),
        _pattern(map(id, tensors)), _pattern(map(id, nodes)), _pattern(map(storage_key, tensors)),
        _modes(), _site(), marks.current is None,
    )  # fmt: skip
    return Call(layer, tuple(tensors), nodes, form, stack, marks.current)


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _module_form(name: str, module: nn.Module, tensors: list[Tensor]) -> Hashable:
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise Unusual
    if type(module).__getattribute__ is not nn.Module.__getattribute__:
        raise Unusual  # reads would not be noticed
    held = [*module._parameters.items(), *module._buffers.items()]
    tensors += [t for _, t in held if t is not None]
    return name, type(module), tuple((n, t is None) for n, t in held), tuple(module._modules)


def _given(value: Any, tensors: list[Tensor]) -> Hashable:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor"
    if isinstance(value, SIZES):
        return "size", value.node.expr
    if isinstance(value, tuple):
        return type(value), tuple(_given(v, tensors) for v in value)
    if (plain := scalar(value)) is not None:
        return plain
    raise Unusual  # it may remember, or be changed


def _node(tensor: Tensor, tracer: Any) -> fx.Node:
    node = traced_node(tensor, tracer)
    if node is None or tensor.layout is not torch.strided or is_traced_constant(tensor, tracer):
        raise Unusual
    return node


def _tensor_form(t: Tensor) -> Hashable:
    return (
        isinstance(t, nn.Parameter), *_layout(t), t.requires_grad, t.is_leaf, t.is_conj(), t.is_neg(),
    )  # fmt: skip


def _layout(t: Tensor) -> tuple[Hashable, ...]:
    numbers = tuple(map(_number, (*t.shape, *t.stride(), t.storage_offset())))
    return t.dim(), numbers, t.dtype, t.device


def _number(value: Any) -> Hashable:
    return value.node.expr if isinstance(value, SIZES) else (type(value), value)


def _pattern(keys: Iterable[Any]) -> tuple[int, ...]:
    """Which of them are the same."""
    first: dict[Any, int] = {}
    return tuple(first.setdefault(key, index) for index, key in enumerate(keys))


def _modes() -> Hashable:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
        function_modes(),
    )  # fmt: skip


def _site() -> Hashable:
    """The lines of the calling modules: they stand in the stack trace of every node."""
    found = list[tuple[Any, int]]()
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "forward":
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


@dataclass(frozen=True)
class Traced:
    """What the trace of a call made.

    Attributes:
        nodes: in the graph's order, without those that compute sizes: the sizes are the same.
        text: what is computed, in terms of what is given; equal for equal computations.
        outputs: the flat outputs in the same terms: of what is given, a node's place, or a value.
        results: place of a node -> what was given out of it.
        marks: the first number of a call of ``torch.utils.checkpoint`` inside, and how many there are.
        calls: module in the layer -> how often it was called by then; the tracer numbers the calls.
    """

    call: Call
    nodes: tuple[fx.Node, ...]
    text: Hashable
    outputs: tuple[tuple[str, Any], ...]
    spec: pytree.TreeSpec
    results: Mapping[int, Tensor]
    marks: tuple[int, int]
    calls: Mapping[str, int]

    def copied(self, call: Call, tracer: Any, marks: Marks) -> Any:
        """The nodes once more, at the end of the graph, for another call; its output."""
        results = dict(zip(self.results, new_traced(list(self.results.values())), strict=True))
        copy = _Copy(self, call, results, tracer, marks.take(self.marks[1]))
        made = [copy.node(node) for node in self.nodes]
        for place, result in results.items():
            attach_node(result, made[place], tracer)
        tracer.num_calls |= {call.path + name: count for name, count in self.calls.items()}
        values = {"given": dict(enumerate(call.tensors)), "node": results}
        leaves = [values[kind][v] if kind in values else v for kind, v in self.outputs]
        return pytree.tree_unflatten(leaves, self.spec)


def traced_of(
    call: Call, nodes: tuple[fx.Node, ...], output: Any, tracer: Any, marks: tuple[int, int]
) -> Traced:
    """Describe what was traced.

    Raises:
        Unusual: it cannot be copied: it writes into what it was given, uses a tensor that it was not
            given, makes sizes that depend on data, holds nested graphs, or gives what is no tensor.
    """
    if any(_of_data(node) for node in nodes):
        raise Unusual
    nodes = tuple(node for node in nodes if not is_size(node))
    text = _Text(call, nodes, tracer)
    lines = tuple(map(text.line, nodes))
    leaves, spec = pytree.tree_flatten(output)
    results: dict[int, Tensor] = {}
    outputs = tuple(text.output(leaf, results) for leaf in leaves)
    described = (
        lines, spec, tuple((kind, _number(v) if kind == "value" else v) for kind, v in outputs),
        tuple(_tensor_form(t) for t in results.values()), marks[1],
    )  # fmt: skip
    calls = {
        path[len(call.path) :]: count
        for path, count in tracer.num_calls.items() if path.startswith(call.path + ".")
    }  # fmt: skip
    return Traced(call, nodes, described, outputs, spec, results, marks, calls)


class _Text:
    """Nodes in terms of what a call is given and of each other."""

    def __init__(self, call: Call, nodes: tuple[fx.Node, ...], tracer: Any) -> None:
        self.call, self.tracer = call, tracer
        self.given = {node: index for index, node in reversed(list(enumerate(call.nodes)))}
        self.objects = {id(t): index for index, t in reversed(list(enumerate(call.tensors)))}
        self.place = {node: index for index, node in enumerate(nodes)}
        self.memory: dict[int | None, tuple[str, int]] = {
            storage_key(t): ("given", index) for index, t in reversed(list(enumerate(call.tensors)))
        }

    def line(self, node: fx.Node) -> Hashable:
        depth = len(self.call.stack)
        inner = list(node.meta["nn_module_stack"].values())[depth:]
        if any(not path.startswith(self.call.path + ".") for path, _ in inner):
            raise Unusual
        if node.op == "get_attr":
            constant: Any = getattr(self.tracer.root, str(node.target), None)
            # Of more numbers than one PyTorch lets the traced copy be the constant itself.
            if not str(node.target).startswith(CONSTANT) or constant.dim():
                raise Unusual
            value: Any = _Constant(constant)
        elif node.op == "call_function" and (
            isinstance(node.target, torch._ops.OpOverload)
            or node.target is operator.getitem
            or node.target in MODES_ENTERED
        ):
            value = node.target
        else:
            raise Unusual
        into = written(node)
        if into is not None:
            written_to = self.memory.get(storage_key(into.meta["val"]))
            if written_to is None or written_to[0] == "given":
                raise Unusual
        inside = tuple(path[len(self.call.path) :] for path, _ in inner)
        args, kwargs = self._argument(node.args), self._argument(node.kwargs)
        mark = node.meta.get("custom", {}).get(CHECKPOINT)
        return (
            value, args, kwargs, self._value(node.meta.get("val"), node), inside,
            node.meta.get("stack_trace"), mark is None or mark == self.call.checkpoint,
        )  # fmt: skip

    def _argument(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            if is_size(value):
                return "size", _number(value.meta["val"])
            if value in self.place:
                return "node", self.place[value]
            if value in self.given:
                return "given", self.given[value]
            raise Unusual
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._argument(v)) for k, v in value.items())
        if isinstance(value, slice):
            return "slice", *(self._argument(v) for v in (value.start, value.stop, value.step))
        if (plain := scalar(value)) is not None:
            return plain
        raise Unusual

    def _value(self, value: Any, node: fx.Node) -> Hashable:
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_conj() or value.is_neg():
                raise Unusual
            made_here = ("node", self.place[node])
            return *_layout(value), self.memory.setdefault(storage_key(value), made_here)
        if isinstance(value, (list, tuple)):
            return tuple(self._value(v, node) for v in value)
        if value is None:
            return None
        raise Unusual

    def output(self, leaf: Any, results: dict[int, Tensor]) -> tuple[str, Any]:
        """``results``: tensors made inside that are given out, by the place of their node."""
        if isinstance(leaf, SIZES) or scalar(leaf) is not None:
            return "value", leaf
        if not isinstance(leaf, Tensor):
            raise Unusual
        if id(leaf) in self.objects:
            return "given", self.objects[id(leaf)]
        node = _node(leaf, self.tracer)
        if node not in self.place:
            raise Unusual
        place = self.place[node]
        if results.setdefault(place, leaf) is not leaf or leaf.storage_offset() != 0:
            raise Unusual
        others = [*self.call.tensors, *(t for t in results.values() if t is not leaf)]
        if storage_key(leaf) in map(storage_key, others):
            raise Unusual
        return "node", place


class _Constant:
    """A tensor that was made from numbers, compared by them."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and _numbers(self.value) == _numbers(other.value)

    def __hash__(self) -> int:
        return hash(self.value.dtype)


def _numbers(value: Tensor) -> Hashable:
    with untraced():
        return value.dtype, value.device, tuple(value.shape), repr(value.tolist())


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size, or whether one is another."""
    return isinstance(node.meta.get("val"), (*SIZES, int, float, bool))


def _of_data(node: fx.Node) -> bool:
    """Whether a size depends on data: an operator makes it, and would make another in every layer."""
    operator = isinstance(node.target, torch._ops.OpOverload) and node.target not in SIZE_OF
    return bool(node.meta.get("unbacked_bindings")) or (is_size(node) and operator)


class _Copy:
    """One copy of a trace being made."""

    def __init__(
        self, traced: Traced, call: Call, results: Mapping[int, Tensor], tracer: Any, first_mark: int
    ) -> None:
        self.traced, self.call, self.tracer, self.first_mark = traced, call, tracer, first_mark
        self.env: dict[fx.Node, fx.Node] = dict(zip(traced.call.nodes, call.nodes, strict=True))
        self.memory: dict[int | None, Tensor] = {
            storage_key(t): new for t, new in zip(traced.call.tensors, call.tensors, strict=True)
        } | {storage_key(t): results[place] for place, t in traced.results.items()}
        self.depth, self.before, self.after = len(traced.call.stack), traced.call.path, call.path

    def node(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            new = constant_node(getattr(self.tracer.root, str(node.target)), self.tracer)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env.get(n, n))
            new = self.tracer.graph.create_node(node.op, node.target, args, kwargs, node.name)
        new.meta = dict(node.meta)
        new.meta["nn_module_stack"] = self._stack(node.meta["nn_module_stack"])
        if "val" in node.meta:
            new.meta["val"] = self._value(node.meta["val"])
        if CHECKPOINT in node.meta.get("custom", {}):
            new.meta["custom"] = node.meta["custom"] | {CHECKPOINT: self._mark(node)}
        self.env[node] = new
        return new

    def _mark(self, node: fx.Node) -> int | None:
        mark: int = node.meta["custom"][CHECKPOINT]
        if mark == self.traced.call.checkpoint:
            return self.call.checkpoint
        return mark - self.traced.marks[0] + self.first_mark

    def _stack(self, stack: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        found = OrderedDict(self.call.stack)
        for key, (path, kind) in list(stack.items())[self.depth :]:
            found[self.after + key[len(self.before) :]] = self.after + path[len(self.before) :], kind
        return found

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            key = storage_key(value)
            new = traced_like(value, self.memory.get(key))
            self.memory.setdefault(key, new)
            return new
        if isinstance(value, (list, tuple)):
            return type(value)(self._value(v) for v in value)
        return value

