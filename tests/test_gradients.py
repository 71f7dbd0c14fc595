"""Gradients of parameters that are DTensors are those of plain tensors, however one asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

from autoshard import compat

ROWS, COLUMNS = 3, 4


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


class Pair:
    """Parameters of a rank, and plain tensors with the same numbers."""

    def __init__(self, mesh: DeviceMesh, count: int = 3) -> None:
        torch.manual_seed(0)
        self.plain = [nn.Parameter(torch.randn(ROWS, COLUMNS)) for _ in range(count)]
        self.split = [
            nn.Parameter(DTensor.from_local(p.detach().clone(), mesh, [Shard(0)], run_check=False))
            for p in self.plain
        ]
        compat.share_specs(self.split)

    def sides(self) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
        """What is trained, and what is computed on: for plain tensors, and for DTensors."""
        return [(self.plain, list(self.plain)), (self.split, compat.shares(self.split))]  # type: ignore[arg-type]

    def same_gradients(self) -> None:
        for one, other in zip(self.plain, self.split, strict=True):
            if one.grad is None:
                assert other.grad is None
                continue
            assert isinstance(other.grad, DTensor)
            assert other.grad.placements == (Shard(0),)
            assert other.grad.shape == (2 * ROWS, COLUMNS)
            assert_close(local(other.grad), one.grad, rtol=0, atol=0)
            assert local(other.grad).stride() == one.grad.stride()


def local(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)
    return x.to_local()


def test_backward_fills_and_adds_up(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    for _ in range(3):  # gradients of several batches are summed
        for _, (a, b, c) in pair.sides():
            ((a * b).sin() + c.t().contiguous().t() * 2).sum().backward()
        pair.same_gradients()
    first = pair.split[0].grad
    for p in (*pair.plain, *pair.split):
        assert p.grad is not None
        p.grad.zero_()
    for _, (a, b, c) in pair.sides():
        (a + b * c).pow(2).sum().backward()
    pair.same_gradients()
    assert pair.split[0].grad is first  # added to in place, as AccumulateGrad does


def test_gradients_of_two_summands_do_not_share_memory(mesh: DeviceMesh) -> None:
    def together(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ((a + b) * c).sum()

    def through_a_view(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ((a.view(-1) + b.view(-1)).view(a.shape) * c).sum()

    def one_by_a_view(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ((a + b.view(-1).view(b.shape)) * c).sum()

    for loss in (together, through_a_view, one_by_a_view):
        for apart in (False, True):  # of one layer's call, and of different ones
            pair = Pair(mesh)
            split = (
                [compat.shares([p])[0] for p in pair.split]  # type: ignore[list-item]
                if apart
                else compat.shares(pair.split)  # type: ignore[arg-type]
            )
            loss(*split).backward()
            loss(*pair.plain).backward()
            pair.same_gradients()
            before = [local(p.grad).clone() for p in pair.split]  # type: ignore[arg-type]
            for p in pair.split:
                p.grad.mul_(2)  # type: ignore[union-attr]  # what clipping does: each gradient once
            for p, old in zip(pair.split, before, strict=True):
                assert_close(local(p.grad), old * 2, rtol=0, atol=0)  # type: ignore[arg-type]


def test_autograd_grad_gives_gradients_and_writes_none(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    found = []
    for trained, (a, b, c) in pair.sides():
        found.append(torch.autograd.grad((a * b * c).sum(), [trained[0], trained[2]]))
        assert all(p.grad is None for p in trained)
    for one, other in zip(*found, strict=True):
        assert isinstance(other, DTensor)
        assert_close(local(other), one, rtol=0, atol=0)


def test_backward_for_some_inputs(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    for trained, (a, b, c) in pair.sides():
        (a * b * c).sum().backward(inputs=[trained[1]])
    pair.same_gradients()
    assert pair.split[0].grad is None


@pytest.mark.parametrize("many", [False, True])
def test_hooks_see_and_change_gradients(mesh: DeviceMesh, many: bool) -> None:
    pair = Pair(mesh)
    seen: list[list[Tensor]] = []
    for trained, (a, b, c) in pair.sides():
        one: list[Tensor] = []
        all_of_them: list[Tensor] = []
        trained[0].register_hook(lambda g: g * 3)
        trained[1].register_post_accumulate_grad_hook(lambda p, to=one: to.append(p.grad))  # type: ignore[misc]
        if many:
            torch.autograd.graph.register_multi_grad_hook(
                [trained[1], trained[2]],
                lambda gs, to=all_of_them: to.extend(gs),  # type: ignore[misc]
            )
        (a * b * c).sum().backward()
        seen.append(one + all_of_them)
    pair.same_gradients()
    assert len(seen[0]) == len(seen[1]) == (3 if many else 1)
    for expected, got in zip(*seen, strict=True):
        assert_close(local(got), expected, rtol=0, atol=0)


def test_hooks_behind_the_accumulation_find_the_gradient(mesh: DeviceMesh) -> None:
    """DistributedDataParallel waits for gradients there."""
    pair = Pair(mesh, 1)
    seen: list[Tensor] = []
    (a,) = compat.shares(pair.split)  # type: ignore[arg-type]
    node = a.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *_: seen.append(pair.split[0].grad))  # type: ignore[arg-type, union-attr]
    (a * 2).sum().backward()
    assert_close(local(seen[0]), torch.full((ROWS, COLUMNS), 2.0))


def test_other_gradients_before(mesh: DeviceMesh) -> None:
    """What somebody put into .grad that is no DTensor placed alike is PyTorch's to add to."""
    pair = Pair(mesh, 1)
    start = torch.arange(2.0 * ROWS * COLUMNS).view(2 * ROWS, COLUMNS)
    pair.split[0].grad = DTensor.from_local(start.clone(), mesh, [Replicate()], run_check=False)
    (a,) = compat.shares(pair.split)  # type: ignore[arg-type]
    (a * 2).sum().backward()
    assert pair.split[0].grad is not None
    assert pair.split[0].grad.shape == (2 * ROWS, COLUMNS)


