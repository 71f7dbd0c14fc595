"""Numbers for the symbols of a graph, so that the proof can count elements."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from autoshard.compat import size_examples


class Sizes:
    """Every symbolic size as a number: its example, times ``factor``.

    The proof is made for two factors. What holds for one by accident (a size written as the number
    that the example has) does not hold for the other; symbols that must be equal stay equal.
    """

    def __init__(self, graph: fx.Graph, factor: int) -> None:
        self.factor = factor
        self.values: dict[Any, int] = {}
        self._known: dict[Any, Any] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._kept: list[torch.Tensor] = []  # so that no id is given twice
        for node in graph.nodes:
            if node.target is torch.ops.aten.split_with_sizes.default:
                self._pieces(node)

    def _pieces(self, node: fx.Node) -> None:
        """Sizes that the data decide have no example: those of a split are made to add up."""
        given: tuple[Any, ...] = (*node.args, 0)
        source, sizes, dim = given[:3]
        traced: list[Any] = [s.meta.get("val") if isinstance(s, fx.Node) else s for s in sizes]
        if not all(isinstance(t, torch.SymInt) and t.node.expr.is_Symbol for t in traced):
            return
        missing = [t.node.expr for t in traced if not self._backed(t)]
        if len(missing) < len(traced):
            return
        whole = self.shape(source.meta["val"])[dim]
        for index, symbol in enumerate(missing):
            first, last = (whole * i // len(missing) for i in (index, index + 1))
            self.values.setdefault(symbol, last - first)

    def shape(self, value: torch.Tensor) -> tuple[int, ...]:
        """A tensor's shape."""
        key = id(value)
        if key not in self._shapes:
            self._kept.append(value)
            self._shapes[key] = tuple(self.number(s) for s in value.shape)
        return self._shapes[key]

    def number(self, value: Any) -> Any:
        """A number of the capture, symbolic or not."""
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value
        expression = value.node.expr
        if expression not in self._known:
            for symbol in expression.free_symbols:
                self.values.setdefault(symbol, self._example(value, symbol) * self.factor)
            found = expression.xreplace(
                {s: sympy.Integer(self.values[s]) for s in expression.free_symbols}
            )
            self._known[expression] = _plain(found, value)
        return self._known[expression]

    @staticmethod
    def _backed(value: Any) -> bool:
        """Whether a symbol stands for a size of the examples."""
        return value.node.expr in size_examples(value.node.shape_env)

    @staticmethod
    def _example(value: Any, symbol: sympy.Symbol) -> int:
        return int(size_examples(value.node.shape_env).get(symbol, 4))


def _plain(expression: Any, value: Any) -> Any:
    expression = sympy.sympify(expression)
    if isinstance(value, torch.SymInt):
        return int(expression)
    if isinstance(value, torch.SymBool):
        return bool(expression)
    return float(expression)
