"""Arguments of calls: by name, compared, and what kind of call they make it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from autoshard.proof.held import Held, Number
from autoshard.proof.placements import Unproven, local_size

aten = torch.ops.aten
NUMBERS = ("operator", "_operator", "math", "torch")


def bound(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of an operator's schema, defaults filled in; of others by position."""
    if not isinstance(target, torch._ops.OpOverload):
        return {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
    schema = target._schema.arguments
    if len(args) > len(schema) or set(kwargs) - {a.name for a in schema}:
        raise Unproven("is given arguments that it does not have")
    result = {a.name: a.default_value for a in schema if a.has_default_value()}
    result.update(zip((a.name for a in schema), args, strict=False))
    result.update(kwargs)
    missing = [a.name for a in schema if a.name not in result]
    if missing:
        raise Unproven(f"is not given {missing}")
    return {a.name: result[a.name] for a in schema}


def same(a: Any, b: Any) -> bool:
    """Whether two arguments say the same: equal, and of one type."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return True
    return a is b or (type(a) is type(b) and bool(a == b))


def operands_of(own: Any, said: Any, bias: str | None) -> dict[tuple[str, int | None], Held]:
    """The tensors given, by argument; each must be a share of the one that the model is given."""
    found: dict[tuple[str, int | None], Held] = {}

    def visit(slot: tuple[str, int | None], mine: Any, model: Any) -> None:
        tensor = isinstance(model, fx.Node)
        if tensor != isinstance(mine, Held) or (tensor and mine.of is not model):
            given = mine.of if isinstance(mine, Held) else mine
            raise Unproven(f"needs {model} as {slot[0]}, has {given}")
        if tensor:
            found[slot] = mine
        elif not same(mine, model):
            raise Unproven(f"needs {model} in {slot[0]}, has {mine}")

    for name, model in said.items():
        if name == bias:
            continue
        mine = own.get(name)
        if isinstance(model, list | tuple) and any(isinstance(m, fx.Node) for m in model):
            if not isinstance(mine, list | tuple) or len(mine) != len(model):
                raise Unproven(f"needs {len(model)} tensors as {name}")
            for index, (a, b) in enumerate(zip(mine, model, strict=True)):
                visit((name, index), a, b)
        elif isinstance(model, fx.Node) or isinstance(mine, Held):
            visit((name, None), mine, model)
    if any(isinstance(v, Held) for k, v in own.items() if k not in said):
        raise Unproven("is given a tensor that the original is not given")
    return found


def number_of(target: Any, args: Any, kwargs: Any) -> Number | None:
    """A size, or what is computed of sizes."""
    if target is aten.sym_size.int and isinstance(args[0], Held):
        ranks = range(max(1, args[0].inside))
        sizes = {local_size(args[0].dims[args[1]], r) for r in ranks}
        if len(sizes) != 1:
            raise Unproven("is a size that differs among ranks")
        if not replace(args[0], times=None, pending=False, weighed=None).is_plain:
            raise Unproven("is a size of an unfinished value")
        return Number(sizes.pop())
    if isinstance(target, torch._ops.OpOverload):
        return None
    if getattr(target, "__module__", None) not in NUMBERS:
        return None
    if not args or kwargs or not all(is_number(a) for a in args):
        return None
    return Number(target(*args))


def is_number(value: Any) -> bool:
    """Whether an argument is a plain number."""
    return isinstance(value, int | float | bool) and not isinstance(value, Held)


def is_random(target: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the call draws random numbers."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is aten.scaled_dot_product_attention.default:
        return bool(arguments.get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in target.tags


def writes(node: fx.Node) -> bool:
    """Whether the call changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def floats(value: Any) -> bool:
    """Whether a gradient can flow to the value."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


@lru_cache(maxsize=64)
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def by_name(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of a Python function, defaults filled in."""
    given = _signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    return dict(given.arguments)
