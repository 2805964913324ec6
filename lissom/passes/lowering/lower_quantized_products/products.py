"""The products that layers are lowered to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.quantized_linear import QuantizedLayer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.ops import int4_product, int8_product
from lissom.passes.lowering.lower_quantized_products.quantized_input import QuantizedInput, flatten, quantize_input
from lissom.passes.lowering.lower_quantized_products.stored_weights import StoredWeights, tile_grid, tiles

aten = torch.ops.aten

GROUPS = (256, 128, 64, 32)
"""The inputs that may share a scale in `_weight_int4pack_mm`."""


def group_of(layer: QuantizedLayer) -> int | None:
    """The largest group `_weight_int4pack_mm` takes that has one scale in this layer."""
    shared = layer.sizes[1] // layer.blocks[1]
    return next((group for group in GROUPS if shared % group == 0), None)


def is_for_triton(layer: QuantizedLayer) -> bool:
    """True for a layer whose formats Triton's kernels multiply: int8 with quantized activations, and weight-only int4."""
    return layer.format == "int8" if layer.rounds else layer.format.endswith("int4")


@dataclass(frozen=True)
class Lowering:
    """Lowers layers; activations and weights that layers share are quantized and converted once.

    Attributes:
        triton: whether Triton's kernels are used.
        row_wise: whether `_scaled_mm` supports row-wise scales.
        pads: whether `_int_mm` needs rows of zeros.
    """

    edit: Editor
    triton: bool
    row_wise: bool
    pads: bool
    weights: StoredWeights
    inputs: dict[fx.Node, QuantizedInput]

    def lower(self, layer: QuantizedLayer) -> fx.Node:
        """The output of the lowered layer."""
        triton = self.triton and is_for_triton(layer)
        if layer.rounds and layer.values not in self.inputs:
            with self.edit.before(layer.values):
                self.inputs[layer.values] = quantize_input(self.edit, layer, triton=triton, pads=self.pads)
        with self.edit.before(layer.node):
            if triton:
                return self._triton_product(layer)
            if not layer.rounds:
                product = self._weight_only_product(layer)
            elif layer.format == "int8":
                product = self._int8_product(layer)
            elif self.row_wise and self._scales_rows(layer):
                return self._unflatten(layer, self._scaled_product(layer))
            else:
                product = self._fp8_product(layer)
            return self._unflatten(layer, self._with_bias(layer, product))

    def _triton_product(self, layer: QuantizedLayer) -> fx.Node:
        """`int8_product` or `int4_product`, with the bias in it where it is one value per feature."""
        bias = layer.bias
        if bias is not None and list(nodes.tensor_type(bias).shape) != [layer.sizes[0]]:
            bias = None
        if layer.rounds:
            values, dtype = self.inputs[layer.values], nodes.tensor_type(layer.node).dtype
            weight = self.weights.matrix(layer), values.scale, values.offset, self.weights.scales(layer)
            product = self.edit.call(int8_product, values.q, *weight, self.weights.sums(layer), bias, dtype=dtype)
        else:
            weight = self.weights.halves(layer), *self.weights.by_group(layer)
            product = self.edit.call(int4_product, layer.x, *weight, bias, signed=layer.format == "int4")
        return product if bias is layer.bias else self._with_bias(layer, product)

    def _int8_product(self, layer: QuantizedLayer) -> fx.Node:
        call, values = self.edit.call, self.inputs[layer.values]
        product = call(aten._int_mm.default, values.q, self.weights.columns(layer))
        if nodes.tensor_type(values.q).shape[0] != values.rows:
            product = call(aten.slice.Tensor, product, 0, 0, values.rows)
        product = call(aten.sub.Tensor, product, call(aten.mul.Tensor, values.offset, self.weights.sums(layer)))
        return call(aten.mul.Tensor, product, call(aten.mul.Tensor, values.scale, self.weights.scales(layer)))

    def _scales_rows(self, layer: QuantizedLayer) -> bool:
        """True when `_scaled_mm` can apply all scales of a layer: bfloat16, per-token."""
        operands = [layer.x] if layer.bias is None else [layer.x, layer.bias]
        by_row = nodes.tensor_type(self.inputs[layer.values].scale).rank == 2
        return by_row and all(nodes.tensor_type(operand).dtype == torch.bfloat16 for operand in operands)

    def _scaled_product(self, layer: QuantizedLayer) -> fx.Node:
        values, scales = self.inputs[layer.values], self.edit.call(aten.unsqueeze.default, self.weights.scales(layer), 0)
        operands = values.q, self.weights.columns(layer), values.scale, scales, layer.bias, None, torch.bfloat16
        return self.edit.call(aten._scaled_mm.default, *operands)

    def _fp8_product(self, layer: QuantizedLayer) -> fx.Node:
        call, values = self.edit.call, self.inputs[layer.values]
        one = self.weights.keep(layer, "one", lambda: torch.ones((), device=self.edit.tensor(layer.stored).device))
        product = call(aten._scaled_mm.default, values.q, self.weights.columns(layer), one, one, None, None, torch.float32)
        return call(aten.mul.Tensor, product, call(aten.mul.Tensor, values.scale, self.weights.scales(layer)))

    def _weight_only_product(self, layer: QuantizedLayer) -> fx.Node:
        x = self.edit.call(aten.contiguous.default, flatten(self.edit, layer.x))
        if layer.format == "int8":
            scales = self.weights.scales(layer, nodes.tensor_type(x).dtype)
            return self.edit.call(aten._weight_int8pack_mm.default, x, self.weights.matrix(layer), scales)
        q, scale, zero_point = layer.parts(self.edit)
        group = group_of(layer) or 0
        packed = self.weights.keep(layer, "tiles", lambda: tiles(q))
        repeats = layer.sizes[1] // layer.blocks[1] // group
        scales = self.weights.keep(layer, "grid", lambda: tile_grid(scale, zero_point, layer.sizes[0], repeats))
        return self.edit.call(aten._weight_int4pack_mm.default, x, packed, group, scales)

    def _with_bias(self, layer: QuantizedLayer, product: fx.Node) -> fx.Node:
        """The bias added, and the result in the layer's dtype."""
        if layer.bias is not None:
            product = self.edit.call(aten.add.Tensor, product, layer.bias)
        dtype = nodes.tensor_type(layer.node).dtype
        return product if nodes.tensor_type(product).dtype == dtype else self.edit.call(aten.to.dtype, product, dtype)

    def _unflatten(self, layer: QuantizedLayer, product: fx.Node) -> fx.Node:
        """[..., features] of [rows, features]."""
        rank = nodes.tensor_type(layer.node).rank
        if rank == 2:
            return product
        sizes = [self.edit.size(layer.x, dim) for dim in range(rank - 1)]
        return self.edit.call(aten.reshape.default, product, [*sizes, layer.sizes[0]])
