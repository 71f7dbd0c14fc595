"""Graphs run node by node: the model's with every value kept, a rank's with every value compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autoshard import ops
from autoshard.analysis import AUTOCAST
from autoshard.claims import is_comparable, share_of
from autoshard.exactly import exactly
from autoshard.groups import SingleGroup
from autoshard.measures import FLOOR, magnitude, objective, relative_error
from autoshard.proof.arguments import bound, is_random
from autoshard.proof.held import Held
from autoshard.proof.walk import UNBIASED
from autoshard.random_streams import RandomStream, group_seed


@dataclass
class Values:
    """What a run of the model's own graph gave: node -> its value, node -> the gradient of that."""

    outputs: list[Any]
    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def gradient(self, name: str) -> Tensor:
        """Zero where none came back."""
        found = self.gradients.get(name)
        return torch.zeros_like(self.values[name]) if found is None else found

    def meant(self, held: Held) -> Tensor:
        """The value that ranks hold something of; without its bias where that is still to be added."""
        value = self.values[held.of.name]
        if not held.pending:
            return value
        said = bound(held.of.target, held.of.args, held.of.kwargs)
        bias = self.values[said[UNBIASED[held.of.target][2]].name]
        if "groups" in said:  # [channels] beside [.., channels, length]
            bias = bias.reshape([-1] + [1] * (value.dim() - 2))
        without: Tensor = value - said.get("beta", 1) * bias
        return without

    def largest_operand(self, node: fx.Node) -> float:
        """The largest element that went into a node: what its result is rounded by."""
        known = (self.values.get(n.name) for n in node.all_input_nodes)
        return max((magnitude(v) for v in known if v is not None), default=0.0)


def run_whole(graph: fx.Graph, values: Sequence[Any], dtype: torch.dtype) -> Values:
    """The model's own graph, forward and backward, every value and gradient kept."""
    found = Values([])
    with exactly(dtype):
        found.outputs = list(_Whole(graph, found).run(*values))
        objective(found.outputs).backward()
    return found


class _Nodes(fx.Interpreter):
    """A value that is an operand too gets a tensor of its own, and so a gradient of its own."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        operands = [t for a in n.all_input_nodes if isinstance(t := self.env.get(a), Tensor)]
        if isinstance(value, Tensor) and any(value is t for t in operands):
            value = value.view_as(value)
        if n.op in ("placeholder", "call_function"):
            self.see(n, value)
        return value

    def see(self, node: fx.Node, value: Any) -> None:
        """Called with what every node gave, while the graph runs."""
        raise NotImplementedError


class _Whole(_Nodes):
    def __init__(self, graph: fx.Graph, found: Values) -> None:
        super().__init__(fx.GraphModule({}, graph, class_name="Whole"))
        self.found = found
        # The numbers that all ranks draw alike are these; those of a rank's own are nobody else's.
        self.alike = SingleGroup(RandomStream(group_seed(0, 0, 1, 0)))

    def run_node(self, n: fx.Node) -> Any:
        modes, random = n.meta.get(AUTOCAST), _is_random(n)
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            if modes is not None or random:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                group = self.alike if random else None
                value = (
                    ops.with_stream(self.alike, n.target, *args, **kwargs)
                    if modes is None
                    else ops.with_autocast(modes, group, n.target, *args, **kwargs)
                )
                self.see(n, value)
                return value
        return super().run_node(n)

    def see(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        # What has no gradient may still be written into.
        kept = value.detach() if value.requires_grad else value.clone()
        self.found.values[node.name] = kept
        if value.requires_grad:
            value.register_hook(_keep(self.found.gradients, node.name))


class Watch(_Nodes):
    """One rank's graph: every value compared with what the rank should hold of the model's.

    Attributes:
        errors: node -> relative error of this rank's value.
        partial: node -> this rank's part of a sum, to be added up with the others'.
        gradients: node -> the gradient that autograd gave this rank.
        outputs: what the graph gave.
        failed: the node that could not be run, and why.
    """

    def __init__(
        self, module: fx.GraphModule, held: Mapping[str, Held], whole: Values,
        place: Callable[[int], int],
    ) -> None:  # fmt: skip
        super().__init__(module)
        self.held, self.whole, self.place = held, whole, place
        self.errors: dict[str, float] = {}
        self.partial: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.outputs: list[Any] = []
        self.failed: tuple[str, Exception] | None = None

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:
            self.failed = n.name, error
            raise

    def see(self, node: fx.Node, value: Any) -> None:
        held = self.held.get(node.name)
        if held is None or not isinstance(value, Tensor) or not is_comparable(held):
            return
        if held.times is not None:
            self.partial[node.name] = value.detach().clone()
        else:
            self.errors[node.name] = self._error(value.detach(), self.whole.meant(held), held)
        if value.requires_grad:
            value.register_hook(_keep(self.gradients, node.name))

    def _error(self, value: Tensor, whole: Tensor, held: Held) -> float:
        right, padding = share_of(whole, held, self.place(held.inside))
        if padding is not None and value.shape == right.shape:
            value = torch.where(padding, right, value)
        # A difference of nearly equal numbers is rounded by these, so operands count too.
        largest = max(magnitude(whole) / FLOOR, self.whole.largest_operand(held.of))
        return relative_error([value], right, largest)


def _keep(into: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        into[name] = gradient.detach()

    return keep


def _is_random(node: fx.Node) -> bool:
    return is_random(node.target, bound(node.target, node.args, node.kwargs))


def tensors_of(value: Any) -> list[Tensor]:
    """The floating tensors in a value."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
