"""The one place for private parts of PyTorch: why each is needed, and where it was tried.

- ``_disable_current_modes`` (torch 2.11, 2.13): a dispatch mode of the caller (``CommDebugMode``, a
  FLOP counter) would be traced into the captured graph. There is no public way to step outside.
- the code of ``torch.autograd.Function.apply`` (torch 2.13, Python 3.11): every call of a function
  runs it. Replacing the attribute would miss ``f = MyFunction.apply`` stored before.
- ``AutogradFunctionVariable.call_apply`` (torch 2.13): strict capture reads a function's bytecode,
  keeps its forward and drops its backward without a word; here it is noticed.
- ``DTensor._local_tensor``, ``DTensor._spec`` and the constructor (torch 2.11, 2.13): ``to_local``
  takes 150 us a parameter and step, forward and backward; ``shares`` takes 20. ``from_local`` takes 200
  without a gradient, and a model that generates makes two DTensors a layer and token.
- ``_use_count``, ``_storage_Use_Count`` and ``_will_engine_execute_node`` (torch 2.11, 2.13): PyTorch
  takes 20 us to put the gradient of a DTensor into ``.grad``, and does not look who else has its
  memory: after ``loss(a + b)`` one memory holds both gradients, and clipping scales it twice.
- ``_FunctionBase.apply`` and ``_are_functorch_transforms_active`` (torch 2.11, 2.13): what
  ``Function.apply`` does in the end.
- calling a node of autograd's graph (torch 2.11, 2.13): the gradients of one operator, in a third of
  the time of the engine, which is not made to be called in a backward pass for each attention.
- ``_get_current_graph_task_keep_graph`` and ``_top_saved_tensors_default_hooks`` (torch 2.11, 2.13):
  whether a graph is kept for another backward pass, whether somebody hooked what autograd keeps.
- ``ProcessGroup.allreduce`` and ``AllreduceOptions`` (torch 2.11, 2.13): ``dist.all_reduce`` writes a
  log and checks, 10 us a collective.
- ``_set_sm_carveout_experimental`` and cuBLAS's ``cublasSetSmCountTarget``, by ctypes (torch 2.11): how
  many multiprocessors matmuls leave alone. The first alone reaches, in 2.11, only those with a bias.
- ``_cuda_getCurrentStream`` and ``_cuda_isCurrentStreamCapturing`` (torch 2.11): ``event.record()``
  makes a Stream each time, and a Python function around one of PyTorch's takes a microsecond in a step.
- ``_get_default_store`` (torch 2.13): the key-value store by which the ranks found each other. Another
  one would need a port of its own.
- ``_set_pg_timeout`` and a backend's ``options`` (torch 2.13): a mesh gives its groups the backend's
  default timeout (30 minutes), whatever ``init_process_group`` was told.
- ``torch.utils.checkpoint.CheckpointFunction`` and ``_checkpoint_without_reentrant_generator`` (torch
  2.13): what ``checkpoint`` calls, by name. Models hold ``checkpoint`` itself since their import.
- ``PythonPrinter`` (torch 2.11, 2.13): the sizes that a capture finds are sympy expressions with
  functions of torch's own, which it writes as Python.
- ``ShapeEnv.backed_var_to_val`` (torch 2.13; ``var_to_val`` in 2.11): which number a symbolic size was
  traced with.
- ``_dispatch_tls_set_dispatch_key_excluded`` (torch 2.13): an operator of our own runs below autograd;
  one whose backward runs a forward once more needs it there.
- ``DelayedError`` (torch 2.11, 2.13): what ``once_differentiable`` gives, which raises where it is
  differentiated.
- ``UntypedStorage._cdata`` (torch 2.11, 2.13): which traced tensors share memory. Traced storages have
  no address, and storages do not compare.
- ``torch._C.DispatchKey`` (torch 2.11, 2.13): which operators are written in others. Their results may
  be their operands, though their schemas say that they are not.
- ``get_proxy_slot``, ``track_tensor_tree``, ``disable_proxy_modes_tracing`` (torch 2.11, 2.13): which
  node stands for a tensor that is being traced. The copy of a traced layer gives tensors of its own.
- ``FakeTensor`` and ``in_kernel_invocation_manager`` (torch 2.11, 2.13): a traced value is made from
  another one's sizes in 60 us; ``empty_strided`` with symbolic sizes takes 500.
- ``ShapeEnv.guards``, ``_get_key`` and ``var_to_range`` (torch 2.11, 2.13): whether tracing learnt
  anything about the sizes.
- ``_has_any_global_hook`` and ``_get_current_function_mode_stack`` (torch 2.11, 2.13): hooks on all
  modules, modes that see every call.
- ``DisableTorchFunction`` (torch 2.11, 2.13): tracing watches what is asked of a tensor by four modes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.autograd.function import once_differentiable
from torch.distributed import AllreduceOptions, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.fx.experimental import proxy_tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.printers import PythonPrinter


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Outside all torch dispatch modes of the caller."""
    with _disable_current_modes():
        yield


