"""Let the kernel of a packed linear layer do what follows it: an activation, a sum or product with another value, a layer norm.

    relu | gelu | silu (packed_linear(x))       ->  packed_linear(x, activation=…)
    packed_linear(x) + other, … · other         ->  packed_linear(x, other, combine=…)
    layer_norm(packed_linear(x) + other)        ->  packed_linear_norm(x, other)

What is fused is done while the sums are in registers or in cache, and the value in between is never written to memory. A value
that is read elsewhere too, as the residual stream of a model with norms in front of its layers, is not fused into a norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler import fake
from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.kinds import Rewrite
from lissom.ops.packed_linear import packed_linear, packed_linear_norm

aten = torch.ops.aten

_COMBINE: dict[object, str] = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}


@dataclass(frozen=True)
class FuseEpilogues(Rewrite):
    """Fuses activations, sums, products and layer norms into the packed linear layers they follow."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(packed_linear):
            while node is not None:
                node = _fuse(edit, node)


def _fuse(edit: Editor, linear: fx.Node) -> fx.Node | None:
    """The layer with its only reader fused into it; None when that cannot be."""
    if len(linear.users) != 1:
        return None
    reader = next(iter(linear.users))
    options = dict(linear.kwargs)
    x, weight, bias, other = (*linear.args, None, None)[:4]
    activation = _activation(reader)
    if activation and options.get("activation", "none") == "none" and other is None:
        return _replace(edit, linear, reader, packed_linear, x, weight, bias, **{**options, "activation": activation})
    if reader.target in _COMBINE and other is None and not reader.kwargs:
        value = reader.args[1] if reader.args[0] is linear else reader.args[0]
        if value is not linear and nodes.is_tensor(value) and _same_type(edit, value, linear):
            return _replace(
                edit, linear, reader, packed_linear, x, weight, bias, value, **options, combine=_COMBINE[reader.target]
            )
    plain = options.get("activation", "none") == "none" and options.get("combine", "add") == "add"
    if reader.target is aten.layer_norm.default and plain and _over_features(reader, options["features"]):
        norm_weight, norm_bias = nodes.argument(reader, "weight"), nodes.argument(reader, "bias")
        call = (x, weight, bias, other, norm_weight, norm_bias)
        return _replace(
            edit, linear, reader, packed_linear_norm, *call, features=options["features"], eps=nodes.argument(reader, "eps")
        )
    return None


def _replace(
    edit: Editor, linear: fx.Node, reader: fx.Node, target: torch._ops.OpOverload, *args: object, **options: object
) -> fx.Node | None:
    with edit.before(reader, like=[linear]):
        call = edit.call(target, *args, **options)
    edit.replace(reader, call)
    return call if target is packed_linear else None


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}[str(nodes.argument(node, "approximate"))]
    return None


def _same_type(edit: Editor, value: fx.Node, linear: fx.Node) -> bool:
    return fake.same_type(edit.program.fake_mode, nodes.node_type(value), nodes.node_type(linear))


def _over_features(norm: fx.Node, features: object) -> bool:
    """True for a norm over the last dimension, with the layer's own dtype throughout."""
    if list(nodes.argument(norm, "normalized_shape")) != [features]:  # pyright: ignore[reportArgumentType]
        return False
    operands = [nodes.argument(norm, name) for name in ("weight", "bias")]
    dtype = nodes.tensor_type(norm).dtype
    return all(item is None or nodes.tensor_type(item).dtype == dtype for item in operands)  # pyright: ignore[reportArgumentType]
