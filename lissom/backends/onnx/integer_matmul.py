"""Quantized layers in ONNX as integer matrix products, with the kernels of ONNX Runtime.

int8 activations and weights (W8A8) are multiplied as integers, and the sum is scaled, with a per-tensor scale of the
activations and a per-channel scale of the weights:

    y = s_x · s_w · Σ_i (q_i - z) w_i + bias        (`MatMulIntegerToFloat`)

It takes no per-row scale and zero point of x. A per-token scale is therefore multiplied after the product, and the zero point
is subtracted by

    Σ_i (q_i - z) w_i = Σ_i q_i w_i - z Σ_i w_i

exactly, within the product itself: z is appended to q as further features, and as many rows d_j with Σ_j d_j = -Σ_i w_i, each
in the range of the weights, are appended to w. That takes some twenty rows for the 384 of a small encoder.

Weight-only int8 and int4 layers become `MatMulNBits`, which reads quantized weights. Where activations have a scale for each
group of 32, it reads them before they are quantized, and its `accuracy_level=4` quantizes them in the same way.

In a model of standard operators, `MatMulInteger` and a product with both scales stand for `MatMulIntegerToFloat`, to which ONNX
Runtime fuses them, and weight-only layers keep `DequantizeLinear`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.attention import CONTRIB
from lissom.backends.onnx.quantization import (
    Stored,
    dynamic_range,
    format_of,
    operands,
    packed,
    scalar_scales,
)
from lissom.backends.onnx.quantized_layers import Layer, level_obstacle, quantized_layers
from lissom.backends.onnx.rewriting import Writer, constant_of, fixed_size, take_over
from lissom.backends.onnx.translation import ROUND

PRODUCTS = {
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulInteger16", "QLinearMatMul", "QGemm"),
    *("QLinearConv", "ConvInteger", "QAttention", "MatMulNBits", "MatMulBnb4"),
}
"""Operators of ONNX Runtime that multiply quantized weights."""
_GROUPED = 4
"""The `accuracy_level` of `MatMulNBits` that quantizes activations to int8, each with a scale for its block."""
_FACTOR = 8
"""Input features per row of zero points at least; where more rows are needed, they are subtracted after the product."""


def expand_integers(
    model: ir.Model, accuracy_level: int = 0, *, beside: bool = False, standard: bool = False, small: bool = False
) -> int:
    """Replace quantized layers with integer kernels where there are any; returns how many.

    Args:
        standard: with operators of standard ONNX alone.
        small: also weight-only layers whose kernel is not faster than dequantizing the weight, for the size of the model.
        beside: keep each layer, and add an output with its integer kernel's error on the same input, as `distance` gives it.
    """
    groups: dict[ir.Value, list[Layer]] = defaultdict(list)
    for layer in quantized_layers(model):
        by_hand = standard and (layer.rounded is None or layer.by_group)
        slow = not small and level_obstacle(layer, accuracy_level) is not None
        if layer.obstacle is None and not slow and not by_hand:
            groups[layer.x].append(layer)
    for group in groups.values():
        write, rounded = Writer(model), group[0].rounded
        values = _integers(write, rounded, _rows(group)) if rounded is not None and not group[0].by_group else None
        model.graph.insert_before(group[0].product, nodes_for(write, group[0]))
        for layer in group:
            write = Writer(model)
            if values is None:
                result, biased = _few_bits(write, layer, _GROUPED if layer.by_group else accuracy_level), False
            elif values.by_row is None:
                result, biased = _scaled_once(write, layer, values, standard), not standard
            else:
                result, biased = _scaled_by_row(write, layer, values, standard), False
            _finish(write, layer, result, biased, beside)
    if groups and not standard:
        model.opset_imports[CONTRIB] = 1
    return sum(map(len, groups.values()))


@dataclass(frozen=True)
class _Integers:
    """Quantized activations.

    Attributes:
        q: with zero points appended, `rows` times.
        by_row: the per-row scale, or None.
        rows: None where zero points are subtracted after the product.
    """

    q: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    by_row: ir.Value | None = None
    rows: int | None = 0


def _integers(write: Writer, rounded: ir.Node, rows: int | None) -> _Integers:
    """The output of a quantizer as integers, and their scale."""
    x, scale, zero_point = operands(rounded)
    call, form = write.call, format_of(rounded)
    if rounded.op_type == ROUND:
        assert scale is not None
        scale, zero_point = scalar_scales(write, scale, zero_point, form)
        return _Integers(call("QuantizeLinear", x, scale, zero_point), scale, zero_point)
    if rounded.attributes["granularity"].as_string() != "token" and form.name == "uint8":
        q, scale, zero_point = write.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        return _Integers(q, scale, zero_point)
    by_row, point = dynamic_range(write, x, form)
    one, features = write.number(1.0), fixed_size(x, -1)
    if point is None:
        int8 = int(ir.DataType.INT8)
        q = call("QuantizeLinear", x, by_row, axis=-1, block_size=features, output_dtype=int8)
        return _Integers(q, one, None, by_row)
    whole = call("Cast", point, to=int(ir.DataType.UINT8))
    q = call("QuantizeLinear", x, by_row, whole, axis=-1, block_size=features)
    if rows:
        q = call("Concat", q, *[whole] * rows, axis=-1)
    return _Integers(q, one, point, by_row, rows)


def _rows(group: Sequence[Layer]) -> int | None:
    """The number of appended rows for all layers with the same input; None where they are too many."""
    needed = [0]
    for layer in group:
        assert layer.stored is not None
        low, high = _range(layer.stored)
        total = -_column_sums(layer.stored)
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = np.where(total > 0, total / high, np.where(total < 0, total / low, 0.0)).max()
        needed.append(int(np.ceil(min(rows, 2**31))))
    features = group[0].stored.q.shape[0] if group[0].stored is not None else 0
    # Kernels read four features at once.
    padded = max(needed) + -(features + max(needed)) % 4
    return padded if padded <= features // _FACTOR else None


def _column_sums(stored: Stored) -> np.ndarray:
    """Σ_i w_i per output feature, as integers."""
    points = 0 if stored.zero_point is None else stored.zero_point.astype(np.int64)
    return (stored.q.astype(np.int64) - points).sum(0)


def _range(stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The minimum and maximum of w per output feature."""
    points = np.zeros(1, np.int64) if stored.zero_point is None else stored.zero_point.astype(np.int64).reshape(-1)
    return int(stored.form.low) - points, int(stored.form.high) - points


