"""Quantization in ONNX: rounded values and stored integers as operators of standard ONNX, computed in floating point.

What rounds a value becomes `QuantizeLinear` and `DequantizeLinear`, stored weights `DequantizeLinear` of a constant. Where ONNX
has no such operator, as for rows of an embedding that were looked up, it is written out. Before this, `onnx_integers` has put
products of integers in the place of the layers that have some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.rewriting import constant_of, fixed_last, replace
from lissom.backends.onnx.translation import DEQUANTIZE, DOMAIN, ROUND, ROUND_DYNAMIC
from lissom.ops.formats import FORMATS, LEAST, Format

_TYPES = {
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


def is_quantization(node: ir.Node, *names: str) -> bool:
    """True for a quantization node; with names, for one of these."""
    return node.domain == DOMAIN and node.op_type in (names or (ROUND, ROUND_DYNAMIC, DEQUANTIZE))


def format_of(node: ir.Node) -> Format:
    """The format of a quantization node."""
    return FORMATS[node.attributes["format"].as_string()]


def expand_quantization(model: ir.Model) -> int:
    """Replace each quantization node with operators of ONNX; returns how many."""
    found = [node for node in model.graph if is_quantization(node)]
    for node in found:
        tape = Tape(model)
        if node.op_type == DEQUANTIZE:
            result = _stored(tape, node)
        elif node.op_type == ROUND:
            result = _rounded(tape, node)
        else:
            result = _rounded_at_run_time(tape, node)
        dtype = node.outputs[0].dtype
        if dtype is not None and dtype != ir.DataType.FLOAT:
            result = tape.op("Cast", [result], {"to": int(dtype)})
        replace(model, node, tape, result)
    return len(found)


class Tape(ir.tape.Tape):
    """Records nodes, and makes constants and weights."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.model = model

    def constant(self, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A small constant. dtype: for dtypes that numpy lacks."""
        return self.op("Constant", [], {"value": ir.Tensor(array, dtype=dtype or ir.DataType.from_numpy(array.dtype))})

    def number(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def weight(self, like: ir.Value, suffix: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A new weight, named after the one it is derived from; made once per name."""
        name = f"{like.name}_{suffix}"
        known = self.model.graph.initializers.get(name)
        if known is not None:
            return known
        typed = dtype or ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, const_value=ir.Tensor(np.array(array, order="C"), dtype=typed, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(typed)
        self.model.graph.register_initializer(value)
        return value

    def as_float(self, x: ir.Value) -> ir.Value:
        return x if x.dtype == ir.DataType.FLOAT else self.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})


def operands(node: ir.Node) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """The inputs of a quantization node: a tensor, its scale and zero point."""
    x, scale, zero_point = [*node.inputs, None, None][:3]
    assert x is not None
    return x, scale, zero_point


def dynamic_range(tape: Tape, x: ir.Value, form: Format) -> tuple[ir.Value, ir.Value | None]:
    """Per-row scale and zero point of x, [..., 1], both floating point, as `formats.scale_for` computes them."""
    zero, axis = tape.number(0.0), tape.integers(-1)
    low = tape.op("Min", [tape.op("ReduceMin", [x, axis], {"keepdims": 1}), zero])
    high = tape.op("Max", [tape.op("ReduceMax", [x, axis], {"keepdims": 1}), zero])
    if form.symmetric:
        largest = tape.op("Max", [tape.op("Neg", [low]), high])
        return tape.op("Max", [tape.op("Div", [largest, tape.number(form.high)]), tape.number(LEAST)]), None
    steps = tape.number(form.high - form.low)
    scale = tape.op("Max", [tape.op("Div", [tape.op("Sub", [high, low]), steps]), tape.number(LEAST)])
    shifted = tape.op("Sub", [tape.number(form.low), tape.op("Div", [low, scale])])
    return scale, tape.op("Clip", [tape.op("Round", [shifted]), tape.number(form.low), tape.number(form.high)])


