"""Rotary embeddings in an ONNX model: as one operator, or as products and sums."""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.onnx.rewriting import fixed_last, integers, replace, sizes_of
from lissom.backends.onnx.translation import DOMAIN, ROTARY


def expand_rotary(model: ir.Model, fused: bool) -> int:
    """Replace each rotary embedding with plain operators, or with one where possible; returns how many became one."""
    count = 0
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != ROTARY:
            continue
        tape = ir.tape.Tape()
        found = _rotary_embedding(tape, node) if fused else None
        count += found is not None
        replace(model, node, tape, found or _rotated(tape, node))
    return count


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    x, cos, sin = node.inputs
    assert x is not None and cos is not None and sin is not None
    return x, cos, sin


def _rotated(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    """(a, b) → (a · cos − b · sin, b · cos + a · sin), one operator each; a, b: halves or neighbours."""
    x, cos, sin = _operands(node)
    features, interleaved = fixed_last(x), bool(node.attributes.get_int("interleaved", 0))
    if interleaved:
        rows = tape.op("Shape", [x], {"start": 0, "end": -1})
        pairs = tape.op("Reshape", [x, tape.op("Concat", [rows, integers(tape, features // 2, 2)], {"axis": 0})])
        halves = tape.op_multi_out("Split", [pairs], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        a, b = (tape.op("Squeeze", [half, integers(tape, -1)]) for half in halves)
    else:
        a, b = tape.op_multi_out("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    if fixed_last(cos) != features:
        first = tape.op("Sub", [tape.op("Mul", [a, cos]), tape.op("Mul", [b, sin])])
        second = tape.op("Add", [tape.op("Mul", [b, cos]), tape.op("Mul", [a, sin])])
        return _joined(tape, first, second, x, interleaved)
    turned = _joined(tape, tape.op("Neg", [b]), a, x, interleaved)
    return tape.op("Add", [tape.op("Mul", [x, cos]), tape.op("Mul", [turned, sin])])


def _joined(tape: ir.tape.Tape, a: ir.Value, b: ir.Value, like: ir.Value, interleaved: bool) -> ir.Value:
    """The features with their pairs joined again."""
    if not interleaved:
        return tape.op("Concat", [a, b], {"axis": -1})
    apart = [tape.op("Unsqueeze", [item, integers(tape, -1)]) for item in (a, b)]
    return tape.op("Reshape", [tape.op("Concat", apart, {"axis": -1}), tape.op("Shape", [like])])


def _rotary_embedding(tape: ir.tape.Tape, node: ir.Node) -> ir.Value | None:
    """`RotaryEmbedding` of [batch, heads, tokens, head_dim] with angles of [1 or batch, 1, tokens, …]; None for others.

    It takes one angle per pair, so tables that hold each angle twice are sliced to their first half.
    """
    x, cos, sin = _operands(node)
    features, interleaved = fixed_last(x), bool(node.attributes.get_int("interleaved", 0))
    if len(sizes_of(x)) != 4 or any(len(sizes_of(table)) != 4 or sizes_of(table)[1] != 1 for table in (cos, sin)):
        return None
    if fixed_last(cos) == features and (interleaved or not (_is_doubled(cos) and _is_doubled(sin))):
        return None
    tables: list[ir.Value] = []
    batch = tape.op("Shape", [x], {"start": 0, "end": 1})
    for table in (cos, sin):
        flat = tape.op("Squeeze", [table, integers(tape, 1)])
        if fixed_last(table) == features:
            flat = tape.op("Slice", [flat, *(integers(tape, number) for number in (0, features // 2, -1))])
        wanted = tape.op("Concat", [batch, integers(tape, 1, 1)], {"axis": 0})
        tables.append(tape.op("Expand", [flat, wanted]))
    return tape.op("RotaryEmbedding", [x, *tables], {"interleaved": int(interleaved)})


def _is_doubled(table: ir.Value) -> bool:
    """True when the second half of the last dimension repeats the first, as for angles concatenated with themselves."""
    value: ir.Value | None = table
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _axis(node) == len(sizes_of(value)) - 1
        scaled = node.op_type == "Mul" and any(other is not None and not sizes_of(other) for other in node.inputs)
        if node.op_type not in ("Cos", "Sin", "Cast", "Unsqueeze") and not scaled:
            return False
        value = next((item for item in node.inputs if item is not None and sizes_of(item)), None)
    return False


def _axis(node: ir.Node) -> int:
    axis, value = node.attributes.get_int("axis", 0), node.outputs[0]
    return axis % len(sizes_of(value))
