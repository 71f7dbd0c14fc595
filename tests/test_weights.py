"""Models built without memory: read from files, or drawn, share by share; and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import autoshard
from autoshard import AutoshardError, CheckpointError, weights
from tests.distributed import run_distributed
from tests.models import nanogpt

GPT = nanogpt.GPTConfig(n_layer=2, n_head=4, n_embd=32)


def llama(layers: int = 2) -> transformers.LlamaForCausalLM:
    """Fewer key heads than heads, rotary buffers that are in no file, an odd vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=101, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


INPUT = {"input_ids": torch.arange(12).view(2, 6)}


def hollow(make: Any, *args: Any) -> Any:
    with autoshard.meta_parameters():
        model = make(*args)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    return model


# -- on ranks -------------------------------------------------------------------------------------


def filled(folder: str, world: int) -> dict[str, Any]:
    """A Llama from one file and from several, a GPT's fused weights, and each by its own init."""
    found: dict[str, Any] = {}
    for name in ("one", "several"):
        model = autoshard.parallelize(hollow(llama), world, INPUT, degree="max")
        with pytest.raises(AutoshardError, match="have no values"):
            model(**INPUT)
        model.load_weights(f"{folder}/{name}")
        found[name] = model(**INPUT).logits.detach()
    found["state"] = model.full_state_dict()
    model.save_pretrained(f"{folder}/written")

    batch = nanogpt.inputs(nanogpt.GPT(GPT))
    gpt = autoshard.parallelize(hollow(nanogpt.GPT, GPT), world, batch, degree="max")
    gpt.load_weights(f"{folder}/gpt.safetensors")
    found["gpt"] = gpt.full_state_dict()
    torch.manual_seed(5)
    gpt.init_weights(nanogpt.GPT._init_weights.__get__(gpt))
    found["drawn"] = gpt.full_state_dict()
    torch.manual_seed(5)
    model.init_weights()
    found["drawn llama"] = model.full_state_dict()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a Llama and of a GPT."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    model = llama()
    model.save_pretrained(path / "one")
    model.save_pretrained(path / "several", max_shard_size="20KB")
    assert (path / "several" / weights.INDEX).exists()
    gpt = nanogpt.GPT(GPT)
    state = {n: t for n, t in gpt.state_dict().items() if n != "lm_head.weight"}  # tied
    save_file(state, path / "gpt.safetensors")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_filled_on_ranks(folder: Path, world: int) -> None:
    """The numbers of the files, and those of the model's own init on one process, bit for bit."""
    torch.manual_seed(1)
    right = llama()
    ranks = run_distributed(filled, world, str(folder), world, timeout=300)
    for found in ranks:
        assert_close(found["state"], right.state_dict(), rtol=0, atol=0)
        for name in ("one", "several"):
            assert_close(found[name], right(**INPUT).logits.detach())
        gpt = load_file(folder / "gpt.safetensors")
        gpt["lm_head.weight"] = gpt["transformer.wte.weight"]
        assert_close(found["gpt"], gpt, rtol=0, atol=0)

        plain = nanogpt.GPT(GPT)
        torch.manual_seed(5)
        plain.apply(plain._init_weights)
        assert_close(found["drawn"], dict(plain.state_dict()), rtol=0, atol=0)
        other = llama()
        torch.manual_seed(5)
        other.apply(other._init_weights)
        assert_close(found["drawn llama"], dict(other.state_dict()), rtol=0, atol=0)
    written = transformers.LlamaForCausalLM.from_pretrained(folder / "written")
    assert_close(dict(written.state_dict()), dict(right.state_dict()), rtol=0, atol=0)


# -- on one ---------------------------------------------------------------------------------------


def one(model: nn.Module, *example: Any) -> autoshard.ParallelModule:
    return autoshard.parallelize(model, 1, *example, degree="max")