def _with_rows(stored: Stored, rows: int) -> np.ndarray:
    """The quantized weight with appended rows that sum to the negative sum of its rows."""
    low, high = _range(stored)
    rest = -_column_sums(stored)
    below: list[np.ndarray] = []
    for _ in range(rows):
        below.append(np.clip(rest, low, high))
        rest = rest - below[-1]
    assert not rest.any()
    points = 0 if stored.zero_point is None else stored.zero_point.astype(np.int64).reshape(-1)
    return np.concatenate([stored.q, (np.stack(below) + points).astype(stored.q.dtype)])


def _operands(write: Writer, layer: Layer, q: np.ndarray, suffix: str) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """A layer's weight, its scales and zero points, as `MatMulIntegerToFloat` reads them."""
    stored = layer.stored
    assert stored is not None
    points = stored.zero_point
    return (
        write.weight(layer.weight, suffix, q),
        write.weight(layer.weight, "scales", _flat(stored.scale)),
        None if points is None else write.weight(layer.weight, "zero_points", _flat(points.astype(q.dtype))),
    )


def _flat(array: np.ndarray) -> np.ndarray:
    """Without the dimension of input features; a scalar where it is per-tensor."""
    return array.reshape(-1) if array.size > 1 else array.reshape(())


def _multiplied(write: Writer, x: Sequence[ir.Value | None], weight: Sequence[ir.Value | None]) -> ir.Value:
    """`MatMulIntegerToFloat` in standard operators; x and weight are integers, scales and zero points."""
    sums = write.call("MatMulInteger", x[0], weight[0], x[2], weight[2])
    return write.call("Mul", write.call("Cast", sums, to=int(ir.DataType.FLOAT)), write.call("Mul", x[1], weight[1]))


def _scaled_once(write: Writer, layer: Layer, values: _Integers, standard: bool) -> ir.Value:
    assert layer.stored is not None
    weight, scale, points = _operands(write, layer, layer.stored.q, "integers")
    if standard:
        return _multiplied(write, (values.q, values.scale, values.zero_point), (weight, scale, points))
    inputs = [values.q, weight, values.scale, scale, values.zero_point, points, _bias(layer)]
    return write.call("MatMulIntegerToFloat", *inputs, domain=CONTRIB)


