"""Example inputs: found, given in any form, and never mixed up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autoshard
from autoshard.capture import capture, skeleton
from autoshard.inputs import normalized_inputs
from tests.models import nanogpt


def huggingface_model(name: str) -> nn.Module:
    """A test model of transformers, imported where it is needed."""
    from tests.models import huggingface

    return huggingface.case(name).build("sdpa", dropout=0.0)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gpt2", {"input_ids", "labels"}),
        pytest.param("bert", {"input_ids", "labels"}, marks=pytest.mark.slow),
        pytest.param("t5", {"input_ids", "decoder_input_ids", "labels"}, marks=pytest.mark.slow),
    ],
)
def test_dummy_inputs_of_transformers(name: str, names: set[str]) -> None:
    """Token ids inside the vocabulary, and labels, so that the loss is in the graph."""
    model = huggingface_model(name)
    args, kwargs = normalized_inputs(model, None)
    assert args == ()
    assert set(kwargs) >= names
    for value in kwargs.values():
        assert value.device.type == "cpu"
    assert kwargs["labels"] is not kwargs["input_ids"]
    vocabulary = model.config.vocab_size
    for key in names:
        assert kwargs[key].dtype == torch.int64
        assert kwargs[key].min() >= 0 and kwargs[key].max() < vocabulary
    assert model(**kwargs).loss.isfinite()


@pytest.mark.slow
def test_transformers_without_a_head() -> None:
    """A model that returns hidden states takes no labels, and is split all the same."""
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=67, n_positions=16, n_embd=32, n_layer=1, n_head=4))
    _, kwargs = normalized_inputs(model, None)
    assert "labels" not in kwargs
    assert autoshard.plan(model, 2, degree="max").sharded_fraction == 1.0


class Lightning(nn.Module):
    """Has what a LightningModule has."""

    def __init__(self, array: Any) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.example_input_array = array

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out if scale is None else out * scale


@pytest.mark.parametrize(
    "array",
    [
        torch.ones(3, 8),
        (torch.ones(3, 8),),
        (torch.ones(3, 8), torch.ones(1)),
        {"x": torch.ones(3, 8), "scale": torch.ones(1)},
    ],
)
def test_example_input_array(array: Any) -> None:
    """A tensor, a tuple or a dict, as Lightning has it."""
    model = Lightning(array)
    args, kwargs = normalized_inputs(model, None)
    expected = pytree.tree_leaves(array)
    assert all(map(torch.equal, pytree.tree_leaves((args, kwargs)), expected))
    assert autoshard.plan(model, 2, degree="max").sharded_fraction == 1.0


class Embedded(nn.Module):
    """Looks its input up, perhaps after something else."""

    def __init__(self, *, first: str) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.LayerNorm(10)
        self.table = nn.Embedding(50, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.first == "norm":
            tokens = self.norm(tokens).long()
        states: Tensor = self.table(tokens)
        if self.first == "linear":
            states = self.up(tokens)
        out: Tensor = states + self.down(F.gelu(self.up(states)))
        return out


def test_tokens_where_an_embedding_comes_first() -> None:
    """Random tokens of the table's range, the same every time; the model is left as it was."""
    model = Embedded(first="embedding")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    args, kwargs = normalized_inputs(model, None)
    again, _ = normalized_inputs(model, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert kwargs == {} and len(args) == 1
    assert args[0].dtype == torch.int64 and args[0].dim() == 2
    assert args[0].min() >= 0 and args[0].max() < 50
    assert torch.equal(args[0], again[0])
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert autoshard.verify(model, 2).ok


def test_the_published_nanogpt_needs_no_inputs() -> None:
    """Its only required argument goes into the table of tokens, beside that of positions."""
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=1, dropout=0.0))
    (tokens,), _ = normalized_inputs(model, None)
    assert tokens.max() < 203
    assert autoshard.verify(model, 2).ok


def test_other_models_get_no_guess() -> None:
    """Where a norm comes first, or two arguments are required, the error asks for inputs."""
    with pytest.raises(ValueError, match=r"of Embedded could not be found.*\(tokens, mask\)"):
        normalized_inputs(Embedded(first="norm"), None)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2), 1)
    with pytest.raises(ValueError, match=r"of TransformerDecoder .*\(tgt, memory, "):
        normalized_inputs(model, None)


def test_given_inputs_win_over_found_ones() -> None:
    """A tensor, a tuple, a list or a dict."""
    model = Lightning(torch.zeros(1, 8))
    x = torch.ones(3, 8, requires_grad=True)
    for given in (x, (x,), [x]):
        args, kwargs = normalized_inputs(model, given)
        assert torch.equal(args[0], x) and kwargs == {}
        assert not args[0].requires_grad
    args, kwargs = normalized_inputs(model, {"x": x})
    assert args == () and torch.equal(kwargs["x"], x)


# One tensor, given twice


