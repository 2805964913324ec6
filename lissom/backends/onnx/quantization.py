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
import torch

from lissom.backends.onnx.rewriting import Writer, constant_of, fixed_size, nodes_of, sizes_of
from lissom.backends.onnx.translation import DEQUANTIZE, DOMAIN, ROUND, ROUND_DYNAMIC
from lissom.ops.formats import FORMATS, LEAST, Format, dequantize_stored, unpack_halves
from lissom.ops.quantization import GROUP

_TYPES = {name: ir.DataType[name.upper()] for name in ("int8", "uint8", "int4", "uint4")} | {"fp8": ir.DataType.FLOAT8E4M3FN}
_FLOAT = int(ir.DataType.FLOAT)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def is_quantization(node: ir.Node, *names: str) -> bool:
    """True for a quantization node; with names, for one of these."""
    return node.domain == DOMAIN and node.op_type in (names or (ROUND, ROUND_DYNAMIC, DEQUANTIZE))


def format_of(node: ir.Node) -> Format:
    """The format of a quantization node."""
    return FORMATS[node.attributes["format"].as_string()]


def expand_quantization(model: ir.Model) -> None:
    """Replace each quantization node with operators of ONNX."""
    expand = {ROUND: _rounded, ROUND_DYNAMIC: _rounded_at_run_time, DEQUANTIZE: _stored}
    for node in nodes_of(model, DOMAIN, *expand):
        write = Writer(model)
        result, dtype = expand[node.op_type](write, node), node.outputs[0].dtype
        if dtype is not None and dtype != ir.DataType.FLOAT:
            result = write.call("Cast", result, to=int(dtype))
        write.replace(node, result)


def operands(node: ir.Node) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """The inputs of a quantization node: a tensor, its scale and zero point."""
    x, scale, zero_point = [*node.inputs, None, None][:3]
    assert x is not None
    return x, scale, zero_point


def dynamic_range(write: Writer, x: ir.Value, form: Format) -> tuple[ir.Value, ir.Value | None]:
    """Per-row scale and zero point of x, [..., 1], both floating point, as `formats.scale_for` computes them."""
    call, number = write.call, write.number
    low = call("Min", call("ReduceMin", x, -1, keepdims=1), number(0.0))
    high = call("Max", call("ReduceMax", x, -1, keepdims=1), number(0.0))
    if form.symmetric:
        largest = call("Max", call("Neg", low), high)
        return call("Max", call("Div", largest, number(form.high)), number(LEAST)), None
    scale = call("Max", call("Div", call("Sub", high, low), number(form.high - form.low)), number(LEAST))
    shifted = call("Sub", number(form.low), call("Div", low, scale))
    return scale, call("Clip", call("Round", shifted), number(form.low), number(form.high))


def _rounded(write: Writer, node: ir.Node) -> ir.Value:
    """Q/DQ with a static scale."""
    x, scale, zero_point = operands(node)
    assert scale is not None
    form, x, known = format_of(node), write.as_float(x), constant_of(scale)
    if known is None or known.size != 1 or form.bits != 8 or not form.is_integer:
        return _by_hand(write, x, write.as_float(scale), zero_point and write.as_float(zero_point), form)
    scale, zero_point = scalar_scales(write, scale, zero_point, form)
    return write.call("DequantizeLinear", write.call("QuantizeLinear", x, scale, zero_point), scale, zero_point)


def scalar_scales(write: Writer, scale: ir.Value, zero_point: ir.Value | None, form: Format) -> tuple[ir.Value, ir.Value]:
    """A constant per-tensor scale and its zero point as scalars, the zero point in the dtype of q."""
    number, point = constant_of(scale), constant_of(zero_point)
    assert number is not None
    dtype = np.uint8 if form.low == 0 else np.int8
    scalar = np.array(0, dtype) if point is None else point.reshape(()).astype(dtype)
    return write.constant(number.reshape(()).astype(np.float32)), write.constant(scalar)


def is_by_group(node: ir.Node) -> bool:
    """True if a quantizer computes per-group scales."""
    return node.op_type == ROUND_DYNAMIC and node.attributes["granularity"].as_string() == "group"


def _rounded_at_run_time(write: Writer, node: ir.Node) -> ir.Value:
    """Q/DQ with a dynamic scale, per-token, per-group or per-tensor."""
    form, x = format_of(node), write.as_float(operands(node)[0])
    if is_by_group(node):
        parts = write.shaped(x, -1, GROUP)
        rounded = _by_hand(write, parts, *dynamic_range(write, parts, form), form)
        return write.call("Reshape", rounded, write.call("Shape", x))
    by_token = node.attributes["granularity"].as_string() == "token"
    if form.name == "uint8" and not by_token:
        q, scale, zero_point = write.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        return write.call("DequantizeLinear", q, scale, zero_point)
    scale, zero_point = dynamic_range(write, x if by_token else write.shaped(x, 1, -1), form)
    if not by_token:
        scale, zero_point = write.shaped(scale, 1), zero_point and write.shaped(zero_point, 1)
    return _by_hand(write, x, scale, zero_point, form)


def _by_hand(write: Writer, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, form: Format) -> ir.Value:
    """Q/DQ in plain operators; the scale broadcasts to x."""
    call, scaled = write.call, write.call("Div", x, scale)
    low, high = write.number(form.low), write.number(form.high)
    if not form.is_integer:
        short = call("Cast", call("Clip", scaled, low, high), to=int(_TYPES[form.name]))
        return call("Mul", call("Cast", short, to=_FLOAT), scale)
    whole = call("Round", scaled)
    if zero_point is None:
        return call("Mul", call("Clip", whole, low, high), scale)
    clipped = call("Clip", call("Add", whole, zero_point), low, high)
    return call("Mul", call("Sub", clipped, zero_point), scale)


