"""Hugging Face's Trainer, for a model that is split.

    from autoshard.integrations.trainer import Trainer      # the one changed line

    trainer = Trainer(model=autoshard.parallelize(model, tp=2), args=arguments, train_dataset=data)

Arguments, callbacks, logs and files are the Trainer's own. What differs, and why:

- ranks of one tp group read the same batches, data parallel copies different ones;
- Accelerate wraps nothing: the model has its ranks, and FSDP2 over ``dp`` where there are copies;
- what is gathered over all ranks (predictions, counts of tokens) is counted once for each copy;
- files are written by all ranks together: the model as ``from_pretrained`` reads it, the optimizer by
  ``autoshard.save``, so that any number of ranks goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from autoshard import checkpoints
from autoshard.errors import AutoshardError
from autoshard.layers import reshard
from autoshard.module import ParallelModule

FOLDER = "autoshard"  # beside the Trainer's own files, within checkpoint-<step>

# Methods of the Trainer that are overridden and are no part of its documentation: without them it would
# write one rank's share of the optimizer's state and give it to all.
_NEEDED = ("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_from_checkpoint")
_MISSING = [name for name in _NEEDED if not hasattr(transformers.Trainer, name)]
if _MISSING:
    raise ImportError(
        f"the Trainer of transformers {transformers.__version__} has no {', '.join(_MISSING)}: "
        "checkpoints of a split model would be wrong; use transformers 5.17 to 5.23"
    )


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for a ``ParallelModule``; every rank makes one, with the same arguments.

    Args:
        model: what ``autoshard.parallelize`` returned. Of several data parallel copies, after
            ``autoshard.fully_shard(model)``.
        args, options: the Trainer's.

    Raises:
        ValueError: a model that is not split.
        AutoshardError: data parallel copies whose gradients nobody averages; arguments that ask for
            what ``parallelize`` does.
    """

    model: Any

    def __init__(self, model: nn.Module | None = None, args: Any = None, **options: Any) -> None:
        if not isinstance(model, ParallelModule):
            raise ValueError(
                f"model is a {type(model).__name__}: pass what autoshard.parallelize(model, tp) "
                "returns, or use transformers.Trainer"
            )
        args = transformers.TrainingArguments() if args is None else args
        _check(model, args)
        super().__init__(model=model, args=args, **options)
        # Autocast and nothing else: prepared, so that Accelerate does not wrap it a second time.
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        self.model._is_accelerate_prepared = True

    # -- which ranks there are -----------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate learns the mesh, after which its data loaders give out batches."""
        model, self.model = self.model, None  # it reads a configuration of its own off split models
        super().create_accelerator_and_postprocess()
        self.model = model
        self.accelerator.state.device_mesh = _mesh_of_loaders(model)

    def get_tp_size(self) -> int:
        """Ranks that are given the same batch."""
        return int(self.model.tp_size)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, once for each data parallel copy."""
        return self._checked(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The Trainer's, once for each data parallel copy."""
        return self._checked(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The Trainer's, once for each data parallel copy."""
        return self._checked(super().get_test_dataloader(test_dataset))

    def _checked(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        if isinstance(loader, DataLoaderDispatcher) and dist.get_world_size() > self.get_tp_size():
            raise AutoshardError(
                "a dataset without a length is read by the first rank, which would give every data "
                'parallel copy the same batch: pass accelerator_config={"dispatch_batches": False}'
            )
        return loader

    @property
    def gather_function(self) -> Any:
        """Gathers over all ranks what each copy has once."""
        return self._gathered_once

    @gather_function.setter
    def gather_function(self, function: Any) -> None:
        function = getattr(function, "func", function)
        self._drops_padding = function == self.accelerator.gather_for_metrics

    def _gathered_once(self, data: Any) -> Any:
        """[rows, ...] of each rank -> those of the first rank of each tp group, without what the last
        batch was filled up with."""
        tp, state = self.get_tp_size(), self.accelerator.gradient_state
        cut = self._drops_padding and state.end_of_dataloader and state.remainder > 0

        def once(value: Tensor) -> Tensor:
            rows = value.unflatten(0, (-1, tp, value.shape[0] // self.accelerator.num_processes))
            rows = rows[:, 0].flatten(0, 1)
            return rows[: state.remainder] if cut else rows

        return pytree.tree_map_only(Tensor, once, self.accelerator.gather(data))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The model's own number, of which each rank of a tp group counts its part."""
        model, self.model = self.model, self.model.__dict__["_skeleton"]
        try:
            return int(super().floating_point_ops(inputs)) // int(model.tp_size)
        finally:
            self.model = model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Of the parameters that stay: FSDP2 leaves others in their place after an evaluation."""
        reshard(self.model)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """By the kinds of the model's own layers, which a parallel module does not have."""
        skeleton = model.__dict__["_skeleton"] if isinstance(model, ParallelModule) else model
        return list(super().get_decay_parameter_names(skeleton))

    # -- files ---------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what ``from_pretrained`` of the model's class reads; every rank calls it."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if hasattr(self.model.__dict__["_skeleton"], "save_pretrained"):
            self.model.save_pretrained(folder)
            if self.args.should_save:
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                torch.save(self.args, folder / "training_args.bin")
        else:
            self._save(str(folder), state_dict=self.model.full_state_dict(rank0_only=True))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        schedule = {"scheduler": self.lr_scheduler.state_dict()}
        checkpoints.save(Path(output_dir) / FOLDER, self.model, self.optimizer, schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not (Path(resume_from_checkpoint) / FOLDER).is_dir():  # else it is read with the optimizer
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / FOLDER).is_dir():
            extra = checkpoints.load(Path(checkpoint) / FOLDER, self.model, self.optimizer)
            self.lr_scheduler.load_state_dict(extra["scheduler"])


def _check(model: ParallelModule, args: Any) -> None:
    """What the Trainer cannot do to a model that is split already."""
    mesh = model.mesh
    if mesh is not None and mesh.ndim == 2 and mesh.size(0) > 1 and not isinstance(model, FSDPModule):
        raise AutoshardError(
            f"there are {mesh.size(0)} data parallel copies and nothing averages their gradients: call "
            "autoshard.fully_shard(model) before making the Trainer"
        )
    refused = {
        "gradient_checkpointing": 'parallelize(model, tp, checkpoint="layer"), or enable it before',
        "activation_checkpointing": 'parallelize(model, tp, checkpoint="layer"), or enable it before',
        "fsdp": "autoshard.fully_shard(model)",
        "deepspeed": "the ranks of the parallel module",
        "parallelism_config": "nothing: the model knows its ranks",
        "torch_compile": "nothing",
        "eval_use_gather_object": "tensors",
    }
    for name, instead in refused.items():
        if getattr(args, name, None):
            raise AutoshardError(f"{name} does not reach a model that is split; use {instead}")


def _mesh_of_loaders(model: ParallelModule) -> DeviceMesh | None:
    """The model's mesh under Accelerate's names for its dimensions; None in one process.

    Raises:
        AutoshardError: a mesh that is not the whole world, numbered with ``tp`` innermost.
    """
    mesh = model.mesh
    if mesh is None:
        return None
    ranks = mesh.mesh.view(-1, model.tp_size)
    if not torch.equal(ranks, torch.arange(dist.get_world_size()).view_as(ranks)):
        raise AutoshardError(
            f"the mesh {mesh.mesh.tolist()} does not number all {dist.get_world_size()} ranks in "
            "order, as the Trainer's data loaders do: let parallelize make the mesh"
        )
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("dp_shard", "tp"))
