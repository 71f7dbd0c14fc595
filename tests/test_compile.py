"""torch.compile of a parallel module: one graph, the same numbers, collectives that it sees."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from torch import Tensor, fx, nn
from torch import distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import autoshard
from autoshard import groups, traced_random
from autoshard.groups import Lane, ProcessGroupComm, Room
from tests.distributed import run_distributed
from tests.test_fuse import Parallel

aten = torch.ops.aten
VOCABULARY = 515  # 2 does not divide it


def _model(kind: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=2,
                n_embd=64,
                n_head=4,
                vocab_size=VOCABULARY,
                n_positions=64,
                use_cache=False,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


def _ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


class _Graphs:
    """A backend that runs what it is given as it is, and counts the collectives in it.

    under: how many matmuls stand between each all-reduce of the backward and its wait.
    """

    def __init__(self) -> None:
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.under: list[int] = []
        self.compiler = aot_autograd(
            fw_compiler=self._counting(self.forward),
            bw_compiler=self._counting(self.backward, self.under),
        )

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        return self.compiler(module, inputs)

    @staticmethod
    def _counting(counter: Counter[str], under: list[int] | None = None) -> Any:
        def compiler(module: fx.GraphModule, inputs: list[Any]) -> Any:
            counter.clear()
            if under is not None:
                under[:] = _matmuls_under(module.graph)
            counter.update(
                n.target._schema.name.partition("::")[2]
                for n in module.graph.nodes
                if isinstance(n.target, torch._ops.OpOverload) and "c10d" in n.target._schema.name
            )
            return module

        return compiler


def _matmuls_under(graph: fx.Graph) -> list[int]:
    """For each all-reduce, the matmuls between it and its wait."""
    nodes = list(graph.nodes)
    found = []
    for place, node in enumerate(nodes):
        if node.target is torch.ops._c10d_functional.all_reduce.default:
            (wait,) = node.users
            between = nodes[place : nodes.index(wait)]
            found.append(sum(n.target in (aten.mm.default, aten.addmm.default) for n in between))
    return found


def _local(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor() if isinstance(value, DTensor) else value


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [_local(p.grad).clone() for p in model.parameters()]
    model.zero_grad()
    return found


def _give_lanes(model: autoshard.ParallelModule) -> list[int]:
    """As if on a GPU; what the products are told to leave, call by call."""
    told: list[int] = []
    groups.leave_multiprocessors = lambda count, of: told.append(count)
    for group in vars(model._last.module).values():
        if isinstance(group, ProcessGroupComm):
            narrow = dist.new_group(group.ranks)
            assert isinstance(narrow, dist.ProcessGroup)
            group.lanes = (
                Lane(Room(0, 64, 24, 32), group.process_group, 132),
                Lane(Room(100, 100, 8, 8), narrow, 132),
            )
    return told


def _compiled_and_not(kind: str, tp: int, lanes: bool = False) -> dict[str, Any]:
    ids = _ids(2, 16)
    tp_model = autoshard.parallelize(
        _model(kind).train(), tp, {"input_ids": ids, "labels": ids}, degree="max"
    )
    told = _give_lanes(tp_model) if lanes else []
    graphs = _Graphs()
    compiled = torch.compile(tp_model, fullgraph=True, backend=graphs)
    found: dict[str, Any] = {}
    for shape in ((2, 16), (3, 17), (5, 9)):
        ids = _ids(*shape)
        told.clear()
        plain = tp_model(input_ids=ids, labels=ids)
        plain.loss.backward()
        expected = _gradients(tp_model)
        found["eager"] = list(told)
        told.clear()
        out = compiled(input_ids=ids, labels=ids)
        out.loss.backward()
        found["compiled"] = list(told)
        assert type(out) is type(plain)
        torch.testing.assert_close(out.loss, plain.loss)
        assert out.logits.shape == plain.logits.shape
        torch.testing.assert_close(_local(out.logits), _local(plain.logits), check_stride=False)
        torch.testing.assert_close(_gradients(tp_model), expected)
    assert len(tp_model._compiled) == 1
    found |= {"forward": dict(graphs.forward), "backward": dict(graphs.backward)}
    found["under"] = list(graphs.under)
    tp_model.eval()
    with torch.no_grad():
        expected = tp_model(input_ids=ids).logits
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_break_and_the_same_numbers(kind: str) -> None:
    """One graph for all shapes: loss, logits and every gradient are those without compilation."""
    for found in run_distributed(_compiled_and_not, 2, kind, 2, timeout=300):
        # Two all-reduces a layer, the embedding's, the loss's two, each with its wait; and their
        # transposes: two a layer and the last norm's.
        assert found["forward"] == {"all_reduce": 7, "wait_tensor": 7}
        assert found["backward"] == {"all_reduce": 5, "wait_tensor": 5}
        # Those of an input's gradient end after the gradients of the weights: per layer of the MLP (two
        # weights in Llama) and of q, k and v (one in GPT-2). The head's weight is padded, so computed.
        assert found["under"] == [0, *([1, 1] if kind == "gpt2" else [2, 3]) * 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_products_that_leave_room_are_one_operator(kind: str) -> None:
    """Compiled as in eager: the same numbers, and each sum's lane is left to it and taken back."""
    for found in run_distributed(_compiled_and_not, 2, kind, 2, True, timeout=300):
        # From 100 columns on 8. MLP: 128 of a rank in GPT-2, 64 and 64 in Llama; q, k and v: 96 and 32.
        backward = [8, 0, 32, 0] if kind == "gpt2" else [32, 0, 32, 0]
        assert found["eager"] == backward * 2
        assert found["compiled"] == found["eager"]
        assert found["backward"] == {"all_reduce": 1, "wait_tensor": 1}  # the padded head's