def _rounded(tape: Tape, node: ir.Node) -> ir.Value:
    """Q/DQ with a static scale."""
    x, scale, zero_point = operands(node)
    assert scale is not None
    form, x = format_of(node), tape.as_float(x)
    if constant_of(scale) is None or constant_of(scale).size != 1 or form.bits != 8 or not form.is_integer:  # pyright: ignore[reportOptionalMemberAccess]
        return _by_hand(tape, x, tape.as_float(scale), zero_point and tape.as_float(zero_point), form)
    scale, zero_point = scalar_scales(tape, scale, zero_point, form)
    q = tape.op("QuantizeLinear", [x, scale, zero_point])
    return tape.op("DequantizeLinear", [q, scale, zero_point])


def scalar_scales(tape: Tape, scale: ir.Value, zero_point: ir.Value | None, form: Format) -> tuple[ir.Value, ir.Value]:
    """A constant per-tensor scale and its zero point as scalars, the zero point in the dtype of q."""
    number, point = constant_of(scale), constant_of(zero_point)
    assert number is not None
    dtype = np.uint8 if form.low == 0 else np.int8
    found = np.array(0, dtype) if point is None else point.reshape(()).astype(dtype)
    return tape.constant(number.reshape(()).astype(np.float32)), tape.constant(found)


def _rounded_at_run_time(tape: Tape, node: ir.Node) -> ir.Value:
    """Q/DQ with a dynamic scale, per-token or per-tensor."""
    form, x = format_of(node), tape.as_float(operands(node)[0])
    by_token = node.attributes["granularity"].as_string() == "token"
    if form.name == "uint8" and not by_token:
        q, scale, zero_point = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        return tape.op("DequantizeLinear", [q, scale, zero_point])
    rows = x if by_token else tape.op("Reshape", [x, tape.integers(1, -1)])
    scale, zero_point = dynamic_range(tape, rows, form)
    if not by_token:
        scale, zero_point = (item and tape.op("Reshape", [item, tape.integers(1)]) for item in (scale, zero_point))
        assert scale is not None
    return _by_hand(tape, x, scale, zero_point, form)


def _by_hand(tape: Tape, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, form: Format) -> ir.Value:
    """Q/DQ in plain operators; the scale broadcasts to x."""
    scaled = tape.op("Div", [x, scale])
    low, high = tape.number(form.low), tape.number(form.high)
    if not form.is_integer:
        short = tape.op("Cast", [tape.op("Clip", [scaled, low, high])], {"to": int(_TYPES[form.name])})
        return tape.op("Mul", [tape.op("Cast", [short], {"to": int(ir.DataType.FLOAT)}), scale])
    whole = tape.op("Round", [scaled])
    if zero_point is None:
        return tape.op("Mul", [tape.op("Clip", [whole, low, high]), scale])
    clipped = tape.op("Clip", [tape.op("Add", [whole, zero_point]), low, high])
    return tape.op("Mul", [tape.op("Sub", [clipped, zero_point]), scale])


@dataclass(frozen=True)
class Stored:
    """A quantized matrix. q: not packed, [rows, columns]; scale, zero_point: per block, as in `lissom.ops.formats`."""

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    form: Format

    @classmethod
    def of(cls, node: ir.Node) -> Stored | None:
        """The constant matrix that a `Dequantize` node reads; None for any other."""
        found = [constant_of(item) for item in operands(node)]
        q, scale, zero_point = found
        if q is None or scale is None or q.ndim != 2 or (zero_point is None) != (operands(node)[2] is None):
            return None
        form = format_of(node)
        shape = scale.shape or (1, 1)
        scale = scale.reshape(shape).astype(np.float32)
        return cls(_unpacked(q, form), scale, zero_point if zero_point is None else zero_point.reshape(shape), form)

    def transposed(self) -> Stored:
        zero_point = None if self.zero_point is None else self.zero_point.T
        return Stored(self.q.T, self.scale.T, zero_point, self.form)


def _unpacked(q: np.ndarray, form: Format) -> np.ndarray:
    if form.bits != 4:
        return q
    halves = np.stack((q & 15, q >> 4), -1).reshape(*q.shape[:-1], -1)
    return (halves.astype(np.int8) ^ 8) - 8 if form.low < 0 else halves


def _stored(tape: Tape, node: ir.Node) -> ir.Value:
    """(q - zero_point) · scale: `DequantizeLinear` for constants with blocks that it supports, else plain operators."""
    stored, x = Stored.of(node), operands(node)[0]
    found = _dequantize_linear(tape, stored, x) if stored is not None else None
    return found or _looked_up(tape, node)


