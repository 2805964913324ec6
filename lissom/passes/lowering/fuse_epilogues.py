"""Fuse what follows a packed linear layer into its kernel: an activation, a sum or product with another value, a layer norm.

Shown for `lissom::packed_linear`; the same holds for `lissom::quantized_linear`, `lissom::weight_quantized_linear`, and
those with a weight of which blocks are zero. `lissom::int8_product` and `lissom::int4_product` on CUDA devices take all but
the norm:

    activation(packed_linear(x))           ->  packed_linear(x, activation=…)    relu, squared_relu, gelu or silu
    packed_linear(x) + other, … · other    ->  packed_linear(x, other, combine=…)
    layer_norm(packed_linear(x) + other)   ->  packed_linear_norm(x, other)

The epilogue is computed while the sums are in registers or in cache, and the intermediate value is never written to memory. A
value with other readers, such as the residual stream of a pre-norm model, is not fused into a norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import activation_of
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Norm
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import only_user, other_argument
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops import int4_product, int8_product
from lissom.ops.block_sparse_linear import (
    block_sparse_linear,
    block_sparse_linear_norm,
    block_sparse_quantized_linear,
    block_sparse_quantized_linear_norm,
)
from lissom.ops.packed_linear import packed_linear, packed_linear_norm
from lissom.ops.quantized_linear import quantized_linear, quantized_linear_norm
from lissom.ops.weight_quantized_linear import weight_quantized_linear, weight_quantized_linear_norm

aten = torch.ops.aten

_NORMED: dict[object, torch._ops.OpOverload | None] = {
    packed_linear: packed_linear_norm,
    quantized_linear: quantized_linear_norm,
    weight_quantized_linear: weight_quantized_linear_norm,
    block_sparse_linear: block_sparse_linear_norm,
    block_sparse_quantized_linear: block_sparse_quantized_linear_norm,
    int8_product: None,
    int4_product: None,
}
"""The operators whose kernels take epilogues, each with its variant that ends in a layer norm, if it has one."""


@dataclass(frozen=True)
class FuseEpilogues(Rewrite):
    """Fuses activations, residual adds, products and layer norms into the packed linear layer before them."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(*_NORMED):
            while node is not None:
                node = _fuse(edit, node)


def _fuse(edit: Editor, linear: fx.Node) -> fx.Node | None:
    """The layer with its only reader fused into it; None when the reader is no epilogue."""
    reader = only_user(linear)
    if reader is None:
        return None
    options, operands = dict(linear.kwargs), _operands(linear)
    other = operands["other"]
    activation = activation_of(reader)
    if activation and options.get("activation", "none") == "none" and other is None:
        return _replace(edit, linear, reader, operands, {**options, "activation": activation})
    if nodes.is_call(reader, aten.add.Tensor, aten.mul.Tensor) and other is None and not reader.kwargs:
        value = other_argument(reader, linear)
        types = nodes.node_type(linear), nodes.node_type(value) if nodes.is_tensor(value) else None
        if value is not linear and fake.same_type(edit.program.fake_mode, *types):
            combine = "mul" if reader.target is aten.mul.Tensor else "add"
            return _replace(edit, linear, reader, {**operands, "other": value}, {**options, "combine": combine})
    normed = _NORMED[linear.target]
    if normed is None:
        return None
    plain = options.pop("activation", "none") == "none" and options.pop("combine", "add") == "add"
    if reader.target is aten.layer_norm.default and plain and _over_features(reader, options["features"]):
        norm = {f"norm_{name}": nodes.argument(reader, name) for name in ("weight", "bias")}
        _replace(edit, linear, reader, {**operands, **norm}, {**options, "eps": nodes.argument(reader, "eps")}, normed)
    return None


def _operands(linear: fx.Node) -> dict[str, object]:
    """The call's positional arguments, by parameter name."""
    parameters = nodes.overload(linear)._schema.arguments
    return {parameter.name: nodes.argument(linear, parameter.name) for parameter in parameters if not parameter.kwarg_only}


def _replace(
    edit: Editor,
    linear: fx.Node,
    reader: fx.Node,
    operands: dict[str, object],
    options: dict[str, Any],
    normed: torch._ops.OpOverload | None = None,
) -> fx.Node:
    """Replace the reader with the layer's kernel, or its variant with a norm."""
    with edit.before(reader, like=[linear]):
        call = edit.call(normed or nodes.overload(linear), *operands.values(), **options)
    edit.replace(reader, call)
    return call


def _over_features(norm: fx.Node, features: object) -> bool:
    """True for a norm over the last dimension, with the layer's own dtype throughout."""
    if list(Norm(norm).shape) != [features]:
        return False
    return len({nodes.tensor_type(tensor).dtype for tensor in (norm, *norm.all_input_nodes[1:])}) == 1