def _parallel_blocks() -> tuple[Counter[str], Counter[str]]:
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(2, 5, 16)
    whole = copy.deepcopy(model)
    expected = whole(x)
    expected.backward()
    split = autoshard.parallelize(model, 2, (x,), degree="max", device="cpu", check_inputs=False)
    graphs = _Graphs()
    loss = torch.compile(split, backend=graphs, fullgraph=True)(x)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in split.named_parameters():
        gradient = whole.get_parameter(name).grad
        torch.testing.assert_close(_whole(parameter.grad), gradient, msg=lambda m, n=name: n + m)
    return graphs.forward, graphs.backward


@pytest.mark.slow
def test_results_that_are_added_are_summed_once() -> None:
    """Attention and MLP side by side: one all-reduce a layer forward, and one backward."""
    for found in run_distributed(_parallel_blocks, 2, timeout=200):
        assert [counter["all_reduce"] for counter in found] == [2, 2]


def test_what_was_never_captured_is_a_break_with_its_reason() -> None:
    """A compiled call for which there is no graph says what to do; without fullgraph it runs."""
    ids = _ids(2, 8)
    tp_model = autoshard.parallelize(_model("gpt2").eval(), 1, {"input_ids": ids})
    with pytest.raises(Exception, match="call the model with them once, not compiled"):
        torch.compile(tp_model, fullgraph=True, backend="eager")(input_ids=ids, labels=ids)
    torch._dynamo.reset()
    loss = torch.compile(tp_model, backend="eager")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, tp_model(input_ids=ids, labels=ids).loss)


def _with_dropout(checkpoint: str | None) -> dict[str, Any]:
    ids = _ids(4, 16)
    tp_model = autoshard.parallelize(
        _model("gpt2", dropout=0.3).train(), 2, {"input_ids": ids, "labels": ids}, degree="max",
        checkpoint=checkpoint,
    )  # fmt: skip
    compiled = torch.compile(tp_model, fullgraph=True, backend="aot_eager")
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for seed in (1, 1, 2):
        tp_model.manual_seed(seed)
        for _ in range(2):
            loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            found["losses"].append(loss.item())
            found["gradients"].append(_gradients(tp_model))
    found["norms"] = {
        name: grad
        for (name, _), grad in zip(tp_model.named_parameters(), found["gradients"][0], strict=True)
        if "ln_" in name
    }
    return found


@pytest.mark.slow
def test_dropout_repeats_and_is_the_same_when_computed_again() -> None:
    """From a seed the same step, bit for bit; two steps differ; with checkpoint="layer" as without."""
    plain = run_distributed(_with_dropout, 2, None, timeout=300)
    again = run_distributed(_with_dropout, 2, "layer", timeout=300)
    for found in (*plain, *again):
        losses = found["losses"]
        assert losses[:2] == losses[2:4] and losses[0] != losses[1] and losses[0] != losses[4]
    # Outside regions masks are those of all ranks: what is whole has one gradient on both.
    assert plain[0]["losses"] == plain[1]["losses"]
    torch.testing.assert_close(plain[0]["norms"], plain[1]["norms"], rtol=0, atol=0)
    assert plain[0]["losses"] == pytest.approx(again[0]["losses"], rel=1e-6)
    for rank in range(2):
        torch.testing.assert_close(plain[rank]["gradients"], again[rank]["gradients"])


def _one_layer_at_a_time() -> None:
    ids = _ids(2, 16)
    tp_model = autoshard.parallelize(
        _model("llama").train(), 2, {"input_ids": ids, "labels": ids}, degree="max"
    )
    plain = tp_model(input_ids=ids, labels=ids)
    plain.loss.backward()
    expected = _gradients(tp_model)
    for layer in tp_model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    loss = tp_model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, plain.loss)
    torch.testing.assert_close(_gradients(tp_model), expected)


@pytest.mark.slow
def test_layers_compile_one_at_a_time() -> None:
    """`layer.compile()` for the layers of the model gives the same numbers."""
    run_distributed(_one_layer_at_a_time, 2, timeout=300)


class Scaled(nn.Module):
    """A part of its hidden values is an output, and may be given to the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: [b, 8], scale: [b, 16] -> [b, 8], [b, 16]."""
        hidden = self.up(x).relu()
        hidden = hidden if scale is None else hidden * scale
        return self.down(hidden), hidden


