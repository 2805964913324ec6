"""Feed-forward sites, plain and gated, and mixtures of experts."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import (
    features,
    first_factor,
    input_of,
    is_linear,
    is_quantizer,
    last_factor,
    producers,
    residual_of,
    source,
)
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Convolution, TopK
from lissom.compiler.ir.operators import NORMS, SHAPES, is_activation, is_pointwise
from lissom.compiler.ir.types import ScalarType, TensorType, fixed
from lissom.compiler.ir.view_calls import Index

aten = torch.ops.aten

_BETWEEN = {operator.getitem, aten.mean.dim, aten.std.correction, aten.std.dim}
"""Operators allowed between up and down besides views and element-wise ones; Gemma 3n thresholds by mean and deviation."""


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward: down(activation(up(x))), or down(activation(gate(x)) · up(x)) when gated.

    Attributes:
        up: the first layers, one or two.
        gated: whether one multiplies the other.
        width: features between up and down.
        residual: the residual add after it; None when there is none.
    """

    up: tuple[fx.Node, ...]
    activations: tuple[fx.Node, ...]
    down: fx.Node
    gated: bool
    width: int
    residual: fx.Node | None

    @property
    def path(self) -> str:
        return nodes.origin(self.down).module_path


@dataclass(frozen=True)
class MixtureSite:
    """A mixture of experts: a router chooses the experts of each token.

    Attributes:
        router: the layer that computes the experts' scores.
        choice: the `topk` that selects experts by score.
        experts: the number of experts.
        top_k: the number of experts per token.
    """

    router: fx.Node
    choice: fx.Node
    experts: int
    top_k: int

    @property
    def path(self) -> str:
        return nodes.origin(self.router).module_path


def mixture_site(choice: fx.Node) -> MixtureSite | None:
    """The mixture whose experts this `topk` selects, if it selects from the features of a linear layer."""
    routers = producers(TopK(choice).x)
    scores = nodes.tensor_type(TopK(choice).x)
    if len(routers) != 1 or nodes.tensor_type(routers[0]).shape[-1] != scores.shape[-1]:
        return None
    return MixtureSite(routers[0], choice, features(routers[0], 0), fixed(TopK(choice).k))


def feed_forward_site(down: fx.Node, projections: set[fx.Node]) -> FeedForwardSite | None:
    """The feed-forward that ends in this layer, if one does: an activation of one or two layers that read one value."""
    if _is_spatial(down):
        return None
    between: list[fx.Node] = []
    up: dict[fx.Node, None] = {}
    pending, seen = [input_of(down)], set()
    while pending:
        node = pending.pop(0)
        if node in seen or node.op != "call_function" or _is_number(node) or _is_looked_up(node):
            continue
        seen.add(node)
        if is_linear(node):
            if _is_spatial(node):
                return None
            up[node] = None
            continue
        passes = is_pointwise(node) or node.target in SHAPES or node.target in _BETWEEN or is_quantizer(node)
        if not (passes or _norm_inside(node)):
            return None
        between.append(node)
        pending += node.all_input_nodes
    activations = tuple(node for node in between if is_activation(node))
    products = any(_multiplies_values(node) for node in between) or len(up) == 2
    if not (activations or products) or not 1 <= len(up) <= 2 or projections.intersection(up) or down in projections:
        return None
    firsts = [first_factor(node) for node in up]
    if len({source(input_of(node)) for node in firsts}) > 1 or features(last_factor(down), 0) != features(firsts[0], 1):
        return None
    return FeedForwardSite(tuple(up), activations, down, products, features(down, 1), residual_of(down))


def _is_number(node: fx.Node) -> bool:
    """True for a size, and for a tensor of rank 0, which scales or shifts the other inputs."""
    value_type = nodes.node_type(node)
    parts = value_type if isinstance(value_type, tuple) else (value_type,)
    return all(isinstance(part, ScalarType) or (isinstance(part, TensorType) and part.rank == 0) for part in parts)


def _is_looked_up(node: fx.Node) -> bool:
    """True for rows of a weight that are looked up: the biases of the experts of each row."""
    return node.target is aten.index.Tensor and Index(node).x.op == "get_attr"


def _is_spatial(linear: fx.Node) -> bool:
    """True for a convolution with a kernel larger than 1: a stem or a patch embedding, never part of a feed-forward."""
    layer = Convolution.of(linear)
    return layer is not None and any(size != 1 for size in nodes.tensor_type(layer.weight).shape[2:])


def _norm_inside(node: fx.Node) -> bool:
    """True for a norm after an activation, as in BitNet before the down projection; other norms read the residual stream."""
    if node.target not in NORMS:
        return False
    before = source(node.all_input_nodes[0])
    return is_activation(before) or nodes.is_call(before, aten.mul.Tensor)


def _multiplies_values(node: fx.Node) -> bool:
    """True for a product of two values where neither is a function of the other alone (x · sigmoid(x) is one activation)."""
    if not nodes.is_call(node, aten.mul.Tensor) or len(node.all_input_nodes) != 2:
        return False
    pieces = (operator.getitem, aten.slice.Tensor)
    return any(nodes.is_call(used, *pieces) for used in node.all_input_nodes)
