"""Scripts with Hugging Face's Trainer and Accelerate: on ranks, and on one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import default_data_collator

import autoshard

WORDS, LENGTH = 48, 10


class Texts(Dataset[dict[str, Any]]):
    """Token sequences, some labels ignored, and a column that no model takes."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(WORDS, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index]
        labels = tokens.masked_fill(torch.arange(LENGTH) >= 4 + index % 5, -100)  # as padding has
        return {"input_ids": tokens, "labels": labels, "source": index}


class Stream(IterableDataset[dict[str, Any]]):
    """Without a length."""

    def __iter__(self) -> Any:
        texts = Texts(8, 1)
        return (texts[i] for i in range(8))


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Tied embeddings, q, k and v in one weight, norms that the optimizer must not decay."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=None, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    for parameter in model.parameters():  # norms and biases too: decay must show
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def split(model: nn.Module, tp: int = 2) -> nn.Module:
    """Over ``tp`` ranks, with copies beside it if there are more; the plain model in one process."""
    if not dist.is_initialized():
        return model
    example = {**default_data_collator([Texts(4, 1)[i] for i in range(4)])}
    example = {"input_ids": example["input_ids"], "labels": example["labels"]}
    example["num_items_in_batch"] = torch.tensor(3.0)
    model = autoshard.parallelize(model, tp, example, degree="max")
    if dist.get_world_size() > tp:
        autoshard.fully_shard(model, reshard_after_forward=False)  # what an evaluation leaves whole
    return model


def renewed(model: nn.Module) -> nn.Module:
    """The model as it was at first, with what it has captured, for another Trainer."""
    model.load_state_dict(gpt2().state_dict())
    if hasattr(model, "_is_accelerate_prepared"):
        del model._is_accelerate_prepared
    return model


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    """The Trainer on two or four ranks, or on one process: 4 rows a step in all."""
    arguments = {name: options.pop(name) for name in list(options) if name != "compute_metrics"}
    copies = dist.get_world_size() // model.tp_size if dist.is_initialized() else 1
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2,
        "weight_decay": 0.3, "max_grad_norm": 0.5, "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4 // copies, "per_device_eval_batch_size": 4 // copies,
    }  # fmt: skip
    logging.disable(logging.WARNING)
    if isinstance(model, autoshard.ParallelModule):
        from autoshard.integrations.trainer import Trainer as kind
    else:
        kind = transformers.Trainer
    return kind(
        model=model, args=transformers.TrainingArguments(**{**defaults, **arguments}),
        train_dataset=Texts(12, 1), eval_dataset=Texts(7, 2), **options,
    )  # fmt: skip


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors."""
    if isinstance(model, autoshard.ParallelModule):
        return model.full_state_dict()
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def logged(trainer: transformers.Trainer) -> list[tuple[float, ...]]:
    """Loss, norm and learning rate of each step."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(line[k] for k in keys) for line in trainer.state.log_history if "loss" in line]


def metrics(prediction: Any) -> dict[str, float]:
    """How often the likeliest token is the label."""
    best = np.asarray(prediction.predictions).argmax(-1)
    return {"same": float((best == prediction.label_ids).mean()), "rows": float(len(best))}


def trained(model: nn.Module, folder: str, **options: Any) -> dict[str, Any]:
    """Train, evaluate, predict and save; what was seen on the way."""
    trainer = trainer_of(model, Path(folder), compute_metrics=metrics, **options)
    before = trainer.evaluate()
    trainer.train()
    after, predicted = trainer.evaluate(), trainer.predict(Texts(5, 3))
    trainer.save_model(f"{folder}/model")
    keys = ("eval_loss", "eval_same", "eval_rows")
    return {
        "logged": torch.tensor(logged(trainer), dtype=torch.float64),
        "evaluated": torch.tensor([[m[k] for k in keys] for m in (before, after)]),
        "logits": torch.tensor(np.asarray(predicted.predictions)),
        "labels": torch.tensor(predicted.label_ids),
        "flops": trainer.state.total_flos,
        "decayed": [len(g["params"]) for g in trainer.optimizer.param_groups],
        "state": whole(model),
    }


# What is tried, and how near the numbers of one process must be: the loss is computed in float32.
NEAR = {"rtol": 1e-5, "atol": 1e-7}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "plain": (
        {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
         "load_best_model_at_end": True, "save_total_limit": 2}, NEAR,
    ),
    "accumulated": (
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "max_grad_norm": 0.0}, NEAR,
    ),
    "bf16": ({"bf16": True, "learning_rate": 1e-3, "max_steps": 1}, {"rtol": 5e-2, "atol": 5e-2}),
}  # fmt: skip


def resumed(folder: str) -> dict[str, Any]:
    """Four steps with dropout, and the last two again from the checkpoint between."""
    losses = []
    model = split(gpt2(dropout=0.3))
    for given in (None, f"{folder}/checkpoint-2"):
        renewed(model)
        options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
        trainer = trainer_of(model, Path(folder), **options)
        trainer.train(resume_from_checkpoint=given)
        losses.append((torch.tensor(logged(trainer))[-2:], whole(model)))
    return {"losses": losses}


def accelerated(model: nn.Module) -> dict[str, Any]:
    """A loop of one's own with Accelerate; its optimizer is saved and loaded."""
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader: Any = DataLoader(Texts(12, 1), 4, collate_fn=default_data_collator)
    if isinstance(model, autoshard.ParallelModule):
        model = accelerator.prepare_model(model, evaluation_mode=True)  # which is: wrap nothing
        loader = prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0)
    else:
        model, loader = accelerator.prepare(model, loader)
    optimizer = accelerator.prepare(optimizer)
    norms, rows = [], []
    model.train()
    for batch in loader:
        rows.append(batch["input_ids"][:, 0])
        accelerator.backward(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms), "rows": torch.stack(rows), "state": whole(model)}


def run(folder: str) -> dict[str, Any]:
    """All of it, one after another; each capture once."""
    model = split(gpt2())
    found = {"accelerated": accelerated(model)}
    for name, (options, _) in VARIANTS.items():
        found[name] = trained(renewed(model), f"{folder}/{name}", **options)
    if dist.is_initialized():
        found["resumed"] = resumed(f"{folder}/resumed")
        found["copies"] = trained(split(gpt2(), tp=1), f"{folder}/copies", **VARIANTS["plain"][0])
        found["refused"] = refused(model, folder)
    return found


def refused(model: nn.Module, folder: str) -> list[str]:
    """What a Trainer of a split model says no to."""
    said = []
    plain = autoshard.parallelize(gpt2(), 1, degree="max")  # two copies, and nothing averages

    def streamed() -> None:
        trainer = trainer_of(split(gpt2(), tp=1), Path(folder))
        trainer.train_dataset = Stream()
        trainer.get_train_dataloader()

    for call in (
        lambda: trainer_of(plain, Path(folder)),
        lambda: trainer_of(model, Path(folder), gradient_checkpointing=True),
        streamed,
    ):
        try:
            call()
        except autoshard.AutoshardError as error:
            said.append(str(error))
    return said
