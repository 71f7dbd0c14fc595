"""A capture that copies repeated layers is, node for node, the one that traces every layer."""

from __future__ import annotations

import contextlib
import itertools
import random
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoshard import capture as capturing
from autoshard import visible_globals
from autoshard.capture import Captured, capture, skeleton
from autoshard.compat import storage_key
from autoshard.repeated_layers import Copies
from autoshard.traced_layer import Traced

LAYERS, HIDDEN = 6, 8
OWN = __name__.partition(".")[0]  # the package of the layers here
COUNTED = ("torch_fn", "seq_nr")  # PyTorch's numbers of calls, which nobody here reads


@contextlib.contextmanager
def all_traced(*_: Any) -> Iterator[Copies]:
    """In place of what copies layers."""
    yield Copies()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Captured, Captured, int]]:
    """Capture a model in both ways: with copies, without, and how many layers were copied."""
    original = Traced.copied

    def run(build: Callable[[], nn.Module], *args: Any, **kwargs: Any) -> Any:
        copies: list[Any] = []

        def counted(*given: Any) -> Any:
            copies.append(original(*given))
            return copies[-1]

        with monkeypatch.context() as patched:
            patched.setattr(Traced, "copied", counted)
            patched.setattr(visible_globals, "TRUSTED", {*visible_globals.TRUSTED, OWN})
            fast = capture(skeleton(build()), args, kwargs)
        with monkeypatch.context() as patched:
            patched.setattr(capturing, "repeated_layers_copied", all_traced)
            full = capture(skeleton(build()), args, kwargs)
        return fast, full, len(copies)

    return run


def described(captured: Captured) -> list[Any]:
    """All that is known of a captured graph, with nodes named by their places."""
    memory: dict[Any, int] = {}
    named: dict[fx.Node, str] = {}

    def value(given: Any) -> Any:
        if isinstance(given, Tensor):
            shared = memory.setdefault(storage_key(given), len(memory))
            layout = (str(given.shape), str(given.stride()), str(given.storage_offset()))
            return type(given), *layout, given.dtype, given.device, given.requires_grad, shared
        if isinstance(given, (list, tuple)):
            return tuple(value(g) for g in given)
        return str(given)

    def graph(given: fx.Graph) -> Iterator[Any]:
        for node in given.nodes:
            named[node] = node.name if node.op in ("placeholder", "get_attr") else f"%{len(named)}"
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: named[n])
            meta = {k: str(v) for k, v in node.meta.items() if k not in ("val", *COUNTED)}
            yield node.op, str(node.target), str(args), str(kwargs), value(node.meta.get("val")), meta
            inner = getattr(given.owning_module, str(node.target), None)
            if node.op == "get_attr" and isinstance(inner, fx.GraphModule):
                yield from graph(inner.graph)

    constants = {name: (t.dtype, t.tolist()) for name, t in captured.constants.items()}
    return [
        *graph(captured.graph), captured.parameters, captured.buffers, constants, captured.inputs,
        captured.out_spec,
    ]  # fmt: skip


def assert_same(fast: Captured, full: Captured) -> None:
    """Line by line, so that the first difference is the message."""
    for line, expected in zip(described(fast), described(full), strict=True):
        assert line == expected


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 6,
    "intermediate_size": 32, "max_position_embeddings": 32, "use_cache": False,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": 16, "n_head": 2, "n_layer": 6, "n_positions": 32, "use_cache": False,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 5, "d_ff": 32,
    "use_cache": False, "decoder_start_token_id": 0,
}  # fmt: skip
NEO = {
    "vocab_size": 64, "hidden_size": 16, "num_heads": 2, "num_layers": 6, "window_size": 4,
    "attention_types": [[["global", "local"], 3]], "max_position_embeddings": 32, "use_cache": False,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"] * 3
GEMMA = {"head_dim": 8, "num_key_value_heads": 1, "layer_types": KINDS}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}