def test_the_body_without_its_head(folder: Path) -> None:
    """Names with the body's prefix and without it; what is not in the model is said."""
    torch.manual_seed(1)
    right = llama()
    config = right.config
    with autoshard.meta_parameters():
        body = transformers.LlamaModel(config).eval()
    body_on_one = one(body, INPUT)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and 0 other tensors .* strict=False"):
        body_on_one.load_weights(folder / "one")
    assert body_on_one.load_weights(folder / "one", strict=False) == ("lm_head.weight",)
    assert_close(body_on_one.full_state_dict(), dict(right.model.state_dict()), rtol=0, atol=0)


class Deep(nn.Module):
    """A parent that draws its children's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 300), nn.Linear(300, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("through", ["data", "parameter"])
def test_an_init_that_reaches_into_children(through: str) -> None:
    """The same numbers as on one process, however it writes."""

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, Deep):
            nn.init.uniform_(module.scale)
            with torch.no_grad():
                for child in (module.up, module.down):
                    weight = child.weight.data if through == "data" else child.weight
                    weight.mul_(0.5).add_(torch.randn(weight.shape))
                    (child.bias.data if through == "data" else child.bias).zero_()

    for width in (300, 30_000):  # small parameters have memory when hollow, large ones have not
        made = nn.Sequential(Deep(), Deep())
        for deep in made:
            deep.up, deep.down = nn.Linear(8, width), nn.Linear(width, 8)
        torch.manual_seed(3)
        made.apply(init)
        with autoshard.meta_parameters():
            empty = nn.Sequential(Deep(), Deep())
            for deep in empty:
                deep.up, deep.down = nn.Linear(8, width), nn.Linear(width, 8)
        tp_model = one(empty, (torch.randn(4, 8),))
        torch.manual_seed(3)
        tp_model.init_weights(init)
        assert_close(tp_model.full_state_dict(), dict(made.state_dict()), rtol=0, atol=0)


def test_what_an_init_leaves_out() -> None:
    """A parameter that nothing wrote is named; without an init, a module that has none is."""
    with autoshard.meta_parameters():
        tp_model = one(Deep(), (torch.randn(4, 8),))
    with pytest.raises(AutoshardError, match="Deep has parameters and no reset_parameters"):
        tp_model.init_weights()

    def partly(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    with pytest.raises(AutoshardError, match="scale and 0 other parameters were not initialised"):
        tp_model.init_weights(partly)
    with pytest.raises(AutoshardError, match="scale and 0 other parameters have no values"):
        tp_model(torch.randn(4, 8))


def test_wrong_files(folder: Path, tmp_path: Path) -> None:
    """Each error names the file and the tensor; nothing was filled."""
    right = load_file(folder / "one" / weights.SINGLE)
    tp_model = one(hollow(llama), INPUT)

    def said(path: Path) -> str:
        with pytest.raises(CheckpointError) as raised:
            tp_model.load_weights(path)
        return str(raised.value)

    name = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / weights.SINGLE
    save_file({n: t for n, t in right.items() if n != name}, file)
    assert f"{name} and 0 other parameters are in no file of {tmp_path}" in said(tmp_path)
    save_file({**right, name: torch.zeros(32, 48)}, file)
    assert f"{file}: {name} has the shape [32, 48], and {name} of the model [48, 32]" in said(tmp_path)
    save_file(right, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert f"{file} is damaged" in said(tmp_path) and f"{file} is damaged" in said(file)
    file.write_bytes(whole)
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(right, "gone")}))
    assert f"there is no file {tmp_path / 'gone'}" in said(tmp_path)
    (tmp_path / weights.INDEX).write_text("[]")
    assert "is not an index of weights" in said(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save(right, tmp_path / "empty" / "pytorch_model.bin")
    assert "Files of torch.save are not read" in said(tmp_path / "empty")
    assert f"there is no file {tmp_path / 'nowhere'}" in said(tmp_path / "nowhere")
    with pytest.raises(AutoshardError, match="have no values"):
        tp_model(**INPUT)


def test_buffers_on_meta_are_refused() -> None:
    """Rotary frequencies would be zeros, or whatever is in memory."""
    with torch.device("meta"):
        model = llama()
    with pytest.raises(AutoshardError, match=r"inv_freq.*meta_parameters"):
        autoshard.parallelize(model, 1, INPUT)
