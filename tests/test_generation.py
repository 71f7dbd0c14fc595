"""Generation: the ranks generate what the model generates, and each holds its heads of the cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import autoshard
from autoshard import caches, layouts
from autoshard.capture import skeleton
from autoshard.errors import AutoshardError, PlanError, RanksDifferError, UnsoundGraphError
from autoshard.layouts import Leaf, Product
from autoshard.module import ParallelModule
from autoshard.parameters import Stored
from autoshard.passes.prove import prove
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.rank import local_share, placeholder_values, rank_module
from autoshard.sharded import Sharded
from autoshard.simulate import RankContext, run_ranks
from tests.distributed import run_distributed

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def gpt2() -> Any:
    """4 heads, fused queries, keys and values."""
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=98,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> Any:
    """4 query heads, 2 heads of keys and values."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    ).eval()


def mistral() -> Any:
    """A window of 5 tokens: its cache holds 4, and counts what it has seen."""
    sizes = {**SIZES, "num_hidden_layers": 1}
    config = transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=5)
    return transformers.MistralForCausalLM(config).eval()


def t5() -> Any:
    """An encoder, and a decoder with two caches."""
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=98,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def perturbed(model: nn.Module) -> nn.Module:
    """No two logits nearly equal, and no bias zero: a wrong sum moves a token."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@contextmanager
def captures(module: ParallelModule) -> Iterator[list[int]]:
    """The number of captures inside, as the one element of a list."""
    count, capture = [0], module._capture

    def counted(*args: Any) -> Any:
        count[0] += 1
        return capture(*args)

    module.__dict__["_capture"] = counted
    try:
        yield count
    finally:
        del module.__dict__["_capture"]


PROMPT = torch.tensor([[0, 0, 7, 8], [11, 12, 13, 14]])
MASK = (PROMPT != 0).long()
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 2.0},
    "beams": {"num_beams": 2},
    "padded": {"attention_mask": MASK},
    "padded sampling beams": {"attention_mask": MASK, "num_beams": 2, "do_sample": True},
}


def generated(model: Any, way: str, tokens: int = 8, **options: Any) -> Any:
    """What the model generates of the prompts, from a seed."""
    torch.manual_seed(3)
    return model.generate(PROMPT, max_new_tokens=tokens, pad_token_id=0, **{**WAYS[way], **options})


# -- a step with a cache on simulated ranks ----------------------------------------------------


def step(
    model: nn.Module, tp: int, cache: Any, held: Stored | None, request: Any = "max"
) -> tuple[Program, Sharded, caches.Given]:
    """A step of one token after those of a cache, split over ranks that hold shares of the cache."""
    inputs = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache, "use_cache": True}
    given = caches.opened((), inputs, set())
    flat = given.kwargs["past_key_values"]
    hollow = skeleton(model)
    with caches.traced(hollow, given, set()) as found:
        shares = {i + 1: held for i in range(len(flat))} if held else {}
        program = analyse(hollow, given.args, given.kwargs, tp, held=shares)
    _, sharded = rewrite(program, tp, request, caches.positions(found))
    return program, sharded, given


def filled(model: Any) -> Any:
    """A cache of three tokens of two sequences, and the model's weights in float64."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), past_key_values=cache)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_a_step_on_shares_of_a_cache_is_the_models_with_its_gradients(tp: int) -> None:
    """Two key/value heads over 2 and 4 ranks: logits, caches, and gradients of weights and caches."""
    model = perturbed(llama().double())
    cache = filled(model)
    split = Leaf(2, 2, tp // 2)
    program, sharded, given = step(model, tp, cache, (1, split, tp))
    kept = [o for o in sharded.outputs if o is not None]
    assert [(o.dim, o.layout, o.degree) for o in kept] == [(1, split, tp)] * 4

    contents = [t.clone().requires_grad_() for t in given.kwargs["past_key_values"]]
    again = transformers.DynamicCache(
        [(contents[2 * i], contents[2 * i + 1]) for i in range(2)], config=model.config
    )
    result = model(input_ids=given.kwargs["input_ids"], past_key_values=again)
    after = [t for layer in again.layers for t in (layer.keys, layer.values)]
    weights = [torch.randn(t.shape, dtype=t.dtype) for t in (*after, result.logits)]
    sum((o * w).sum() for o, w in zip((*after, result.logits), weights, strict=True)).backward()

    captured = program.captured
    stored = {captured.parameters[p]: share for p, share in sharded.stored.items()}
    named = dict(model.named_parameters())

    def run(rank: RankContext) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor], int]:
        place = rank.group(tp).coordinate
        own = {
            n: (
                local_share(p.detach(), stored[n], rank.group(stored[n][2]).coordinate)
                if n in stored else p.detach()
            ).clone().requires_grad_()
            for n, p in named.items()
        }  # fmt: skip
        shares = [
            layouts.local_part(t.detach(), 1, split, place).clone().requires_grad_() for t in contents
        ]
        flat = [given.kwargs["input_ids"], *shares, True]
        values = placeholder_values(sharded, captured, own, dict(model.named_buffers()), flat)
        outputs = list(rank_module(sharded, rank.group)(*values))
        total = outputs[-1].new_zeros(())
        for output, share, weight in zip(outputs, sharded.outputs, weights, strict=True):
            if share is not None:  # every rank that holds an element is given a part of its gradient
                weight = layouts.local_part(weight, 1, split, place) * 2 / tp
            total = total + (output * weight).sum()
        total.backward()
        return (
            [o.detach() for o in outputs],
            {n: p.grad for n, p in own.items() if p.grad is not None},
            [s.grad for s in shares if s.grad is not None],
            place,
        )

    summed = [torch.zeros_like(t) for t in contents]
    for outputs, gradients, of_shares, place in run_ranks(run, tp):
        for output, share, whole in zip(outputs, sharded.outputs, (*after, result.logits), strict=True):
            expected = whole if share is None else layouts.local_part(whole, 1, split, place)
            assert_close(output, expected.detach())
        for name, parameter in named.items():
            assert parameter.grad is not None
            right = parameter.grad
            if name in stored:
                right = local_share(right, stored[name], place)
            assert_close(gradients[name], right, msg=lambda m, n=name: f"{n}: {m}")
        for total, mine in zip(summed, of_shares, strict=True):
            rows = torch.tensor(layouts.indices(split, place))
            total.index_add_(1, rows, mine)
    for total, whole in zip(summed, contents, strict=True):
        assert whole.grad is not None
        assert_close(total, whole.grad)


