"""Masks that are proven to be the lower triangle, and masks that only look like it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.testing import assert_close

import autoshard
from autoshard.analysis import AUTOCAST
from autoshard.capture import Captured, capture, skeleton
from autoshard.inequalities import (
    Every,
    Formula,
    Holds,
    Some,
    at_least,
    equal,
    every,
    impossible,
    negated,
    some,
)
from autoshard.passes import restore_causal as restoring
from autoshard.passes.functionalize import functionalize
from autoshard.passes.inline import inline
from autoshard.passes.normalize import normalize
from autoshard.passes.restore_causal import restore_causal
from autoshard.rules import bind
from autoshard.rules.call import op_name

LENGTHS = (2, 3, 4, 5, 7, 8, 9, 16, 33)
Make = Callable[[Tensor], Tensor]  # x of [B, S, 8] -> a mask


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the queries and of the keys."""
    positions = torch.arange(x.shape[1])
    return positions[:, None], positions[None, :]


def triangle(x: Tensor) -> Tensor:
    q, k = places(x)
    return k <= q


def floating(allowed: Tensor, least: float) -> Tensor:
    return torch.where(allowed, 0.0, torch.full((), least, dtype=torch.float64))


def packed(x: Tensor) -> Tensor:
    """What looks for packed sequences in positions that count from 0."""
    positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
    number = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    q, k = places(x)
    rows = torch.arange(x.shape[0])[:, None, None, None]
    return ((k <= q)[None, None] & (number[rows, q] == number[rows, k])).expand(-1, 2, -1, -1)


def written_in_place(x: Tensor) -> Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float64).min, dtype=torch.float64)
    counted = torch.arange(x.shape[1])
    mask.masked_fill_(counted < (counted + 1).view(x.shape[1], 1), 0)
    return mask[None, None].expand(x.shape[0], 1, -1, -1)


def written_later(x: Tensor) -> Tensor:
    """The triangle of positions, the first of which were made zero."""
    positions = torch.arange(x.shape[1])
    mask = positions[None, :]
    positions[:3] = 0
    return mask <= torch.arange(x.shape[1])[:, None]


def two_for_zero() -> Tensor:
    """Captured as a constant of 0, which is written into."""
    offset = torch.tensor([0])
    offset[0] = 2
    return offset


def square(x: Tensor, value: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), value, dtype=dtype)


INF, LEAST = float("-inf"), torch.finfo(torch.float64).min

CAUSAL: dict[str, Make] = {
    "compared": triangle,
    "contrary": lambda x: ~(places(x)[1] > places(x)[0]),
    "difference": lambda x: places(x)[0] - places(x)[1] >= 0,
    "compared with a bool too": lambda x: triangle(x) & (places(x)[1] >= False),
    "less than the next": lambda x: places(x)[1] < places(x)[0] + 1,
    "less than with a constant": lambda x: places(x)[1] < places(x)[0] + torch.tensor([1]),
    "twice": lambda x: 2 * places(x)[1] <= 2 * places(x)[0] + 1,
    "transposed": lambda x: (places(x)[0] <= places(x)[1]).transpose(0, 1),
    "permuted": lambda x: (places(x)[0] <= places(x)[1])[None].permute(0, 2, 1),
    "tril": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "not triu": lambda x: ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
    "tril of ones": lambda x: square(x).tril().bool(),
    "tril == 1": lambda x: torch.tril(square(x)) == 1,
    "triu of -inf": lambda x: torch.triu(square(x, INF), diagonal=1),
    "masked_fill": lambda x: square(x, 0.0).masked_fill(square(x).tril() == 0, INF),
    "where": lambda x: floating(triangle(x), INF),
    "the least number": lambda x: floating(triangle(x), LEAST),
    "of contrary ones": lambda x: (1.0 - square(x).tril()) * LEAST,
    "for each row and head": lambda x: triangle(x)[None, None].expand(x.shape[0], 2, -1, -1),
    "repeated": lambda x: triangle(x)[None, None].repeat(x.shape[0], 2, 1, 1),
    "packed": packed,
    "counted by a sum": lambda x: torch.ones(x.shape[1]).long().cumsum(0)[:, None] > places(x)[1],
    "joined": lambda x: torch.cat([torch.arange(1), 1 + torch.arange(x.shape[1] - 1)]) <= places(x)[0],
    "window of all": lambda x: triangle(x) & (places(x)[1] > places(x)[0] - x.shape[1]),
    "beyond the end": lambda x: triangle(x) | (places(x)[1] >= x.shape[1]),
    "selected": lambda x: torch.arange(x.shape[1]).expand(3, -1)[-1] <= places(x)[0],
    "reversed twice": lambda x: (x.shape[1] - 1 - places(x)[1]) >= (x.shape[1] - 1 - places(x)[0]),
    "sliced": lambda x: torch.arange(x.shape[1] + 3)[3:] - 3 <= places(x)[0],
}  # fmt: skip