def test_gradients_in_another_dtype(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    for trained, (a, b, c) in pair.sides():
        trained[0].grad_dtype = torch.float64
        (a * b * c).sum().backward()
        assert trained[0].grad is not None
        assert trained[0].grad.dtype == torch.float64
    pair.same_gradients()


def test_gradients_of_what_was_computed_from_parameters(mesh: DeviceMesh) -> None:
    """torch.func.functional_call with parameters that are no leaves."""
    pair = Pair(mesh)
    for trained in (pair.plain, pair.split):
        doubled = [p * 2 for p in trained]
        a, b, c = doubled if trained is pair.plain else compat.shares(doubled)  # type: ignore[arg-type]
        (a * b * c).sum().backward()
    pair.same_gradients()


def test_gradients_of_gradients_are_refused_not_dropped(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    a, b, c = compat.shares(pair.split)  # type: ignore[arg-type]
    (a * b * c).sum().backward(create_graph=True)
    grad = pair.split[0].grad
    assert isinstance(grad, DTensor)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.to_local().sum().backward()


def test_only_some_are_trained_or_used(mesh: DeviceMesh) -> None:
    pair = Pair(mesh)
    for trained in (pair.plain, pair.split):
        trained[1].requires_grad_(False)
    for _, (a, b, _c) in pair.sides():
        (a * b).sum().backward()
    pair.same_gradients()
    assert pair.split[1].grad is None
    assert pair.split[2].grad is None


def way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[bool]]:
    """Which gradients did not take PyTorch's way."""
    found: list[bool] = []
    original = compat._accumulated

    def watched(*given: object) -> bool:
        found.append(original(*given))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(compat, "_accumulated", watched)
    return lambda: found


def test_the_short_way_is_taken_in_training_alone(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = way(monkeypatch)
    pair = Pair(mesh)
    a, b, c = compat.shares(pair.split)  # type: ignore[arg-type]
    (a * b * c).sum().backward()
    assert taken() == [True] * 3
    a, b, c = compat.shares(pair.split)  # type: ignore[arg-type]
    torch.autograd.grad((a * b * c).sum(), pair.split)
    assert taken() == [True] * 3
    pair.split[0].register_hook(lambda g: g)
    a, b, c = compat.shares(pair.split)  # type: ignore[arg-type]
    (a * b * c).sum().backward()
    assert taken() == [True] * 3 + [False, True, True]
