"""The walk over the rewritten graph: every value is shown to be ranks' shares of an original one.

A node's name says which original node it stands for. That is a claim, and is proven: its operands must
be shares of that node's operands, its arguments must be those, and what the ranks compute must be a
placement of what the model computes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from autoshard import ops
from autoshard.analysis import AUTOCAST
from autoshard.errors import UnsoundGraphError
from autoshard.layouts import Layout
from autoshard.proof.arguments import (
    bound,
    by_name,
    floats,
    is_number,
    is_random,
    number_of,
    operands_of,
    same,
    writes,
)
from autoshard.proof.border import given, leaves, may_be_overwritten, may_meet, stored
from autoshard.proof.calls import Calls
from autoshard.proof.collectives import LOOKUPS, SIMPLE
from autoshard.proof.held import OUTSIDE, Held, Known, Number, Several
from autoshard.proof.moves import moves
from autoshard.proof.placements import Dim, Unproven, told_apart
from autoshard.proof.sizes import Sizes
from autoshard.rules import where
from autoshard.sharded import Sharded

aten = torch.ops.aten

# The operator that computes the same without the bias, the names of its operands in the first one, and
# the bias, which is added after the sum over ranks.
UNBIASED: dict[Any, tuple[Any, dict[str, str], str]] = {
    aten.linear.default: (aten.linear.default, {}, "bias"),
    aten.addmm.default: (aten.mm.default, {"self": "mat1"}, "self"),
    aten.baddbmm.default: (aten.bmm.default, {"self": "batch1", "mat2": "batch2"}, "self"),
    aten.conv1d.default: (aten.conv1d.default, {}, "bias"),
    aten.conv2d.default: (aten.conv2d.default, {}, "bias"),
}
# What following a call with arguments that it cannot have may raise.
SENSELESS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
STOPS = {
    aten.detach.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
}


@dataclass(frozen=True)
class Call:
    """A call of the rewritten graph, out of its random stream and autocast."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stream: int | None = None
    autocast: Any = None


