"""Models that write into their own parameters and buffers, or read them behind autograd's back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoshard
from autoshard.errors import CaptureError


class Stateful(nn.Module):
    """Batch normalization, a weight that is clamped in training, and one that is read detached."""

    def __init__(self, assigns: bool = False) -> None:
        super().__init__()
        self.assigns = assigns
        self.first, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.mix = nn.Parameter(torch.randn(32, 32))
        self.scale = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 8] -> [n, 32]."""
        h: Tensor = self.norm(self.first(x))
        if self.training:
            self.mix.data.clamp_(-0.5, 0.5)
        if self.assigns:
            self.scale.data = self.scale.data * 2
        y: Tensor = self.down(torch.relu(self.up(h)))
        return h + y @ self.mix * self.scale.data


@pytest.mark.parametrize("train", [True, False])
def test_what_a_forward_writes_is_written(train: bool) -> None:
    """Running statistics, and weights through ``.data``; gradients do not pass it."""
    model, x = Stateful().train(train), torch.randn(6, 8)
    report = autoshard.verify(model, 2, (x,))
    assert report.ok, report
    plain = copy.deepcopy(model)
    tp_model = autoshard.parallelize(model, 1, (x,), degree="max")
    for each in (plain, tp_model):
        for _ in range(2):
            each(x).square().sum().backward()
    assert plain.mix.abs().max() <= 0.5 or not train
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    actual = {**dict(tp_model.named_parameters()), **dict(tp_model.named_buffers())}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
        if value.grad is not None:
            torch.testing.assert_close(actual[name].grad, value.grad, msg=name)
    assert tp_model.scale.grad is None or not tp_model.scale.grad.any()


def test_another_dtype_after_the_first_capture() -> None:
    """Buffers too: captured again."""
    model, x = Stateful(), torch.randn(6, 8)
    tp_model = autoshard.parallelize(model, 1, (x,), degree="max")
    tp_model(x)
    assert tp_model.double()(x.double()).dtype == torch.float64


def test_an_assignment_to_data_is_refused() -> None:
    """The capture could not follow it."""
    with pytest.raises(CaptureError, match=r"assigns to a tensor's \.data"):
        autoshard.verify(Stateful(assigns=True), 2, (torch.randn(6, 8),))


class Made(nn.Module):
    """Tensors that are made in ``forward``: new ones in each call, whoever writes into them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix = how, nn.Linear(8, 8)
        self.kept = torch.tensor(0.0)  # neither a buffer nor a parameter

    def forward(self, x: Tensor) -> Any:
        """x: [B, S, 8]."""
        y = self.mix(x)
        if self.how == "added to":
            scale = torch.tensor([0.0, 0.0])
            scale += 1
            return y * scale[0]
        if self.how == "offset of a mask":
            offset, places = torch.tensor([0]), torch.arange(x.shape[1])
            offset[0] = 2
            return F.scaled_dot_product_attention(y, y, y, places[None] <= places[:, None] + offset)
        if self.how == "index":
            index = torch.tensor([0])
            index[0] = 2
            return y[:, index]
        if self.how == "returned":
            return y, torch.tensor(0.0)
        if self.how == "kept":
            self.kept.add_(1)
            return y * self.kept
        return y * torch.tensor(2.0)


@pytest.mark.parametrize("how", ["added to", "offset of a mask", "index", "returned", "read"])
def test_what_is_made_in_forward_is_new_in_each_call(how: str) -> None:
    """The capture has one for all calls: who writes into it, here or in the caller's code, a copy."""
    model = Made(how)
    split = autoshard.parallelize(copy.deepcopy(model), 1, (torch.randn(2, 6, 8),))
    assert any("clone" in str(n.target) for n in split.graph.nodes) == (how != "read")
    for length in (6, 6, 9):
        x = torch.randn(2, length, 8)
        found, expected = split(x), model(x)
        torch.testing.assert_close(found, expected)
        if how == "returned":
            for result in (found, expected):
                result[1].add_(5)


def test_a_write_into_a_plain_attribute_is_refused() -> None:
    """Nobody would see it: what the model keeps is a constant of the capture."""
    with pytest.raises(CaptureError, match=r"kept, a tensor .* register_buffer"):
        autoshard.parallelize(Made("kept"), 1, (torch.randn(2, 6, 8),))
