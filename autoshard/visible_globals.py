"""What a layer's functions can see outside of the layer: globals, closures, classes.

Found by the names that stand in the functions' code, before anything runs: more than is ever read. A
function is followed into those that it names, within the packages that the layer's code comes from.
What is out of reach: state behind a function that is looked up by a key, or in an object in an object.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from autoshard.visible_state import closure, frozen, of_torch

# What a layer's own code may come from, to be copied: these keep no state where nobody looks. Of
# transformers, captures with copies were compared with whole ones in 244 architectures.
TRUSTED = {"transformers"}
LIBRARIES = {"torch", "numpy", "builtins", "", *sys.stdlib_module_names}
FOLLOWED = 1  # objects within a global object are compared by identity: a logger knows all loggers


class Surroundings:
    """Where some classes and functions look, and what stands there now."""

    def __init__(self, code: tuple[Any, ...]) -> None:
        self._packages = {_package(one) for one in code}
        self._known: set[Any] = set()
        self._foreign: set[str] = self._packages - TRUSTED - LIBRARIES
        self._looks: list[Callable[[], Any]] = []
        for one in code:
            for base in one.__mro__ if isinstance(one, type) else (one,):
                self._value(base)

    @property
    def trusted(self) -> bool:
        """Whether all functions and classes that were found come from packages known to be plain."""
        return not self._foreign

    def now(self) -> Hashable:
        """The frozen values, in one order."""
        return tuple(frozen(look(), {}, FOLLOWED) for look in self._looks)

    def _class(self, kind: type) -> None:
        if kind in self._known or of_torch(kind) or kind.__module__ == "builtins":
            return
        self._known.add(kind)
        for name, value in list(vars(kind).items()):
            functions = list(_functions(value))
            for function in functions:
                self._function(function)
            if not functions and not name.startswith("_abc") and not hasattr(value, "__get__"):
                self._looks.append(lambda name=name: vars(kind).get(name))  # type: ignore[misc]

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        if code in self._known or of_torch(function):
            return
        self._known.add(code)
        for held in closure(function):
            self._value(held)
        cells = function.__closure__ or ()
        self._looks.append(lambda: closure(function) if cells else None)
        self._looks.append(lambda: (function.__defaults__, function.__kwdefaults__))
        names = set(_names(code))
        self._space(function.__globals__, names)
        for name in names:
            module = function.__globals__.get(name)
            if isinstance(module, types.ModuleType) and not module.__name__.startswith("torch"):
                self._space(vars(module), names)

    def _space(self, space: dict[str, Any], names: set[str]) -> None:
        for name in sorted(names & space.keys()):
            self._value(space[name])
            # Of a module of the model's that it finds so, the trace notices the reading.
            if not isinstance(space[name], (types.ModuleType, nn.Module)):
                self._looks.append(lambda name=name: space.get(name))  # type: ignore[misc]

    def _value(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            value = value.func
        package = _package(value)
        if package not in self._packages:
            if callable(value) and package not in LIBRARIES | TRUSTED:
                self._foreign.add(package)
            return
        if isinstance(value, type):
            self._class(value)
        for function in _functions(value):
            self._function(function)


def code_of(layer: nn.Module) -> tuple[Any, ...]:
    """The classes of a layer's modules and the functions that these hold, but for PyTorch's."""
    found: list[Any] = []
    for module in layer.modules():
        held = (v for v in vars(module).values() if callable(v) and not isinstance(v, nn.Module))
        for value in (type(module), *held):
            value = value.func if isinstance(value, functools.partial) else value
            value = getattr(value, "__func__", value)
            if not isinstance(value, (type, types.FunctionType)):
                value = type(value)  # an object that can be called
            if not of_torch(value):
                found.append(value)
    return tuple(dict.fromkeys(found))


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions in what stands in a class or a module."""
    if isinstance(value, (classmethod, staticmethod, types.MethodType)):
        value = value.__func__
    if isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if isinstance(f, types.FunctionType))
    while isinstance(value, types.FunctionType):
        yield value
        value = getattr(value, "__wrapped__", None)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
