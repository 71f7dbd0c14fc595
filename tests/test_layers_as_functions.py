"""Layers that are one function of autograd, in loops of all kinds, beside autograd's own record.

The other rank is missing, so that sums are this rank's. Where tensors that autograd keeps are hooked, a
layer is recorded call by call: the same graph, differentiated by PyTorch.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

import autoshard
from autoshard import beside
from autoshard.products import side_by_side
from tests.distributed import run_distributed

H = 8


@pytest.fixture(scope="module", autouse=True)
def two_ranks() -> Iterator[None]:
    """This process is the first of two."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """An MLP behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def mlp(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., H]."""
        return self.out(F.gelu(self.fc(self.norm(x))))

    def forward(self, x: Tensor) -> Any:
        """x: [..., H] -> [..., H]."""
        return x + self.mlp(x)


class Stack(nn.Module):
    """Blocks of a kind, one behind the other; the results beside the first of each are given too."""

    def __init__(self, block: type[Block] = Block, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(layers))

    def forward(self, x: Tensor) -> Any:
        """x: [..., H] -> [..., H]; and the others."""
        others = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(x, tuple):
                x, other = x
                others.append(other)
        return (x, others) if others else x


class Complex(Block):
    """Pairs of numbers turned, as in Llama's own rotary embedding, and a Fourier transform."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.polar(torch.ones(H // 2), torch.arange(H // 2) * 0.7)
        turned = torch.view_as_complex(self.norm(x).unflatten(-1, (-1, 2))) * angles
        x = x + torch.view_as_real(turned).flatten(-2) + torch.fft.fft(x, dim=-1).real
        return x + self.mlp(x)


class ComplexFrozen(Block):
    """Complex numbers that depend on parameters, used where no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.norm(x).unflatten(-1, (-1, 2)))
        with torch.no_grad():
            scale = torch.view_as_real(turned * turned).flatten(-2)
        return x + self.mlp(x) * scale


class OneForAll(Block):
    """A bias of one number, added to three columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, H)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first = F.linear(y, self.weight, self.bias)
        second = torch.addmm(self.bias, y.flatten(0, -2), self.weight.t()).view(first.shape)
        return x + self.mlp(x) + (first * second).sigmoid().mean(-1, keepdim=True)


class WideBias(Block):
    """A column-parallel product's bias of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.bias = nn.Parameter(torch.randn(1))


class Beside(Block):
    """A second result, by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.mlp(x)
        return y, self.aux(y).sigmoid()


class Chosen(Block):
    """Values that end in indices: an indexer's, whose weights have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.index = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        hidden = F.softplus(self.fc(y))  # has no row, as the last one has none: all between is one part
        chosen = self.index(y).softmax(-1).topk(2, -1).indices
        mask = torch.zeros(x.shape).scatter(-1, chosen, 1.0)
        return x + self.out(F.softplus(hidden)) * mask


class Positions(Block):
    """A parameter of the activation's own shape: both have one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, H))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        return x + self.mlp(x)


class Gate(Block):
    """A product by a vector, which has a dimension less."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(H))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(F.linear(self.norm(x), self.gate))
        return x + self.mlp(x) * gate.unsqueeze(-1)


class BiasOfPlaces(Block):
    """A product's bias for each token, of sizes that nothing is split over."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(H, 7)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.gelu(self.down(self.norm(x))), self.weight, self.bias)
        return x + self.mlp(x) * y.sigmoid().mean(-1, keepdim=True)


class Heads(Block):
    """Products of each head: of heads that are split, and of as many that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(H, H) for _ in range(3))
        self.own, self.whole = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.whole(x.unflatten(-1, (2, 4)))
        q, k = self.own(self.q(y).unflatten(-1, (2, 4))), self.k(y).unflatten(-1, (2, 4))
        o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, F.gelu(q))))
        return x + self.o(o.transpose(1, 2).flatten(-2)) + z.flatten(-2) + self.mlp(x)


class Narrow(Block):
    """Three products of few columns, whose gradients are one product."""

    def __init__(self) -> None:
        super().__init__()
        del self.fc, self.out
        self.q, self.k, self.v = (nn.Linear(H, 2, bias=False) for _ in range(3))
        self.proj = nn.Linear(2, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.proj(self.q(y) * self.k(y) + self.v(y))


class CalledTwice(nn.Module):
    """One layer on two values, whose gradients follow each other in one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(H, H), nn.ModuleList([Positions()])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).sin(), self.first(x).cos()
        result: Tensor = self.layers[0](a) * self.layers[0](b)
        return result


