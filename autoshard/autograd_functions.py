"""A model's own ``autograd.Function``: one opaque node of the captured graph, with its own backward.

Before: tracing would run a function's forward, keep its operators, and drop its backward::

    x_round = aten.round(x)                # of a straight-through estimator: gradient 0

After: every call of one class with the same other arguments is an operator of its own::

    x_round = autograd_functions.Round_5d2c1f([x], [])   # calls Round.apply(x)

It runs ``Function.apply`` itself, so it has the forward and the backward that the model has. It has no
rule, so its operands are whole on every rank, and so are its results and gradients. What such a node
cannot keep is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard.compat import apply_function, autograd_functions_applied
from autoshard.errors import CaptureError

NAMESPACE = "autograd_functions"
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout,
    torch.memory_format, type(Ellipsis),
)  # fmt: skip
FIX = "Register it as an operator with torch.library.custom_op and register_autograd."

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_KNOWN: dict[str, _Kept] = {}


class _State(threading.local):
    """tracing: a capture runs. apart: inside a function that is kept. place: who calls it."""

    tracing, apart, place = False, False, ""


_STATE = _State()


class _Slot:
    """Where a tensor, or a size that the graph computes, stands among the arguments."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class _Kept:
    """A class with all of its arguments but tensors and sizes, and how its results are put together."""

    function: type[torch.autograd.Function]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    results: list[pytree.TreeSpec]

    def __call__(self, tensors: list[Tensor | None], sizes: list[int]) -> list[Tensor]:
        """The results of ``apply``, tensors alone."""
        own = {"tensor": iter(tensors), "size": iter(sizes)}
        leaves = [next(own[x.kind]) if isinstance(x, _Slot) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        given = [(t, t._version) for t in tensors if t is not None]
        look = _Traced(self.function, [t for t, _ in given]) if _STATE.tracing else None
        with _apart(), look or contextlib.nullcontext():
            made = apply_function(self.function, *args, **kwargs)
        if any(t._version != version for t, version in given):
            raise CaptureError(_refusal(self.function, "writes into its arguments", _STATE.place))
        flat, spec = pytree.tree_flatten(made)
        if not all(isinstance(r, Tensor) for r in flat):
            raise CaptureError(_refusal(self.function, "gives what is no tensor", _STATE.place))
        if not self.results:
            self.results.append(spec)
        # What it hands on of its arguments is a value of its own.
        return [r.view_as(r) if any(r is t for t, _ in given) else r for r in flat]


def is_kept(target: Any) -> bool:
    """Whether a node's target is a model's own function."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside, functions of the model's own that are applied become operators.

    Raises CaptureError for one that takes a module, reads tensors that it is not given, writes into its
    arguments, or draws random numbers.
    """
    with _set("tracing", True), autograd_functions_applied(_applied):
        yield


def _applied(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if cls.__module__.startswith("torch.") or _STATE.apart or not _STATE.tracing:
        return apply_function(cls, *args, **kwargs)
    place = _caller()
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors: list[Tensor | None] = []
    sizes: list[Any] = []
    others: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            others.append(_Slot("tensor"))
        elif isinstance(leaf, torch.SymInt):
            sizes.append(leaf)
            others.append(_Slot("size"))
        elif isinstance(leaf, PLAIN):
            others.append(leaf)
        else:
            what = "a module" if isinstance(leaf, nn.Module) else f"a {type(leaf).__name__}"
            raise CaptureError(
                _refusal(cls, f"is given {what}, whose tensors would not be seen", place)
            )
    known = _operator(cls, tuple(others), spec)
    with _set("place", place):
        results = getattr(torch.ops.autograd_functions, known)(tensors, sizes)
    return pytree.tree_unflatten(results, _KNOWN[known].results[0])


def _operator(cls: Any, leaves: tuple[Any, ...], spec: pytree.TreeSpec) -> str:
    """The operator of a class and its other arguments, made where there is none."""
    for name, one in _KNOWN.items():
        if one.function is cls and one.spec == spec and repr(one.leaves) == repr(leaves):
            return name
    # By what it is, not by what was captured before: all ranks must give it the same name.
    digest = hashlib.sha256(f"{cls.__module__}.{cls.__qualname__} {leaves} {spec}".encode())
    name = f"{cls.__name__}_{digest.hexdigest()[:6]}"
    while name in _KNOWN:  # another class of the same name
        name += "_"
    _define(name, _Kept(cls, leaves, spec, []))
    return name


def _define(name: str, made: _Kept) -> None:
    _KNOWN[name] = made
    _LIBRARY.define(f"{name}(Tensor?[] tensors, SymInt[] sizes) -> Tensor[]")
    for key in ("CompositeExplicitAutograd", "Autograd", "Meta"):
        _LIBRARY.impl(name, made, key)


def packed(target: Any) -> Any:
    """What another process needs to run this operator, which is kept: to be pickled, for ``unpack``."""
    name = target._schema.name.partition("::")[2]
    return name, _KNOWN[name]


def unpack(given: Any) -> None:
    """Make the operator that another process packed, where there is none."""
    name, made = given
    if name not in _KNOWN:
        _define(name, made)


class _Traced(TorchDispatchMode):
    """Looks at what a function's forward does, while it is captured."""

    def __init__(self, function: Any, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.function = function
        self.seen = {id(t): t for t in given}  # held, so that no other tensor gets an id of these

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Ranks would draw different numbers for what all of them hold.
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(_refusal(self.function, f"draws random numbers ({func})", _STATE.place))
        for tensor in pytree.tree_leaves((args, kwargs)):
            new = func is torch.ops.aten.lift_fresh.default  # torch.tensor(1.0)
            if isinstance(tensor, Tensor) and id(tensor) not in self.seen and not new:
                why = f"reads a tensor {tuple(tensor.shape)} that is no argument of it"
                raise CaptureError(_refusal(self.function, why, _STATE.place))
        made = func(*args, **(kwargs or {}))
        self.seen.update((id(t), t) for t in pytree.tree_leaves(made) if isinstance(t, Tensor))
        return made


def _refusal(function: Any, why: str, place: str) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    return f"{place} calls its own autograd.Function {name}, which {why}. {FIX}"


def lost_in_strict(function: Any) -> str:
    """Why a model that only strict capture takes, and that applies this function, is refused."""
    why = "cannot be kept: the model is captured by its bytecode alone, since non-strict capture failed"
    return _refusal(function, why, "the model")


@contextlib.contextmanager
def _set(name: str, value: Any) -> Iterator[None]:
    before = getattr(_STATE, name, None)
    setattr(_STATE, name, value)
    try:
        yield
    finally:
        setattr(_STATE, name, before)


def _apart() -> contextlib.AbstractContextManager[None]:
    """Functions applied inside another are part of it."""
    return _set("apart", True)


def _caller() -> str:
    """``Attention.forward (model.py:57)``: the innermost layer of the model that is running."""
    frame = inspect.currentframe()
    while frame is not None:
        layer = frame.f_locals.get("self")
        file = frame.f_code.co_filename
        if isinstance(layer, torch.nn.Module) and "/torch/" not in file:
            return f"{type(layer).__name__}.{frame.f_code.co_name} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return "the model"