ALL: dict[str, Make] = {
    "ones": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool),
    "from the start": lambda x: (places(x)[0] >= 0).expand(x.shape[1], x.shape[1]),
    "zeros": lambda x: square(x, 0.0),
    "one row": lambda x: (torch.arange(x.shape[1]) < x.shape[1])[None, None, None],
    "above and below": lambda x: triangle(x) | (places(x)[1] > places(x)[0]),
    "rows": lambda x: (torch.arange(x.shape[0]) > -1)[:, None, None, None],
}

OTHER: dict[str, Make] = {
    "window": lambda x: triangle(x) & (places(x)[1] > places(x)[0] - 3),
    "wide window": lambda x: triangle(x) & (places(x)[1] > places(x)[0] - 1000),
    "up to a length": lambda x: triangle(x) & (places(x)[1] < 30),
    "from a length": lambda x: triangle(x) | (places(x)[0] > 30),
    "prefix": lambda x: triangle(x) | (places(x)[1] < 3),
    "strict": lambda x: (places(x)[1] < places(x)[0]) | (places(x)[0] == 0),
    "tril(-1)": lambda x: square(x).tril(-1).bool() | (places(x)[0] == 0),
    "tril(1)": lambda x: square(x).tril(1).bool(),
    "one more": lambda x: places(x)[1] <= places(x)[0] + 1,
    "upper": lambda x: places(x)[1] >= places(x)[0],
    "triu of ones": lambda x: square(x).triu().bool(),
    "double pace": lambda x: places(x)[1] <= 2 * places(x)[0],
    "without a hole": lambda x: triangle(x) & ((places(x)[0] != 5) | (places(x)[1] != 2)),
    "ALiBi": lambda x: torch.where(triangle(x), 0.1 * (places(x)[1] - places(x)[0]), INF).double(),
    "finite": lambda x: floating(triangle(x), -3.0),
    "a bias below": lambda x: torch.where(triangle(x), 0.5, INF).double(),
    "the first row": lambda x: triangle(x) | (torch.arange(x.shape[0]) < 1)[:, None, None, None],
    "head by head": lambda x: triangle(x) | (torch.arange(2) < 1)[:, None, None],
    "by several constants": lambda x: triangle(x) | (torch.tensor([0, 1]) > 0)[:, None, None],
    "blocks": lambda x: torch.div(places(x)[0], 4, rounding_mode="floor") >= places(x)[1],
    "of the values": lambda x: triangle(x) | (x[:, None, :, :1] > 0),
    "by the values' sums": lambda x: triangle(x) | (x.sum() > 1e9),
    "row by row": lambda x: (places(x)[1] - places(x)[0])[None]
    <= torch.arange(x.shape[0])[:, None, None, None],
    "packed at 5": lambda x: triangle(x) & ((places(x)[0] >= 5) == (places(x)[1] >= 5)),
    "a product": lambda x: places(x)[0] * places(x)[1] <= places(x)[0] * places(x)[0],
    "-1 is the last": lambda x: (torch.arange(x.shape[1])[places(x)[1] - 1] < places(x)[0])
    | (places(x)[1] == places(x)[0]),
    "written in place": written_in_place,  # a triangle; what is written to is not followed
    "written later": written_later,
    "a constant that is written": lambda x: places(x)[1] <= places(x)[0] + two_for_zero(),
    "in 8 bits": lambda x: places(x)[1].to(torch.int8) <= places(x)[0].to(torch.int8),
}  # fmt: skip


