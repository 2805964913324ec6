"""Linear layers with quantized weights, as the lowering passes match them.

    linear(fake_quantize(x) | fake_quantize_dynamic(x) | x, dequantize(W_q), b)

and the same as `addmm`, `mm` or `matmul`, with the weight in either orientation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import bias_of, input_of
from lissom.compiler.analysis.structure.matrix import stored_weight
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Dequantize
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_own_weight
from lissom.compiler.ir.operators import FAKE_QUANTIZES, GROUPED_PRODUCTS, LINEAR_PRODUCTS, TRANSPOSES
from lissom.compiler.ir.types import Size, fixed
from lissom.ops.formats import FORMATS, unpack_halves
from lissom.ops.quantization import dequantize, fake_quantize

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer with a quantized weight, or the layers of several experts with a stack of them.

    Attributes:
        node: the product.
        values: its input.
        weight: the dequantized weight.
        bias: None when there is none.
        transposed: whether the weight is [..., in_features, out_features].
    """

    node: fx.Node
    values: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def is_stacked(self) -> bool:
        """True for the layers of experts, whose product reads the ends of their rows too."""
        return self.node.target in GROUPED_PRODUCTS

    @property
    def stored(self) -> fx.Node:
        """The stored weight."""
        return Dequantize(self.weight).q

    @property
    def rounds(self) -> bool:
        """True when its input is quantized."""
        return self.values.target in FAKE_QUANTIZES

    @property
    def scale_is_known(self) -> bool:
        """True when its input is quantized with a scale that is an operand, from calibration or computed by other operators."""
        return self.values.target is fake_quantize

    @property
    def granularity(self) -> str:
        """That of its input's dynamic scale; `token` where the scale is known."""
        return str(self.values.kwargs.get("granularity", "token"))

    @property
    def x(self) -> fx.Node:
        """The layer's input before it is quantized."""
        return nodes.operand(self.values) if self.rounds else self.values

    @property
    def format(self) -> str:
        """The format of the stored weight."""
        return Dequantize(self.weight).format

    @property
    def blocks(self) -> tuple[int, int]:
        """The number of blocks with a scale each, along out_features and in_features."""
        return self._oriented(1, 1, *nodes.tensor_type(Dequantize(self.weight).scale).shape)

    @property
    def sizes(self) -> tuple[int, int]:
        """out_features and in_features."""
        return self._oriented(*nodes.tensor_type(self.weight).shape)

    def _oriented(self, *shape: Size) -> tuple[int, int]:
        rows, columns = map(fixed, shape[-2:])
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def is_read_whole(self) -> bool:
        """True when another operator needs the whole weight in floating point."""
        return any(_reads_whole(user) for user in self.weight.users)

    @property
    def has_one_scale(self) -> bool:
        """False when its input is quantized with several known scales."""
        return not self.scale_is_known or not any(nodes.tensor_type(grid).rank for grid in self.values.all_input_nodes[1:])

    @property
    def has_row_scales(self) -> bool:
        """True when its input is quantized with a known scale for each row, as where ranks hold parts of the rows."""
        if not self.scale_is_known:
            return False
        rows = (*nodes.tensor_type(self.x).shape[:-1], 1)
        grid = [nodes.tensor_type(operand) for operand in self.values.all_input_nodes[1:]]
        return all(operand_type.shape == rows and operand_type.dtype == torch.float32 for operand_type in grid)

    def parts(self, edit: Editor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The stored weight, unpacked, its scale and its zero point, as [..., out_features, in_features]."""
        q, *grid = (edit.program.weight(str(operand.target)).detach() for operand in self.weight.all_input_nodes)
        form = FORMATS[self.format]
        q = unpack_halves(q, form) if form.bits == 4 else q
        q, scale, *zero_point = (tensor.mT if self.transposed and tensor.dim() else tensor for tensor in (q, *grid))
        return q, scale, zero_point[0] if zero_point else None


def quantized_layer(node: fx.Node) -> QuantizedLayer | None:
    """The quantized layer of a product; None for any other node."""
    if node.kwargs:
        return None
    weight, transposed = stored_weight(node)
    x, bias = input_of(node), bias_of(node)
    if weight.target is not dequantize:
        return None
    if nodes.tensor_type(weight).rank != (3 if node.target in GROUPED_PRODUCTS else 2):
        return None
    if any(operand.op != "get_attr" for operand in weight.all_input_nodes):
        return None
    return QuantizedLayer(node, x, weight, bias, transposed)


def _reads_whole(user: fx.Node) -> bool:
    if nodes.is_call(user, *TRANSPOSES):
        return any(_reads_whole(reader) for reader in user.users)
    return user.target not in (*LINEAR_PRODUCTS, *GROUPED_PRODUCTS)


def is_owned(argument: object) -> TypeGuard[fx.Node]:
    """True for a weight, or a dequantized one, that nothing else reads."""
    if nodes.is_call(argument, dequantize):
        return len(argument.users) == 1 and all(map(is_own_weight, argument.all_input_nodes))
    return is_own_weight(argument)


def layer_path(weight: fx.Node) -> str:
    """The module that a weight, or a dequantized one, is stored in."""
    stored = weight if weight.op == "get_attr" else nodes.operand(weight)
    return str(stored.target).rpartition(".")[0]


def store_like(edit: Editor, weight: fx.Node, name: str, parts: Iterable[torch.Tensor]) -> fx.Node:
    """A dequantized weight of other integers and their grid, in the format of `weight`; use inside `edit.before`."""
    leaves = (name, f"{name}_scale", f"{name}_zero_point")
    stored = [edit.weight(leaf, part) for leaf, part in zip(leaves, parts, strict=False)]
    return edit.call(dequantize, *stored, **weight.kwargs)
