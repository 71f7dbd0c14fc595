"""A layer as one function of autograd: its forward graph keeps what its backward graph needs.

``passes/differentiate.py`` writes the two graphs. Where it cannot, and where somebody looks at what
autograd keeps (hooks on saved tensors) or changes what operators compute in (autocast), a layer's calls
are recorded by autograd one by one, as they would be without this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from autoshard.compat import backward_is_kept, gradients_by_node, gradients_of, placed
from autoshard.failures import know

_CODEGEN = threading.Lock()


@dataclass(frozen=True)
class Record:
    """What autograd recorded of a part: its leaves that need a gradient, and what was computed."""

    leaves: list[Tensor]
    results: tuple[Any, ...]


def recorded(body: Any, asked: tuple[bool, ...], *operands: Any) -> tuple[Any, ...]:
    """The results of ``body(*operands)``, and a `Record` of it.

    asked: of which operands a gradient will be asked.
    """
    with torch.enable_grad():
        given = [
            x.detach().requires_grad_() if need else x
            for x, need in zip(operands, asked, strict=True)
        ]
        results = body.forward(*given)
    leaves = [x for x, need in zip(given, asked, strict=True) if need]
    return *(r.detach() if isinstance(r, Tensor) else r for r in results), Record(leaves, results)


def played_back(record: Record, *dys: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of the leaves, zeros where there is none, from those of the results."""
    pairs = [
        (result, dy)
        for result, dy in zip(record.results, dys, strict=True)
        if dy is not None and result.requires_grad
    ]
    if not pairs:
        return tuple(map(torch.zeros_like, record.leaves))
    if len(pairs) == 1 and (found := gradients_by_node(*pairs[0], record.leaves)) is not None:
        return found
    return torch.autograd.grad(
        [result for result, _ in pairs], record.leaves, [dy for _, dy in pairs],
        retain_graph=backward_is_kept(), materialize_grads=True,
    )  # fmt: skip


class Differentiated:
    """A layer's forward and backward graph.

    Args:
        forward: placeholders -> (results, values that are kept).
        backward: the kept values in a list, the last first, which it empties, and the gradients of the
            results -> gradients of the `needed`.
        parts: attribute of the forward graph -> the graph of a part.
        needed: of each placeholder of the forward graph, whether its gradient is asked for.
        flows: of each result, whether it has a gradient.
        given: of each kept value, whether it is a result.
        several: the layer gives a tuple.
    """

    def __init__(
        self,
        forward: fx.Graph,
        backward: fx.Graph,
        parts: Mapping[str, fx.Graph],
        needed: Sequence[bool],
        flows: Sequence[bool],
        given: Sequence[bool],
        several: bool,
    ) -> None:
        self.given = given
        self.count = len(needed)
        self.asked = [place for place, need in enumerate(needed) if need]
        self.flows, self.several = flows, several
        with _CODEGEN:
            bodies = {n: fx.GraphModule({}, g, class_name="PartOfLayer") for n, g in parts.items()}
            self.forward = fx.GraphModule(bodies, forward, class_name="LayerForward")
            self.backward = fx.GraphModule({}, backward, class_name="LayerBackward")
        for known in (self.forward, *bodies.values()):
            know(known)
        know(self.backward, "backward")

    def __call__(self, parameters: Sequence[Tensor], operands: Sequence[Any]) -> Any:
        """The layer's results; the parameters may be DTensors."""
        apply = cast(Callable[..., tuple[Tensor, ...]], _Layer.apply)
        results = apply(self, len(parameters), *parameters, *operands)
        return results if self.several else results[0]


class _Layer(torch.autograd.Function):
    """What is kept is in a list, from which the backward graph takes it, so that each value's memory is
    free after its last use. ``save_for_backward`` would hold all of them until the end."""

    @staticmethod
    def forward(ctx: Any, made: Differentiated, count: int, *values: Any) -> tuple[Tensor, ...]:
        own = placed(values[:count])
        results, kept = made.forward.forward(*own.shares, *values[count:])
        # A result that is kept would keep this function alive, which made it.
        ctx.kept = [x.detach() if aliases else x for x, aliases in zip(kept, made.given, strict=True)]
        ctx.versions = [x._version if isinstance(x, Tensor) else 0 for x in ctx.kept]
        ctx.made, ctx.placed = made, own
        if not all(made.flows):
            ctx.mark_non_differentiable(
                *(
                    r for r, flows in zip(results, made.flows, strict=True)
                    if not flows and isinstance(r, Tensor)
                )
            )
        return cast(tuple[Tensor, ...], results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, made = ctx.kept, ctx.made
        if kept is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, after what it kept was freed: "
                "call backward or autograd.grad with retain_graph=True the first time"
            )
        for x, version in zip(kept, ctx.versions, strict=True):
            if isinstance(x, Tensor) and x._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a {x.dtype} of shape {tuple(x.shape)} is at version "
                    f"{x._version}, expected {version}"
                )
        if backward_is_kept():
            kept = list(kept)
        else:
            ctx.kept = None
        kept.reverse()
        found = made.backward.forward(kept, *dys)
        grads: list[Tensor | None] = [None] * made.count
        for place, grad in zip(made.asked, found, strict=True):
            grads[place] = grad
        del found
        count = len(ctx.placed.shares)
        nodes = [node for node, _ in ctx.next_functions[:count]]
        return None, None, *gradients_of(ctx.placed, nodes, grads[:count]), *grads[count:]
