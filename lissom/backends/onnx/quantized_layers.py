"""The quantized layers of an ONNX graph, and why some have no integer kernel of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.export import module_of
from lissom.backends.onnx.quantization import Stored, format_of, is_by_group, is_quantization, operands
from lissom.backends.onnx.rewriting import constant_of
from lissom.backends.onnx.translation import DEQUANTIZE, ROUND, ROUND_DYNAMIC
from lissom.backends.simulated_layers import SimulatedLayer
from lissom.ops.quantization import GROUP

_BLOCKS = (256, 128, 64, 32, 16)
_BLOCK = GROUP
"""The block size of `MatMulNBits` for a per-channel scale."""


@dataclass(frozen=True)
class Layer:
    """A layer with a quantized weight or quantized activations.

    Attributes:
        product: its node.
        x: its input.
        rounded: the quantizer that x comes from, or None; x is before it where its scales are per group.
        stored: its quantized weight as [features in, features out], None for a floating-point weight.
        weight: the value that holds it.
    """

    product: ir.Node
    x: ir.Value
    rounded: ir.Node | None
    stored: Stored | None
    weight: ir.Value

    @property
    def module(self) -> str:
        return module_of(self.product)

    def simulated(self, reason: str) -> SimulatedLayer:
        """The layer as one that is simulated in floating point, for this reason."""
        weights = self.stored and f"{self.stored.form.name} weights"
        values = self.rounded and f"{format_of(self.rounded).name} activations"
        return SimulatedLayer(self.product.name or "", self.module, " on ".join(filter(None, (weights, values))), reason)

    @property
    def obstacle(self) -> str | None:
        """The reason the layer has no integer kernel; None if it has one."""
        stored, rounded = self.stored, self.rounded
        if stored is None:
            return "its weight is not stored in integers"
        if self.x.dtype != ir.DataType.FLOAT or not self.x.shape:
            return "it does not compute in float32"
        if not stored.form.is_integer or (rounded is not None and not format_of(rounded).is_integer):
            return "ONNX Runtime has no products of fp8 on a CPU"
        if stored.shifts:
            return "ONNX Runtime takes integer zero points only, and its weight has them in floating point"
        if rounded is None or self.by_group:
            least = (
                f"{GROUP} neighbours and more with rounded activations"
                if self.by_group
                else f"{_BLOCKS[-1]} neighbours and more"
            )
            return None if self.block else f"MatMulNBits takes groups of {least}, and it has {self._group}"
        if stored.form.bits != 8 or format_of(rounded).bits != 8:
            return "ONNX Runtime multiplies 8-bit integers with 8-bit integers only"
        if stored.scale.shape[0] != 1:
            return "a product of integers takes a scale for each channel, and it has one for each group of a channel"
        scale = constant_of(rounded.inputs[1]) if rounded.op_type == ROUND else np.ones(1)
        if scale is None or scale.size != 1:
            return "a product of integers takes one scale for the values it reads"
        return None

    @property
    def by_group(self) -> bool:
        """True if its activations have a scale for each group."""
        return self.rounded is not None and is_by_group(self.rounded)

    @property
    def _group(self) -> int:
        """The number of input features per scale."""
        assert self.stored is not None
        return self.stored.q.shape[0] // self.stored.scale.shape[0]

    @property
    def block(self) -> int:
        """The block size for `MatMulNBits`, which divides that of the weight; 0 where there is none."""
        assert self.stored is not None
        if self.stored.scale.shape[0] == 1:
            return _BLOCK
        return next((block for block in ((GROUP,) if self.by_group else _BLOCKS) if self._group % block == 0), 0)


def quantized_layers(model: ir.Model) -> list[Layer]:
    """Every matrix product with a quantized weight or a quantized input."""
    layers = [_as_layer(node) for node in model.graph if node.op_type in ("MatMul", "Gemm") and node.domain == ""]
    return [layer for layer in layers if layer is not None]


def simulated(layers: Sequence[Layer], accuracy_level: int, failure: str | None = None) -> list[SimulatedLayer]:
    """The layers without an integer kernel, with the reason; `failure` is that of all others."""
    simulated_layers: list[SimulatedLayer] = []
    for layer in layers:
        reason = layer.obstacle or level_obstacle(layer, accuracy_level) or failure
        if reason is not None:
            simulated_layers.append(layer.simulated(reason))
    return simulated_layers


def level_obstacle(layer: Layer, accuracy_level: int) -> str | None:
    """The reason a weight-only layer has no kernel faster than dequantizing the weight; None if it has one."""
    if layer.rounded is not None or layer.stored is None or layer.stored.form.bits == 4 or accuracy_level == 4:
        return None
    return "ONNX Runtime is fast with int8 weights only where it rounds activations, as OnnxRuntime(accuracy_level=4) lets it"


def _as_layer(product: ir.Node) -> Layer | None:
    x, second = product.inputs[:2]
    if x is None or second is None:
        return None
    options = product.attributes
    turned = bool(options.get_int("transB", 0))
    if options.get_int("transA", 0) or options.get_float("alpha", 1.0) != 1.0 or options.get_float("beta", 1.0) != 1.0:
        return None
    node = second.producer()
    if node is not None and node.op_type == "Transpose" and node.domain == "" and len(second.shape or ()) == 2:
        first = node.inputs[0]
        node, turned = first.producer() if first is not None else None, not turned
    rounds = x.producer()
    rounded = rounds if rounds is not None and is_quantization(rounds, ROUND, ROUND_DYNAMIC) else None
    weight = node if node is not None and is_quantization(node, DEQUANTIZE) else None
    stored = Stored.of(weight) if weight is not None else None
    if rounded is not None and weight is not None and is_by_group(rounded):
        x = operands(rounded)[0]
    if weight is None:
        # A product of two activations, as in attention, is no layer.
        return Layer(product, x, rounded, None, second) if rounded is not None and constant_of(second) is not None else None
    return Layer(product, x, rounded, stored.transposed() if stored and turned else stored, operands(weight)[0])
