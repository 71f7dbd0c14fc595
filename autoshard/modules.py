"""The calls of a model's modules, and which values of the captured graph may be their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


class Call:
    """One tensor that a call of a module gave. ``path`` is ``h.0.mlp``, and ``h.0.mlp@1`` the second
    time; ``gradient`` is that of ``output``, zero where none came back."""

    def __init__(self, path: str, kind: str, output: Tensor) -> None:
        self.path, self.kind, self.output = path, kind, output.detach().clone()
        self.gradient = torch.zeros_like(self.output)
        if output.requires_grad:
            output.register_hook(self._keep)

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()


class ModuleCalls:
    """Inside, every module's outputs are kept, in the order in which the modules end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[Call] = []
        self._counts: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> ModuleCalls:
        for path, module in self.model.named_modules():
            self._hooks.append(module.register_forward_hook(self._hook(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            count = self._counts[path] = self._counts.get(path, 0) + 1
            name = path if count == 1 else f"{path}@{count - 1}"
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    self.calls.append(Call(name, type(module).__name__, leaf))

        return keep

    def nodes(self, graph: fx.Graph, values: Mapping[str, Tensor]) -> Iterator[tuple[Call, list[str]]]:
        """Each output with the nodes that may be it: of its shape, leaving or entering the module.

        A module that hands on what it was given has its output outside of itself. Left out is what
        no node that leaves the module could be.
        """
        members: dict[str, set[fx.Node]] = {}
        for node in graph.nodes:
            for path, _ in node.meta.get("nn_module_stack", {}).values():
                members.setdefault(str(path), set()).add(node)
        for call in self.calls:
            inside = members.get(call.path, set())

            def fits(node: fx.Node, call: Call = call) -> bool:
                value = values.get(node.name)
                return value is not None and value.shape == call.output.shape

            leaving = [n for n in inside if fits(n) and any(u not in inside for u in n.users)]
            if leaving:
                entering = {o for n in inside for o in n.all_input_nodes if o not in inside and fits(o)}
                yield call, [n.name for n in (*leaving, *entering)]
