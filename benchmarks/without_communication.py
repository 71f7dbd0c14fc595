"""The limit: autoshard's own split model with every collective left out.

The graph, its kernels and the way it is called stay what they are; only the results are wrong. What a
split model takes beyond this is communication, whether it shows as waiting or as less memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from autoshard import ParallelModule
from autoshard.groups import Lane, ProcessGroupComm, ReduceOp


class Silent(ProcessGroupComm):
    """A group whose collectives give the right shapes and send nothing."""

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """This rank's own `x`; nothing is copied either."""
        return x.detach()

    def start_all_reduce(self, x: Tensor, lane: Lane | None = None) -> Callable[[], Tensor]:
        """This rank's own `x`."""
        return lambda: x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """This rank's own `x` for every rank."""
        return [x.detach()] * self.degree


def silence(model: ParallelModule) -> ParallelModule:
    """Replace the groups in the rank's graph; ValueError where nothing is split."""
    module = model._last.module
    groups = {n: v for n, v in vars(module).items() if isinstance(v, ProcessGroupComm)}
    if not groups:
        raise ValueError("no group in the rank's graph: nothing of the model is split")
    for name, group in groups.items():
        setattr(module, name, Silent(group.process_group, group.stream))
    return model
