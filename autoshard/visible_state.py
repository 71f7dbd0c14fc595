"""What the Python code of a layer can see besides its tensors, as values that can be compared.

Two layers compute the same when they see the same. What a layer sees: its modules' attributes, of which
those that a trace never read do not matter (the number of the layer, say), and what its functions'
globals, closures, defaults and classes hold. A value is *frozen*: numbers, strings and containers by
what they hold, own modules and tensors by their name in the layer, functions by code and closure, plain
objects by their attributes. What cannot be followed equals nothing, not even itself.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import random
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Set
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

SCALARS = (
    type(None), bool, int, float, complex, str, bytes, type(Ellipsis),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
SEQUENCES = (list, tuple, deque, torch.Size)
MAPPINGS = (dict, OrderedDict, defaultdict, types.MappingProxyType)
STRUCTURE = ("_parameters", "_buffers", "_modules")  # of a module: compared as tensors and modules

State = Mapping[tuple[str, str], Hashable]
Reads = Set[tuple[str, str]]  # (module, attribute); "__dict__" stands for all of a module's


class _Same:
    """A value that equals itself alone, and lives as long as what it is compared with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Unknown:
    """What cannot be followed: made anew for each look, it equals nothing."""


def own_names(layer: nn.Module) -> dict[int, str]:
    """id -> name in the layer, of its modules and tensors."""
    named: dict[int, str] = {}
    for name, part in (
        *layer.named_modules(), *layer.named_parameters(), *layer.named_buffers()
    ):  # fmt: skip
        named.setdefault(id(part), f"{type(part).__name__} {name}")
    return named


def scalar(value: Any) -> Hashable | None:
    """A plain value with its type, so that 1, 1.0 and True differ; None for what is none."""
    if type(value) in SCALARS or isinstance(value, enum.Enum):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    return None


class _Freezer:
    """One look. `followed`: how deep objects within objects are followed; below, identity counts."""

    def __init__(self, own: Mapping[int, str], followed: int | None) -> None:
        self.own, self.followed = own, followed
        self.seen: dict[int, int] = {}

    def of(self, value: Any) -> Hashable:
        if id(value) in self.own:
            return "own", self.own[id(value)]
        if (plain := scalar(value)) is not None:
            return plain
        if isinstance(value, (Tensor, type, types.ModuleType)):
            return _Same(value)
        if isinstance(value, (nn.Module, Iterator)):  # of another layer; what next() changes
            return _Unknown()
        if id(value) in self.seen:
            return "seen", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
            return self._function(value)
        if isinstance(value, functools.partial):
            return "partial", self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, ContextVar):
            return _Same(value), self.of(value.get(None))
        if isinstance(value, weakref.ref):
            return "reference", self.of(value())
        return self._object(value)

    def _function(self, value: Any) -> Hashable:
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, types.BuiltinFunctionType):
            bound = not isinstance(value.__self__, (types.ModuleType, type(None)))
            return (value.__name__, self.of(value.__self__)) if bound else _Same(value)
        if of_torch(value) or not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return _Same(value)
        cells = tuple(self.of(held) for held in closure(value))
        return _Same(value.__code__), cells, self.of(value.__defaults__), self.of(value.__kwdefaults__)

    def _object(self, value: Any) -> Hashable:
        kind, held = type(value), list[Hashable]()
        for base in kind.__mro__:
            if base in SEQUENCES:
                held.append(tuple(self.of(item) for item in value))
            elif base in MAPPINGS:
                held.append(tuple((self.of(key), self.of(item)) for key, item in value.items()))
            elif base in (set, frozenset):
                held.append(frozenset(self.of(item) for item in value))
            elif base is not object and _in_c(base):  # it may hold what no attribute shows
                return _Unknown() if self.followed is None else _Same(value)
        attributes = _attributes(value)
        if attributes and self.followed is not None:
            if self.followed == 0:
                return _Same(value)
            inner = _Freezer(self.own, self.followed - 1)
            inner.seen = self.seen
            return kind, tuple(held), tuple((name, inner.of(item)) for name, item in attributes)
        return kind, tuple(held), tuple((name, self.of(item)) for name, item in attributes)


def frozen(value: Any, own: Mapping[int, str], followed: int | None = None) -> Hashable:
    """A value to compare. `followed`: None follows objects within objects to the end."""
    return _Freezer(own, followed).of(value)


def closure(function: types.FunctionType) -> list[Any]:
    """What the function's own variables from outside hold."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            found.append(cell.cell_contents)
    return found


def of_torch(value: Any) -> bool:
    """Whether a function or class is PyTorch's: those keep nothing between layers."""
    return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"


def _in_c(kind: type) -> bool:
    """Whether a class is no Python: it is static, or makes its instances itself."""
    heap = kind.__flags__ & 1 << 9  # Py_TPFLAGS_HEAPTYPE; as copyreg asks
    return not heap or isinstance(vars(kind).get("__new__"), types.BuiltinFunctionType)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    found = list(getattr(value, "__dict__", {}).items())
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.append((name, getattr(value, name)))
    return found


def attributes(layer: nn.Module, reads: Reads | None = None) -> State:
    """(module, attribute) -> its frozen value: of what was read, or of all."""
    own = own_names(layer)
    return {
        (path, name): frozen(value, own)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if name not in STRUCTURE
        and (reads is None or (path, name) in reads or (path, "__dict__") in reads)
    }


def random_state() -> Hashable:
    """Python's random numbers, and NumPy's: a layer that draws some is not the next one."""
    state: list[Hashable] = [random.getstate()]
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state.append((name, keys.tobytes(), *rest))
    return tuple(state)


@contextlib.contextmanager
def reads_noticed() -> Iterator[dict[nn.Module, set[str]]]:
    """Which attributes of which modules are read inside; ``__dict__`` stands for all of them.

    Modules look their own tensors and modules up in ``__dict__``, which are compared anyway.
    """
    found: dict[nn.Module, set[str]] = defaultdict(set)
    lookup = object.__getattribute__
    library = nn.Module.__init__.__code__.co_filename

    def noticed(self: nn.Module, name: str) -> Any:
        if name != "__dict__" or sys._getframe(1).f_code.co_filename != library:
            found[self].add(name)
        return lookup(self, name)

    nn.Module.__getattribute__ = noticed  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__
