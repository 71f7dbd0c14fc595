"""For which shapes of its inputs a captured graph holds: a function that can be called and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoshard.compat import as_python, size_examples

Holds = Callable[[Sequence[Any]], bool]


def shape_guard(inputs: Sequence[Any], ranges: Mapping[str, tuple[float, float]]) -> Holds:
    """A check of flat inputs against the shapes that the graph was captured for.

    A symbol is read off the first dimension that is that symbol alone; all other dimensions must agree.
    One that stands nowhere alone has the number that it had in the capture: the graph is for that one.

    Args:
        inputs: what stood for each flat input in the capture; a tensor has sizes and symbols.
        ranges: symbol -> the least and the largest value.

    Returns:
        Written as Python, so that torch.compile can follow it::

            def holds(flat):
                s0 = flat[0].shape[0]
                s1 = flat[0].shape[1]
                return 2 <= s0 and 2 <= s1 and flat[1].shape[0] == s0 and 0 == (s1 % 64)
    """
    symbols: dict[Any, str] = {}
    reads, tests = list[str](), list[str]()
    later: list[tuple[str, Any]] = []
    examples: dict[Any, Any] = {}
    for index, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            continue
        for dim, size in enumerate(value.shape):
            actual = f"flat[{index}].shape[{dim}]"
            if isinstance(size, int):
                tests.append(f"{actual} == {size}")
                continue
            expression = size.node.expr
            examples.update(size_examples(size.node.shape_env))
            if expression.is_Symbol and expression not in symbols:
                name = symbols[expression] = str(expression)
                reads.append(f"    {name} = {actual}")
                least, largest = ranges.get(name, (0, float("inf")))
                tests.append(f"{int(least)} <= {name}")
                if largest < 2**62:
                    tests.append(f"{name} <= {int(largest)}")
            else:
                later.append((actual, expression))
    for actual, expression in later:
        for symbol in sorted(expression.free_symbols - symbols.keys(), key=str):
            symbols[symbol] = str(symbol)
            reads.append(f"    {symbol} = {int(examples[symbol])}")
        tests.append(f"{actual} == {as_python(expression)}")
    tests += [f"({as_python(g)})" for g in _guards(inputs) if g.free_symbols <= symbols.keys()]
    lines = ["def holds(flat):", *reads, f"    return {' and '.join(tests) or 'True'}"]
    names: dict[str, Any] = {"math": __import__("math"), "torch": torch}
    exec("\n".join(lines), names)  # the text is made of sizes and sympy's own expressions
    holds: Holds = names["holds"]
    return holds


def _guards(inputs: Sequence[Any]) -> list[Any]:
    for value in inputs:
        if isinstance(value, Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    environment = size.node.shape_env
                    return [g.expr for g in environment.guards] if environment else []
    return []
