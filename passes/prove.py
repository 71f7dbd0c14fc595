"""Prove: recompute from nothing what every rank holds of every value, and refuse what does not follow.

Takes the original graph, the rewritten one and how parameters are stored, and trusts nothing that the
passes before concluded: neither axes, nor regions, nor names. For every value of the rewritten graph it
derives which original value it is, which elements each rank holds, whether it is a partial sum, and
what its gradient is; the rules are in ``autoshard/proof``.

Before::

    addmm_1 = aten.mm(view_6, c_proj.weight)
    addmm_1_reduce = ops.reduce(addmm_1, tp2, True)
    addmm_1_add = aten.add(addmm_1_reduce, c_proj.bias)

Proven::

    addmm_1         rank r: a partial sum of the original addmm_1 without its bias, inside 2 ranks
    addmm_1_reduce  all of it on every rank; its gradient is whole
    addmm_1_add     the original addmm_1

After: the same graph. Where parts of it are computed again in the backward pass, the graph with these
parts put back is compared with the proven one; so is the graph of layers with the layers put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import fx

from autoshard.layouts import Layout
from autoshard.proof.calls import Calls
from autoshard.proof.fused import same_as_unfused
from autoshard.proof.held import Held
from autoshard.proof.layered import same_as_one
from autoshard.proof.nested import same_as_flat
from autoshard.proof.walk import Proof
from autoshard.sharded import Sharded

FACTORS = (1, 3)  # symbolic sizes are their examples, and three times that


def prove(
    graph: fx.Graph,
    sharded: Sharded,
    differentiable_inputs: set[str],
    held: Mapping[str, tuple[int, Layout, int]] = MappingProxyType({}),
    parameters: Mapping[str, str] | None = None,
) -> Sharded:
    """Return the rewritten graph if it is proven to compute the original; else refuse it.

    Args:
        graph: the original, normalized.
        sharded: the rank's graph, and how parameters and outputs lie on the ranks.
        differentiable_inputs: placeholders that a gradient can flow to.
        held: inputs that the caller gives each rank its share of: (dimension, layout, degree). This is
            assumed of a call, as it is that ``sharded.stored`` says how parameters lie.
        parameters: placeholder -> the parameter's name, by which a graph of layers takes them; without
            them that graph is not looked at.

    Raises:
        UnsoundGraphError: names the first node where the proof fails, its layer, what is held there
            and what is needed.
    """
    calls = Calls()
    for factor in FACTORS:
        Proof(graph, sharded, differentiable_inputs, factor, calls, held).run()
    if sharded.nested is not None:
        same_as_flat(sharded.nested, sharded.graph)
    if sharded.layered is not None and parameters is not None:
        same_as_one(sharded.layered, sharded.runs, parameters)
    same_as_unfused(sharded)
    return sharded


def placements(
    graph: fx.Graph,
    sharded: Sharded,
    differentiable_inputs: set[str],
    held: Mapping[str, tuple[int, Layout, int]] = MappingProxyType({}),
) -> dict[str, Held]:
    """What each rank holds of every tensor of a rewritten graph, by node, at the sizes captured.

    Args and raises: as ``prove``.
    """
    proof = Proof(graph, sharded, differentiable_inputs, FACTORS[0], Calls(), held)
    proof.run()
    return {n.name: known for n, known in proof.known.items() if isinstance(known, Held)}