class Proof:
    """One walk, with numbers for the symbols."""

    def __init__(
        self, graph: fx.Graph, sharded: Sharded, differentiable: set[str], factor: int, calls: Calls,
        held: Mapping[str, tuple[int, Layout, int]] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.sharded, self.differentiable, self.held = sharded, differentiable, held
        self.original = {n.name: n for n in graph.nodes}
        self.order = list(graph.nodes)
        self.sizes = Sizes(graph, factor)
        self.calls = calls
        self.known: dict[fx.Node, Known] = {}
        self.groups: dict[fx.Node, int] = {}
        self.drawn: set[fx.Node] = set()
        self.made: set[fx.Node] = set()

    def run(self) -> None:
        """Raises UnsoundGraphError at the first node where the proof fails."""
        placeholders = [n for n in self.order if n.op == "placeholder"]
        given = iter(placeholders)
        for node in self.sharded.graph.nodes:
            try:
                if node.op == "placeholder":
                    self.known[node] = self._placeholder(node, next(given, None))
                elif node.op == "get_attr":
                    self.groups[node] = _degree(node)
                elif node.op == "output":
                    self._output(node)
                elif node.op == "call_function":
                    self.known[node] = self._call(self._unwrapped(node))
                else:
                    raise Unproven(f"is a {node.op}, which no rewriting makes")
            except Unproven as failure:
                raise self._refusal(node, str(failure)) from None
            except SENSELESS as failure:
                why = f"its arguments make no sense ({type(failure).__name__}: {failure})"
                raise self._refusal(node, why) from failure
        used = {d for node, d in self.groups.items() if node.users}
        if used - set(self.sharded.degrees):
            raise UnsoundGraphError(
                f"the rewritten graph uses groups of {sorted(used)} ranks, declared are "
                f"{sorted(self.sharded.degrees)}"
            )
        for model in self.order:
            if writes(model) and model not in self.made:
                raise UnsoundGraphError(
                    f"the rewritten graph leaves out {model} ({where(model)}), which writes in place"
                )
        if next(given, None) is not None:
            raise UnsoundGraphError("the rewritten graph has fewer inputs than the original")

    def _refusal(self, node: fx.Node, why: str) -> UnsoundGraphError:
        known = [(n, self.known.get(n)) for n in node.all_input_nodes]
        held = "\n".join(f"    {n}: {k}" for n, k in known if k is not None)
        return UnsoundGraphError(
            f"the rewritten graph is not proven to compute the model's function and gradients: it is "
            f"not at {node} ({where(node)}): {why}"
            + (f"\n  operands, and what ranks hold of them:\n{held}" if held else "")
            + "\n  Keep the region whole with plan.with_degree(name, 1), and report this graph."
        )

    # -- the border ----------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, model: fx.Node | None) -> Known:
        if model is None or model.target != node.target:
            raise Unproven(f"is given {node.target} where the original is given {model}")
        value = model.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return Number(self.sizes.number(value))
        shape = self.sizes.shape(value)
        name = str(node.target)
        gradient = name in self.differentiable
        if name in self.held and name in self.sharded.stored:
            raise Unproven("is stored split, and is an input that the caller gives as a share")
        if name not in self.sharded.stored and name not in self.held:
            return Held(model, shape, OUTSIDE, gradient)
        dim, layout, degree = (self.held if name in self.held else self.sharded.stored)[name]
        if not 0 <= dim < len(shape):
            raise Unproven(f"is stored split along dimension {dim} of {list(shape)}")
        dims: list[Dim] = list(shape)
        dims[dim] = (given if name in self.held else stored)(layout, shape[dim], degree)
        return Held(model, tuple(dims), degree, gradient)

    def _output(self, node: fx.Node) -> None:
        wanted = next(n for n in self.order if n.op == "output").args[0]
        given: Any = node.args[0]
        assert isinstance(wanted, tuple | list)
        if not len(given) == len(wanted) == len(self.sharded.outputs):
            raise Unproven(f"has {len(given)} outputs, the original {len(wanted)}")
        for place, (new, old) in enumerate(zip(given, wanted, strict=True)):
            split = self.sharded.outputs[place]
            known = self.known[new] if isinstance(new, fx.Node) else Number(new)
            if isinstance(known, Held):
                if known.of is not old:
                    raise Unproven(f"output {place} is {known.of}, the original's is {old}")
                leaves(known, split, place)
            else:
                number = old.meta.get("val") if isinstance(old, fx.Node) else old
                if not isinstance(known, Number) or not same(known.value, self.sizes.number(number)):
                    raise Unproven(f"output {place} is {known}, the original's is {old}")

    # -- calls ---------------------------------------------------------------------------------

    def _unwrapped(self, node: fx.Node) -> Call:
        target, args = node.target, tuple(node.args)
        if target is ops.with_autocast:
            modes, group, inner, *rest = args
            stream = None if group is None else self._group(group)
            return Call(node, inner, tuple(rest), node.kwargs, stream, modes)
        if target is ops.with_stream:
            return Call(node, args[1], args[2:], node.kwargs, self._group(args[0]))
        return Call(node, target, args, node.kwargs)

    def _group(self, node: Any) -> int:
        if node not in self.groups:
            raise Unproven(f"needs a group of ranks, has {node}")
        return self.groups[node]

    def _value(self, value: Any) -> Any:
        """An argument: numbers for sizes, what is held for tensors, degrees for groups."""
        if isinstance(value, fx.Node):
            if value in self.groups:
                return self.groups[value]
            known = self.known[value]
            return known.value if isinstance(known, Number) else known
        if isinstance(value, list | tuple):
            return type(value)(self._value(v) for v in value)
        return value

    def _model_value(self, value: Any) -> Any:
        """An argument of the original: numbers for sizes, nodes for tensors."""
        if isinstance(value, fx.Node):
            meta = value.meta.get("val")
            if isinstance(meta, torch.Tensor | list | tuple):
                return value
            return self.sizes.number(meta)
        if isinstance(value, list | tuple):
            return type(value)(self._model_value(v) for v in value)
        return value

    def _call(self, call: Call) -> Known:
        target, node = call.target, call.node
        if target is operator.getitem:
            return self._item(call)
        if target in SIMPLE or target in LOOKUPS:
            return self._collective(call)
        args = self._value(call.args)
        kwargs = {k: self._value(v) for k, v in call.kwargs.items()}
        number = number_of(target, args, kwargs)
        if number is not None:
            return number
        continued = self._continued(call, args, kwargs)
        if continued is not None:
            return continued
        model = self.original.get(node.name)
        if model is not None and _may_be(target, model):
            return self._proven(call, model, args, kwargs)
        helper = self._helper(call, args, kwargs)
        if helper is not None:
            return helper
        for model in self.order:  # a name that says nothing: any call that it may be
            if _may_be(target, model):
                try:
                    return self._proven(call, model, args, kwargs)
                except Unproven:
                    continue
        raise Unproven("computes nothing that the original computes")

    def _item(self, call: Call) -> Known:
        source, index = self._value(call.args)
        if not isinstance(source, Several):
            raise Unproven(f"takes item {index} of {source}")
        if not isinstance(index, int) or not 0 <= index < len(source.items):
            raise Unproven(f"takes item {index} of {len(source.items)}")
        item = source.items[index]
        for user in source.of.users:
            if user.target is operator.getitem and user.args[1] == index:
                if call.node.name == user.name or self.original.get(call.node.name) is None:
                    return None if item is None else replace(item, of=user)
        raise Unproven(f"is item {index} of {source.of}, which the original does not take here")

    def _collective(self, call: Call) -> Known:
        given = by_name(call.target, call.args, call.kwargs)
        arguments = {name: self._value(value) for name, value in given.items()}
        if "group" in arguments and not any(
            isinstance(a, fx.Node) and a in self.groups for a in (*call.args, *call.kwargs.values())
        ):
            raise Unproven("needs a group of ranks")
        if any(isinstance(a, Several) for a in arguments.values()):
            raise Unproven("is given several values")
        if call.target in LOOKUPS:
            model = self.original.get(call.node.name)
            wanted, infer = LOOKUPS[call.target]
            if model is None or model.target is not wanted:
                raise Unproven("computes nothing that the original computes")
            said = {k: self._model_value(v) for k, v in bound(wanted, model.args, model.kwargs).items()}
            held = infer(arguments, model, said)
            return held if held.times else replace(held, dims=self.sizes.shape(model.meta["val"]))
        x = arguments.get("x")
        if not isinstance(x, Held):
            raise Unproven(f"needs a tensor, has {x}")
        if arguments.get("inplace"):
            may_be_overwritten(call.args[0])
        return SIMPLE[call.target](**arguments)

    def _continued(self, call: Call, args: Any, kwargs: Any) -> Held | None:
        """What is still to be done to a value: a partial sum scaled, a bias added."""
        x = args[0] if args else None
        if not isinstance(x, Held):
            return None
        if x.times is not None:
            if call.target is aten.mul.Tensor and len(args) == 2 and is_number(args[1]) and not kwargs:
                return replace(x, times=x.times * args[1])
            raise Unproven("needs a finished value: reduce it first")
        if x.pending:
            if call.target is aten.add.Tensor and len(args) == 2:
                return self._with_bias(x, args[1], kwargs)
            raise Unproven("needs a finished value: its bias is still to be added")
        return None

    def _with_bias(self, x: Held, bias: Any, kwargs: Mapping[str, Any]) -> Held:
        said = bound(x.of.target, x.of.args, x.of.kwargs)
        wanted = said[UNBIASED[x.of.target][2]]
        if not isinstance(bias, Held) or bias.of is not wanted:
            raise Unproven(f"needs the bias {wanted}, has {bias}")
        trailing = len(self.sizes.shape(said["weight"].meta["val"])) - 2 if "groups" in said else 0
        plain = replace(bias, trailing=0, pending=False, cast=None)
        if not plain.is_plain or plain.is_split or bias.inside != OUTSIDE or bias.trailing != trailing:
            raise Unproven(f"needs the whole bias {wanted}, outside of all groups, has {bias}")
        if kwargs.get("alpha", 1) != said.get("beta", 1):
            raise Unproven(f"needs the bias {said.get('beta', 1)} times")
        return replace(x, pending=False, gradient=x.gradient or bias.gradient)

    def _helper(self, call: Call, args: Any, kwargs: Any) -> Held | None:
        """Calls of the rewriting's own that change no element."""
        x = args[0] if args else None
        if not isinstance(x, Held) or not x.is_plain or kwargs:
            return None
        if call.target is aten.type_as.default and isinstance(args[1], Held) and args[1].pending:
            return x
        if call.target is aten.to.dtype and len(args) == 2 and args[1].is_floating_point:
            return replace(x, cast=args[1])
        if call.target is aten.unsqueeze.default and args[1] == 0 and x.inside != OUTSIDE:
            return replace(x, stacked=1)
        if call.target is aten.reshape.default and x.inside == OUTSIDE and len(x.dims) == 1:
            if list(args[1]) == [-1] + [1] * (len(args[1]) - 1) and len(args[1]) > 1:
                return replace(x, trailing=len(args[1]) - 1)
        return None

    def _proven(self, call: Call, model: fx.Node, args: Any, kwargs: Any) -> Known:
        """The call is a placement of the original call ``model``."""
        if call.autocast != model.meta.get(AUTOCAST):
            raise Unproven(f"runs under autocast {call.autocast}, not {model.meta.get(AUTOCAST)}")
        own = bound(call.target, args, kwargs)
        said = {
            k: self._model_value(v) for k, v in bound(model.target, model.args, model.kwargs).items()
        }
        bias, scale = None, 1.0
        if model.target in UNBIASED:
            target, names, slot = UNBIASED[model.target]
            without = call.target is not model.target or (own[slot] is None and said[slot] is not None)
            if without and call.target is target:
                bias, scale = slot, said.get("alpha", 1)
                own = {names.get(k, k): v for k, v in own.items()}
                own.update({k: said[k] for k in ("alpha", "beta") if k in said})
                own[slot] = None
        operands = operands_of(own, said, bias)
        inside = {h.inside for h in operands.values()} - {OUTSIDE}
        if len(inside) > 1:
            raise Unproven("meets values inside groups of " + " and of ".join(map(str, sorted(inside))))
        degree = inside.pop() if inside else OUTSIDE
        may_meet(operands.values(), degree)
        result = self.calls.results(
            call.target, model, own, said, operands, degree, self.sizes.shape, bias
        )
        if bias is not None and result.times is None:
            raise Unproven("leaves the bias out of what is no partial sum")
        flows = any(h.gradient for h in operands.values()) and model.target not in STOPS
        value = model.meta.get("val")
        if is_random(model.target, own):
            outputs = tuple(d and tuple(map(told_apart, d)) for d in result.outputs)
            result = replace(result, outputs=outputs)
            self._draws(call, model, degree, outputs)
        self.made.add(model)
        if isinstance(value, torch.Tensor):
            assert result.outputs[0] is not None
            times = None if result.times is None else result.times / scale
            gradient = flows and floats(value)
            return Held(model, result.outputs[0], degree, gradient, times, bias is not None)
        if isinstance(value, list | tuple):
            if result.times is not None:
                raise Unproven("gives several partial sums")
            items = tuple(
                None if dims is None else Held(model, dims, degree, flows and floats(v))
                for v, dims in zip(value, result.outputs, strict=True)
            )
            return Several(model, items)
        if degree != OUTSIDE and value is not None:
            raise Unproven("makes a number of what is inside a group")
        return Number(self.sizes.number(value))

    def _draws(self, call: Call, model: fx.Node, degree: int, outputs: Any) -> None:
        """An element's random numbers are drawn once: by all alike, or by the one rank that has it."""
        if model in self.drawn:
            raise Unproven(f"draws the random numbers of {model} once more")
        self.drawn.add(model)
        if call.stream is None:
            raise Unproven("draws random numbers from no stream: ranks would draw different ones")
        splits = [d for d in outputs if d is not None and any(not isinstance(x, int) for x in d)]
        if not splits:
            if call.stream != OUTSIDE:
                raise Unproven(
                    f"draws different random numbers on {call.stream} ranks for what all hold; it needs"
                    " the stream tp1"
                )
            return
        if call.stream != degree:
            raise Unproven(f"draws from the stream of {call.stream} ranks inside a group of {degree}")
        if not all(self.calls.disjoint(d) for d in splits):
            raise Unproven("draws different random numbers for elements that several ranks hold")


def _degree(node: fx.Node) -> int:
    name = str(node.target)
    if not name.startswith("tp") or not name[2:].isdigit():
        raise Unproven(f"is the attribute {name}, which is no group")
    return int(name[2:])


def _may_be(target: Any, model: fx.Node) -> bool:
    if model.op != "call_function":
        return False
    if model.target is target:
        return True
    if model.target in UNBIASED and UNBIASED[model.target][0] is target:
        return True
    family = moves(target)
    return family is not None and family == moves(model.target)