class _Applied:
    def apply(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        __class__  # type: ignore[name-defined]  # noqa: B018  (the code that this one stands for has this one free variable)
        import autoshard.compat

        return autoshard.compat.applied(cls, args, kwargs)


_CODE: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
_APPLY = types.FunctionType(
    _CODE.__code__, _CODE.__globals__, "apply", _CODE.__defaults__, _CODE.__closure__
)
applied: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = lambda cls, args, kwargs: _APPLY(  # noqa: E731
    cls, *args, **kwargs
)


def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.apply(*args, **kwargs)``, whatever is installed."""
    return _APPLY(cls, *args, **kwargs)


def apply_own(cls: Any, *args: Any) -> Any:
    """``cls.apply(*args)``, which searches the arguments for what vmap has left behind: 5 us."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return cls.apply(*args)
    return super(torch.autograd.Function, cls).apply(*args)


@contextlib.contextmanager
def autograd_functions_applied(
    instead: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Inside, ``instead(class, args, kwargs)`` is called for every ``autograd.Function`` applied."""
    global applied
    before, code = applied, _CODE.__code__
    applied, _CODE.__code__ = instead, _Applied.__dict__["apply"].__code__
    try:
        yield
    finally:
        applied, _CODE.__code__ = before, code


@contextlib.contextmanager
def autograd_functions_inlined() -> Iterator[list[Any]]:
    """The classes of the ``autograd.Function``s that strict capture met inside."""
    from torch._dynamo.variables.misc import AutogradFunctionVariable as Variable

    found: list[Any] = []
    original: Any = Variable.call_apply

    def call_apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.fn_cls)
        return original(self, *args, **kwargs)

    Variable.call_apply = call_apply  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Variable.call_apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def checkpoints_entered(
    around: Callable[[], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Have ``torch.utils.checkpoint`` do no more than call its function, inside ``around()``."""
    module: Any = torch.utils.checkpoint
    reentrant, other = module.CheckpointFunction, module._checkpoint_without_reentrant_generator

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            with around():
                return function(*args)

    def plain(*args: Any, **kwargs: Any) -> Iterator[None]:
        with around():
            yield

    module.CheckpointFunction, module._checkpoint_without_reentrant_generator = Plain, plain
    try:
        yield
    finally:
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = reentrant, other


def shares(parameters: list[DTensor]) -> list[Tensor]:
    """What ``to_local`` of each gives, in one call: gradients flow back, as DTensors placed alike."""
    if not torch.is_grad_enabled():
        return [p._local_tensor for p in parameters]
    trained = [p for p in parameters if p.requires_grad]
    found = iter(apply_own(_Shares, *trained)) if trained else iter(())
    return [next(found) if p.requires_grad else p._local_tensor for p in parameters]


class _Shares(torch.autograd.Function):
    """DTensors -> their shares; shares' gradients -> DTensors."""

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.placed = placed(parameters)
        return tuple(share.detach() for share in ctx.placed.shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nodes = [node for node, _ in ctx.next_functions]
        return tuple(gradients_of(ctx.placed, nodes, grads, _holders_of_given()))


@dataclass(frozen=True)
class Placed:
    """How parameters lie on this rank.

    Attributes:
        shares: what this rank holds of each.
        specs: of DTensors; None of plain tensors.
    """

    shares: list[Tensor]
    specs: list[DTensorSpec | None]


def placed(parameters: Sequence[Tensor]) -> Placed:
    """The shares of parameters, for a function of autograd; `gradients_of` is for its backward pass."""
    _holders_of_given()  # found outside of backward
    return Placed(
        [p._local_tensor if isinstance(p, DTensor) else p for p in parameters],
        [p._spec if isinstance(p, DTensor) else None for p in parameters],
    )


def gradients_of(
    parameters: Placed,
    nodes: Sequence[Any],
    grads: Sequence[Tensor | None],
    alone: tuple[int, int] | None = None,
    others: Sequence[Tensor | None] = (),
    own: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Inside of a backward pass: shares' gradients -> what it returns for the parameters.

    Where the pass is `.backward()` and no hook waits, gradients are added to `.grad` here, and None is
    returned.

    Args:
        nodes: of the parameters, in autograd's graph; None of one that needs no gradient.
        grads: None where there is none.
        alone: the `_holders` of a gradient that is nobody else's; of one made in this pass by default.
        others: gradients that the pass goes on with, whose memory no `.grad` may take.
        own: for each, whether it is known to be contiguous and nobody else's.
    """
    alone = alone or _holders_of_made()
    seen = {id(other) for other in others}
    result: list[Tensor | None] = []
    with torch._C.DisableTorchFunctionSubclass():  # each question to a DTensor takes half as long
        at_once = _is_whole_backward(nodes, grads)
        for grad, share, spec, node, is_own in zip(
            grads, parameters.shares, parameters.specs, nodes, own or [False] * len(grads), strict=True
        ):
            if grad is None or spec is None:
                result.append(grad)
                continue
            # Gradients of both summands of `a + b` have the same memory. AccumulateGrad copies such a
            # one; that of a DTensor looks at the DTensor, which is always new.
            if not (is_own and share.is_contiguous()):
                stride = share.stride()
                if id(grad) in seen or _holders(grad) != alone or grad.stride() != stride:
                    empty = torch.empty_strided(
                        grad.shape, stride, dtype=grad.dtype, device=grad.device
                    )
                    grad = empty.copy_(grad)
                seen.add(id(grad))
            done = at_once and _accumulated(node, grad, spec)
            result.append(None if done else _new_dtensor(grad, spec))
    return result


def _holders(grad: Tensor) -> tuple[int, int]:
    """How many hold the tensor, and how many its memory, these two lines among them."""
    return grad._use_count(), torch._C._storage_Use_Count(grad.untyped_storage()._cdata)  # type: ignore[attr-defined]


@functools.cache
def _holders_of_made() -> tuple[int, int]:
    """The holders of a tensor that Python alone has: (1, 2) in torch 2.13."""
    return _holders(torch.zeros(2, device="cpu"))


@functools.cache
def _holders_of_given() -> tuple[int, int]:
    """The holders of a gradient that a backward pass is given, and nobody else has: (2, 2)."""
    found: list[tuple[int, int]] = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            for grad in grads:
                found.append(_holders(grad))
            return grads[0]

    with without_modes(), torch.enable_grad():
        one = torch.zeros(2, device="cpu", requires_grad=True)
        (Count.apply(one) * 2).sum().backward()  # type: ignore[no-untyped-call]
    return found[0]


def _is_whole_backward(nodes: Sequence[Any], grads: Sequence[Tensor | None]) -> bool:
    """Whether ``.backward()`` runs, not ``autograd.grad``, and in the stream that its end waits for."""
    for first in grads:
        if first is not None:
            break
    else:
        return False
    # Kept: with create_graph=True `.grad` is a function of what it was computed from.
    if backward_is_kept() or first.requires_grad or torch.compiler.is_compiling():
        return False
    if first.is_cuda:
        if _current_stream(first.get_device())[0] != 0:
            return False
    elif not first.is_cpu:
        return False
    try:
        return all(map(_will_run, filter(None, nodes)))
    except RuntimeError:  # the gradient is asked for, not to be added to .grad
        return False


_will_run = torch._C._will_engine_execute_node


def _accumulated(node: Any, grad: Tensor, spec: DTensorSpec) -> bool:
    """Do what the parameter's AccumulateGrad would, which takes four times as long with DTensors.

    False where that one must do it: hooks wait for the gradient, or the types differ.
    """
    parameter = getattr(node, "variable", None)
    if parameter is None:  # computed from one
        return False
    trained, hooks, more_hooks, dtype, before = _state(parameter)
    if hooks or more_hooks or not trained or dtype is not grad.dtype:
        return False
    if before is None:
        parameter.grad = _new_dtensor(grad, spec)
    elif isinstance(before, DTensor) and before._spec == spec and not before.requires_grad:
        before._local_tensor.add_(grad)
    else:
        return False
    return True


# As one call: five questions in Python take twice as long.
_state = operator.attrgetter(
    "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks", "grad_dtype", "grad"
)


def share_specs(parameters: Iterable[Tensor]) -> None:
    """Let DTensors that are placed alike have one description: PyTorch looks what to do with each
    gradient up by it, and compares descriptions field by field unless they are one object."""
    found: dict[DTensorSpec, DTensorSpec] = {}
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            parameter._spec = found.setdefault(parameter._spec, parameter._spec)


def _new_dtensor(share: Tensor, spec: DTensorSpec) -> DTensor:
    """``DTensor(share, spec, requires_grad=False)`` past ``__init__``, which does nothing, in 4 us."""
    made: DTensor = DTensor.__new__(DTensor, share, spec, requires_grad=False)
    return made


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable`` for a backward pass that reads what was kept: as its gradients depend on
    that, to differentiate them is an error too where the gradients that it is given are constants."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        refuse: Any = torch._C._functions.DelayedError(
            b"trying to differentiate twice a function that was marked with @once_differentiable",
            len(found),
        )
        return refuse(*(g if g is None else g.detach().requires_grad_() for g in found))

    return wrapper


_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def backward_is_kept() -> bool:
    """Inside of a backward pass: whether its graph is kept for another one (``retain_graph=True``)."""
    return bool(_is_kept())


def gradients_by_node(
    result: Tensor, dy: Tensor, leaves: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """``torch.autograd.grad([result], leaves, [dy])`` where one operator made it of these leaves, else
    None: the operator's node called as a function, 30 us in place of the engine's 100.

    The engine also sums gradients that were broadcast, and casts: here these are None too.
    """
    node: Any = result.grad_fn
    if node is None:  # the result is a leaf: a cast to its own dtype gives the operand
        return None
    sources = [getattr(n, "variable", None) for n, _ in node.next_functions]
    if len(sources) != len(leaves) or not all(map(operator.is_, sources, leaves)):
        return None
    kind = type(node)  # of an operator
    if kind not in _of_one_result:
        if len(node._input_metadata) != 1:
            return None
        _of_one_result.add(kind)
    if torch.is_grad_enabled():
        with torch.no_grad():
            found = node(dy)
    else:
        found = node(dy)
    grads = found if isinstance(found, tuple) else (found,)
    return grads if all(map(_is_gradient_of, grads, leaves)) else None


_of_one_result: set[type] = set()


def _is_gradient_of(grad: Tensor | None, leaf: Tensor) -> bool:
    return grad is not None and grad.shape == leaf.shape and grad.dtype == leaf.dtype


def are_saved_tensors_hooked() -> bool:
    """Whether what autograd keeps now goes through somebody's hooks: of a checkpoint, or to the CPU."""
    return _top_hooks(True) is not None


def as_dtensor(
    share: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size
) -> Tensor:
    """``DTensor.from_local`` of contiguous true shape, unchecked."""
    stride: list[int] = []
    size = 1
    for n in reversed(shape):
        stride.insert(0, size)
        size *= max(n, 1)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and share.requires_grad):
        return DTensor.from_local(
            share, mesh, placements, run_check=False, shape=shape, stride=tuple(stride)
        )
    meta = TensorMeta(shape, tuple(stride), share.dtype)
    return DTensor(share, DTensorSpec(mesh, tuple(placements), meta), requires_grad=False)


def _options(op: Any, asynchronous: bool) -> AllreduceOptions:
    made = AllreduceOptions()
    made.reduceOp, made.asyncOp = op, asynchronous
    return made


_SUM = {started: _options(dist.ReduceOp.SUM, started) for started in (False, True)}
_MAX = _options(dist.ReduceOp.MAX, False)


def all_reduce(x: Tensor, op: str, group: dist.ProcessGroup) -> None:
    """``dist.all_reduce`` of a real tensor in place, past its log and checks, which take 10 us."""
    work = group.allreduce([x], _SUM[False] if op == "sum" else _MAX)
    if work is not None:
        work.wait()


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """``dist.all_reduce(x, group=group, async_op=True)``, in the same way."""
    return group.allreduce([x], _SUM[True])


def leave_multiprocessors(count: int, of: int) -> None:
    """Matmuls from now on leave so many of a GPU's `of` multiprocessors, until it is said to be 0.

    Through cuBLAS's handle those of this thread; PyTorch's own switch is one for the process.
    """
    torch._C._set_sm_carveout_experimental(count or None)
    target = _sm_count_target()
    if target is not None:
        target(torch.cuda.current_blas_handle(), of - count if count else 0)


@functools.cache
def _sm_count_target() -> Callable[[int, int], int] | None:
    """``cublasSetSmCountTarget(handle, count)`` of the cuBLAS that PyTorch has loaded; 0: all."""
    try:
        name = f"libcublas.so.{(torch.version.cuda or '').partition('.')[0]}"
        library = ctypes.PyDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # never another copy
        found = library.cublasSetSmCountTarget
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_int
    return cast(Callable[[int, int], int], found)


# Whether a CUDA graph is being captured on the current stream, without a Python function around it.
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentStream", None)


def record(event: torch.cuda.Event, device: int) -> None:
    """``event.record()`` on the device's current stream, which then is no new Python object."""
    key = _current_stream(device)
    stream = _streams.get(key)
    if stream is None:
        stream = _streams[key] = torch.cuda.current_stream(device)
    event.record(stream)


_streams: dict[tuple[int, int, int], torch.cuda.Stream] = {}


def subgroup(ranks: list[int], device: torch.device) -> dist.ProcessGroup:
    """A process group of these ranks, which alone call this, in one order."""
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    inherit_timeout(group, device)
    return group


def storage_key(tensor: Tensor) -> int | None:
    """The same number for tensors over the same memory; None for one inside ``vmap``."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


@contextlib.contextmanager
def autograd_again() -> Iterator[None]:
    """Inside an operator of ``torch.library.custom_op``: what runs can be differentiated."""
    keys = [
        getattr(torch._C.DispatchKey, name) for name in ("AutogradFunctionality", "ADInplaceOrView")
    ]
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def as_python(expression: Any) -> str:
    """An expression of symbolic sizes, as Python."""
    return str(PythonPrinter().doprint(expression))


def size_examples(environment: Any) -> Mapping[Any, Any]:
    """Symbol of a size -> the number that it had in the capture."""
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return cast(Mapping[Any, Any], known)


def default_store() -> distributed_c10d.Store | None:
    """A connection of its own to the store of the default process group; None where it has none."""
    try:
        store: distributed_c10d.Store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        return store
    except RuntimeError:  # a group without processes
        return None


def inherit_timeout(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give a process group the timeout of the default group, for collectives on `device`."""
    timeout = timeout_of(dist.group.WORLD, device)
    if timeout is not None:
        distributed_c10d._set_pg_timeout(timeout, group)


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta | None:
    """After which time a collective of the group fails; None of a backend without one."""
    try:
        return group._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None


def is_nccl(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether collectives of the group on `device` are NCCL's, whatever else the group has."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return False
    try:
        return isinstance(group._get_backend(device), dist.ProcessGroupNCCL)
    except RuntimeError:  # none for this device
        return False


def is_composite(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator is a function of others, without a derivative of its own."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(operator.has_kernel_for_dispatch_key(key))


@contextlib.contextmanager
def module_calls(around: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module call that is traced is ``around(tracer, module, forward, *args, **kwargs)``."""
    original = fx.Tracer.call_module

    def call_module(
        self: fx.Tracer, m: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return original(self, m, functools.partial(around, self, m, forward), args, kwargs)

    fx.Tracer.call_module = call_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Tracer.call_module = original  # type: ignore[method-assign]


# What a trace writes down of torch.no_grad and torch.autocast; nested graphs are made of it later.
MODES_ENTERED = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


def function_modes() -> tuple[int, ...]:
    """Which modes see the functions that are called: a default device is one."""
    return tuple(id(mode) for mode in _get_current_function_mode_stack())


def has_global_hooks() -> bool:
    """Whether every module has a hook."""
    return bool(_has_any_global_hook())


# Inside, what is asked of a tensor is not shown to the modes that watch a trace, at 10 us a question.
unwatched: Callable[[], contextlib.AbstractContextManager[None]] = torch._C.DisableTorchFunction


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Inside, tensors are tensors, whatever is being traced around."""
    with unwatched(), _disable_current_modes():
        yield


def traced_node(tensor: Tensor, tracer: Any) -> fx.Node | None:
    """What stands for a traced tensor in the graph; None for one that is not traced."""
    slot = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    return slot.proxy.node if slot is not None and isinstance(tensor, FakeTensor) else None


def is_traced_constant(tensor: Tensor, tracer: Any) -> bool:
    """Whether the tracer knows the tensor's numbers, so that a model may branch on them."""
    return proxy_tensor.get_proxy_slot(tensor, tracer).constant is not None


def attach_node(tensor: Tensor, node: fx.Node, tracer: Any) -> None:
    """From here on the node stands for the tensor."""
    proxy_tensor.track_tensor_tree(tensor, fx.Proxy(node, tracer), constant=None, tracer=tracer)


def constant_node(value: Tensor, tracer: Any) -> fx.Node:
    """A node for a tensor of these numbers, as if the model had made it here."""
    with untraced():
        value = value.clone()
    return cast(fx.Node, tracer.create_arg(value))


def size_facts(traced: Sequence[Tensor]) -> Any:
    """What is known of symbolic sizes in the trace that the tensors are of, to be compared."""
    environment = cast(FakeTensor, traced[0]).fake_mode.shape_env if traced else None
    if environment is None:
        return None
    return len(environment.guards), environment._get_key(), dict(environment.var_to_range)


def traced_like(tensor: Tensor, memory: Tensor | None) -> Tensor:
    """A traced value of the same sizes, strides and type: in this memory, or in memory of its own.

    Memory of its own is an identity and no bytes: nothing reads the value of a node.
    """
    fake = cast(FakeTensor, tensor)
    with in_kernel_invocation_manager(fake.fake_mode):
        if memory is None:
            base = torch.empty(0, dtype=fake.dtype, device="meta")
        else:
            base = torch.ops.aten.detach.default(memory)
        if base.dtype != fake.dtype:
            base = base.view(fake.dtype)
        made = torch.as_strided(base, fake.size(), fake.stride(), fake.storage_offset())
    return FakeTensor(fake.fake_mode, made, fake.device)


class _New(torch.autograd.Function):
    """Tensors that came from somewhere: no leaves, where they have gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
        made = tuple(_empty_like(t) for t in like)
        pairs = zip(made, like, strict=True)
        ctx.mark_non_differentiable(*(new for new, t in pairs if not t.requires_grad))
        return made


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)


def new_traced(like: list[Tensor]) -> list[Tensor]:
    """Traced tensors of these sizes, strides and types, that have gradients where these have."""
    if not like:
        return []
    environment = cast(FakeTensor, like[0]).fake_mode.shape_env
    with (
        proxy_tensor.disable_proxy_modes_tracing(),
        environment.suppress_guards() if environment is not None else contextlib.nullcontext(),
    ):
        if not any(t.requires_grad for t in like):
            return [_empty_like(t) for t in like]
        return list(apply_function(_New, torch.empty(0, requires_grad=True), like))
