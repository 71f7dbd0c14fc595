"""Writes in place become values: random programs of views and writes compute the same thing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autoshard
from autoshard.capture import capture
from autoshard.errors import CaptureError
from autoshard.memory import written
from autoshard.passes.functionalize import functionalize
from autoshard.passes.inline import inline
from autoshard.passes.normalize import normalize
from autoshard.rules import bind
from autoshard.rules.call import op_name

Step = tuple[str, int, int]  # what, on which value, with which other value or constant

VIEWS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "transpose": lambda x, n: x.transpose(0, n % x.dim()),
    "permute": lambda x, n: x.permute(*(sorted(range(x.dim()), key=lambda d: (d + n) % x.dim()))),
    "unsqueeze": lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    "squeeze": lambda x, n: x.squeeze(n % x.dim()),
    "slice": lambda x, n: x[(slice(None),) * (n % x.dim()) + (slice(1, 3),)],
    "stride": lambda x, n: x[..., ::2],
    "select": lambda x, n: x.select(n % x.dim(), -1) if x.dim() > 1 else x,
    "reshape": lambda x, n: x.reshape(-1) if n % 2 else x.reshape(1, *x.shape),
    "contiguous": lambda x, n: x.contiguous(),
    "same": lambda x, n: x.to(x.dtype),
    "off": lambda x, n: F.dropout(x, 0.5, training=False) if n % 2 else F.dropout(x, 0.0),
    "narrow": lambda x, n: x.narrow(-1, 0, 2) if x.shape[-1] == 4 else x,
    "expand": lambda x, n: x.expand(2, *x.shape),  # never written
}
WRITES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "add_": lambda x, y, n: x.add_(y.sum() * 0.25),
    "mul_": lambda x, y, n: x.mul_(n + 2),
    "fill_": lambda x, y, n: x.fill_(float(n)),
    "zero_": lambda x, y, n: x.zero_(),
    "copy_": lambda x, y, n: x.copy_(y.sum() * n),
    "masked_fill_": lambda x, y, n: x.masked_fill_(torch.ones(x.shape) > n, 0.5),
}
READS = ("keep", "clone", "clone")


class Program(nn.Module):
    """Steps on a weight-dependent value, and on memory that starts as zeros."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """x: [2, 6, 4] -> []."""
        values = [self.linear(x), torch.zeros(2, 6, 4, dtype=x.dtype)]
        expanded: set[int] = set()
        total = values[0].sum() * 0
        for number, (what, which, n) in enumerate(self.steps):
            index = which % len(values)
            value = values[index]
            if what in VIEWS:
                values.append(VIEWS[what](value, n))
                if what == "expand" or index in expanded:
                    expanded.add(len(values) - 1)
            elif what in WRITES:
                if index not in expanded:
                    values.append(WRITES[what](value, values[n % len(values)], n))
            elif what == "keep":
                total = total + value.sum() * (number + 1)
            else:
                values.append(value.clone())
        for number, value in enumerate(values):
            total = total + (value * torch.arange(value.numel()).view(value.shape)).sum() * (number + 3)
        return total


def functional(model: nn.Module, *args: Any) -> fx.GraphModule:
    """The captured graph after the two passes, to be called with parameters and inputs."""
    captured = capture(copy.deepcopy(model), args, {})
    graph = functionalize(inline(captured.graph, captured.differentiable), captured.parameters)
    graph.lint()
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    values = {k: dict(model.named_parameters())[v] for k, v in captured.parameters.items()}
    values |= {k: dict(model.named_buffers())[v] for k, v in captured.buffers.items()}
    values |= captured.constants
    values |= dict(zip(captured.inputs, args, strict=True))
    module = fx.GraphModule(graph.owning_module or {}, graph)
    forward = module.forward
    module.forward = lambda: forward(*[values[n] for n in names])
    return module


def same(model: nn.Module, *args: Any) -> fx.GraphModule:
    """The model and its functional graph give one result and one gradient."""
    expected = model(*args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    module = functional(model, *args)
    actual = module()[0]
    torch.testing.assert_close(actual, expected)
    if actual.requires_grad:
        again = torch.autograd.grad(actual.sum(), parameters, allow_unused=True)
        torch.testing.assert_close(again, gradients)
    else:
        assert all(g is None or not g.any() for g in gradients)
    return module


steps = st.lists(
    st.tuples(
        st.sampled_from([*VIEWS, *WRITES, *WRITES, *READS]), st.integers(0, 20), st.integers(0, 5)
    ),
    min_size=2,
    max_size=14,
)


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))
@given(steps)
def test_any_program_of_views_and_writes(program: list[Step]) -> None:
    """Values, gradients, and no write left where a weight is."""
    model, x = Program(program), torch.randn(2, 6, 4, dtype=torch.float64)
    try:
        expected = model(x)
        expected.backward()
    except RuntimeError:
        return  # what autograd itself refuses
    model.zero_grad()
    graph = same(model, x).graph
    reached = {n for n in graph.nodes if "linear" in n.name}
    for node in graph.nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            assert written(node) is None, node


class Pieces(nn.Module):
    """Writes into pieces of memory without a history."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 4] -> [n, 4]."""
        h = self.linear(x)
        made = h.new_zeros(h.shape)
        a, b = made.chunk(2, -1)
        c, *_, d = made.unbind(1)
        a.copy_(h[:, 2:].detach())
        c.add_(1)
        b.mul_(3)
        d.copy_(c)
        out: Tensor = h * made + a.sum() * h
        return out