def _scaled_by_row(write: Writer, layer: Layer, values: _Integers, standard: bool) -> ir.Value:
    call, stored = write.call, layer.stored
    assert stored is not None and values.by_row is not None
    q = _with_rows(stored, values.rows) if values.rows else stored.q
    weight, scale, points = _operands(write, layer, q, f"integers_{values.rows}" if values.rows else "integers")
    if standard:
        result = _multiplied(write, (values.q, values.scale, None), (weight, scale, points))
    else:
        result = call("MatMulIntegerToFloat", values.q, weight, values.scale, scale, None, points, domain=CONTRIB)
    if values.rows is None and values.zero_point is not None:
        sums = _column_sums(stored) * stored.scale.reshape(-1).astype(np.float64)
        sums = write.weight(layer.weight, "sums", sums.astype(np.float32))
        result = call("Sub", result, call("Mul", values.zero_point, sums))
    return call("Mul", result, values.by_row)


def _few_bits(write: Writer, layer: Layer, accuracy_level: int) -> ir.Value:
    """`MatMulNBits`: a weight-only product, its weight [features out, blocks, bytes]."""
    stored, block = layer.stored, layer.block
    assert stored is not None
    bits = stored.form.bits
    features, count = stored.q.shape
    blocks = -(-features // block)
    middle = 0 if stored.form.low == 0 else 2 ** (bits - 1)
    whole = np.full((count, blocks * block), middle, np.uint8)
    whole[:, :features] = (stored.q.T.astype(np.int16) + middle).astype(np.uint8)
    each = blocks // stored.scale.shape[0]
    scale = np.broadcast_to(stored.scale.T.repeat(each, 1), (count, blocks)).astype(np.float32)
    inputs = [
        layer.x,
        write.weight(layer.weight, "blocks", packed(whole, bits).reshape(count, blocks, -1)),
        write.weight(layer.weight, "block_scales", scale.reshape(-1)),
    ]
    if stored.zero_point is not None:
        points = np.broadcast_to(stored.zero_point.T.astype(np.uint8).repeat(each, 1), (count, blocks))
        inputs.append(write.weight(layer.weight, "block_zero_points", packed(points, bits)))
    options = {"K": features, "N": count, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    return write.op("MatMulNBits", inputs, options, domain=CONTRIB)


def _bias(layer: Layer) -> ir.Value | None:
    """A constant added to a layer's output, one element per output feature."""
    bias = layer.product.inputs[2] if len(layer.product.inputs) > 2 else None
    add = _sum_behind(layer) if bias is None else None
    if add is not None:
        bias = next(operand for operand in add.inputs if operand is not layer.product.outputs[0])
    value = constant_of(bias)
    count = layer.stored.q.shape[1] if layer.stored is not None else 0
    return bias if value is not None and value.shape == (count,) else None


def _sum_behind(layer: Layer) -> ir.Node | None:
    result = layer.product.outputs[0]
    uses = list(result.uses())
    node = uses[0].node if len(uses) == 1 and not result.is_graph_output() else None
    return node if node is not None and node.op_type == "Add" and node.inputs[0] is not node.inputs[1] else None


def _finish(write: Writer, layer: Layer, result: ir.Value, biased: bool, beside: bool) -> None:
    """Replace a layer's output, or add its relative error as an output. A `biased` result includes the bias, if any."""
    graph, last = write.model.graph, layer.product
    bias = _bias(layer) if biased else None
    own = layer.product.inputs[2] if len(layer.product.inputs) > 2 else None
    if bias is not None and own is None:
        last = _sum_behind(layer) or last
    elif own is not None and bias is None:
        result = write.call("Add", result, own)
    if beside:
        graph.outputs.append(distance(write, last.outputs[0], result, f"error_{len(graph.outputs)}"))
        graph.insert_after(last, nodes_for(write, layer))
        return
    graph.insert_before(layer.product, nodes_for(write, layer))
    take_over(last.outputs[0], result)


def nodes_for(write: Writer, layer: Layer) -> Sequence[ir.Node]:
    """The recorded nodes, with the metadata of a layer's module."""
    for node in write.nodes:
        node.metadata_props.update(layer.product.metadata_props)
    return write.nodes


def distance(write: Writer, wanted: ir.Value, actual: ir.Value, name: str) -> ir.Value:
    """max |actual - wanted| / max |wanted|, with a denominator of at least 1e-6."""
    call = write.call
    error, largest = (call("ReduceMax", call("Abs", value), keepdims=0) for value in (call("Sub", actual, wanted), wanted))
    result = call("Div", error, call("Max", largest, write.number(1e-6)))
    result.name, result.shape, result.type = name, ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
    return result