class Attends(nn.Module):
    """One attention for each mask; the model's own mask buffer and parameter for the last two."""

    def __init__(self, masks: dict[str, Make]) -> None:
        super().__init__()
        self.masks = masks
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 64, dtype=torch.float64).view(8, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = (x @ self.weight).unflatten(-1, (2, 4)).transpose(1, 2)
        return {n: F.scaled_dot_product_attention(y, y + 1, y * y, m(x)) for n, m in self.masks.items()}


def example(length: int = 6, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, 8, generator=generator, dtype=torch.float64)


def restored(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Captured, fx.Graph]:
    """The captured graph behind the pass."""
    captured = capture(skeleton(model), args, kwargs)
    graph = inline(captured.graph, captured.differentiable)
    graph = functionalize(graph, captured.parameters)
    graph = normalize(graph, captured.parameters, captured.constants)
    return captured, restore_causal(graph, captured.constants)


def attentions(graph: fx.Graph) -> list[dict[str, Any]]:
    return [bind(n) for n in graph.nodes if op_name(n) == "scaled_dot_product_attention"]


def state(graph: fx.Graph) -> list[str]:
    """Of each attention: causal, all, or masked."""
    found = []
    for call in attentions(graph):
        masked = call["attn_mask"] is not None
        assert not (masked and call["is_causal"])
        found.append("masked" if masked else "causal" if call["is_causal"] else "all")
    return found


def assert_same(model: nn.Module, captured: Captured, graph: fx.Graph, *inputs: Tensor) -> None:
    """The graph's outputs and gradients are the model's."""
    buffers = dict(model.named_buffers())
    given = dict(zip((n for n in captured.inputs if n), inputs, strict=True))
    results, parameters = [], dict(model.named_parameters())
    for run in ("model", "graph"):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        if run == "model":
            out: Any = model(*leaves)
        else:
            by_name = dict(zip(given, leaves, strict=True))
            values = [
                parameters[captured.parameters[n.name]] if n.name in captured.parameters
                else buffers[captured.buffers[n.name]] if n.name in captured.buffers
                else captured.constants[n.name] if n.name in captured.constants
                else by_name[n.name]
                for n in graph.nodes if n.op == "placeholder"
            ]  # fmt: skip
            module = fx.GraphModule(captured.graph.owning_module or nn.Module(), graph)
            out = module(*values)
        flat = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        wanted = [*(x for x in leaves if x.requires_grad), *parameters.values()]
        total = sum((t * torch.linspace(0.5, 2.0, t.numel()).view(t.shape)).sum()
                    for t in flat if t.is_floating_point())  # fmt: skip
        assert isinstance(total, Tensor)
        results.append((flat, torch.autograd.grad(total, wanted, allow_unused=True)))
    assert_close(results[1], results[0])


KINDS = {"causal": CAUSAL, "all": ALL, "masked": OTHER}


@functools.cache
def several(kind: str) -> tuple[nn.Module, Captured, fx.Graph]:
    """All masks of a kind in one model; by the proof alone, without the samples that also refuse."""
    model = Attends(KINDS[kind])
    with pytest.MonkeyPatch.context() as patch:
        if kind == "masked":
            patch.setattr(restoring, "_as_sampled", lambda *_: True)
        return model, *restored(model, example())


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, masks in KINDS.items() for n in masks])
def test_what_is_proven_of_a_mask(kind: str, name: str) -> None:
    """The triangle is found however it is made; what differs from it anywhere, at any length, stays."""
    model, _, graph = several(kind)
    assert state(graph)[list(model.masks).index(name)] == kind  # type: ignore[arg-type,call-overload]


@pytest.mark.parametrize("kind", ["causal", "all", "masked"])
def test_function_and_gradients_stay_at_all_lengths(kind: str) -> None:
    """Longer and shorter than what was captured, and past the lengths that the odd masks turn at."""
    model, captured, graph = several(kind)
    for length in (*LENGTHS, 40):
        assert_same(model, captured, graph, example(length, rows=3))


def test_what_made_the_masks_is_gone() -> None:
    """Nothing but the attention is left."""
    _, _, graph = several("causal")
    assert not {"arange", "le", "where", "tril", "cumsum"} & {op_name(n) for n in graph.nodes}


class Crossed(nn.Module):
    """Queries and keys of two lengths."""

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        q, k = torch.arange(x.shape[1])[:, None], torch.arange(y.shape[1])[None]
        behind = y.shape[1] - x.shape[1]
        masks = [k <= q, k <= q + behind, k >= 0, q >= 0]
        return [
            F.scaled_dot_product_attention(x, y, y, m.expand(q.shape[0], k.shape[1])) for m in masks
        ]


