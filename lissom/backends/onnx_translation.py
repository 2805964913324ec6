"""Operators that torch's ONNX exporter lacks, or that are wanted as one node: each as a function that writes ONNX nodes.

Attention is written as one node of the domain `lissom`, which no runtime knows: `onnx_attention` puts in its place what the
runtime at hand is fast at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator, values

from lissom.compiler.program import Program
from lissom.ops import attention, rotary

aten = torch.ops.aten

OPSET = 23
DOMAIN = "lissom"
"""The domain of the node that stands for an attention."""

op: Any = values.Opset("", OPSET)


def _attention_node(
    inputs: Sequence[ir.Value | None], scale: float, softcap: float = 0.0, causal: bool = False, zeros: bool = False
) -> ir.Value:
    """The node of an attention; zeros: rows that see nothing yield zeros, where they would yield no number."""
    options = {"scale": scale, "softcap": softcap, "causal": int(causal), "zeros": int(zeros)}
    node = ir.Node(DOMAIN, "Attention", inputs, ir.convenience.convert_attributes(options), num_outputs=1, version=1)
    return _recorded(node)[0]


def _recorded(node: ir.Node) -> Sequence[ir.Value]:
    """The results of a node that the opset's functions cannot make."""
    evaluator.default().nodes.append(node)  # pyright: ignore[reportAttributeAccessIssue]
    return node.outputs


def _scaled_dot_product_attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    factor = 1.0 / math.sqrt(_fixed(query, -1)) if scale is None else scale
    return _attention_node([query, key, value, attn_mask], factor, causal=is_causal, zeros=attn_mask is not None)


def _attention(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    bias: ir.Value | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: ir.Value | None = None,
) -> ir.Value:
    return _attention_node([q, k, v, bias, sinks], scale, softcap)


def _rotary(x: ir.Value, cos: ir.Value, sin: ir.Value, interleaved: bool = False) -> ir.Value:
    features = _fixed(x, -1)
    halves = _fixed(cos, -1) != features
    if interleaved:
        pairs = op.Reshape(x, op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[features // 2, 2]), axis=0))
        last = op.Constant(value_ints=[-1])
        a, b = (op.Squeeze(item, last) for item in op.Split(pairs, num_outputs=2, axis=-1))
    else:
        a, b = op.Split(x, num_outputs=2, axis=-1)
    if halves:
        turned = (op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin)))
        return _joined(*turned, x, interleaved)
    return op.Add(op.Mul(x, cos), op.Mul(_joined(op.Neg(b), a, x, interleaved), sin))


def _joined(a: ir.Value, b: ir.Value, like: ir.Value, interleaved: bool) -> ir.Value:
    """The two members of each pair side by side again."""
    if not interleaved:
        return op.Concat(a, b, axis=-1)
    last = op.Constant(value_ints=[-1])
    return op.Reshape(op.Concat(op.Unsqueeze(a, last), op.Unsqueeze(b, last), axis=-1), op.Shape(like))


def _grouped_product(input: ir.Value, weight: ir.Value, offs: ir.Value) -> ir.Value:
    """Rows [offs[i - 1], offs[i]) times weight[i], and zeros for rows behind; input: [rows, k], weight: [groups, k, n]."""
    groups = _fixed(weight, 0)
    first = op.Constant(value_ints=[0])
    ends = op.Concat(first, op.Cast(offs, to=ir.DataType.INT64), op.Shape(input, start=0, end=1), axis=0)
    count = op.Constant(value_ints=[groups + 1])
    sizes = op.Sub(
        op.Slice(ends, op.Constant(value_ints=[1]), op.Constant(value_ints=[groups + 2]), first),
        op.Slice(ends, first, count, first),
    )
    rows = _recorded(ir.Node("", "Split", [input, sizes], [ir.AttrInt64("axis", 0)], num_outputs=groups + 1))
    weights = [op.Gather(weight, op.Constant(value_int=group), axis=0) for group in range(groups)]
    parts = [op.MatMul(part, item) for part, item in zip(rows, weights, strict=False)]
    rest = op.Mul(op.MatMul(rows[-1], weights[0]), op.CastLike(op.Constant(value_float=0.0), input))
    return op.Concat(*parts, rest, axis=0)


def _masked_fill(self: ir.Value, mask: ir.Value, value: ir.Value | float) -> ir.Value:
    filled = op.CastLike(value, self)
    return _chosen(mask, filled, self)


def _where(condition: ir.Value, self: ir.Value, other: ir.Value) -> ir.Value:
    return _chosen(condition, self, other)


def _chosen(condition: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
    """ONNX Runtime has no `Where` of booleans on a CPU."""
    if second.dtype != ir.DataType.BOOL:
        return op.Where(condition, first, second)
    return op.Or(op.And(condition, first), op.And(op.Not(condition), second))


def _fixed(value: ir.Value, dim: int) -> int:
    """A size that does not vary."""
    size = value.shape[dim] if value.shape is not None else None
    if not isinstance(size, int):
        raise ValueError(f"dimension {dim} of '{value.name}' is {size}; it has to be fixed")
    return size


_TRANSLATIONS: Mapping[object, Callable[..., object]] = {
    aten.scaled_dot_product_attention.default: _scaled_dot_product_attention,
    attention: _attention,
    rotary: _rotary,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.where.self: _where,
}
_OF_OTHERS: Mapping[str, Callable[..., object]] = {"transformers.grouped_mm_fallback.default": _grouped_product}
"""For operators that other packages register, by name."""


def translations_for(program: Program) -> dict[object, Callable[..., object]]:
    """What the exporter is to write for operators of the program that it does not know, or knows a worse form of."""
    others = {node.target: _OF_OTHERS[str(node.target)] for node in program.nodes() if str(node.target) in _OF_OTHERS}
    return {**_TRANSLATIONS, **others}
