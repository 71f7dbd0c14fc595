"""A rehearsal: the split model run, forward and backward, on ranks that are threads of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autoshard import capture as capturing
from autoshard.autograd_functions import is_kept
from autoshard.exactly import exactly
from autoshard.measures import cloned, objective
from autoshard.passes.fuse import fuse
from autoshard.pipeline import Program
from autoshard.plans import Plan
from autoshard.rank import (
    layered_module,
    local_share,
    placeholder_values,
    rank_module,
    whole_tensor,
)
from autoshard.sharded import Sharded
from autoshard.simulate import RankContext, run_ranks

Run = Callable[[RankContext, fx.GraphModule, list[Any]], list[Any]]


def simulated(
    subject: nn.Module,
    program: Program,
    sharded: Sharded,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Run | None = None,
) -> tuple[list[list[Any]], dict[str, list[Tensor]]]:
    """Outputs by rank, and each parameter's gradient, whole, as each group of ranks holds it.

    call: how a rank runs its graph, by its context, its module and the placeholders' values.
    """
    captured = program.captured
    stored = {captured.parameters[p]: share for p, share in sharded.stored.items()}
    names = capturing.tied_names(subject)
    whole = {n: p.detach() for n, p in subject.named_parameters()}
    trained = {n for n, p in subject.named_parameters() if p.requires_grad}
    buffers = {n: b.detach() for n, b in subject.named_buffers(remove_duplicate=False)}
    flat = pytree.tree_leaves((args, kwargs))
    degrees = tuple({r.degree for r in plan.regions})
    python = any(is_kept(inner) for n in sharded.graph.nodes for inner in (n.target, *n.args))
    dtype = next((p.dtype for p in whole.values() if p.is_floating_point()), torch.float32)

    # As what runs; `call` looks at every node.
    fused = fuse(replace(sharded, layered=None, fused=None), plan.overlap)

    def run(rank: RankContext) -> tuple[list[Any], dict[str, Tensor | None], dict[str, int]]:
        local: dict[str, Tensor] = {}
        places: dict[str, int] = {}
        for name, value in whole.items():
            share = stored.get(name)
            if share is not None:
                places[name] = rank.group(share[2]).coordinate
                value = local_share(value, share, places[name])
            local[name] = value.clone().requires_grad_(name in trained)
        local.update({alias: local[n] for alias, n in names.items() if n in local})
        make, graph = (layered_module, fused) if call is None else (rank_module, sharded)
        module = make(graph, rank.group)
        own = {n: b.clone() for n, b in buffers.items()}
        values = placeholder_values(sharded, captured, local, own, cloned(flat))
        # What a function of the model's own calls is not in the graph, so not made exact there.
        with exactly(dtype) if python else contextlib.nullcontext():
            result = list(module(*values) if call is None else call(rank, module, values))
            objective(result).backward()
        return (
            [r.detach() if isinstance(r, Tensor) else r for r in result],
            {n: local[n].grad for n in whole},
            places,
        )

    ranks = run_ranks(run, plan.tp, degrees=degrees)
    gradients: dict[str, list[Tensor]] = {}
    for name, value in whole.items():
        shares = [
            torch.zeros_like(_share_like(value, stored.get(name), r[2].get(name, 0)))
            if r[1][name] is None else r[1][name]
            for r in ranks
        ]  # fmt: skip
        share = stored.get(name)
        if share is None:
            gradients[name] = [s for s in shares if s is not None]
            continue
        by_place: dict[int, list[Tensor]] = {}
        for s, r in zip(shares, ranks, strict=True):
            assert s is not None
            by_place.setdefault(r[2][name], []).append(s)
        copies = min(len(v) for v in by_place.values())
        gradients[name] = [
            whole_tensor([by_place[c][k] for c in range(share[2])], share) for k in range(copies)
        ]
    return [r[0] for r in ranks], gradients


def _share_like(value: Tensor, share: Any, place: int) -> Tensor:
    return value if share is None else local_share(value, share, place)