# Class of the model, configuration, how many of its layers are copied.
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, 3),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}, 3),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL, 3),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, 3),  # the first layers have a relative bias
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, **GEMMA}, 2),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", NEO, 2),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SMALL, **EXPERTS}, 3),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SMALL, "word_embed_proj_dim": 16}, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_huggingface(name: str, both: Any) -> None:
    kind, config, given, expected = MODELS[name]

    def build() -> nn.Module:
        made: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**given))
        return made.train()

    fast, full, copies = both(build, **tokens())
    assert_same(fast, full)
    assert copies >= expected


def test_gradient_checkpointing_keeps_its_numbers(both: Any) -> None:
    def build() -> nn.Module:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).train()
        model.gradient_checkpointing_enable()
        return model

    fast, full, copies = both(build, **tokens())
    assert_same(fast, full)
    assert copies == 3
    assert {n.meta["checkpoint"] for n in fast.graph.nodes if "checkpoint" in n.meta} == set(range(6))


def test_encoder_of_torch(both: Any) -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        parts = {"first": nn.Linear(HIDDEN, HIDDEN), "encoder": encoder}
        return nn.Sequential(OrderedDict(parts)).train()

    fast, full, copies = both(build, torch.randn(2, 6, HIDDEN))
    assert_same(fast, full)
    assert copies == LAYERS - 3


class Layer(nn.Module):
    """A layer that does what every layer does, and what `twist(layer, x)` adds."""

    def __init__(self, index: int, twist: Any = None) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.twist = twist

    def forward(self, x: Tensor, *given: Any) -> Any:
        y = x + self.dropout(F.relu(self.linear(x)))
        return y if self.twist is None else self.twist(self, y, *given)


