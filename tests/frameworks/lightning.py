"""Scripts with Lightning: on two ranks with the strategy, on one process without."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import autoshard
from tests.models import nanogpt

ROWS, LENGTH = 24, 12


class Module(pl.LightningModule):
    """A model of one's own, a scheduler, logged metrics, clipped gradients."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = nanogpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, dropout=dropout)
        self.model = nanogpt.GPT(config).double()
        self.scale = 1.0  # no child, no parameter
        self.losses: list[Tensor] = []
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.model(*batch)[1]
        self.losses.append(loss.detach())
        self.seen.append(batch[0][:, 0])
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        loss = self.model(*batch)[1]
        self.log("loss", loss, sync_dist=True, on_epoch=True)
        self.log("rows", float(len(batch[0])), sync_dist=True, on_epoch=True, reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Splits(Module):
    """Splits its model itself, into copies whose layers an evaluation leaves whole."""

    def configure_model(self) -> None:
        if dist.is_initialized() and not isinstance(self.model, autoshard.ParallelModule):
            example = tuple(next(iter(loader(1))))
            self.model = autoshard.parallelize(self.model, 1, example, degree="max", device="cpu")
            autoshard.fully_shard(self.model, reshard_after_forward=False)


def loader(seed: int, copies: int = 1) -> DataLoader[Any]:
    """Four rows a step in all, in the order that Lightning's sampler gives them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(200, (ROWS if seed == 1 else 8, LENGTH + 1), generator=generator)
    rows = [(t[:-1], t[1:]) for t in tokens]
    alone = DistributedSampler(rows, 1, 0, shuffle=seed == 1)
    return DataLoader(rows, batch_size=4 // copies, sampler=None if dist.is_initialized() else alone)


def trainer_of(folder: str, tp: int = 2, **options: Any) -> pl.Trainer:
    """Lightning's Trainer; with the strategy where there are ranks."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if dist.is_initialized():
        from autoshard.integrations.lightning import AutoshardStrategy

        example = next(iter(loader(1)))
        strategy = AutoshardStrategy(tp=tp, degree="max", example_inputs=tuple(example))
        options = {"strategy": strategy, "devices": dist.get_world_size(), **options}
    else:
        options = {"devices": 1, **options}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, gradient_clip_val=0.5, use_distributed_sampler=True,
        enable_checkpointing=False, **options,
    )  # fmt: skip


def whole(module: Module) -> dict[str, Tensor]:
    """The model's own tensors."""
    model: nn.Module = module.model
    return dict(model.full_state_dict() if hasattr(model, "plan") else model.state_dict())


def fitted(
    folder: str, steps: int, given: str | None = None, tp: int = 2, dropout: float = 0.0,
    kind: type[Module] = Module, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Validate, fit for some steps, from a checkpoint or not, validate between; save."""
    module = kind(dropout)
    trainer = trainer_of(folder, tp, max_steps=steps, val_check_interval=2, **options)
    copies = dist.get_world_size() // tp if dist.is_initialized() else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind is Splits:
            trainer.validate(module, loader(2, copies), verbose=False)
        trainer.fit(module, loader(1, copies), loader(2, copies), ckpt_path=given, weights_only=False)
    path = f"{folder}/{steps}.ckpt"
    trainer.save_checkpoint(path)
    return {
        "losses": torch.stack(module.losses),
        "state": whole(module),
        "rates": torch.tensor([g["lr"] for g in trainer.optimizers[0].param_groups]),
        "validated": {n: v.double() for n, v in trainer.callback_metrics.items()},
        "rows": torch.stack(module.seen),
        "path": path,
    }


class SaveAt(pl.Callback):
    """Writes a checkpoint between two epochs."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(folder: str) -> dict[str, Any]:
    """On ranks: in two parts; with dropout, whole and from the middle; two copies of a whole model."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    first = fitted(folder, 6)
    found = {"first": first, "second": fitted(folder, 9, first["path"])}
    masks = {"dropout": 0.3, "limit_val_batches": 0, "limit_train_batches": 2}
    middle = f"{folder}/middle.ckpt"
    found["random"] = fitted(folder, 4, callbacks=[SaveAt(2, middle)], **masks)
    found["again"] = fitted(folder, 4, middle, **masks)
    found["copies"] = fitted(folder, 6, tp=1)
    found["split itself"] = fitted(folder, 6, tp=1, kind=Splits)
    return found
