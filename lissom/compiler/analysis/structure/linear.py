"""Linear layers: which nodes are one, their weights and inputs, and the layers a value comes from."""

from __future__ import annotations

import operator

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import AddedProduct, Binary, Convolution, Embedding, Matmul, WeightedLayer
from lissom.compiler.ir.match import computed_from

aten = torch.ops.aten

_WEIGHT_VIEWS = (*ops.PERMUTATIONS, *ops.RESHAPES, *ops.CASTS, operator.getitem, *ops.SPLITS, *ops.PARTS)
"""Operators allowed between a weight and the linear layer that reads it."""

_FAR = 12
"""The most operators between a layer and its residual add."""


def is_attention(node: fx.Node) -> bool:
    """True for an attention operator: PyTorch's, or ours with soft-capped scores and sinks."""
    return node.target in ops.ATTENTIONS


def is_quantizer(node: fx.Node) -> bool:
    """True for an operator that quantizes its first argument, dequantizes it, or does both."""
    return node.target in ops.QUANTIZERS


def is_linear(node: fx.Node) -> bool:
    """True for a product with a weight: linear, addmm, a convolution, or a (grouped) matmul whose second factor is one."""
    return weight_of(node) is not None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The weight of a linear layer, before views, casts and quantizers; None for any other node.

    Kernels with a packed or quantized weight do not count as linear layers here: their weight is no plain matrix.
    """
    path = weight_path(node) if node.target not in ops.QUANTIZED_LINEARS else ()
    return path[-1] if path else None


def weight_path(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes from a linear layer's weight argument back to the weight: views, casts and quantizers, then the weight.

    Empty when the node is no linear layer, as for a product of two computed values.
    """
    if (weight := second_factor(node)) is None:
        return ()
    path = [weight]
    while nodes.is_call(path[-1], *_WEIGHT_VIEWS, *ops.QUANTIZERS):
        path.append(nodes.operand(path[-1]))
    return tuple(path) if path[-1].op == "get_attr" else ()


def second_factor(node: fx.Node) -> fx.Node | None:
    """The weight argument of a linear layer, or the second factor of a product; None for any other node."""
    if (product := AddedProduct.of(node) or Matmul.of(node)) is not None:
        return product.y
    layer = WeightedLayer.of(node)
    return None if layer is None else layer.weight


def input_of(linear: fx.Node) -> fx.Node:
    """The input of a linear layer."""
    product = AddedProduct.of(linear)
    return nodes.operand(linear) if product is None else product.x


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The bias of a linear layer, or what `addmm` adds; None when there is none."""
    if (product := AddedProduct.of(linear)) is not None:
        return product.bias
    bias = None if linear.target in (*ops.MATMULS, *ops.GROUPED_PRODUCTS) else nodes.argument(linear, "bias")
    return bias if isinstance(bias, fx.Node) else None


def producers(start: object) -> tuple[fx.Node, ...]:
    """The linear layers a value comes from, nearest first, without passing through another one or an attention."""
    before = computed_from([start], lambda node: not (is_linear(node) or is_attention(node)))
    return tuple(node for node in before if is_linear(node))


def source(node: fx.Node) -> fx.Node:
    """A value before views, casts and norms, so that two layers with the same input can be recognized."""
    while nodes.is_call(node, *ops.SHAPES, *ops.NORMS) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def last_factor(linear: fx.Node) -> fx.Node:
    """The layer that ends a product of linear layers, U of U·(V·x), as `low-rank` makes them; else the layer itself."""
    node = linear
    while True:
        users = list(node.users)
        while len(users) == 1 and is_quantizer(users[0]):
            users = list(users[0].users)
        if len(users) != 1 or not is_linear(users[0]):
            return node
        node = users[0]


def first_factor(linear: fx.Node) -> fx.Node:
    """The layer that begins a product of linear layers, V of U·(V·x); else the layer itself."""
    node = linear
    while is_linear(before := _unquantized(input_of(node))) and last_factor(before) is last_factor(linear):
        node = before
    return node


def _unquantized(node: fx.Node) -> fx.Node:
    while is_quantizer(node):
        node = node.all_input_nodes[0]
    return node


def residual_of(last: fx.Node) -> fx.Node | None:
    """The residual add of a site, reached from its last call through views, norms, bases and element-wise operators only.

    Of a layer in factors, from its last factor.
    """
    node = last_factor(last)
    for _ in range(_FAR):
        users = [user for user in node.users if user.op == "call_function"]
        if len(users) != 1:
            return None
        user = users[0]
        if nodes.is_call(user, aten.add.Tensor) and nodes.is_tensor(Binary(user).right):
            ranks = {nodes.tensor_type(value).rank for value in (Binary(user).left, Binary(user).right, user)}
            return user if len(ranks) == 1 else None
        passed = user.target in ops.SHAPES or user.target in (*ops.NORMS, *ops.BASES)
        if not (passed or ops.is_pointwise(user) or is_quantizer(user)):
            return None
        node = user
    return None


def features(linear: fx.Node, side: int) -> int:
    """The out_features (side 0) or in_features (side 1) of a linear layer."""
    if linear.target in ops.CONVOLUTIONS:
        return as_int(nodes.tensor_type(Convolution(linear).weight).shape[side])
    return width(linear if side == 0 else input_of(linear))


def width(node: object) -> int:
    """The size of the last dimension of a value; -1 when it varies."""
    return as_int(nodes.tensor_type(node).shape[-1])


def as_int(size: object) -> int:
    """The size when it is fixed, -1 when it varies."""
    return size if isinstance(size, int) else -1


def activation_of(node: fx.Node) -> str | None:
    """The name of the activation that a call computes, if the kernels have it as an epilogue."""
    if node.target not in ops.EPILOGUES:
        return None
    tanh = node.target is aten.gelu.default and nodes.argument(node, "approximate") == "tanh"
    return "gelu_tanh" if tanh else nodes.overload(node)._schema.name.partition("::")[2]


def is_id_table(node: object) -> bool:
    """True for a lookup in a table of ids, [ids, 1] in int64, by which a pruned vocabulary maps them."""
    lookup = Embedding.of(node)
    if lookup is None:
        return False
    table = nodes.tensor_type(lookup.table)
    return lookup.table.op == "get_attr" and table.dtype == torch.int64 and table.shape[1] == 1
