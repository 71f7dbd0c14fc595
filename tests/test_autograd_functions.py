"""A model's own autograd.Function keeps the backward that the model has, or is refused by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import autoshard
from autoshard import CaptureError
from autoshard.capture import capture, skeleton
from tests.distributed import run_distributed

INPUT = (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 3,)


class MLP(nn.Module):
    """Two linears around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.function(self.up(x)))
        return out


class Round(torch.autograd.Function):
    """Rounds; its backward passes the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Halved(torch.autograd.Function):
    """The identity; half of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class BoundedRoot(torch.autograd.Function):
    """A square root whose gradient is bounded, which shows only where x is tiny."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The root."""
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """At most 500."""
        (x,) = ctx.saved_tensors
        out: Tensor = grad / (4 * x).clamp(min=1e-6).sqrt()
        return out


class Swish(torch.autograd.Function):
    """x·sigmoid(x) with its derivative written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s: Tensor = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


class NewSwish(Swish):
    """The same in the style that functorch asks for."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)


class Sized(torch.autograd.Function):
    """Is given a size that the graph computes; its backward is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


def _called(function: Any) -> Callable[[Tensor], Tensor]:
    """The function looked up when it is called; ``function.apply`` is it looked up before."""
    return lambda x: function.apply(x)


def _sized(x: Tensor) -> Tensor:
    out: Tensor = Sized.apply(x, x.shape[0])
    return out


def _under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = Round.apply(x)
    return x * gate


def _cast(x: Tensor) -> Tensor:
    return Swish.apply(x.float()).to(x.dtype)


def _several(x: Tensor) -> Tensor:
    class Both(torch.autograd.Function):
        """Two results of two arguments; a backward that exchanges them."""

        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            ctx.scale = scale
            return a * b, a.sum(-1, keepdim=True) * scale

        @staticmethod
        def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, None]:
            return first + second, first * 2 * ctx.scale, None

    product, total = Both.apply(x, x.exp().clamp(max=3), 0.5)
    return product + total


OTHERS = {
    "a size": _sized, "under no_grad": _under_no_grad, "a cast": _cast, "several": _several,
}  # fmt: skip


@pytest.mark.parametrize("function", [Round, Halved, BoundedRoot, Swish, NewSwish])
@pytest.mark.parametrize("how", ["called", "stored"])
def test_a_function_is_kept(function: Any, how: str) -> None:
    """Also where ``f = Function.apply`` was stored before: outputs and gradients are the model's."""
    apply = _called(function) if how == "called" else function.apply
    report = autoshard.verify(MLP(apply), 2, INPUT)
    assert report.ok, report
    assert report.plan.sharded_fraction == 1.0
    assert any(function.__name__ in line for line in report.plan.unknown)


@pytest.mark.parametrize("name", OTHERS)
def test_kinds_of_calls(name: str) -> None:
    """Sizes, several arguments and results, under no_grad, casts inside."""
    report = autoshard.verify(MLP(OTHERS[name]), 2, INPUT, locate=True)
    assert report.ok, report


def test_a_straight_through_estimator_has_its_gradient() -> None:
    """Not the zero that its forward's operators would give; float32, outside of verify."""
    torch.manual_seed(0)
    model = MLP(Round.apply)
    tp_model = autoshard.parallelize(model, 1, INPUT, degree="max")
    for each in (model, tp_model):
        each(*INPUT).square().sum().backward()
    expected = model.up.weight.grad
    assert expected is not None and expected.abs().max() > 0.1
    torch.testing.assert_close(tp_model.get_parameter("up.weight").grad, expected)


def test_another_size_is_given_to_the_function() -> None:
    """The size is a value of the graph, not the example's."""
    model = MLP(_sized)
    tp_model = autoshard.parallelize(model, 1, INPUT, degree="max")
    x = torch.randn(7, 8)
    torch.testing.assert_close(tp_model(x), model(x))


def test_names_do_not_depend_on_what_was_captured_before() -> None:
    """Ranks compare their graphs' text."""

    def names(apply: Any) -> list[str]:
        graph = capture(skeleton(MLP(apply)), INPUT, {}).graph
        return [str(n.target) for n in graph.nodes if "autograd_functions." in str(n.target)]

    first = names(Round.apply)
    names(_sized)
    assert names(_called(Round)) == first and len(first) == 1


# What cannot be kept


class Dirty(torch.autograd.Function):
    """Writes into its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Noisy(torch.autograd.Function):
    """Draws random numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Given(torch.autograd.Function):
    """Is given a module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        out: Tensor = module(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


HIDDEN = torch.arange(16.0)


class Reads(torch.autograd.Function):
    """Reads a tensor from elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * HIDDEN

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


REFUSED = {
    "writes into its arguments": (Dirty, lambda x: Dirty.apply(x * 1)),
    "draws random numbers": (Noisy, Noisy.apply),
    "is given a module": (Given, lambda x: Given.apply(x, nn.Identity())),
    "reads a tensor": (Reads, Reads.apply),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_kept_is_refused(why: str) -> None:
    """By its name, with the layer, the line, and what to do."""
    function, apply = REFUSED[why]
    with pytest.raises(CaptureError, match=rf"MLP.forward .*{function.__name__}.*{why}.*custom_op"):
        autoshard.plan(MLP(apply), 2, INPUT, degree="max")


class Traced(nn.Module):
    """What only strict capture takes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP(Round.apply)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():
            raise RuntimeError("not this way")
        out: Tensor = self.mlp(x)
        return out


def test_strict_capture_refuses_a_function() -> None:
    """It would keep the forward's operators and drop the backward."""
    with pytest.raises(CaptureError, match=r"(?s)Round.*non-strict capture failed.*not this way"):
        autoshard.plan(Traced(), 2, INPUT, degree="max")


def trained() -> dict[str, Any]:
    """Gradients of two real ranks."""
    torch.manual_seed(0)
    model = MLP(Round.apply)
    tp_model = autoshard.parallelize(model, 2, INPUT, degree="max")
    tp_model(*INPUT).square().sum().backward()
    model(*INPUT).square().sum().backward()
    own = {n: p.grad.full_tensor() for n, p in tp_model.named_parameters()}
    return {n: (own[n], p.grad) for n, p in model.named_parameters()}


@pytest.mark.slow
def test_on_real_ranks() -> None:
    """Names of operators agree among processes; gradients are the model's."""
    for rank in run_distributed(trained, 2):
        for name, (own, expected) in rank.items():
            torch.testing.assert_close(own, expected, msg=name)


def test_apply_is_itself_again() -> None:
    """After a capture, and after one that fails."""
    code = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    with contextlib.suppress(CaptureError):
        autoshard.plan(MLP(Noisy.apply), 2, INPUT, degree="max")
    assert torch.autograd.Function.apply.__func__.__code__ is code  # type: ignore[attr-defined]
    x = torch.full((2,), math.e, requires_grad=True)
    Round.apply(x).sum().backward()
    assert x.grad is not None and F.relu(x.grad).sum() == 2
