"""A layer as one function of autograd: its forward graph keeps what its backward graph needs.

``passes/differentiate.py`` writes the two graphs. Where it cannot, and where somebody looks at what
autograd keeps (hooks on saved tensors) or changes what operators compute in (autocast), a layer's calls
are recorded by autograd one by one, as they would be without this.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx

from autoshard.compat import (
    apply_own,
    backward_is_kept,
    gradients_by_node,
    gradients_of,
    once,
    placed,
)
from autoshard.failures import know

_CODEGEN = threading.Lock()
_version = attrgetter("_version")  # how often a tensor was written into


@dataclass(frozen=True)
class Record:
    """What autograd recorded of a part: its leaves that need a gradient, and what was computed."""

    leaves: list[Tensor]
    results: tuple[Any, ...]


def recorded(body: Any, asked: tuple[bool, ...], *operands: Any) -> tuple[Any, ...]:
    """The results of ``body(*operands)``, and a `Record` of it.

    asked: of which operands a gradient will be asked.
    """
    given, leaves = list(operands), []
    with torch.enable_grad():
        for place, need in enumerate(asked):
            if need:
                given[place] = leaf = operands[place].detach().requires_grad_()
                leaves.append(leaf)
        results = body.forward(*given)
    return *[r.detach() if isinstance(r, Tensor) else r for r in results], Record(leaves, results)


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
        operands: the placeholders among the kept values.
        reached: for each placeholder whose gradient is asked for, the results that it reaches.
        own: for each of them, whether the gradient is contiguous, and in nobody else's memory.
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
        operands: Sequence[int],
        reached: Sequence[Collection[int]],
        own: Sequence[bool],
        several: bool,
    ) -> None:
        self.given, self.operands, self.reached = given, operands, reached
        self.count = len(needed)
        self.asked = [place for place, need in enumerate(needed) if need]
        self.own = [False] * self.count
        for place, is_own in zip(self.asked, own, strict=True):
            self.own[place] = is_own
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
        results: tuple[Tensor, ...] = apply_own(_Layer, self, len(parameters), *parameters, *operands)
        return results if self.several else results[0]


class _Layer(torch.autograd.Function):
    """What is kept is in a list, from which the backward graph takes it, so that each value's memory is
    free after its last use. ``save_for_backward`` would hold all of them until the end."""

    @staticmethod
    def forward(ctx: Any, made: Differentiated, count: int, *values: Any) -> tuple[Tensor, ...]:
        own = placed(values[:count])
        results, kept = made.forward.forward(*own.shares, *values[count:])
        ctx.set_materialize_grads(False)
        # A result that is kept would keep this function alive, which made it.
        ctx.kept = [x.detach() if aliases else x for x, aliases in zip(kept, made.given, strict=True)]
        # Both a DTensor and its share may be written into.
        written = [x for x in ctx.kept if isinstance(x, Tensor)]
        written += [values[place] for place in made.operands if place < count]
        ctx.read, ctx.versions = written, list(map(_version, written))
        ctx.made, ctx.placed = made, own
        if len(results) > 1:
            ctx.like = [
                r.new_empty(()).expand(r.shape) if flows else None
                for r, flows in zip(results, made.flows, strict=True)
            ]
        if not all(made.flows):
            ctx.mark_non_differentiable(
                *(
                    r for r, flows in zip(results, made.flows, strict=True)
                    if not flows and isinstance(r, Tensor)
                )
            )
        return cast(tuple[Tensor, ...], results)

    @staticmethod
    @once
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, made = ctx.kept, ctx.made
        if kept is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, after what it kept was freed: "
                "call backward or autograd.grad with retain_graph=True the first time"
            )
        versions = list(map(_version, ctx.read))
        if versions != ctx.versions:
            changed = zip(ctx.read, versions, ctx.versions, strict=True)
            x, now, before = next(found for found in changed if found[1] != found[2])
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a {x.dtype} of shape {tuple(x.shape)} is at version {now}, "
                f"expected {before}"
            )
        if backward_is_kept():
            kept = list(kept)
        else:
            ctx.kept = ctx.read = None
        kept.reverse()
        read = {place for place, dy in enumerate(dys) if dy is not None}
        if not read:  # what comes behind gave none
            return (None, None, *(None for _ in range(made.count)))
        if len(read) < len(dys):  # a result that nobody read
            dys = tuple(
                torch.zeros_like(like) if dy is None and like is not None else dy
                for dy, like in zip(dys, ctx.like, strict=True)
            )
        found = made.backward.forward(kept, *dys)
        grads: list[Tensor | None] = [None] * made.count
        for place, grad, reached in zip(made.asked, found, made.reached, strict=True):
            if not read.isdisjoint(reached):  # else None, not zeros: an optimizer skips it then
                grads[place] = grad
        del found
        count = len(ctx.placed.shares)
        nodes = [node for node, _ in ctx.next_functions[:count]]
        own, others = grads[:count], grads[count:]
        found = gradients_of(ctx.placed, nodes, own, others=others, own=made.own[:count])
        return None, None, *found, *others
