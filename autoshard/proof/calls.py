"""One call of an operator: which rule of inference it takes; equal calls are inferred once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard.proof.arguments import bound, same
from autoshard.proof.held import Held
from autoshard.proof.joins import concatenated, overwritten
from autoshard.proof.moves import moved, moves
from autoshard.proof.placements import Dim, Unproven, disjoint, local_size, size_of
from autoshard.proof.rows import Given, Slot, computed
from autoshard.proof.views import reshaped, view_sizes

aten = torch.ops.aten
ShapeOf = Callable[[torch.Tensor], tuple[int, ...]]


@dataclass(frozen=True)
class Results:
    """Dimensions of each result, and how often the ranks together add it if it is a partial sum."""

    outputs: tuple[tuple[Dim, ...] | None, ...]
    times: float | None = None


class Calls:
    """What calls give. Equal calls (operator, arguments, what is held) are inferred once."""

    def __init__(self) -> None:
        self._known: dict[Any, Results] = {}
        self._disjoint: dict[tuple[Dim, ...], bool] = {}

    def disjoint(self, dims: tuple[Dim, ...]) -> bool:
        """Whether no two ranks hold the same element."""
        if dims not in self._disjoint:
            self._disjoint[dims] = disjoint(dims)
        return self._disjoint[dims]

    def results(
        self,
        target: Any,
        model: fx.Node,
        own: Mapping[str, Any],
        said: Mapping[str, Any],
        operands: Mapping[Slot, Held],
        degree: int,
        shape_of: ShapeOf,
        bias: str | None,
    ) -> Results:
        """What the rank's call gives, as placements of the results of the model's.

        Args:
            target: the operator on the rank, which may be another of the model's family.
            model: the original call.
            own, said: the arguments by name, on the rank and in the model.
            operands: what ranks hold of each tensor.
            degree: ranks of the group.
            bias: an argument of the model's that the rank leaves out.
        """
        plain = {k: v for k, v in own.items() if k not in _names(operands)}
        wanted = {k: v for k, v in said.items() if k not in _names(operands) and k != bias}
        plain.pop(bias, None) if bias else None
        equal = target is model.target and plain.keys() == wanted.keys() and all(
            same(plain[k], wanted[k]) for k in wanted
        )  # fmt: skip
        shapes = _shapes(model.meta.get("val"), shape_of)
        whole = all(not h.is_split and h.weighed is None for h in operands.values())
        if equal and whole and bias is None:
            return Results(shapes)
        if any(h.weighed is not None for h in operands.values()):
            return self._infer(target, model, own, said, operands, degree, shape_of, bias)
        key = (
            target, model.target, repr(plain), repr(wanted), tuple(operands), degree, bias, shapes,
            tuple(h.dims for h in operands.values()),
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = self._infer(target, model, own, said, operands, degree, shape_of, bias)
        return self._known[key]

    def _infer(
        self, target: Any, model: fx.Node, own: Mapping[str, Any], said: Mapping[str, Any],
        operands: Mapping[Slot, Held], degree: int, shape_of: ShapeOf, bias: str | None,
    ) -> Results:  # fmt: skip
        family = moves(target)
        if family is not None:
            if any(h.weighed is not None for h in operands.values()):
                raise Unproven("moves the elements of a weighed value")
            return Results(tuple(_moved(family, target, model, own, said, operands, degree)))
        differing = [k for k in said if k not in _names(operands) and k != bias
                     and not same(own.get(k), said[k])]  # fmt: skip
        convolved = {"groups", "stride"} if "groups" in said else set()
        if bias is None and target is not model.target:
            raise Unproven(f"is {target}, the original {model.target}")
        if set(differing) - convolved:
            name = next(k for k in differing if k not in convolved)
            raise Unproven(f"needs {name} = {said[name]} as in the model, has {own.get(name)}")
        linear = getattr(model.target, "namespace", "") == "aten"
        if any(h.weighed for h in operands.values()) and not linear:
            raise Unproven("is not known to be linear in what is weighed")
        given = {slot: Given(h.dims, h.weighed) for slot, h in operands.items()}
        # The row names operands in order, the one left out too: of that, nothing is held.
        arguments = bound(model.target, model.args, model.kwargs)
        result = computed(model, arguments, given, shape_of, degree)
        if convolved:
            _convolution(result.groups, own, said, degree)
        return Results(result.outputs, result.times)


def _convolution(
    groups: tuple[Dim, ...], own: Mapping[str, Any], said: Mapping[str, Any], degree: int
) -> None:
    """A rank's number of groups is that of the groups that it holds; likewise a kernel that tiles."""
    for rank in range(degree):
        if own["groups"] != local_size(groups[0], rank):
            raise Unproven(f"needs {local_size(groups[0], rank)} groups, has {own['groups']}")
        kernel = [local_size(k, rank) for k in groups[1:]]
        if any(local_size(k, rank) != size_of(k) for k in groups[1:]):
            if list(own["stride"]) != kernel:
                raise Unproven(f"needs the stride {kernel} of its part of the kernel")
        elif not same(own["stride"], said["stride"]):
            raise Unproven(f"needs the stride {said['stride']} as in the model, has {own['stride']}")


def _moved(
    family: str, target: Any, model: fx.Node, own: Mapping[str, Any], said: Mapping[str, Any],
    operands: Mapping[Slot, Held], degree: int,
) -> list[tuple[Dim, ...]]:  # fmt: skip
    ranks = range(degree)
    if family == "cat":
        if own["dim"] != said["dim"]:
            raise Unproven(f"concatenates along {own['dim']}, the model along {said['dim']}")
        dims = [operands["tensors", i].dims for i in range(len(said["tensors"]))]
        return [concatenated(dims, said["dim"] % len(dims[0]))]
    x = operands["self", None].dims
    if family == "slice_scatter":
        return [overwritten(said, [own] * degree, x, operands["src", None].dims)]
    if family == "reshape":
        other = operands.get(("other", None))
        theirs = None if other is None else tuple(map(size_of, other.dims))
        whole = view_sizes(model.target, said, tuple(map(size_of, x)), theirs)
        local = []
        for r in ranks:
            theirs = None if other is None else tuple(local_size(d, r) for d in other.dims)
            local.append(view_sizes(target, own, tuple(local_size(d, r) for d in x), theirs))
        return [reshaped(whole, local, x)]
    return moved((model.target, said), [(target, own)] * degree, x)


def _names(operands: Mapping[Slot, Held]) -> set[str]:
    return {name for name, _ in operands}


def _shapes(value: Any, shape_of: ShapeOf) -> tuple[tuple[int, ...] | None, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(shape_of(v) if isinstance(v, torch.Tensor) else None for v in values)
