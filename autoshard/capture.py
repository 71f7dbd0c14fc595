"""Capture: a model becomes one flat torch.fx graph of ATen operators, batch and sequence symbolic.

The one front end is ``torch.export`` (non-strict first, strict where that fails). It runs on a
*skeleton*: the model with its parameters' shapes and no memory, so that a model of any size can be
captured again at any time for another signature (another set of inputs, train or eval).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autoshard import huggingface
from autoshard.analysis import CHECKPOINT
from autoshard.autograd_functions import kept, lost_in_strict
from autoshard.checkpoint_marks import Marks
from autoshard.compat import autograd_functions_inlined, checkpoints_entered, without_modes
from autoshard.errors import CaptureError
from autoshard.guards import Holds, shape_guard
from autoshard.layouts import Layout
from autoshard.memory import storage, written
from autoshard.repeated_layers import repeated_layers_copied
from autoshard.rules.call import is_continuous, op_name, where

SMALL = 2**16  # elements
BUILTINS = (dict, OrderedDict, defaultdict)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True)
class Captured:
    """A captured graph and what its placeholders stand for.

    Attributes:
        graph: flat; placeholders for parameters, buffers, constants, then the inputs.
        parameters: placeholder -> the parameter's name (a tied one under its first name).
        buffers: placeholder -> the buffer's name.
        constants: placeholder -> a tensor made in ``forward``.
        inputs: placeholders of the tensor inputs, in pytree order; None where an input is no tensor.
        out_spec: how the flat outputs are put together.
        holds: whether the graph holds for flat inputs of these shapes.
        held: input placeholder -> (dimension, layout, degree), where the caller gives a rank its share.
    """

    graph: fx.Graph
    parameters: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    out_spec: pytree.TreeSpec
    holds: Holds
    held: Mapping[str, tuple[int, Layout, int]] = field(default_factory=dict)

    @property
    def differentiable(self) -> set[str]:
        """Placeholders that a gradient can flow to: parameters and inputs of continuous numbers."""
        names = {*self.parameters, *self.inputs}
        found = (n for n in self.graph.nodes if n.op == "placeholder" and n.name in names)
        values = ((n.name, n.meta.get("val")) for n in found)
        return {n for n, v in values if is_continuous(v)}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have shapes, dtypes and (all but small ones) no memory.

    Buffers have memory, and small parameters too: a forward may write into them (running statistics,
    weights that are clamped), which memory of one element for all would not let it.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        hollow = hollowed(tensor, tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            hollow = nn.Parameter(hollow, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = hollow
    return copy.deepcopy(model, memo)


def hollowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A CPU tensor of this shape; a large parameter's is the memory of one element."""
    if isinstance(tensor, nn.Parameter) and tensor.numel() > SMALL:
        return torch.zeros((), dtype=dtype).expand(tensor.shape)
    return torch.zeros(tensor.shape, dtype=dtype)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every parameter's and buffer's name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name, tensor in named:
        names[name] = first.setdefault(id(tensor), name)
    return names


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, marks: Marks
) -> torch.export.ExportedProgram:
    """The model traced; once more with every layer where copies failed or are not to be trusted."""
    export = functools.partial(
        torch.export.export,
        model, args, kwargs, dynamic_shapes=_by_name(model, shapes), strict=False,
    )  # fmt: skip
    with kept(), repeated_layers_copied(model, marks) as copies:
        try:
            program = export()
        except Exception:
            if not copies.made:
                raise
            copies.mistaken = True
    if copies.mistaken:
        with kept():
            program = export()
    return program


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Capture ``model(*args, **kwargs)`` as one graph, every input dimension symbolic.

    Raises:
        CaptureError: the model branches on data, or holds a Python construct that cannot be
            captured; names the layer and the source line.
    """
    huggingface.register_outputs(model)
    # One tensor given twice (labels = input_ids) would become one input. Values are not looked at: an
    # empty tensor of any size takes no memory until it is written to.
    args, kwargs = pytree.tree_map_only(Tensor, torch.empty_like, (args, kwargs))
    shapes = _symbolic((args, kwargs))
    with contextlib.ExitStack() as around:
        around.enter_context(_named_arguments(model, kwargs))
        around.enter_context(_quiet())
        around.enter_context(without_modes())
        around.enter_context(_AsEager())
        marks = Marks()
        around.enter_context(checkpoints_entered(marks.entered))
        hooks = around.enter_context(_hooks_noticed())
        try:
            program = _exported(model, args, kwargs, shapes, marks)
        except CaptureError:
            raise
        except Exception as error:
            try:
                with autograd_functions_inlined() as inlined:
                    program = torch.export.export(
                        model, args, kwargs, dynamic_shapes=_by_name(model, shapes), strict=True
                    )
            except Exception:
                raise CaptureError(_explain(error)) from error
            if inlined:
                raise CaptureError(lost_in_strict(inlined[0]) + "\n" + _explain(error)) from error
    if hooks:
        raise CaptureError(
            f"the model registers a hook on a gradient while it runs ({hooks[0]}); the capture has the "
            "forward alone and would drop it without a word. Write it as an operator with "
            "torch.library.custom_op and register_autograd."
        )
    first = tied_names(model)
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.PARAMETER:
            parameters[name] = first[str(spec.target)]
        elif spec.kind is InputKind.BUFFER:
            buffers[name] = first[str(spec.target)]
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[str(spec.target)]
            if isinstance(constants[name], FakeTensor):
                raise CaptureError(f"the capture lost where the tensor {name} comes from")
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            raise CaptureError(f"an input of kind {spec.kind} ({spec.target}) is not supported")
    graph = copy.deepcopy(program.graph_module).graph
    _marked(graph)
    _no_constant_written(graph, constants)
    assert program.call_spec.out_spec is not None
    return Captured(
        graph, parameters, buffers, constants, tuple(inputs), program.call_spec.out_spec,
        _holds(program, graph, tuple(inputs)),
    )  # fmt: skip


def _no_constant_written(graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
    """A tensor that is a plain attribute of the model cannot keep what is written into it."""
    lifted = {n.args[0] for n in graph.nodes if op_name(n) in ("lift_fresh_copy", "lift_fresh")}
    held = [n for n in graph.nodes if n.op == "placeholder" and n.name in constants and n not in lifted]
    given = {storage(n): n.name for n in held}
    for node in graph.nodes:
        target = written(node)
        if target is not None and storage(target) in given:
            raise CaptureError(
                f"{where(node)} writes into {given[storage(target)]}, a tensor that is neither a "
                "buffer nor a parameter: register it with register_buffer"
            )


class _AsEager(TorchFunctionMode):
    """What tracing would see otherwise than eager code does.

    ``weight.data`` is ``weight.detach()``: traced as itself it would be a constant. A dropout that is
    off gives the very tensor that it got: its trace is another one.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise CaptureError("the model assigns to a tensor's .data; write into it by copy_ instead")
        if func in DROPOUTS:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            if not (given.arguments["p"] and given.arguments["training"]):
                return given.arguments["input"]
        return func(*args, **(kwargs or {}))


