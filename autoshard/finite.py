"""Where infinities and NaNs first appear: the rank's graph run node by node, every value looked at."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autoshard.errors import NonFiniteError
from autoshard.mesh import Mesh
from autoshard.paths import module_path
from autoshard.plans import Plan

NAN, INF = 1, 2


class FiniteWatch:
    """Looks at the values of a rank's graph, forward and backward, and remembers the first bad one.

    A value is bad where it is not a number and none of its operands was so, or infinite and none of
    its operands was: a mask of ``-inf`` that the model writes (an infinite constant among the
    arguments) or gets as an input is meant. Every value costs two reductions and one wait for the
    device, so this is for looking, not for training.
    """

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        self._plan, self._mesh = plan, mesh
        self._graph: fx.Graph | None = None
        self._names: Mapping[str, str] = {}
        self._backward: dict[int, int] = {}  # place of a node -> NAN | INF in its gradient
        self._hooks: list[Any] = []

    def run(self, module: fx.GraphModule, names: Mapping[str, str], values: Sequence[Any]) -> Any:
        """The graph's outputs. Raises NonFiniteError on every rank where one meets a bad value.

        names: placeholder -> the parameter's name.
        """
        self.end()
        self._graph, self._names, self._backward = module.graph, names, {}
        interpreter = _Interpreter(module, names, self._backward)
        self._hooks = interpreter.hooks
        outputs = interpreter.run(*values)
        self._agree(interpreter.first, "forward")
        return outputs

    def end(self) -> None:
        """After a backward pass: raises NonFiniteError on every rank where one met a bad gradient."""
        self.close()
        if self._graph is None:
            return
        # The gradient that appeared first is that of the last node.
        first = max(self._backward.items(), default=None)
        self._backward = {}
        self._agree(first, "backward")

    def close(self) -> None:
        """Look at no more gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _agree(self, mine: tuple[int, int] | None, way: str) -> None:
        place, kind = mine if mine is not None else (-1, 0)
        everyone = [(place, kind)]
        if self._mesh.tp > 1:
            both = torch.tensor([place, kind], device=self._mesh.device)
            gathered = self._mesh.group(self._mesh.tp).all_gather(both)
            everyone = [(int(p), int(k)) for p, k in torch.stack(gathered).tolist()]
        places = [p for p, _ in everyone if p >= 0]
        if not places:
            return
        at = min(places) if way == "forward" else max(places)
        ranks = [r for r, (p, _) in zip(self._mesh.tp_ranks(), everyone, strict=True) if p == at]
        kinds = {k for p, k in everyone if p == at}
        assert self._graph is not None
        node = list(self._graph.nodes)[at]
        self._graph = None
        raise NonFiniteError(self._told(node, way, max(kinds), ranks))

    def _told(self, node: fx.Node, way: str, kind: int, ranks: list[int]) -> str:
        what = {NAN: "a NaN", INF: "an infinity", NAN | INF: "NaNs and infinities"}[kind]
        layer, source = module_path(node), f"{node.name} ({_target(node)})"
        if node.op == "placeholder":
            name = self._names.get(str(node.target))
            layer = (name or "").rpartition(".")[0]
            source = f"the input {node.name}" if name is None else f"the parameter {name}"
        if way == "backward":
            users = ", ".join(f"{u.name} ({_target(u)})" for u in node.users)
            source = f"the gradient of {source}" + (f", which comes from {users}" if users else "")
        region = self._region(node, layer)
        return (
            f"{what} first appears in the {way} of {layer or 'the top of the model'}, "
            f"{f'in region {region}' if region else 'in no region that is split'}: {source}, on rank "
            f"{', '.join(map(str, ranks))} of the tensor parallel ranks "
            f"{', '.join(map(str, self._mesh.tp_ranks()))}"
        )

    def _region(self, node: fx.Node, layer: str) -> str:
        """By the node that it was made of, then by the layer."""
        split = [r for r in self._plan.regions if r.degree > 1]
        by_node = (r for r in split for n in r.nodes if node.name == n or node.name.startswith(f"{n}_"))
        by_layer = (r for r in split if r.name and (layer == r.name or layer.startswith(f"{r.name}.")))
        exact = (r for r in split if node.name in r.nodes)
        found = next((r for some in (exact, by_layer, by_node) for r in some), None)
        return f"{found.name or found.kind} ({found.kind})" if found is not None else ""


class _Interpreter(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, parameters: Collection[str], backward: dict[int, int]
    ) -> None:
        super().__init__(module)
        self.parameters = parameters
        self.places = {node: place for place, node in enumerate(module.graph.nodes)}
        self.kinds: dict[fx.Node, int] = {}
        self.first: tuple[int, int] | None = None
        self.backward = backward
        self.hooks: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("get_attr", "output"):
            return value
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        kind = 0
        for tensor in tensors:
            kind |= _kind(tensor)
        self.kinds[n] = kind
        new = kind & ~self._meant(n)
        if new and self.first is None:
            self.first = self.places[n], new
        if self.first is None:
            for tensor in tensors:
                if tensor.requires_grad:
                    self.hooks.append(tensor.register_hook(self._hook(self.places[n])))
        return value

    def _meant(self, node: fx.Node) -> int:
        """What is no news here."""
        if node.op == "placeholder":  # a parameter must be finite, an input may be a mask
            return 0 if node.target in self.parameters else INF
        known = 0
        for operand in node.all_input_nodes:
            known |= self.kinds.get(operand, 0)
        constants = pytree.tree_leaves((node.args, node.kwargs))
        if any(isinstance(c, float) and math.isinf(c) for c in constants):
            known |= INF
        return known

    def _hook(self, place: int) -> Any:
        def look(gradient: Tensor) -> None:
            kind = _kind(gradient)
            if kind:
                self.backward[place] = self.backward.get(place, 0) | kind

        return look


def _kind(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return 0
    tensor = tensor.detach()
    found = torch.stack([tensor.isnan().any(), tensor.isinf().any()]).tolist()
    return NAN * int(found[0]) + INF * int(found[1])


def _target(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