def _dequantize_linear(tape: Tape, stored: Stored, like: ir.Value) -> ir.Value | None:
    scale, zero_point, dtype = stored.scale, stored.zero_point, _TYPES[stored.form.name]
    split = [axis for axis in (0, 1) if scale.shape[axis] > 1]
    blocked = [axis for axis in split if scale.shape[axis] != stored.q.shape[axis]]
    attributes: dict[str, ir.Attr | int] = {}
    if not split:
        shape: Sequence[int] = ()
    elif len(split) == 1 and not blocked:
        shape, attributes = (scale.size,), {"axis": split[0]}
    else:
        # Group-wise along one dimension, per-channel along the other.
        other = 1 - (blocked or [1])[0]
        if len(blocked) > 1 or stored.q.shape[1 - other] % scale.shape[1 - other]:
            return None
        axis = 1 - other
        shape = (stored.q.shape[0], scale.shape[1]) if axis == 1 else (scale.shape[0], stored.q.shape[1])
        attributes = {"axis": axis, "block_size": stored.q.shape[axis] // scale.shape[axis]}
    spread = np.broadcast_to(scale, shape) if len(shape) == 2 else scale.reshape(shape)
    inputs = [
        tape.weight(like, "elements", stored.q, dtype) if stored.form.bits == 4 else like,
        tape.weight(like, "scales", spread.astype(np.float32)),
    ]
    if zero_point is not None:
        points = np.broadcast_to(zero_point, shape) if len(shape) == 2 else zero_point.reshape(shape)
        inputs.append(tape.weight(like, "zero_points", points.astype(stored.q.dtype), dtype))
    return tape.op("DequantizeLinear", inputs, attributes)


def _looked_up(tape: Tape, node: ir.Node) -> ir.Value:
    """Dequantize embedding rows, [..., features], with their scales, [..., blocks]."""
    q, scale, zero_point = operands(node)
    assert scale is not None
    form = format_of(node)
    values = tape.as_float(q if form.bits == 8 else _halves(tape, q, form))
    blocks = fixed_last(scale) if scale.shape else 1
    scale, zero_point = tape.as_float(scale), zero_point and tape.as_float(zero_point)
    features = fixed_last(node.outputs[0])
    if blocks in (1, features):
        centred = values if zero_point is None else tape.op("Sub", [values, zero_point])
        return tape.op("Mul", [centred, scale])
    kept = [0] * (len(node.outputs[0].shape or ()) - 1)
    parts = tape.op("Reshape", [values, tape.integers(*kept, blocks, features // blocks)])
    last = tape.integers(-1)
    if zero_point is not None:
        parts = tape.op("Sub", [parts, tape.op("Unsqueeze", [zero_point, last])])
    scaled = tape.op("Mul", [parts, tape.op("Unsqueeze", [scale, last])])
    return tape.op("Reshape", [scaled, tape.integers(*kept, features)])


def _halves(tape: Tape, q: ir.Value, form: Format) -> ir.Value:
    """Four-bit elements packed two per byte, as floats; the first in the low half."""
    sixteen, last = tape.number(16.0), tape.integers(-1)
    # Exact in floating point, where every provider has these operators.
    byte = tape.op("Cast", [q], {"to": int(ir.DataType.FLOAT)})
    high = tape.op("Floor", [tape.op("Div", [byte, sixteen])])
    low = tape.op("Sub", [byte, tape.op("Mul", [high, sixteen])])
    both = tape.op("Concat", [tape.op("Unsqueeze", [item, last]) for item in (low, high)], {"axis": -1})
    kept = [0] * (len(q.shape or ()) - 1)
    joined = tape.op("Reshape", [both, tape.integers(*kept, 2 * fixed_last(q))])
    joined.dtype = ir.DataType.FLOAT
    if form.low == 0:
        return joined
    negative = tape.op("Cast", [tape.op("Greater", [joined, tape.number(7.0)])], {"to": int(ir.DataType.FLOAT)})
    signed = tape.op("Sub", [joined, tape.op("Mul", [negative, sixteen])])
    signed.dtype = ir.DataType.FLOAT
    return signed
