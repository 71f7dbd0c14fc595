"""A rearranged model, whole: what its split is compared with, the model being another function."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from autoshard.capture import Captured
from autoshard.pipeline import Program
from autoshard.rank import place_on, placeholder_values
from autoshard.sharded import Sharded

REFERENCE = "the model with its norms moved (pre_norm=True), run whole from its captured graph"


class Rearranged(nn.Module):
    """The model's own parameters and buffers in the rearranged graph, before that is split."""

    _whole: Sharded
    _captured: Captured
    _run: fx.GraphModule
    _device: torch.device

    def __init__(self, model: nn.Module, program: Program, device: torch.device | str = "cpu") -> None:
        """
        Args:
            model: gives the tensors; they are shared.
            program: analysed with ``pre_norm=True``.
            device: of the tensors.
        """
        super().__init__()
        assert program.reference is not None
        self._parameters, self._buffers = model._parameters, model._buffers
        self._modules = model._modules
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.reference, {}))
        self._whole, self._captured = Sharded(graph, {}, (), ()), program.captured
        self._device = torch.device(device)
        place_on(self._whole, self._device)
        self.__dict__["_run"] = fx.GraphModule({}, graph)  # no submodule of the model
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's inputs and outputs."""
        values = placeholder_values(
            self._whole,
            self._captured,
            dict(self.named_parameters(remove_duplicate=False)),
            dict(self.named_buffers(remove_duplicate=False)),
            pytree.tree_leaves((args, kwargs)),
        )
        values = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self._device), values)
        return pytree.tree_unflatten(list(self._run(*values)), self._captured.out_spec)