def test_what_the_proof_assumes_of_an_input_is_what_it_is_told() -> None:
    """Negative control: the same graph is refused where shares are others, whole, or kept wrongly."""
    model = llama()
    held: Stored = (1, Leaf(2, 2, 1), 2)
    program, sharded, _ = step(model, 2, filled(model), held)
    graph, given = program.analysis.graph, program.captured.held
    flows = {str(n.target) for n in program.analysis.axes.differentiable if n.op == "placeholder"}
    prove(graph, sharded, flows, given)
    with pytest.raises(UnsoundGraphError):
        prove(graph, sharded, flows)
    with pytest.raises(UnsoundGraphError):
        prove(graph, sharded, flows, {**given, next(iter(given)): (3, Leaf(8, 2, 1), 2)})
    with pytest.raises(UnsoundGraphError, match="not every element"):
        prove(graph, sharded, flows, {**given, next(iter(given)): (1, Leaf(2, 2, 2), 2)})
    first = sharded.outputs[0]
    assert first is not None
    for wrong in (None, replace(first, dim=3), replace(first, layout=Leaf(2, 1, 1))):
        broken = replace(sharded, outputs=(wrong, *sharded.outputs[1:]))
        with pytest.raises(UnsoundGraphError, match="output 0"):
            prove(graph, broken, flows, given)


def test_the_order_of_shares_is_proven_too() -> None:
    """Over four ranks of two heads, ranks 0 and 1 hold the first: not ranks 0 and 2."""
    model = llama()
    program, sharded, _ = step(model, 4, filled(model), (1, Leaf(2, 2, 2), 4))
    flows = {str(n.target) for n in program.analysis.axes.differentiable if n.op == "placeholder"}
    other = {name: (1, Leaf(2, 2, 1), 4) for name in program.captured.held}
    prove(program.analysis.graph, sharded, flows, program.captured.held)
    with pytest.raises(UnsoundGraphError):
        prove(program.analysis.graph, sharded, flows, other)


def test_a_share_that_the_plan_does_not_split_is_refused() -> None:
    """A cache over two ranks, and attention at degree 1."""
    model = llama()
    cache = filled(model)
    with pytest.raises(
        PlanError, match=r"is given split as 2/2 in dimension 1 over 2 ranks.*needs it whole"
    ):
        step(model, 2, cache, (1, Leaf(2, 2, 1), 2), {})
    with pytest.raises(PlanError, match="dimension 3"):
        step(model, 2, cache, (3, Leaf(8, 2, 1), 2))