def split_of(model: nn.Module, x: Tensor) -> autoshard.ParallelModule:
    """The rank's module; the same numbers for the same model."""
    return autoshard.parallelize(model.train(), 2, (x,), degree="max", device="cpu", check_inputs=False)


def recorded() -> contextlib.AbstractContextManager[Any]:
    """A layer's calls are recorded one by one."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """This rank's, which are forgotten."""
    found = {
        n: None if p.grad is None else p.grad.to_local().clone()  # type: ignore[attr-defined]
        for n, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def first_of(result: Any) -> Tensor:
    """The value that goes from layer to layer."""
    return result[0] if isinstance(result, tuple) else result


def is_function(result: Tensor) -> bool:
    """Whether a layer is a function, somewhere behind a result."""
    seen, left = set(), [result.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [n for n, _ in node.next_functions]
    return any(type(node).__name__ == "_LayerBackward" for node in seen)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "complex": lambda: Stack(Complex),
    "a bias that is broadcast": lambda: Stack(OneForAll),
    "a column's bias that is broadcast": lambda: Stack(WideBias),
    "a result that nobody reads": lambda: Stack(Beside),
    "values that end in indices": lambda: Stack(Chosen),
    "a parameter like the activation": CalledTwice,
    "products side by side": lambda: Stack(Narrow),
    "a product by a vector": lambda: Stack(Gate),
    "a bias of each place": lambda: Stack(BiasOfPlaces),
    "products of heads": lambda: Stack(Heads),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_autograds(name: str) -> None:
    """Numbers, shapes, and None where autograd gives none: an optimizer decays what has zeros."""
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.randn(6, H) if name == "a parameter like the activation" else torch.randn(2, 3, H)
    split = split_of(model, x)
    found = []
    for around in (contextlib.nullcontext(), recorded()):
        with around:
            y = first_of(split(x))
        found.append(is_function(y))
        y.pow(2).sum().backward()
        found.append(gradients(split))
    function, mine, record, theirs = found
    assert function and not record
    assert {n for n, g in mine.items() if g is None} == {n for n, g in theirs.items() if g is None}
    for key, grad in mine.items():
        assert_close(grad, theirs[key], rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    first_of(split(x)).sum().backward()
    apart = [_local(p.grad) for p in split.parameters() if p.grad is not None]
    # Memory of their own: clipping scales each once.
    assert len({g.untyped_storage().data_ptr() for g in apart}) == len(apart)
    assert all(g.untyped_storage().nbytes() == g.nbytes for g in apart)
    assert any(g is None for g in mine.values()) == (name in list(MODELS)[3:5])


def test_products_side_by_side_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model above: its gradients are pieces of one, so that they have to be copied."""
    joined = []

    def seen(dys: Any, weights: Any, transposed: bool) -> Any:
        found = side_by_side(dys, weights, transposed)
        joined.append(len(dys) > len(found[0]))
        return found

    monkeypatch.setattr(beside, "side_by_side", seen)
    x = torch.randn(2, 3, H)
    split_of(Stack(Narrow), x)(x).sum().backward()
    assert joined == [True, True]


def test_no_gradient_flows_through_complex_values_under_no_grad() -> None:
    """As through others: compared with the model itself."""
    torch.manual_seed(0)
    model, x = Stack(ComplexFrozen), torch.randn(2, 3, H)
    split = autoshard.parallelize(model.train(), 1, (x,), device="cpu", check_inputs=False)
    for one in (model, split):
        one(x).pow(2).sum().backward()
    for key, parameter in split.named_parameters():
        expected = model.get_parameter(key).grad
        assert_close(_local(parameter.grad), expected, msg=lambda m, key=key: f"{key}: {m}")


def test_some_of_the_results_are_read() -> None:
    """Each of two results alone, and both: None and numbers where autograd has them."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, H)
    split = split_of(Stack(Beside), x)
    for read in ((True, False), (False, True), (True, True)):
        found = []
        for around in (contextlib.nullcontext(), recorded()):
            with around:
                y, others = split(x)
            values = [value for value, r in zip((y, others[0]), read, strict=True) if r]
            torch.stack([value.pow(2).sum() for value in values]).sum().backward()
            found.append(gradients(split))
        mine, theirs = found
        for key, grad in mine.items():
            assert (grad is None) == (theirs[key] is None), (read, key)
            if grad is not None:
                assert_close(grad, theirs[key], rtol=1e-5, atol=1e-5)


class GivesNone(torch.autograd.Function):
    """A user's function that has no gradient for its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


def test_what_gets_no_gradient_gives_none() -> None:
    """From the caller's code behind the model, and from a layer whose other result alone is read."""

    class Apart(Block):
        """Its second result is of its own parameters alone."""

        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Parameter(torch.randn(H))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.mlp(x), self.aux.sin()

    torch.manual_seed(0)
    x = torch.randn(2, 3, H)
    split = split_of(Stack(), x)
    function: Any = GivesNone
    function.apply(split(x)).pow(2).sum().backward()
    assert set(gradients(split).values()) == {None}
    split = split_of(Stack(Apart), x)
    for place in (0, 1):
        found = []
        for around in (contextlib.nullcontext(), recorded()):
            with around:
                _, others = split(x)
            others[place].pow(2).sum().backward()
            found.append(gradients(split))
        mine, theirs = found
        assert {n for n, g in mine.items() if g is not None} == {f"layers.{place}.aux"}
        assert {n for n, g in theirs.items() if g is not None} == {f"layers.{place}.aux"}


def test_weights_that_are_computed_are_free_behind_their_layer() -> None:
    """While the loss is still there."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, H)
    split = split_of(Stack(), x)
    weights = {n: p * 2 for n, p in split.named_parameters()}
    alive = [weakref.ref(w) for w in weights.values()]
    loss = torch.func.functional_call(split, weights, (x,)).pow(2).sum()
    del weights
    loss.backward()
    assert sum(one() is not None for one in alive) == 0
    assert loss.grad_fn is not None


@pytest.mark.parametrize("how", ["foreach", "one by one", "by hand"])
def test_a_step_between_forward_and_backward_is_refused(how: str) -> None:
    """As with plain tensors: the gradients would be of other weights than those that are kept."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, H)
    plain = Stack()
    for model in (split_of(plain, x), plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=how == "foreach")
        for _ in range(2):  # the usual loop goes on
            model(x).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        first, second = model(x), model(x)
        first.pow(2).sum().backward()
        if how == "by hand":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
        else:
            optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.pow(2).sum().backward()


def test_what_is_frozen_before_the_backward_pass_stays_without() -> None:
    """As AccumulateGrad leaves it."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, H, requires_grad=True)
    split = split_of(Stack(), x)
    y = split(x)
    for parameter in split.parameters():
        parameter.requires_grad_(False)
    y.pow(2).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in split.parameters())


@pytest.mark.parametrize("penalised", ["input", "parameters", "grad"])
def test_a_penalty_on_gradients_is_an_error_and_not_nothing(penalised: str) -> None:
    """Also where the gradient that the layer is given is a constant."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, H, requires_grad=True)
    split = split_of(Stack(), x)
    y = split(x)
    if penalised == "grad":
        y.sum().backward(create_graph=True)
        grads = [p.grad for p in split.parameters()]
    else:
        wanted = [x] if penalised == "input" else list(split.parameters())
        grads = list(torch.autograd.grad(y.sum(), wanted, create_graph=True))
    penalty = sum((g.pow(2).sum() for g in map(_local, grads)), x.new_zeros(()))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (y.mean() + penalty).backward()


def _local(grad: Any) -> Tensor:
    assert grad is not None
    return grad.to_local() if hasattr(grad, "to_local") else grad


def test_the_plan_of_an_input_that_enters_a_product_is_printed() -> None:
    """It depends on no weight, and has a size all the same."""

    class Bare(Block):
        def mlp(self, x: Tensor) -> Tensor:
            return self.out(F.gelu(self.fc(x)))

    x = torch.randn(2, 3, H)
    plan = autoshard.plan(Stack(Bare), 2, (x,), degree="max")
    assert "layers.{0..1}" in str(plan)


def _averaged(static: bool) -> list[dict[str, Tensor]]:
    """Gradients under DistributedDataParallel, and their mean over two copies by hand."""
    found = []
    xs = [torch.randn(2, 3, H, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for around in (True, False):
        torch.manual_seed(0)
        split = autoshard.parallelize(Stack().train(), 2, (xs[0],), degree="max", device="cpu")
        own, model = xs[dist.get_rank() // 2], split
        if around:
            mesh: Any = split.mesh
            model = DistributedDataParallel(split, device_mesh=mesh["dp"], static_graph=static)
        parameters = dict(split.named_parameters())
        model(own).pow(2).sum().backward()
        if not around:
            autoshard.average_gradients(split)
        found.append({n: _local(p.grad).clone() for n, p in parameters.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_distributed_data_parallel(static: bool) -> None:
    """It puts what it makes of a DTensor where a module's plain attributes are."""
    for mine, theirs in run_distributed(_averaged, 4, static, timeout=200):
        assert mine.keys() == theirs.keys() and mine
        for name, grad in mine.items():
            assert_close(grad, theirs[name], rtol=1e-5, atol=1e-5)
