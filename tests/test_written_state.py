"""Models that write into their own parameters and buffers, or read them behind autograd's back."""

from __future__ import annotations

import copy

import pytest
import torch
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