def _shares_go_in() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = Scaled().eval()
    tp_model = autoshard.parallelize(model, 2, (x,), degree="max", logits="sharded")
    assert tp_model.mesh is not None
    given = distribute_tensor(x, tp_model.mesh["tp"], [Replicate()]).requires_grad_()

    def step(call: Any) -> list[Tensor]:
        out, hidden = call(x)
        assert isinstance(hidden, DTensor) or call is model
        inputs = x.clone().requires_grad_() if call is model else given
        out, again = call(inputs, hidden)
        (out.square().sum() + _whole(again).square().sum()).backward()
        found = [out, again, inputs.grad, *(p.grad for p in tp_model.parameters())]
        if call is model:
            found[3:] = [p.grad for p in model.parameters()]
        given.grad = None
        tp_model.zero_grad()
        return [_whole(value).detach() for value in found]

    right = step(model)
    for call in (tp_model, torch.compile(tp_model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(step(call), right)


@pytest.mark.slow
def test_shares_go_in() -> None:
    """DTensors as inputs, split or whole: values and gradients of two compiled calls in a row."""
    run_distributed(_shares_go_in, 2, timeout=300)


def test_bits_are_even_and_independent() -> None:
    """Every bit is 1 half of the time, and equal to that of another call or seed half of the time."""
    words = torch.tensor([123456789, -987654321])
    shape = torch.Size((1000, 200))
    first = traced_random.uniform_bits(words, 0, shape)
    others = {
        "the next call": traced_random.uniform_bits(words, 1, shape),
        "another seed": traced_random.uniform_bits(words + 1, 0, shape),
        "the next element": first.view(-1).roll(1).view(shape),
        "the next row": first.roll(1, 0),
    }
    n = first.numel()
    limit = 6 * 0.5 / n**0.5  # six standard deviations
    for bit in range(32):
        ones = (first >> bit) & 1
        assert abs(ones.double().mean().item() - 0.5) < limit
        for name, other in others.items():
            same = (ones == ((other >> bit) & 1)).double().mean().item()
            assert abs(same - 0.5) < limit, (bit, name)


def test_dropout_keeps_its_share() -> None:
    """Of ones, a share p becomes 0 and the others 1 / (1 - p); 0 and 1 are as in PyTorch."""
    words = (torch.tensor([5, 6]), torch.tensor([5, 6]))
    x = torch.ones(400, 500)
    for p in (0.0, 0.1, 0.5, 1.0):
        y = traced_random.FORMS[aten.dropout.default](words, x, p, True)
        zero = (y == 0).double().mean().item()
        assert abs(zero - p) < 6 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-12
        if p < 1.0:
            kept = y[y != 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_gradient_of_its_mask(masked: bool) -> None:
    """The dropped attention is one function of its operands: finite differences agree."""
    torch.manual_seed(0)
    words = torch.tensor([5, -6])
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.randn(4, 4, dtype=torch.float64, requires_grad=True) if masked else None

    def dropped(*given: Tensor | None) -> Tensor:
        out: Tensor = traced_random.attention(words, 3, *given, 0.5, False, None, False)
        return out

    state = torch.get_rng_state()
    inputs = (q, k, v, mask)
    assert torch.autograd.gradcheck(dropped, inputs)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    whole = nn.functional.scaled_dot_product_attention(q, k, v, mask)
    assert not torch.allclose(dropped(*inputs), whole)
    assert copy.deepcopy(words).equal(words)


def _attended(how: str, masked: bool, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """Dropped attention under autocast, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(1, 2, 4, 8, generator=generator).to(d).requires_grad_() for d in dtypes[:3]]
    mask = torch.randn(4, 4, generator=generator).to(dtypes[3]).requires_grad_() if masked else None
    words = torch.tensor([5, -6])
    attention = aten.scaled_dot_product_attention.default

    def dropped(*given: Tensor | None) -> Tensor:
        if how == "PyTorch":
            with traced_random._seeded(words, 0, words.device):
                return attention(*given, dropout_p=0.5)
        traced_random.first_site()
        form: Tensor = traced_random.FORMS[attention]((words, words), *given, dropout_p=0.5)
        return form

    if how == "compiled":
        dropped = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = dropped(*operands, mask)
    out.float().square().sum().backward()
    wanted = operands if mask is None else [*operands, mask]
    return [out.detach(), *(_local(x.grad) for x in wanted)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["called", "compiled"])
def test_attention_under_autocast(how: str, masked: bool) -> None:
    """Operands of several dtypes are cast as PyTorch casts them: bits, dtypes and gradients."""
    low, high = torch.bfloat16, torch.float32
    for dtypes in ((high, high, high, high), (high, low, high, low), (low, low, low, high)):
        right = _attended("PyTorch", masked, dtypes)
        assert right[0].dtype == low
        torch.testing.assert_close(_attended(how, masked, dtypes), right, rtol=0, atol=0)
