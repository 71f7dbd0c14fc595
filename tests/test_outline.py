"""Outline: layers as calls of the model's modules, and the proof that they are the proven graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from autoshard import ops
from autoshard.capture import skeleton
from autoshard.errors import UnsoundGraphError
from autoshard.passes.outline import outline
from autoshard.paths import layer_of
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.proof.layered import same_as_one
from autoshard.sharded import Layered, Sharded
from tests.models import nanogpt
from tests.models.huggingface import CASES

# Models whose layers share nothing: others have parameters that stay outside.
HUGGINGFACE = ("gpt2", "llama-kv2", "bert", "gpt-neox")


def _split(model: nn.Module, inputs: dict[str, Any]) -> tuple[Program, Sharded]:
    program = analyse(skeleton(model), (), inputs, 2)
    return program, rewrite(program, 2, "max")[1]


def _layered(sharded: Sharded) -> Layered:
    assert sharded.layered is not None
    return sharded.layered


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGINGFACE)
def test_every_layer_is_one_call(name: str) -> None:
    """As many calls as layers, in order, and no layer's parameter outside of its layer."""
    case = next(c for c in CASES if c.name == name)
    model = case.build(case.attention[0])
    program, sharded = _split(model, case.inputs(model))
    layered = _layered(sharded)
    calls = [n for n in layered.graph.nodes if n.target is ops.call_layer]
    layers = list(dict.fromkeys(filter(None, (layer_of(n) for n, _ in model.named_parameters()))))
    assert [layered.layers[n.args[0].name] for n in calls] == layers
    used = {program.captured.parameters[n.name] for n in program.analysis.axes.parameters}
    assert set(layered.parameters) == {name for name in used if layer_of(name)}


def _swapped_name(layered: Layered) -> None:
    call = next(n for n in layered.graph.nodes if n.target is ops.call_layer)
    module, body, names, *rest = call.args
    call.args = (module, body, (names[1], names[0], *names[2:]), *rest)


def _other_layer(layered: Layered) -> None:
    first, second = (n for n in layered.graph.nodes if n.target is ops.call_layer)
    first.args = (second.args[0], *first.args[1:])


def _no_copy(layered: Layered) -> None:
    body = next(iter(layered.bodies.values()))
    copy = next(n for n in body.nodes if n.target is ops.copy)
    copy.replace_all_uses_with(copy.args[0])
    body.erase_node(copy)


def _no_dropout_of_a_result(layered: Layered) -> None:
    body = next(iter(layered.bodies.values()))
    output = next(iter(reversed(body.nodes)))
    output.args = (output.args[0].args[0],)


def _skipped(layered: Layered) -> None:
    call = next(n for n in layered.graph.nodes if n.target is ops.call_layer)
    call.replace_all_uses_with(next(n for n in call.args[3:] if "val" in n.meta))
    layered.graph.erase_node(call)


FAULTS: list[Callable[[Layered], None]] = [
    _swapped_name, _other_layer, _no_copy, _no_dropout_of_a_result, _skipped,
]  # fmt: skip


@pytest.fixture(scope="module")
def gpt() -> tuple[Program, Sharded]:
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=32, dropout=0.1))
    return _split(model, nanogpt.inputs(model))


@pytest.mark.parametrize("fault", FAULTS)
def test_another_graph_is_refused(fault: Callable[[Layered], None], gpt: Any) -> None:
    """One change in the graph of layers, and it is not the proven one."""
    program, sharded = gpt
    again = outline(replace(sharded, layered=None), program.analysis.names)
    same_as_one(_layered(again), again.runs, program.analysis.names)
    fault(_layered(again))
    with pytest.raises(UnsoundGraphError):
        same_as_one(_layered(again), again.runs, program.analysis.names)


class Borrowing(nn.Module):
    """Uses a weight of its first layer beside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [b, 8] -> [b, 8]."""
        x = self.layers[1](self.layers[0](x).relu())
        return x * self.layers[0].bias


def test_what_others_use_too_is_an_operand() -> None:
    """A parameter that is used outside of its layer is not taken by the layer."""
    program = analyse(skeleton(Borrowing()), (torch.ones(2, 8),), {}, 1)
    layered = _layered(rewrite(program, 1, "max")[1])
    assert set(layered.parameters) == {
        "layers.0.weight", "layers.1.weight", "layers.1.bias",
    }  # fmt: skip
    outside = [n.name for n in layered.graph.nodes if n.op == "placeholder"]
    assert any(program.captured.parameters.get(n) == "layers.0.bias" for n in outside)
    assert all(isinstance(g, fx.Graph) for g in layered.bodies.values())