def test_a_whole_cache_is_taken_too_and_leaves_as_shares() -> None:
    """A rank takes its heads of a whole cache where it uses them."""
    model = llama()
    _, sharded, _ = step(model, 2, filled(model), None)
    assert sum(o is not None for o in sharded.outputs) == 4


# -- in one process ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_captures_then_none() -> None:
    """One of the prompts and one of a token, whatever batch and lengths are."""
    model = perturbed(llama())
    module = autoshard.parallelize(copy.deepcopy(model), 1)
    with captures(module) as count:
        assert torch.equal(generated(module, "greedy"), generated(model, "greedy"))
        assert count == [2]
        longer, more = torch.randint(1, 99, (3, 7)), {"max_new_tokens": 20, "pad_token_id": 0}
        longer[0, 0] = 0  # padding, as in the prompts: without any there is no mask, another signature
        assert torch.equal(module.generate(longer, **more), model.generate(longer, **more))
        for way in ("sampling", "beams"):
            assert torch.equal(generated(module, way, 12), generated(model, way, 12))
        assert count == [2]


def test_a_loop_that_runs_modules_by_itself_is_refused() -> None:
    """They have no weights: what it computes would be wrong without a word."""

    class Own(transformers.GPT2LMHeadModel):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, input_ids: Tensor, **rest: Any) -> Any:
            self.transformer.wte(input_ids)
            return super().prepare_inputs_for_generation(input_ids, **rest)

    module = autoshard.parallelize(Own(gpt2().config), 1)
    with pytest.raises(AutoshardError, match=r"runs transformer\.wte by itself"):
        module.generate(PROMPT, max_new_tokens=2, pad_token_id=0)
    sharded = autoshard.parallelize(gpt2(), 1, logits="sharded")
    with pytest.raises(AutoshardError, match="whole logits"):
        sharded.generate(PROMPT)


def test_what_is_refused_says_why() -> None:
    """Static caches, assistants, and models without generate."""
    module = autoshard.parallelize(gpt2(), 1)
    with pytest.raises(AutoshardError, match="cache_implementation='static'"):
        module.generate(PROMPT, cache_implementation="static")
    with pytest.raises(AutoshardError, match="assistant_model"):
        module.generate(PROMPT, assistant_model=gpt2())
    config = module.config
    with pytest.raises(AutoshardError, match="StaticCache"):
        module(
            input_ids=PROMPT, past_key_values=transformers.StaticCache(config=config, max_cache_len=9)
        )
    with pytest.raises(ValueError, match="leave it out"):
        autoshard.parallelize(gpt2(), 1, {"input_ids": PROMPT, "past_key_values": filled(gpt2())})
    plain = autoshard.parallelize(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), 1)
    with pytest.raises(AttributeError, match="has no generate"):
        plain.generate(PROMPT)


# -- caches taken apart ------------------------------------------------------------------------


def test_apart_and_together_again() -> None:
    """Tensors and counters go, everything else is the form; parts that are kept keep their identity."""
    config = mistral().config
    cache = transformers.DynamicCache(config=config)
    cache.update(torch.ones(2, 2, 7, 8), torch.zeros(2, 2, 7, 8), 0)
    layer = cache.layers[0]
    counters = {(type(layer), "cumulative_length")}
    apart = caches.Apart(counters)
    form = apart.form(cache)
    hash(form)
    assert apart.numbers == [7]
    assert layer.keys in apart.tensors or any(t is layer.keys for t in apart.tensors)
    new = caches.together(form, apart.tensors, [9], torch.device("cpu"))
    assert new.layers[0].cumulative_length == 9 and new.layers[0].keys is layer.keys
    assert new.layers[0] is not layer and new.layers[0].sliding_window == 5
    same = caches.together(form, apart.tensors, [9], torch.device("cpu"), cache)
    assert same is cache and cache.layers[0] is layer and layer.cumulative_length == 9
    assert caches.Apart(set()).form(cache) != form
    assert caches.Apart(counters).form(cache) == form


def test_what_has_no_form_is_refused() -> None:
    """A cache that holds a function."""
    cache = transformers.DynamicCache()
    cache.hook = lambda x: x
    with pytest.raises(AutoshardError, match="hook is function"):
        caches.opened((cache,), {}, set())