class Stack(nn.Module):
    """Layers one after the other; `call(layer, x, number)` calls one."""

    def __init__(self, twist: Any = None, call: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList(Layer(i, twist) for i in range(LAYERS))
        self.call = call or (lambda layer, x, number: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, layer in enumerate(self.layers):
            x = self.call(layer, x, number)
        return x


X = torch.randn(2, 6, HIDDEN)
STATE: dict[str, int] = {}  # what some twists look at
COUNTER = 0
FOUND: dict[str, Tensor] = {}
ELSEWHERE = nn.Module()


def times(x: Tensor, number: int) -> Tensor:
    """Something else in layer 3: the two that are compared are alike, and the last."""
    return x * 2 if number == 3 else x


def check(both: Any, build: Callable[[], nn.Module], expected: int | None = None) -> None:
    fast, full, copies = both(build, X)
    assert_same(fast, full)
    assert expected is None or copies == expected


def test_plain_layers_are_copied(both: Any) -> None:
    check(both, Stack, LAYERS - 3)


def test_an_attribute_that_is_read(both: Any) -> None:
    check(both, lambda: Stack(lambda layer, x: times(x, layer.index)))


def test_an_attribute_by_dict(both: Any) -> None:
    check(both, lambda: Stack(lambda layer, x: times(x, layer.__dict__["index"])))
    check(both, lambda: Stack(lambda layer, x: times(x, vars(layer)["index"])))


def test_an_object_that_layers_hold(both: Any) -> None:
    class Options:
        def __init__(self, index: int) -> None:
            self.inner = {"index": [index]}

    def build() -> nn.Module:
        model = Stack(lambda layer, x: times(x, layer.options.inner["index"][0]))
        for index, layer in enumerate(model.layers):
            layer.options = Options(index)
        return model

    check(both, build)


def test_a_place_in_a_list_of_layers(both: Any) -> None:
    def build() -> nn.Module:
        model = Stack(lambda layer, x: times(x, layer.siblings.index(layer)))
        for layer in model.layers:
            layer.siblings = list(model.layers)
        return model

    check(both, build)


def test_a_counter_in_a_closure(both: Any) -> None:
    def build() -> nn.Module:
        calls = itertools.count()
        return Stack(lambda layer, x: times(x, next(calls)))

    def listed() -> nn.Module:
        calls: list[int] = []

        def twist(layer: nn.Module, x: Tensor) -> Tensor:
            calls.append(0)
            return times(x, len(calls) - 1)

        return Stack(twist)

    check(both, build, 0)
    check(both, listed, 0)


def _counted(layer: nn.Module, x: Tensor) -> Tensor:
    global COUNTER
    COUNTER += 1
    return times(x, COUNTER - 1)


def test_a_counter_in_a_global(both: Any) -> None:
    def build() -> nn.Module:
        global COUNTER
        COUNTER = 0
        return Stack(_counted)

    check(both, build, 0)


def test_a_global_that_the_model_sets(both: Any) -> None:
    def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
        STATE["number"] = number
        made: Tensor = layer(x)
        return made

    check(both, lambda: Stack(lambda layer, x: times(x, STATE["number"]), call))


class Numbered(Layer):
    """Knows from its class which call it is."""

    number = 0

    def forward(self, x: Tensor, *given: Any) -> Any:
        return times(super().forward(x), type(self).number)


def test_an_attribute_of_the_class(both: Any) -> None:
    def build() -> nn.Module:
        def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
            Numbered.number = number
            made: Tensor = layer(x)
            return made

        model = Stack(call=call)
        model.layers = nn.ModuleList(Numbered(i) for i in range(LAYERS))
        return model

    check(both, build)


def test_a_config_that_the_model_changes(both: Any) -> None:
    class Config:
        number = 0

    def build() -> nn.Module:
        config = Config()

        def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
            layer.config.number = number  # type: ignore[union-attr]
            made: Tensor = layer(x)
            return made

        model = Stack(lambda layer, x: times(x, layer.config.number), call)
        for layer in model.layers:
            layer.config = config
        return model

    check(both, build)


def test_an_attribute_that_the_layer_sets(both: Any) -> None:
    def twist(layer: Any, x: Tensor) -> Tensor:
        layer.last = 1
        return x

    check(both, lambda: Stack(twist))


def test_what_a_layer_leaves_behind(both: Any) -> None:
    """Tensors that layers put into a list of the model's are all there."""

    class Keeping(Stack):
        def forward(self, x: Tensor) -> Any:
            kept.clear()
            return super().forward(x), list(kept)

    kept: list[Tensor] = []

    def twist(layer: nn.Module, x: Tensor) -> Tensor:
        kept.append(x * 2)
        return x

    check(both, lambda: Keeping(twist), 0)


def test_random_numbers_of_python(both: Any) -> None:
    def build() -> nn.Module:
        random.seed(5)  # 0.62, 0.74, 0.80, 0.94, 0.74: the first two are alike
        return Stack(lambda layer, x: x * 2 if random.random() > 0.77 else x)

    check(both, build, 0)


def test_a_weight_of_another_layer(both: Any) -> None:
    def tied() -> nn.Module:
        model = Stack()
        model.layers[3].linear.weight = model.layers[0].linear.weight
        return model

    check(both, tied, LAYERS - 3)


def test_a_weight_from_elsewhere(both: Any) -> None:
    class Sharing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x, self.layers[place].linear.weight)
            return x

    for place in range(LAYERS):  # noqa: B007
        check(both, lambda: Sharing(lambda layer, x, weight: F.linear(x, weight)))


def test_a_buffer_and_a_number_beside_it(both: Any) -> None:
    def build() -> nn.Module:
        model = Stack(lambda layer, x: times(x, int(layer.scale)) + layer.buffer)
        for index, layer in enumerate(model.layers):
            layer.register_buffer("buffer", torch.full((HIDDEN,), float(index)))
            layer.scale = 3.0 if index == 4 else 1.0
        return model

    check(both, build, 2)


def test_hooks_on_one_layer(both: Any) -> None:
    def build() -> nn.Module:
        model = Stack()
        model.layers[3].linear.register_forward_hook(lambda module, args, result: result * 2)
        model.layers[4].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        return model

    check(both, build, 1)


def test_a_forward_of_one_instance(both: Any) -> None:
    def other(layer: Any, x: Tensor) -> Tensor:
        return Layer.forward(layer, x) * 2

    def build() -> nn.Module:
        model = Stack()
        layer: Any = model.layers[3]
        layer.forward = types.MethodType(other, layer)
        return model

    check(both, build, 2)


@pytest.mark.parametrize("change", ["p", "eval", "frozen", "class", "attribute of a part"])
def test_one_layer_that_differs(change: str, both: Any) -> None:
    def build() -> nn.Module:
        model = Stack()
        layer: Any = model.layers[3]
        if change == "p":
            layer.dropout.p = 0.2
        elif change == "eval":
            layer.eval()
        elif change == "frozen":
            layer.requires_grad_(False)
        elif change == "class":
            layer.linear = nn.utils.parametrizations.weight_norm(layer.linear)
        else:
            layer.dropout.inplace = True
        return model

    check(both, build, 2)


def test_a_write_into_the_input(both: Any) -> None:
    def forward(layer: Any, x: Tensor, given: Tensor) -> Tensor:
        given.add_(x.mean())
        return x

    class Writing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x, total = self.first(x), torch.zeros(())
            for layer in self.layers:
                x = layer(x, total)
            return x * total

    check(both, lambda: Writing(forward), 0)


def test_writes_of_its_own(both: Any) -> None:
    def twist(layer: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0].mul_(2)
        return y.add_(1)

    check(both, lambda: Stack(twist), LAYERS - 3)


def test_a_write_into_what_a_layer_gave(both: Any) -> None:
    check(both, lambda: Stack(call=lambda layer, x, number: layer(x).mul_(2)), LAYERS - 3)


def test_a_write_into_a_buffer(both: Any) -> None:
    def build() -> nn.Module:
        model = Stack(lambda layer, x: x + layer.seen.add_(1))
        for layer in model.layers:
            layer.register_buffer("seen", torch.zeros(()))
        return model

    check(both, build, 0)


def test_layers_that_are_called_twice(both: Any) -> None:
    check(both, lambda: Stack(call=lambda layer, x, number: layer(layer(x))))

    def shared() -> nn.Module:
        model = Stack()
        model.layers = nn.ModuleList([*model.layers, *model.layers])
        return model

    check(both, shared, 0)  # PyTorch's tracer has stand-ins for modules of two names


def test_numbers_that_the_model_passes(both: Any) -> None:
    check(both, lambda: Stack(lambda layer, x, n: times(x, n), lambda layer, x, n: layer(x, n)), 0)
    check(
        both,
        lambda: Stack(lambda layer, x, n: times(x, n), lambda layer, x, n: layer(x, int(n == 4) * 3)),
        2,
    )


def test_containers_that_the_model_passes(both: Any) -> None:
    def grown() -> nn.Module:
        seen: list[int] = []

        def twist(layer: nn.Module, x: Tensor, given: list[int]) -> Tensor:
            given.append(0)
            return times(x, len(given) - 1)

        return Stack(twist, lambda layer, x, n: layer(x, seen))

    check(both, grown, 0)


def test_tensors_that_change_roles(both: Any) -> None:
    """Which of the arguments are one tensor, and which tensor all layers are given."""

    class Masked(Stack):
        def __init__(self, twist: Any, which: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
            super().__init__(twist)
            self.which = which

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            one, two = x.cos(), x.sin()
            for number, layer in enumerate(self.layers):
                x = layer(x, self.which(number, x, one, two))
            return x

    def add(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return x + mask

    check(both, lambda: Masked(add, lambda n, x, one, two: one), 3)
    check(both, lambda: Masked(add, lambda n, x, one, two: one if n != 3 else two))
    check(both, lambda: Masked(add, lambda n, x, one, two: one if n != 3 else x))
    check(both, lambda: Masked(add, lambda n, x, one, two: x if n != 3 else one))
    check(both, lambda: Masked(add, lambda n, x, one, two: one if n != 3 else one[:, :1]))


def test_a_tensor_that_is_given_and_found(both: Any) -> None:
    """What the first layers are given is also what all find in a global."""

    class Masked(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            one, two = x.cos(), x.sin()
            FOUND["one"] = one
            for number, layer in enumerate(self.layers):
                x = layer(x, one if number < 3 else two)
            return x

    check(both, lambda: Masked(lambda layer, x, mask: x + mask * FOUND["one"]))
    FOUND.clear()


def test_a_module_in_a_global(both: Any) -> None:
    def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
        ELSEWHERE.number = number  # type: ignore[assignment]
        made: Tensor = layer(x)
        return made

    check(both, lambda: Stack(lambda layer, x: times(x, ELSEWHERE.number), call), 0)


def test_modes_around_and_inside(both: Any) -> None:
    def frozen(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().max() + 1
        return x / scale

    def half(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, x[0])
        return x + y.float().sum(-1, keepdim=True)

    def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
        with torch.set_grad_enabled(number < 3):
            made: Tensor = layer(x)
        return made

    check(both, lambda: Stack(frozen), LAYERS - 3)
    check(both, lambda: Stack(half), LAYERS - 3)
    check(both, lambda: Stack(call=call))


def test_constants_made_of_numbers(both: Any) -> None:
    def twist(layer: Any, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0)

    check(both, lambda: Stack(twist), LAYERS - 3)
    check(both, lambda: Stack(lambda layer, x: x * torch.tensor([2.0] * HIDDEN)), 0)
    check(both, lambda: Stack(lambda layer, x: x * torch.tensor(float(layer.index == 3))))


def test_checkpoints_around_layers(both: Any) -> None:
    def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
        made: Tensor = checkpoint(layer, x, use_reentrant=False)
        return made

    def within(layer: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(F.gelu, x, use_reentrant=False)
        return x

    check(both, lambda: Stack(call=call), LAYERS - 3)
    check(both, lambda: Stack(within), LAYERS - 3)


def test_outputs_of_all_kinds(both: Any) -> None:
    def twist(layer: Any, x: Tensor, given: Tensor) -> Any:
        return x, given, {"n": 3, "none": None}, [x.detach().sum()], layer.linear.weight

    class Many(Stack):
        def forward(self, x: Tensor) -> Any:
            x = first = self.first(x)
            sums = list[Any]()
            for layer in self.layers:
                x, given, plain, (total,), weight = layer(x, first)
                assert given is first and plain == {"n": 3, "none": None}
                assert weight is layer.linear.weight and x.requires_grad and not total.requires_grad
                sums.append(total * weight.sum() * x.shape[1])
            return x, sums

    check(both, lambda: Many(twist), LAYERS - 4)  # the first is given one tensor twice


def test_sizes_of_data(both: Any) -> None:
    def twist(layer: Any, x: Tensor) -> Tensor:
        return x + x[x > 0].sum()

    check(both, lambda: Stack(twist), 0)


def test_code_of_others_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are neither PyTorch's nor transformers', or that call what is not."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("copied")

    monkeypatch.setattr(Traced, "copied", refuse)
    capture(skeleton(Stack()), (X,), {})
    block = transformers.models.gpt2.modeling_gpt2.GPT2Block
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    capture(skeleton(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))), (), tokens())


PLACE = [0]
BY_NAME: dict[str, Callable[..., Any]] = {
    "enter": lambda number: PLACE.__setitem__(0, number),
    "place": lambda: PLACE[0],
}


def test_a_last_layer_that_differs_by_what_nobody_sees(both: Any) -> None:
    """State behind a function in a dictionary: the last layer shows it, and nothing is copied."""

    def call(layer: nn.Module, x: Tensor, number: int) -> Tensor:
        BY_NAME["enter"](number)
        made: Tensor = layer(x)
        return made

    def build() -> nn.Module:
        return Stack(lambda layer, x: x * 2 if BY_NAME["place"]() >= 3 else x, call)

    check(both, build, LAYERS - 3)  # copies that were made before the last one was seen


def test_nothing_stays_behind(both: Any) -> None:
    check(both, Stack)
    assert "__getattribute__" not in vars(nn.Module)
    assert fx.Tracer.call_module.__module__ == "torch.fx._symbolic_trace"