@dataclass(frozen=True)
class Stored:
    """A quantized matrix.

    A zero point in floating point is subtracted after scaling.

    Attributes:
        q: not packed, [rows, columns].
        scale: per block, as in `lissom.ops.formats`.
        zero_point: per block, as in `lissom.ops.formats`.
    """

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    form: Format

    @classmethod
    def of(cls, node: ir.Node) -> Stored | None:
        """The constant matrix that a `Dequantize` node reads; None for any other."""
        constants = [constant_of(operand) for operand in operands(node)]
        q, scale, zero_point = constants
        if q is None or scale is None or q.ndim != 2 or (zero_point is None) != (operands(node)[2] is None):
            return None
        form = format_of(node)
        shape = scale.shape or (1, 1)
        scale = scale.reshape(shape).astype(np.float32)
        return cls(_unpacked(q, form), scale, zero_point if zero_point is None else zero_point.reshape(shape), form)

    @property
    def shifts(self) -> bool:
        """True if zero points are in floating point, which ONNX's operators do not take."""
        return self.zero_point is not None and self.zero_point.dtype.kind == "f"

    def floats(self) -> np.ndarray:
        """The dequantized matrix in float32."""
        points = None if self.zero_point is None else torch.tensor(self.zero_point)
        return dequantize_stored(torch.tensor(self.q), torch.tensor(self.scale), points, torch.float32).numpy()

    def transposed(self) -> Stored:
        zero_point = None if self.zero_point is None else self.zero_point.T
        return Stored(self.q.T, self.scale.T, zero_point, self.form)


def _unpacked(q: np.ndarray, form: Format) -> np.ndarray:
    return unpack_halves(torch.tensor(q), form).numpy() if form.bits == 4 else q


def packed(elements: np.ndarray, bits: int) -> np.ndarray:
    """Four-bit elements packed two per byte, the first in the low half."""
    if bits == 8:
        return elements
    even = elements if elements.shape[-1] % 2 == 0 else np.pad(elements, ((0, 0), (0, 1)))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def _stored(write: Writer, node: ir.Node) -> ir.Value:
    """(q - zero_point) · scale: `DequantizeLinear` for constants with blocks that it supports, else plain operators."""
    stored, x = Stored.of(node), operands(node)[0]
    dequantized = _dequantize_linear(write, stored, x) if stored is not None and not stored.shifts else None
    return dequantized or _looked_up(write, node)


def _dequantize_linear(write: Writer, stored: Stored, like: ir.Value) -> ir.Value | None:
    scale, zero_point, dtype = stored.scale, stored.zero_point, _TYPES[stored.form.name]
    split = [axis for axis in (0, 1) if scale.shape[axis] > 1]
    blocked = [axis for axis in split if scale.shape[axis] != stored.q.shape[axis]]
    attributes: dict[str, int] = {}
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
        write.weight(like, "elements", stored.q, dtype) if stored.form.bits == 4 else like,
        write.weight(like, "scales", spread.astype(np.float32)),
    ]
    if zero_point is not None:
        points = np.broadcast_to(zero_point, shape) if len(shape) == 2 else zero_point.reshape(shape)
        inputs.append(write.weight(like, "zero_points", points.astype(stored.q.dtype), dtype))
    return write.op("DequantizeLinear", inputs, attributes)


def _looked_up(write: Writer, node: ir.Node) -> ir.Value:
    """Dequantize embedding rows, [..., features], with their scales, [..., blocks]."""
    q, scale, zero_point = operands(node)
    assert scale is not None
    call, form = write.call, format_of(node)
    values = write.as_float(q if form.bits == 8 else _halves(write, q, form))
    blocks, features = fixed_size(scale, -1) if sizes_of(scale) else 1, fixed_size(node.outputs[0], -1)
    shifts = zero_point is not None and zero_point.dtype in _FLOATS
    scale, zero_point = write.as_float(scale), zero_point and write.as_float(zero_point)
    kept = [0] * (len(sizes_of(node.outputs[0])) - 1)
    grouped = blocks not in (1, features)
    if grouped:
        values = write.shaped(values, *kept, blocks, features // blocks)
        scale, zero_point = call("Unsqueeze", scale, -1), zero_point and call("Unsqueeze", zero_point, -1)
    if zero_point is None:
        values = call("Mul", values, scale)
    elif shifts:
        values = call("Sub", call("Mul", values, scale), zero_point)
    else:
        values = call("Mul", call("Sub", values, zero_point), scale)
    return write.shaped(values, *kept, features) if grouped else values


def _halves(write: Writer, q: ir.Value, form: Format) -> ir.Value:
    """Four-bit elements packed two per byte, as floats; the first in the low half."""
    call, sixteen = write.call, write.number(16.0)
    # Exact in floating point, where every provider has these operators.
    byte = call("Cast", q, to=_FLOAT)
    high = call("Floor", call("Div", byte, sixteen))
    low = call("Sub", byte, call("Mul", high, sixteen))
    both = call("Concat", *(call("Unsqueeze", half, -1) for half in (low, high)), axis=-1)
    unpacked = write.shaped(both, *[0] * (len(sizes_of(q)) - 1), 2 * fixed_size(q, -1))
    if form.low < 0:
        negative = call("Cast", call("Greater", unpacked, write.number(7.0)), to=_FLOAT)
        unpacked = call("Sub", unpacked, call("Mul", negative, sixteen))
    unpacked.dtype = ir.DataType.FLOAT
    return unpacked