def test_other_numbers_of_keys_are_not_causal() -> None:
    """``is_causal`` is the triangle at the top left; masks at either corner stay, all is all."""
    model = Crossed()
    captured, graph = restored(model, example(4), example(7))
    assert state(graph) == ["masked", "masked", "all", "all"]
    for lengths in ((2, 9), (5, 5), (3, 4)):
        assert_same(model, captured, graph, *map(example, lengths))


class Given(nn.Module):
    """Masks of a buffer, a parameter, an input and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(64, 64).tril().view(1, 1, 64, 64))
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        length, y = x.shape[1], x[:, None]
        q, k = places(x)
        masks = [
            self.bias[:, :, :length, :length] != 0,
            floating(k <= q, INF) + self.slope,
            (k <= q) & mask[:, None, None],
            (k <= q) & (torch.rand(length, length) < 2),
        ]
        return [F.scaled_dot_product_attention(y, y, y, m) for m in masks]


def test_masks_of_values_stay() -> None:
    """A buffer is a triangle until another one is loaded."""
    model = Given()
    padding = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    captured, graph = restored(model, example(), padding)
    assert state(graph) == ["masked"] * 4
    assert "rand" in {op_name(n) for n in graph.nodes}
    assert_same(model, captured, graph, example(), padding)
    model.bias.fill_(1.0)
    assert_same(model, captured, graph, example(), padding)


class Arguments(nn.Module):
    """Attention with all its arguments, under autocast, and a mask that others read too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, mask = x.unflatten(-1, (4, 2)).transpose(1, 2), triangle(x)
        key = y[:, :2]
        grouped = F.scaled_dot_product_attention(y, key, key, mask, scale=0.3, enable_gqa=True)
        dropped = F.scaled_dot_product_attention(y, y, y, attn_mask=mask, dropout_p=0.5)
        own = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            cast = F.scaled_dot_product_attention(y.float(), y.float(), y.float(), triangle(x))
        return grouped, dropped, own, cast, mask


def test_other_arguments_stay() -> None:
    """Scale, groups, dropout and autocast are kept; so is the mask where it is read elsewhere."""
    captured, graph = restored(Arguments(), example())
    assert state(graph) == ["causal"] * 4
    grouped, dropped, _, _ = attentions(graph)
    assert (grouped["scale"], grouped["enable_gqa"], grouped["dropout_p"]) == (0.3, True, 0.0)
    assert (dropped["scale"], dropped["dropout_p"]) == (None, 0.5)
    nodes = [n for n in graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    assert [AUTOCAST in n.meta for n in nodes] == [False, False, False, True]
    assert [op_name(n) for n in graph.nodes].count("le") == 1
    x = example(9)
    module = fx.GraphModule(captured.graph.owning_module or nn.Module(), graph)
    values = [captured.constants.get(n.name, x) for n in graph.nodes if n.op == "placeholder"]
    ours, theirs = module(*values), Arguments()(x)
    for index in (0, 2, 4):
        assert_close(ours[index], theirs[index])


# -- models of transformers ------------------------------------------------------------------------


def tiny(kind: str, **settings: Any) -> nn.Module:
    sizes = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "d_model": 16, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1, "pad_token_id": 1,
        "bos_token_id": 1, "eos_token_id": 1, "use_cache": False, "head_dim": 4, **settings,
    }  # fmt: skip
    auto = {"bert": transformers.AutoModelForMaskedLM, "bart": transformers.AutoModelForSeq2SeqLM}
    known = transformers.CONFIG_MAPPING[kind]()
    config = transformers.AutoConfig.for_model(
        kind, **{k: v for k, v in sizes.items() if hasattr(known, k)}
    )
    torch.manual_seed(0)
    model = auto.get(kind, transformers.AutoModelForCausalLM).from_config(
        config, attn_implementation="sdpa"
    )
    return model.double().eval()


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(length))