def test_writes_into_pieces() -> None:
    """Of ``chunk`` and ``unbind``; pieces of the same memory see each other's writes."""
    same(Pieces(), torch.randn(3, 4, dtype=torch.float64))


class Into(nn.Module):
    """Writes a weight-dependent value into zeros, which then meet weights."""

    def __init__(self, under_no_grad: bool = False, detached: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.under_no_grad, self.detached = under_no_grad, detached

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 8] -> [n, 8]."""
        h = self.up(x)
        made = torch.zeros_like(h) if not self.under_no_grad else h
        if self.under_no_grad:
            with torch.no_grad():
                made[:, :4] = 1.0
        elif self.detached:
            h.detach().mul_(2.0)
        else:
            made[:, 4:12] = h[:, :8]
            made[:, :4] = 2.0
        out: Tensor = self.down(made.relu() + h)
        return out


def test_what_is_written_into_zeros_keeps_its_gradient() -> None:
    """Zeros have no gradient until a value that has one is written into them."""
    same(Into(), torch.randn(3, 8))
    report = autoshard.verify(Into(), 2, (torch.randn(3, 8),))
    assert report.ok, report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"under_no_grad": True}, r"fill_.*writes under no_grad into a value that has a gradient"),
        ({"detached": True}, r"mul_.*writes through aten.detach"),
    ],
)
def test_a_write_past_autograd_is_refused(options: dict[str, bool], message: str) -> None:
    """By operator, layer and line: the gradient does not know of it."""
    with pytest.raises(CaptureError, match=message):
        autoshard.verify(Into(**options), 2, (torch.randn(3, 8),))


class Whole(nn.Module):
    """Concatenates by writing, as latent attention does."""

    def __init__(self, rewritten: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(24, 8)
        self.rewritten = rewritten

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 8] -> [n, 8]."""
        h = self.up(x)
        made = h.new_empty(h.shape[0], 24)
        made[:, 8:] = h
        if self.rewritten:
            h.mul_(2.0)
        made[:, :8] = h[:, :8]
        out: Tensor = self.down(made.relu())
        return out


@pytest.mark.parametrize("rewritten", [False, True])
def test_slices_written_into_an_empty_tensor_are_a_concatenation(rewritten: bool) -> None:
    """Also where what was written changes between two writes."""
    same(Whole(rewritten), torch.randn(3, 8))
    report = autoshard.verify(Whole(rewritten), 2, (torch.randn(3, 8),))
    assert report.ok, report
    assert report.plan.sharded_fraction == 1


class SlicesOfAll(nn.Module):
    """Slices that take all, and two that do not; one leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)[:, :, None, :].sin()[:, :, 0]
        z = y[:, 0:6, :6] * y[:, -6:, ::1] + y[:, :, 1:2]
        return z, y[:]


def test_slices_that_take_all_are_nothing() -> None:
    """Their gradient would be written into zeros; those of a part stay, and what leaves is a view."""
    x = torch.randn(2, 6, 6)
    torch.manual_seed(0)
    model = SlicesOfAll()
    captured = capture(model, (x,), {})
    before = [bind(n) for n in captured.graph.nodes if op_name(n) == "slice"]
    graph = normalize(captured.graph, captured.parameters, captured.constants)
    after = [bind(n) for n in graph.nodes if op_name(n) == "slice"]
    ends = [(k["dim"], k["start"], k["end"]) for k in after]
    # Six of a dimension that had six in the example are not all of it.
    assert ends == [(1, 0, 6), (1, -6, sys.maxsize), (2, 1, 2), (0, 0, sys.maxsize)]
    assert len(before) > len(after)
    assert autoshard.verify(model, 2, (x,)).ok