def _marked(graph: fx.Graph) -> None:
    """Marks of the tracer become the nodes' own; in nested graphs too."""
    for node in graph.nodes:
        call = node.meta.pop("custom", {}).get(CHECKPOINT)
        if call is not None:
            node.meta[CHECKPOINT] = call
        if node.op == "get_attr" and graph.owning_module is not None:
            inner = getattr(graph.owning_module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                _marked(inner.graph)


def _symbolic(value: Any) -> Any:
    """Every dimension symbolic; a list, as ``torch.export`` has it, for what is no plain container."""
    if isinstance(value, Tensor):
        return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)
    if isinstance(value, dict) and type(value) in BUILTINS:
        return {key: _symbolic(item) for key, item in value.items()}
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return None
    found = [_symbolic(item) for item in node.flatten_fn(value)[0]]
    return tuple(found) if isinstance(value, tuple) else found


def _by_name(model: nn.Module, shapes: tuple[Any, Any]) -> Any:
    """Dynamic shapes in the form that ``torch.export`` takes: by the names of ``forward``."""
    args, kwargs = shapes
    names = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    result: dict[str, Any] = dict(zip((p.name for p in positional), args, strict=False))
    if len(args) > len(positional):
        variadic = next(p.name for p in names if p.kind is p.VAR_POSITIONAL)
        result[variadic] = tuple(args[len(positional) :])
    return result | kwargs


@contextlib.contextmanager
def _named_arguments(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Give what ``forward(**kwargs)`` takes names of its own.

    ``torch.export`` (2.11 to 2.13) counts an argument that only ``**kwargs`` takes twice.
    """
    forward = model.forward
    parameters = list(inspect.signature(forward).parameters.values())
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    extra = [k for k in kwargs if k not in {p.name for p in named}]
    if not extra:
        yield
        return

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    keywords = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in extra]
    renamed.__signature__ = inspect.Signature([*named, *keywords])  # type: ignore[attr-defined]
    own = "forward" in model.__dict__
    model.forward = renamed
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.__dict__["forward"]


@contextlib.contextmanager
def alone(model: nn.Module, part: str | None) -> Iterator[None]:
    """Inside, the model's forward is that of the part of it that its method ``part`` gives."""
    if part is None:
        yield
        return
    inner = getattr(model, part)()
    assert "forward" not in model.__dict__

    @functools.wraps(inner.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]


@contextlib.contextmanager
def _hooks_noticed() -> Iterator[list[str]]:
    """The places in the model's code that call ``Tensor.register_hook``."""
    found: list[str] = []
    original = Tensor.register_hook

    def register_hook(self: Tensor, hook: Any) -> Any:
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        if caller is not None and "/torch/" not in caller.f_code.co_filename:
            found.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return original(self, hook)  # type: ignore[no-untyped-call]

    Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Tensor.register_hook = original  # type: ignore[method-assign]


def _explain(error: Exception) -> str:
    text = str(error).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    place = [line.strip() for line in lines if 'File "' in line and "/torch/" not in line]
    message = f"the model could not be captured: {type(error).__name__}: {lines[0] if lines else ''}"
    if frames := _model_frames(error):
        message += f"\n  at {frames}"
    elif place:
        message += f"\n  at {place[-1]}"
    return message + (
        "\n  A branch or a size that depends on data cannot be captured: compute it with tensors "
        "(torch.where, masks), or outside the model."
    )


def _model_frames(error: BaseException) -> str:
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        layer = trace.tb_frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and "/torch/" not in file:
            found = f"{type(layer).__name__}.forward ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs and warnings that torch.export prints; its error says what went wrong."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _holds(
    program: torch.export.ExportedProgram, graph: fx.Graph, inputs: tuple[str, ...]
) -> Holds:
    found = {str(n.target): n.meta.get("val") for n in graph.nodes if n.op == "placeholder"}
    ranges = {str(s): (r.lower, r.upper) for s, r in program.range_constraints.items()}
    return shape_guard([found[name] for name in inputs], ranges)
