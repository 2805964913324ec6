"""Translations for torch's ONNX exporter: of operators that it lacks, or that later rewrites need as one node.

Attention, rotary embeddings, quantization and `index_copy` are written as nodes of the domain `lissom`, which no runtime has:
`attention`, `sparse_attention`, `rotary`, `quantization` and `state` replace them with operators that ONNX Runtime has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator, values
from torch import fx

from lissom import ops
from lissom.backends.onnx.rewriting import fixed_size
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import QUANTIZED_LINEARS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import short_dtype
from lissom.errors import UnsupportedError
from lissom.ops.formats import BYTE_SCALES
from lissom.ops.linear_attention import CHUNK, FLOOR
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic

aten = torch.ops.aten

OPSET = 23
DOMAIN = "lissom"
ATTENTION, ROTARY = "Attention", "Rotary"
"""The domain of our nodes, and their names for attention and rotary embedding."""
SPARSE_ATTENTION = "BlockSparseAttention"
"""The name of block-sparse attention nodes."""
ROUND, ROUND_DYNAMIC, DEQUANTIZE = "FakeQuantize", "FakeQuantizeDynamic", "Dequantize"
"""The names of quantization nodes."""
INDEX_COPY = "IndexCopy"
"""The name of `index_copy` nodes."""

op: Any = values.Opset("", OPSET)


def _node(op_type: str, *inputs: ir.Value | None, **options: int | float | str | ir.Attr) -> ir.Value:
    """A node of our domain, which a later rewrite replaces."""
    given = ir.convenience.convert_attributes(options)
    return recorded(ir.Node(DOMAIN, op_type, inputs, given, num_outputs=1, version=1))[0]


def recorded(node: ir.Node) -> Sequence[ir.Value]:
    """Record a node outside the opset; returns its outputs."""
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
    options = {"softcap": 0.0, "causal": int(is_causal), "zeros": int(attn_mask is not None)}
    factor = 1.0 / math.sqrt(fixed_size(query, -1)) if scale is None else scale
    return _node(ATTENTION, query, key, value, attn_mask, scale=factor, **options)


def _attention(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    bias: ir.Value | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: ir.Value | None = None,
) -> ir.Value:
    # Fully masked rows yield zeros and not NaN; with sinks the softmax of such a row is not NaN.
    zeros = int(bias is not None and sinks is None)
    return _node(ATTENTION, q, k, v, bias, sinks, scale=scale, softcap=softcap, causal=0, zeros=zeros)


def _block_sparse_attention(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    bias: ir.Value | None = None,
    layout: ir.Value | None = None,
    pattern: Sequence[int] = (),
    block: int = 1,
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: ir.Value | None = None,
) -> ir.Value:
    numbers = ir.AttrInt64s("pattern", list(pattern))
    return _node(SPARSE_ATTENTION, q, k, v, bias, layout, sinks, block=block, scale=scale, softcap=softcap, pattern=numbers)


def _rotary(x: ir.Value, cos: ir.Value, sin: ir.Value, interleaved: bool = False) -> ir.Value:
    return _node(ROTARY, x, cos, sin, interleaved=int(interleaved))


def _squared_relu(x: ir.Value) -> ir.Value:
    positive = op.Relu(x)
    return op.Mul(positive, positive)


def _change_basis(x: ir.Value, basis: ir.Value) -> ir.Value:
    if len(basis.shape or ()) == 2:
        return op.MatMul(x, basis)
    heads, key_heads, features, size = fixed_size(x, 1), fixed_size(basis, 0), fixed_size(x, 3), fixed_size(basis, 2)
    grouped = op.Reshape(x, op.Constant(value_ints=[0, key_heads, -1, features]))
    return op.Reshape(op.MatMul(grouped, basis), op.Constant(value_ints=[0, heads, -1, size]))


def _fake_quantize(x: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, format: str = "") -> ir.Value:
    return _node(ROUND, x, scale, zero_point, format=format)


def _fake_quantize_dynamic(x: ir.Value, format: str = "", granularity: str = "token") -> ir.Value:
    return _node(ROUND_DYNAMIC, x, format=format, granularity=granularity)


def _dequantize(
    q: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, format: str = "", dtype: int = ir.DataType.FLOAT
) -> ir.Value:
    return _node(DEQUANTIZE, q, scale, zero_point, format=format)


def _grouped_product(input: ir.Value, weight: ir.Value, offs: ir.Value) -> ir.Value:
    """Rows [offs[i - 1], offs[i]) times weight[i], and zeros for rows after.

    Args:
        input: [rows, k], weight: [groups, k, n].
    """
    groups = fixed_size(weight, 0)
    first = op.Constant(value_ints=[0])
    ends = op.Concat(first, op.Cast(offs, to=ir.DataType.INT64), op.Shape(input, start=0, end=1), axis=0)
    count = op.Constant(value_ints=[groups + 1])
    sizes = op.Sub(
        op.Slice(ends, op.Constant(value_ints=[1]), op.Constant(value_ints=[groups + 2]), first),
        op.Slice(ends, first, count, first),
    )
    rows = recorded(ir.Node("", "Split", [input, sizes], [ir.AttrInt64("axis", 0)], num_outputs=groups + 1))
    weights = [op.Gather(weight, op.Constant(value_int=group), axis=0) for group in range(groups)]
    parts = [op.MatMul(part, matrix) for part, matrix in zip(rows, weights, strict=False)]
    rest = op.Mul(op.MatMul(rows[-1], weights[0]), op.CastLike(op.Constant(value_float=0.0), input))
    return op.Concat(*parts, rest, axis=0)


def _linear_attention(q: ir.Value, k: ir.Value, v: ir.Value, causal: bool = False, chunk: int = CHUNK) -> ir.Value:
    """φ(q) (Σ φ(k)ᵀ v), whose last column is the denominator.

    Causal sums are those of earlier chunks, and within a chunk masked weights.
    """
    heads, key_heads, features, head_dim = fixed_size(q, 1), fixed_size(k, 1), fixed_size(q, 3), fixed_size(v, 3)
    given, wide = v, ir.DataType.DOUBLE if v.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    q, k, v = (op.Cast(operand, to=wide) for operand in (q, k, v))
    ends = op.Constant(value_ints=[0, 0, 0, 0, 0, 0, 0, 1])
    v = op.Pad(v, ends, op.CastLike(op.Constant(value_float=1.0), v))
    tokens = op.Shape(q, start=2, end=3)
    if not causal:
        grouped = op.Reshape(q, op.Constant(value_ints=[0, key_heads, -1, features]))
        sums = op.MatMul(grouped, op.MatMul(op.Transpose(k, perm=[0, 1, 3, 2]), v))
    else:
        missing = op.Mod(op.Neg(tokens), op.Constant(value_ints=[chunk]))
        zeros = op.Constant(value_ints=[0, 0, 0, 0, 0, 0])
        pads = op.Concat(zeros, missing, op.Constant(value_ints=[0]), axis=0)
        q, k, v = (op.Pad(operand, pads) for operand in (q, k, v))
        # A further dimension for the query heads that share a key head.
        q = op.Reshape(q, op.Constant(value_ints=[0, key_heads, heads // key_heads, -1, chunk, features]))
        k = op.Reshape(k, op.Constant(value_ints=[0, key_heads, 1, -1, chunk, features]))
        v = op.Reshape(v, op.Constant(value_ints=[0, key_heads, 1, -1, chunk, head_dim + 1]))
        turned = op.Transpose(k, perm=[0, 1, 2, 3, 5, 4])
        before = op.CumSum(op.MatMul(turned, v), op.Constant(value_int=3), exclusive=1)
        weights = op.Trilu(op.MatMul(q, turned), upper=0)
        sums = op.Add(op.MatMul(q, before), op.MatMul(weights, v))
    sums = op.Reshape(sums, op.Constant(value_ints=[0, heads, -1, head_dim + 1]))
    if causal:
        sums = op.Slice(sums, op.Constant(value_ints=[0]), tokens, op.Constant(value_ints=[2]))
    last, end, axis = (op.Constant(value_ints=[number]) for number in (head_dim, head_dim + 1, 3))
    floor = op.CastLike(op.Constant(value_float=FLOOR), sums)
    values = op.Slice(sums, op.Constant(value_ints=[0]), last, axis)
    return op.CastLike(op.Div(values, op.Max(op.Slice(sums, last, end, axis), floor)), given)


def _index_copy(self: ir.Value, dim: int, index: ir.Value, source: ir.Value) -> ir.Value:
    return _node(INDEX_COPY, self, index, source, dim=dim)


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


TRANSLATIONS: Mapping[Callable[..., object], Callable[..., object]] = {
    aten.scaled_dot_product_attention.default: _scaled_dot_product_attention,
    ops.attention: _attention,
    ops.block_sparse_attention: _block_sparse_attention,
    ops.rotary: _rotary,
    ops.squared_relu: _squared_relu,
    ops.change_basis: _change_basis,
    ops.grouped_product: _grouped_product,
    ops.linear_attention: _linear_attention,
    fake_quantize: _fake_quantize,
    fake_quantize_dynamic: _fake_quantize_dynamic,
    dequantize: _dequantize,
    aten.index_copy.default: _index_copy,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.where.self: _where,
}
"""Translations of operators that the exporter lacks, or translates worse; those of recurrences are in `recurrences`."""

_WRITTEN_BY: Mapping[object, str] = {
    ops.fused_attention: "fuse-attention or lower-sparse-attention",
    ops.merged_attention: "fuse-merged-attention",
    ops.unpadded_attention: "fuse-unpadded-attention",
    **dict.fromkeys((ops.fused_layer_norm, ops.fused_rms_norm), "fuse-norm"),
    ops.fused_rotary: "fuse-rotary",
    **dict.fromkeys((ops.packed_linear, ops.packed_embedding), "pack-linear or pack-quantized-linear"),
    **dict.fromkeys(QUANTIZED_LINEARS, "pack-quantized-linear"),
    **dict.fromkeys((ops.packed_linear_norm, ops.quantized_linear_norm, ops.weight_quantized_linear_norm), "fuse-epilogues"),
    **dict.fromkeys((ops.block_sparse_linear_norm, ops.block_sparse_quantized_linear_norm), "fuse-epilogues"),
    **dict.fromkeys((ops.sparse_linear, ops.block_sparse_linear, ops.block_sparse_quantized_linear), "pack-sparse"),
}
"""Operators that only Lissom or PyTorch have kernels for, and the passes that write them."""


def check_translatable(program: Program, runtime: str) -> None:
    """Refuse weights in block formats, and operators that a lowering pass of another backend wrote.

    Args:
        runtime: the name that errors give.

    Raises:
        UnsupportedError: with the weight, or with the pass.
    """
    for node in program.nodes(dequantize, fake_quantize):
        stored, scale, form = nodes.operand(node), nodes.argument(node, "scale"), nodes.argument(node, "format")
        if isinstance(scale, fx.Node) and (dtype := nodes.tensor_type(scale).dtype) in BYTE_SCALES:
            weight = str(stored.target).removesuffix(f"_{form}")
            raise UnsupportedError(
                f"{runtime} has no kernel on a CPU for '{weight}' of {program.name}, a weight in {form} with scales in "
                f"{short_dtype(dtype)}; choose quantize{{scheme=int4-weight}} or quantize{{scheme=int8-weight}}, or backend "
                f"'eager'"
            )
    for node in program.nodes(*_WRITTEN_BY):
        raise UnsupportedError(
            f"{runtime} has no kernel for {node.target} in '{node.name}' of {program.name}, which the pass "
            f"{_WRITTEN_BY[node.target]} writes for backend 'eager'; leave that pass out, or choose backend 'eager'"
        )
