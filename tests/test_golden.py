"""The text of rewritten graphs, as files: a change of what the compiler emits is seen in review.

``pytest tests/test_golden.py --update-golden`` writes them anew.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from transformers import LlamaForCausalLM

from autoshard.capture import skeleton
from autoshard.paths import module_path
from autoshard.pipeline import analyse, rewrite
from autoshard.plans import Plan
from autoshard.sharded import Sharded
from tests.models import huggingface
from tests.models.case import Case

GOLDEN = Path(__file__).parent / "golden"

CASES = {
    "gpt2": huggingface._gpt2("gpt2", n_layer=1, use_cache=False),
    "llama": huggingface._usual(
        "llama",
        LlamaForCausalLM,
        ("attention_dropout",),
        intermediate_size=huggingface.FFN,
        num_key_value_heads=4,
        num_hidden_layers=1,
    ),
}


def emitted(case: Case, tp: int) -> str:
    """The plan's regions, the stored shares, and the rank's graph by layer."""
    model = case.build("sdpa")
    program = analyse(skeleton(model), (), case.inputs(model), tp)
    plan, sharded = rewrite(program, tp, "max")
    names = program.captured.parameters
    nodes = _nodes(sharded.graph, names)
    return "\n".join([*_regions(plan), "", *_shares(sharded, names), *nodes]) + "\n"


def _regions(plan: Plan) -> list[str]:
    return [f"region {r.name}: {r.kind}, degree {r.degree}, {r.reason}" for r in plan.regions]


def _shares(sharded: Sharded, names: dict[str, str]) -> list[str]:
    return [
        f"share of {names[node]}: dimension {dim}, {layout}"
        for node, (dim, layout, _) in sharded.stored.items()
    ]


def _nodes(graph: fx.Graph, parameters: Collection[str]) -> list[str]:
    """What is computed from parameters. The rest (masks, positions) is the model's own, unchanged,
    and stands as ``%name`` where it is used."""
    lines: list[str] = []
    names = _Names()
    weighted: set[fx.Node] = set()
    layer = ""
    for node in graph.nodes:
        if node.op == "output":
            lines += ["", f"return {names.text(node.args[0])}"]
        elif node.op in ("placeholder", "get_attr"):
            names.known[node] = node.name
            weighted |= {node} if node.name in parameters else set()
        elif weighted & set(node.all_input_nodes):
            weighted.add(node)
            if module_path(node) and module_path(node) != layer:
                layer = module_path(node)
                lines += ["", f"# {layer}"]
            lines.append(f"{names.new(node, '')} = {_target(node.target)}({names.arguments(node)})")
    return lines


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{target.__module__.rpartition('.')[2].lstrip('_')}.{target.__name__}"


class _Names:
    """Names with numbers of their own: those of the capture count nodes that are gone."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, str] = {}
        self.count: Counter[str] = Counter()

    def new(self, node: fx.Node, mark: str) -> str:
        """The name of a node that has none yet."""
        base = mark + re.sub(r"(_\d+)+(?=_|$)", "", node.name)
        self.known[node] = f"{base}_{self.count[base]}" if self.count[base] else base
        self.count[base] += 1
        return self.known[node]

    def arguments(self, node: fx.Node) -> str:
        """All arguments of a call."""
        named = [f"{name}={self.text(value)}" for name, value in node.kwargs.items()]
        return ", ".join([*map(self.text, node.args), *named])

    def text(self, value: Any) -> str:
        """One argument."""
        if isinstance(value, fx.Node):
            return self.known.get(value) or self.new(value, "%")
        if isinstance(value, torch._ops.OpOverload):
            return str(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.text, value))}]"
        return "end" if value == sys.maxsize else repr(value)


@pytest.mark.parametrize("name", CASES)
def test_emitted_graph_is_the_golden_one(name: str, update_golden: bool) -> None:
    """One layer at tp=2, word for word."""
    text, file = emitted(CASES[name], 2), GOLDEN / f"{name}.txt"
    if update_golden:
        file.write_text(text)
        return
    expected = file.read_text()
    difference = difflib.unified_diff(
        expected.splitlines(), text.splitlines(), str(file.name), "emitted now", lineterm=""
    )
    assert text == expected, "\n".join(difference) + "\n(make golden writes it anew)"


def test_emission_is_the_same_twice() -> None:
    """Nothing in the text depends on the order of a set or on what was emitted before."""
    assert emitted(CASES["gpt2"], 2) == emitted(CASES["gpt2"], 2)
