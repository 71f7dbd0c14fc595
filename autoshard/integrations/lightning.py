"""A Lightning strategy that splits a LightningModule's model.

    from autoshard.integrations.lightning import AutoshardStrategy      # the changed line:

    trainer = lightning.Trainer(strategy=AutoshardStrategy(tp=2), devices=2, ...)

The module stays as it is: its one child with parameters (or the one that ``module=`` names) is split
before ``configure_optimizers`` is called, and its steps call it as before. A module may also call
``autoshard.parallelize`` itself, in ``configure_model``. Checkpoints are those of one process: any
number of ranks goes on from them, and so does a plain ``lightning.Trainer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from autoshard.api import parallelize
from autoshard.checkpoints import whole
from autoshard.data_parallel import fully_shard
from autoshard.errors import AutoshardError
from autoshard.layers import reshard
from autoshard.module import ParallelModule
from autoshard.random_streams import derive_seed

STREAMS = "autoshard_random_state"  # in a checkpoint: where dropout's streams stand


class AutoshardStrategy(ModelParallelStrategy):
    """Splits the model over ``tp`` ranks; what the world has beyond that are data parallel copies.

    Args:
        tp: ranks of one copy, a divisor of the number of devices in all nodes.
        module: the name of the child to split; needed where several children have parameters.
        timeout: of the process group, as Lightning's strategies take it.
        options: of ``autoshard.parallelize``: ``example_inputs``, ``degree``, ``plan``, ...

    Copies are kept the same by FSDP2. Batches, logged metrics (``sync_dist=True``) and ``all_gather``
    are of the copies; barriers and broadcasts of all ranks.
    """

    def __init__(self, tp: int, module: str | None = None, timeout: Any = None, **options: Any) -> None:
        given = {} if timeout is None else {"timeout": timeout}
        super().__init__(tensor_parallel_size=tp, save_distributed_checkpoint=False, **given)
        self._tp, self._name, self._options = tp, module, options
        self._streams: dict[str, Tensor] | None = None

    # -- ranks ---------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Processes, groups, and Lightning's mesh of ``data_parallel`` and ``tensor_parallel``."""
        world = self.num_nodes * self.num_processes
        if world % self._tp:
            raise ValueError(
                f"tp={self._tp} does not divide the {world} devices of the Trainer: pass devices= a "
                f"multiple of {self._tp}"
            )
        self._data_parallel_size = world // self._tp
        super().setup_environment()

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the data parallel copies: the ranks of one have the same value."""
        return super().reduce(tensor, self._copies if group is None else group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Among all ranks, as they stop together."""
        value = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(value, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(value)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """One entry for each data parallel copy."""
        group = self._copies if group is None else group
        return super().all_gather(tensor, group=group, sync_grads=sync_grads)

    @property
    def _copies(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("data_parallel")

    # -- the model -----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        """Split the model, then make the optimizers, of its split parameters."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self._split(self.lightning_module)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            reshard(self.parallel_module)  # after an evaluation, others stand in their place
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def tensor_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """Models are built on the CPU, whole; ``autoshard.meta_parameters`` builds without memory."""
        return nullcontext()

    @property
    def parallel_module(self) -> ParallelModule:
        """The child that is split."""
        assert self.lightning_module is not None
        return next(m for m in self.lightning_module.modules() if isinstance(m, ParallelModule))

    def _split(self, module: pl.LightningModule) -> None:
        if not any(isinstance(m, ParallelModule) for m in module.modules()):
            name = self._name_of_child(module)
            child, options = module.get_submodule(name), {"device": self.root_device, **self._options}
            module.set_submodule(name, parallelize(child, self._tp, **options))
        split, copies = self.parallel_module, self.world_size // self._tp
        if copies == 1:
            return
        inside = {id(p) for p in split.parameters()}
        outside = [n for n, p in module.named_parameters() if id(p) not in inside]
        if outside:
            raise AutoshardError(
                f"{outside[0]} and {len(outside) - 1} other parameters are outside of the model that "
                f"is split, and {copies} data parallel copies would train them apart: move them into it"
            )
        if not isinstance(split, FSDPModule):
            fully_shard(split)

    def _name_of_child(self, module: pl.LightningModule) -> str:
        if self._name is not None:
            return self._name
        names = [n for n, child in module.named_children() if any(True for _ in child.parameters())]
        if len(names) != 1:
            raise AutoshardError(
                f"{len(names)} children of {type(module).__name__} have parameters "
                f"({', '.join(names) or 'none'}): say which one is to be split, "
                'AutoshardStrategy(tp, module="name")'
            )
        return names[0]

    # -- checkpoints ---------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The plain module's, whole, on the first rank; every rank calls it."""
        module, split = self.lightning_module, self.parallel_module
        assert module is not None
        prefix = next(f"{n}." for n, m in module.named_modules() if m is split)
        rest = module.state_dict()
        tensors = {prefix + n: t for n, t in split.full_state_dict(rank0_only=True).items()}
        return {**rest, **tensors} if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The plain optimizer's, whole, on the first rank; every rank calls it."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return whole.of_optimizer(self.parallel_module, optimizer, keep=self.is_global_zero)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """One file, as one process writes it; every rank calls it."""
        states: list[Any] = [None] * self.world_size
        dist.all_gather_object(states, self.parallel_module.random_state())
        checkpoint[STREAMS] = {name: value for state in states for name, value in state.items()}
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each rank reads the file."""
        found = Strategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)
        self._streams = found.get(STREAMS)
        return found

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning gives the states back to ``load_optimizer_state_dict``."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Whole tensors into each rank's shares; dropout goes on, where ranks are split alike."""
        Strategy.load_model_state_dict(self, checkpoint, strict)
        split = self.parallel_module
        if self._streams is None:
            return
        if split.random_state().keys() <= self._streams.keys():
            split.load_random_state(self._streams)
        else:  # not the masks of the first steps once more
            split.manual_seed(derive_seed(0, "loaded", str(checkpoint["global_step"])))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Whole tensors into each rank's shares."""
        for optimizer, given in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            whole.into_optimizer(self.parallel_module, plain, given)