def test_one_tensor_given_twice_is_two_inputs() -> None:
    """labels = input_ids in the example does not tie them in later calls."""
    model = nanogpt.CASES[0].build("sdpa", dropout=0.0)
    ids = torch.randint(203, (3, 10), generator=torch.Generator().manual_seed(0))
    others = ids.roll(1, 1)
    captured = capture(skeleton(model), (), {"idx": ids, "targets": ids})
    assert len(captured.inputs) == 2
    tp_model = autoshard.parallelize(model, 1, {"idx": ids, "targets": ids}, degree="max")
    for inputs in ({"idx": ids, "targets": ids}, {"idx": ids, "targets": others}):
        assert torch.equal(tp_model(**inputs)[1], model(**inputs)[1])
    assert len(tp_model._compiled) == 1
    view = {"idx": ids[:, :-1], "targets": ids[:, 1:].contiguous()}
    assert torch.equal(tp_model(**view)[1], model(**view)[1])


def test_the_order_of_keywords_does_not_matter() -> None:
    """Two inputs of one shape and dtype, named in any order, in the example or the call."""
    model = nanogpt.CASES[0].build("sdpa", dropout=0.0)
    batch = nanogpt.inputs(model)
    turned = dict(reversed(batch.items()))
    expected = model(**batch)[1]
    for example in (batch, turned):
        tp_model = autoshard.parallelize(model, 1, example, degree="max")
        for given in (batch, turned):
            assert torch.equal(tp_model(**given)[1], expected)
        assert torch.equal(tp_model(batch["idx"], targets=batch["targets"])[1], expected)


# Any signature


class Variadic(nn.Module):
    """Takes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0, **named: Any) -> Any:
        y = self.down(self.up(x).relu()) * scale
        for value in (*more, *named.values()):
            if isinstance(value, Tensor):
                y = y + value
        return {"y": y, "names": list(named)}


X, Y, Z = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, Y), {}),
        ((X, Y, Z), {"scale": 2.0}),
        ((X,), {"scale": 3}),
        ((X,), {"z": Z}),
        ((X, Y), {"z": Z, "none": None}),
        ((), {"z": Z, "x": X, "flag": True}),
    ],
)
def test_every_way_to_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Arguments through `*args` and `**kwargs`, tensors or not, captured or called later."""
    model = Variadic()
    expected = model(*args, **kwargs)
    tp_model = autoshard.parallelize(model, 1, (X,), degree="max")
    found = tp_model(*args, **kwargs)
    assert torch.equal(found["y"], expected["y"])
    assert found["names"] == expected["names"]
    if args == () or not kwargs:
        tp_model = autoshard.parallelize(model, 1, args or kwargs, degree="max")
        assert torch.equal(tp_model(*args, **kwargs)["y"], expected["y"])


@pytest.mark.slow
def test_options_of_transformers_that_forward_takes_by_kwargs() -> None:
    """return_dict and output_hidden_states are no parameters of GPT-2's forward, and work."""
    model = huggingface_model("gpt2").eval()
    ids = torch.randint(3, 203, (2, 7), generator=torch.Generator().manual_seed(0))
    tp_model = autoshard.parallelize(model, 1, {"input_ids": ids}, degree="max")
    expected = model(ids, return_dict=False)
    found = tp_model(ids, return_dict=False)
    assert type(found) is tuple
    torch.testing.assert_close(found[0], expected[0])
    expected = model(ids, output_hidden_states=True)
    found = tp_model(ids, output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)


def test_a_plain_sequential() -> None:
    """Its argument is called `input`, a builtin's name."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    assert autoshard.verify(model, 2, (X,)).ok
    assert torch.equal(autoshard.parallelize(model, 1, (X,), degree="max")(X), model(X))


def test_inputs_nested_in_containers() -> None:
    """A dict of tensors as one argument, whatever the order of its keys."""

    class Nested(Lightning):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            out: Tensor = self.down(self.up(batch["x"]).relu()) - batch["y"]
            return out

    model = Nested(None)
    tp_model = autoshard.parallelize(model, 1, ({"x": X, "y": Y},), degree="max")
    for batch in ({"x": X, "y": Y}, {"y": Y, "x": X}, {"x": Y[:2], "y": X[:2]}):
        assert torch.equal(tp_model(batch), model(batch))


def test_options_of_equal_value_and_other_type() -> None:
    """True, 1 and 1.0 are equal, and three different things to a model."""

    class Typed(Lightning):
        def forward(self, x: Tensor, option: Any) -> Tensor:  # type: ignore[override]
            factor = {bool: 2.0, int: 3.0, float: 4.0}[type(option)]
            out: Tensor = self.down(self.up(x)) * factor
            return out

    model = Typed(None)
    tp_model = autoshard.parallelize(model, 1, (X, True), degree="max")
    for option in (True, 1, 1.0, True):
        assert torch.equal(tp_model(X, option), model(X, option))