class Called(nn.Module):
    """A model of transformers by position: tokens, and a padding mask where there is one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> tuple[Tensor, ...]:
        result = self.model(input_ids=ids, attention_mask=padding, labels=ids)
        return result.loss, result.logits


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("gpt2", {}, ["causal"] * 3),
        ("llama", {}, ["causal"] * 3),
        ("bert", {}, ["all"] * 3),
        ("bart", {}, ["all", "all", "all", "causal", "all"]),
        ("mistral", {"sliding_window": 4}, ["masked"] * 3),
        ("mistral", {"sliding_window": 64}, ["masked"] * 3),
    ],
    ids=str,
)
def test_models_of_transformers(kind: str, settings: dict[str, Any], expected: list[str]) -> None:
    """What was traced as a mask is the kernel's again; function and gradients at other lengths."""
    model = Called(tiny(kind, **settings))
    captured, graph = restored(model, tokens(6))
    assert state(graph) == expected
    for length in (2, 7, 13):
        assert_same(model, captured, graph, tokens(length, rows=3))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_padding_that_is_given_stays(kind: str) -> None:
    """Also where the example's padding is none."""
    model = Called(tiny(kind))
    captured, graph = restored(model, tokens(6), torch.ones(2, 6, dtype=torch.long))
    assert state(graph) == ["masked"] * 3
    padding = (torch.arange(9) < torch.tensor([[9], [5]])).long()
    assert_same(model, captured, graph, tokens(9), padding)


def test_what_is_proven_is_also_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that calls everything causal is stopped by the mask's values at two sizes."""
    monkeypatch.setattr(restoring.Elements, "refuted", lambda *_: True)
    monkeypatch.setattr(restoring, "_allowed", lambda *_: (every(), every()))
    names = ("window", "strict", "upper", "one more", "double pace")
    _, graph = restored(Attends({n: OTHER[n] for n in names}), example())
    assert state(graph) == ["masked"] * len(names)


def test_equal_masks_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, one mask, one proof."""
    proofs: list[Any] = []
    proven = restoring._proven
    monkeypatch.setattr(restoring, "_proven", lambda *given: (proofs.append(given), proven(*given))[1])

    class Layers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = triangle(x)
            for _ in range(3):
                x = F.scaled_dot_product_attention(x, x, x, mask)
            return x

    _, graph = restored(Layers(), example())
    assert state(graph) == ["causal"] * 3 and len(proofs) == 1


def test_verify_compares_with_the_model_and_not_with_the_restored_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window that is taken for the triangle is seen."""
    model, ids = tiny("mistral", sliding_window=4, num_hidden_layers=1), tokens(9)
    inputs = {"input_ids": ids, "labels": ids}
    monkeypatch.setattr(restoring, "_proven", lambda *_: True)
    assert not autoshard.verify(model, 2, inputs).ok


# -- inequalities ----------------------------------------------------------------------------------

X = sympy.symbols("x y z", integer=True)
NUMBERS = st.integers(-3, 3)


def terms() -> st.SearchStrategy[Any]:
    return st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(
        lambda c: sympy.Add(*(a * x for a, x in zip(c, X, strict=False)), c[3])
    )


def formulas() -> st.SearchStrategy[Formula]:
    atoms = st.one_of(terms().map(lambda t: at_least(t, 0)), terms().map(lambda t: equal(t, 0)))
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda p: every(*p)),
            st.tuples(inner, inner).map(lambda p: some(*p)),
            inner.map(negated),
        ),
        max_leaves=6,
    )


def true_at(formula: Formula, values: dict[Any, int]) -> bool:
    if isinstance(formula, Holds):
        return bool(formula.term.subs(values) >= 0)
    return (all if isinstance(formula, Every) else any)(true_at(p, values) for p in formula.parts)


def points() -> Iterator[dict[Any, int]]:
    for values in itertools.product((-4, -1, 0, 1, 3), repeat=3):
        yield dict(zip(X, values, strict=True))


@settings(max_examples=40)
@given(formulas())
def test_what_is_impossible_holds_nowhere(formula: Formula) -> None:
    """Neither a formula nor its contrary is called impossible where a point is known; one is true."""
    contrary = negated(formula)
    inside = list(itertools.islice(points(), 0, None, 7))
    truths = [true_at(formula, p) for p in inside]
    assert [true_at(contrary, p) for p in inside] == [not t for t in truths]
    assert not (any(truths) and impossible([formula]))
    assert not (not all(truths) and impossible([contrary]))
    assert impossible([formula, contrary]) or not isinstance(formula, Holds)


def test_integers_between_fractions_are_none() -> None:
    """0 < 2x < 2 has a solution, but no integer."""
    x, y, _ = X
    assert impossible([at_least(2 * x, 1), at_least(1, 2 * x)])
    assert impossible([at_least(x, y + 1), at_least(y, x)])
    assert not impossible([at_least(x, y), at_least(y, x)])
    assert impossible([Some(())]) and not impossible([])
