"""Recurrences for torch's ONNX exporter: a `Scan` over tokens, whose state is that of the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from lissom import ops
from lissom.backends.onnx.rewriting import fixed_size
from lissom.backends.onnx.translation import OPSET, op, recorded
from lissom.ops.recurrences import EPS

_TOKENS = 1
"""The dimension of tokens."""

Body = Callable[[ir.tape.Tape, ir.Value, Sequence[ir.Value]], tuple[ir.Value, ir.Value]]
"""Records one token's computation: of the state and the token's operands, the next state and the token's output."""


def _gated_delta_rule(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    decay: ir.Value,
    beta: ir.Value,
    state: ir.Value | None = None,
    scale: float = 1.0,
    normalizes: bool = False,
) -> tuple[ir.Value, ir.Value]:
    """The state is [batch, heads, key_dim, value_dim]; rows and columns are matrices of one row and one column."""
    given, wide = value, _wide(value)
    heads, key_heads = fixed_size(value, 2), fixed_size(key, 2)
    key_dim, value_dim = fixed_size(key, 3), fixed_size(value, 3)
    query, key = (_cast(operand, wide) for operand in (query, key))
    if normalizes:
        query, key = _normalized(query), _normalized(key)
    query, key = (_repeated(operand, key_heads, heads, key_dim) for operand in (query, key))
    query = op.Mul(query, op.CastLike(op.Constant(value_float=scale), query))
    columns = op.Constant(value_ints=[0, 0, heads, -1, 1])
    rows = op.Constant(value_ints=[0, 0, heads, 1, -1])
    forget = op.Exp(op.Reshape(_cast(decay, wide), columns))
    operands = [op.Reshape(query, rows), op.Reshape(key, rows), op.Reshape(key, columns)]
    operands += [op.Reshape(_cast(value, wide), rows), forget, op.Reshape(_cast(beta, wide), columns)]

    def token(tape: ir.tape.Tape, kept: ir.Value, now: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        q, k, k_column, v, forget, rate = now
        kept = tape.op("Mul", [kept, forget])
        error = tape.op("Mul", [tape.op("Sub", [v, tape.op("MatMul", [k, kept])]), rate])
        kept = tape.op("Add", [kept, tape.op("MatMul", [k_column, error])])
        return kept, tape.op("MatMul", [q, kept])

    y, last = _scan(token, _started(state, value, (heads, key_dim, value_dim), wide), operands, wide)
    return op.CastLike(op.Reshape(y, op.Constant(value_ints=[0, 0, heads, value_dim])), given), last


def _selective_scan(
    x: ir.Value,
    step: ir.Value,
    a: ir.Value,
    b: ir.Value,
    c: ir.Value,
    d: ir.Value | None = None,
    state: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """The state is [batch, heads, channels, states]."""
    given, wide = x, _wide(x)
    heads, channels, groups, states = fixed_size(x, 2), fixed_size(x, 3), fixed_size(b, 2), fixed_size(b, 3)
    column = op.Constant(value_ints=[0, 0, heads, -1, 1])
    x, step, a = op.Reshape(_cast(x, wide), column), op.Reshape(_cast(step, wide), column), _cast(a, wide)
    forget = op.Exp(op.Mul(step, op.Reshape(a, op.Constant(value_ints=[heads, 1, -1]))))
    b, c = (_repeated(_cast(operand, wide), groups, heads, states) for operand in (b, c))
    writes = op.Reshape(b, op.Constant(value_ints=[0, 0, heads, 1, states]))
    reads = op.Reshape(c, op.Constant(value_ints=[0, 0, heads, states, 1]))

    def token(tape: ir.tape.Tape, kept: ir.Value, now: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        given, forget, write, read = now
        kept = tape.op("Add", [tape.op("Mul", [kept, forget]), tape.op("Mul", [given, write])])
        return kept, tape.op("MatMul", [kept, read])

    start = _started(state, given, (heads, channels, states), wide)
    y, last = _scan(token, start, [op.Mul(step, x), forget, writes, reads], wide)
    if d is not None:
        y = op.Add(y, op.Mul(x, op.Reshape(_cast(d, wide), op.Constant(value_ints=[heads, 1, 1]))))
    return op.CastLike(op.Reshape(y, op.Constant(value_ints=[0, 0, heads, channels])), given), last


def _wide(value: ir.Value) -> ir.DataType:
    return ir.DataType.DOUBLE if value.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return value if value.dtype == dtype else op.Cast(value, to=dtype)


def _normalized(x: ir.Value) -> ir.Value:
    """Queries or keys, divided by their lengths."""
    squares = op.ReduceSum(op.Mul(x, x), op.Constant(value_ints=[3]), keepdims=1)
    return op.Div(x, op.Sqrt(op.Add(squares, op.CastLike(op.Constant(value_float=EPS), squares))))


def _repeated(x: ir.Value, groups: int, heads: int, width: int) -> ir.Value:
    """[batch, tokens, groups, width] with each group repeated for the heads that share it."""
    if groups == heads:
        return x
    single = op.Reshape(x, op.Constant(value_ints=[0, 0, groups, 1, width]))
    repeats = op.Constant(value_ints=[1, 1, 1, heads // groups, 1])
    return op.Reshape(op.Tile(single, repeats), op.Constant(value_ints=[0, 0, heads, width]))


def _started(state: ir.Value | None, like: ir.Value, sizes: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    """The state before the first token: zeros where it is not given."""
    if state is not None:
        return _cast(state, dtype)
    shape = op.Concat(op.Shape(like, start=0, end=1), op.Constant(value_ints=list(sizes)), axis=0)
    return op.Expand(op.Cast(op.Constant(value_float=0.0), to=dtype), shape)


def _scan(body: Body, start: ir.Value, operands: Sequence[ir.Value], dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """The outputs of all tokens, and the last state, of a body that is run for each token of the operands."""
    names = ["state", *(f"operand_{index}" for index in range(len(operands)))]
    inputs = [ir.Value(name=name, type=ir.TensorType(dtype)) for name in names]
    tape = ir.tape.Tape()
    kept, output = body(tape, inputs[0], inputs[1:])
    for value, name in ((kept, "next_state"), (output, "output")):
        value.name, value.type = name, ir.TensorType(dtype)
    graph = ir.Graph(inputs, [kept, output], nodes=tape.nodes, opset_imports={"": OPSET}, name="token")
    attributes = [
        ir.AttrGraph("body", graph),
        ir.AttrInt64("num_scan_inputs", len(operands)),
        ir.AttrInt64s("scan_input_axes", [_TOKENS] * len(operands)),
        ir.AttrInt64s("scan_output_axes", [_TOKENS]),
    ]
    last, outputs = recorded(ir.Node("", "Scan", [start, *operands], attributes, num_outputs=2))
    return outputs, last


RECURRENCES: Mapping[Callable[..., object], Callable[..., object]] = {
    ops.gated_delta_rule: _gated_delta_rule,
    ops.selective_scan: _selective_scan,
}
"""Translations of recurrences."""
