"""PyTorch's own Python bindings of operators, which are called in half the time of `torch.ops`.

`torch.ops.aten.linear.default` parses its arguments by a schema, 15 us on a CPU on which `F.linear`
takes 8; both then call the same operator of the dispatcher. Rows are operators of which a layer has
many, whose binding has just their signature and takes a tensor first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.chunk.default: torch.chunk,
    aten.embedding.default: torch.embedding,
    aten.flatten.using_ints: torch.flatten,
    aten.gelu.default: F.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: F.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.silu.default: F.silu,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


_OPERATORS = {binding: target for target, binding in BINDINGS.items()}


def operator_of(node: fx.Node) -> Any:
    """What a node calls: the operator of a binding."""
    target: Any = node.target
    return _OPERATORS.get(target, target)


def bind(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph that calls bindings where there are any; nodes keep names and meta."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
        if node.op == "call_function":
            env[node].target = BINDINGS.get(node.target, node.target)
    return new