def test_which_layouts_are_chunks() -> None:
    """Rank r holds chunk ``r // stride % parts`` of ``torch.chunk``, or the layout is none of these."""
    assert layouts.chunks(Leaf(6, 2, 1), 2) == (2, 1)
    assert layouts.chunks(Leaf(2, 2, 2), 4) == (2, 2)
    assert layouts.chunks(Product((Leaf(4, 2, 1), Leaf(8))), 2) == (2, 1)
    assert layouts.chunks(Product((Leaf(4, 2, 2), Leaf(8))), 4) == (2, 2)
    assert layouts.chunks(Product((Leaf(8), Leaf(4, 2, 1))), 2) is None
    assert layouts.chunks(layouts.parse("4/2 | 4/2"), 2) is None
    assert layouts.chunks(Leaf(8), 2) is None


# -- on processes ------------------------------------------------------------------------------


def _generate(names: tuple[str, ...], ways: tuple[str, ...], tp: int, train: bool) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in names:
        model = perturbed(globals()[name]())
        module = autoshard.parallelize(copy.deepcopy(model), tp, degree="max")
        for way in ways:
            found[name, way] = generated(module, way), generated(model, way)
        both = {"return_dict_in_generate": True, "output_logits": True}
        with captures(module) as count:
            full, right = (generated(m, "greedy", 20, **both) for m in (module, model))
        assert count == [0], name  # the window is full by now
        assert_close(full.logits, right.logits)
        found[name, "cache"] = _sizes(full.past_key_values), _sizes(right.past_key_values)
        for mine, own in zip(
            _tensors(full.past_key_values), _tensors(right.past_key_values), strict=True
        ):
            assert_close(mine.full_tensor() if isinstance(mine, DTensor) else mine, own)
    torch.manual_seed(dist.get_rank())
    try:
        module.generate(PROMPT, max_new_tokens=9, do_sample=True, temperature=9.0, pad_token_id=0)
    except RanksDifferError as error:
        found["seeds"] = str(error)
    found["shares"] = _with_gradients(module, model, train)
    return found


def _tensors(cache: Any) -> list[Tensor]:
    parts = (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if hasattr(cache, "is_updated")
        else [cache]
    )
    return [t for part in parts for layer in part.layers for t in (layer.keys, layer.values)]


def _sizes(cache: Any) -> int:
    """Bytes of the keys and values that this rank holds."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in _tensors(cache)]
    return sum(t.numel() * t.element_size() for t in local)


def _with_gradients(module: ParallelModule, model: Any, train: bool) -> list[bool]:
    """Gradients through two calls on one cache; which of its tensors are shares."""
    module.train(train), model.train(train)
    totals, held = [], []
    for one in (module, model):
        cache = transformers.DynamicCache(config=model.config)
        one(input_ids=PROMPT, past_key_values=cache)
        result = one(input_ids=PROMPT[:, :2], past_key_values=cache)
        held.append([isinstance(t, DTensor) for t in _tensors(cache)])
        total = result.logits.sin().sum()
        for t in _tensors(cache):
            whole = t.full_tensor() if isinstance(t, DTensor) else t
            total = total + (whole * torch.arange(whole.numel()).view(whole.shape).sin()).sum()
        total.backward()
        totals.append(total.detach())
    assert_close(*totals)
    right = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        gradient = autoshard.parameters.whole(parameter.grad, module.share_of(name))
        assert_close(
            gradient, right[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    return held[0]


def _check(ranks: list[Mapping[Any, Any]], copies: int) -> None:
    for found in ranks:
        for key, (mine, own) in ((k, v) for k, v in found.items() if isinstance(k, tuple)):
            if key[1] == "cache":
                assert mine * copies == own, key
            else:
                assert torch.equal(mine, own), key
        assert "chose other tokens" in found["seeds"]


@pytest.mark.slow
def test_two_ranks_generate_what_the_model_does() -> None:
    """Fused heads, a window, an encoder and grouped heads; each rank holds half of the cache.

    In train mode the caches that a call is given leave whole.
    """
    ways, names = ("greedy", "padded sampling beams"), ("t5", "mistral", "gpt2")
    ranks = run_distributed(_generate, 2, names, ways, 2, True, timeout=500.0)
    _check(ranks, 2)
    assert not any(any(found["shares"]) for found in ranks)


@pytest.mark.slow
def test_four_ranks_of_two_heads_hold_one_each() -> None:
    """Fewer heads than ranks: a rank holds the head that its queries use, half of the cache.

    Gradients flow through shares that two ranks hold.
    """
    ranks = run_distributed(_generate, 4, ("llama",), ("padded", "sampling"), 4, False, timeout=500.0)
    _check(ranks, 2)
    assert all(all(found["shares"]) for found in ranks)
