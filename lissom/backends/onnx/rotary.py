"""Rotary embeddings in an ONNX model: as one operator, or as products and sums."""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.onnx.rewriting import Writer, fixed_size, nodes_of, sizes_of
from lissom.backends.onnx.translation import DOMAIN, ROTARY


def expand_rotary(model: ir.Model, fused: bool) -> int:
    """Replace each rotary embedding with plain operators, or with one where possible; returns how many became one."""
    count = 0
    for node in nodes_of(model, DOMAIN, ROTARY):
        write = Writer(model)
        single = _rotary_embedding(write, node) if fused else None
        count += single is not None
        write.replace(node, single or _rotated(write, node))
    return count


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, bool]:
    x, cos, sin = node.inputs
    assert x is not None and cos is not None and sin is not None
    return x, cos, sin, bool(node.attributes.get_int("interleaved", 0))


def _rotated(write: Writer, node: ir.Node) -> ir.Value:
    """(a, b) → (a · cos − b · sin, b · cos + a · sin), one operator each; a, b: halves or neighbours."""
    call, (x, cos, sin, interleaved) = write.call, _operands(node)
    features, halves = fixed_size(x, -1), {"axis": -1, "num_outputs": 2}
    if interleaved:
        rows = call("Shape", x, start=0, end=-1)
        pairs = call("Reshape", x, call("Concat", rows, write.integers(features // 2, 2), axis=0))
        a, b = (call("Squeeze", half, -1) for half in write.op_multi_out("Split", [pairs], halves, num_outputs=2))
    else:
        a, b = write.op_multi_out("Split", [x], halves, num_outputs=2)
    if fixed_size(cos, -1) != features:
        first = call("Sub", call("Mul", a, cos), call("Mul", b, sin))
        second = call("Add", call("Mul", b, cos), call("Mul", a, sin))
        return _joined(write, first, second, x, interleaved)
    turned = _joined(write, call("Neg", b), a, x, interleaved)
    return call("Add", call("Mul", x, cos), call("Mul", turned, sin))


def _joined(write: Writer, a: ir.Value, b: ir.Value, like: ir.Value, interleaved: bool) -> ir.Value:
    """The features with their pairs joined again."""
    if not interleaved:
        return write.call("Concat", a, b, axis=-1)
    apart = [write.call("Unsqueeze", half, -1) for half in (a, b)]
    return write.call("Reshape", write.call("Concat", *apart, axis=-1), write.call("Shape", like))


def _rotary_embedding(write: Writer, node: ir.Node) -> ir.Value | None:
    """`RotaryEmbedding` of [batch, heads, tokens, head_dim] with angles of [1 or batch, 1, tokens, …]; None for others.

    It takes one angle per pair, so tables that hold each angle twice are sliced to their first half.
    """
    call, (x, cos, sin, interleaved) = write.call, _operands(node)
    features = fixed_size(x, -1)
    if len(sizes_of(x)) != 4 or any(len(sizes_of(table)) != 4 or sizes_of(table)[1] != 1 for table in (cos, sin)):
        return None
    if fixed_size(cos, -1) == features and (interleaved or not (_is_doubled(cos) and _is_doubled(sin))):
        return None
    tables: list[ir.Value] = []
    batch = call("Shape", x, start=0, end=1)
    for table in (cos, sin):
        flat = call("Squeeze", table, 1)
        if fixed_size(table, -1) == features:
            flat = call("Slice", flat, 0, features // 2, -1)
        tables.append(call("Expand", flat, call("Concat", batch, write.integers(1, 1), axis=0)))
    return call("RotaryEmbedding", x, *tables, interleaved=int(interleaved))


def _is_doubled(table: ir.Value) -> bool:
    """True when the second half of the last dimension repeats the first, as for angles concatenated with themselves."""
    value: ir.Value | None = table
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            last = node.attributes.get_int("axis", 0) in (-1, len(sizes_of(value)) - 1)
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and last
        scaled = node.op_type == "Mul" and any(other is not None and not sizes_of(other) for other in node.inputs)
        if node.op_type not in ("Cos", "Sin", "Cast", "Unsqueeze") and not scaled:
            return False
        value = next((operand for operand in node.inputs if operand is not None and sizes_of(operand)), None)
    return False
