"""Attention in ONNX: as matrix products and a softmax, or as a single operator.

Where possible the single operators read the outputs of projections, [batch, tokens, heads · head_dim], without transposes:
`com.microsoft.MultiHeadAttention`, which ONNX Runtime computes block by block, without a mask, and `Attention` of opset 23 with
one. Where an operator is between projections and attention, such as a rotary embedding, `Attention` reads
[batch, heads, tokens, head_dim].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from ml_dtypes import finfo

from lissom.backends.onnx.rewriting import Writer, fixed_size, nodes_of, shape_of
from lissom.backends.onnx.translation import ATTENTION, DOMAIN

CONTRIB = "com.microsoft"
_HEADS_FIRST = (0, 2, 1, 3)


def expand_attention(model: ir.Model, fused: bool) -> int:
    """Replace each attention with plain operators, or with a single one where there is one; returns how many became one."""
    count = 0
    for node in nodes_of(model, DOMAIN, ATTENTION):
        site = Site.of(model, node)
        single = _single(site) if fused else None
        count += single is not None
        site.write.replace(node, single or _explicit(site))
    if any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.opset_imports[CONTRIB] = 1
    return count


@dataclass(frozen=True)
class Site:
    """One attention: its operands and options, and the writer of its replacement."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    sinks: ir.Value | None
    scale: float
    softcap: float
    causal: bool
    zeros: bool
    result: ir.Value
    write: Writer

    @classmethod
    def of(cls, model: ir.Model, node: ir.Node) -> Site:
        q, k, v, mask, sinks = [*node.inputs, None, None][:5]
        assert q is not None and k is not None and v is not None
        number = node.attributes
        return cls(
            q, k, v, mask, sinks,
            scale=number.get_float("scale", 1.0), softcap=number.get_float("softcap", 0.0),
            causal=bool(number.get_int("causal", 0)), zeros=bool(number.get_int("zeros", 0)),
            result=node.outputs[0], write=Writer(model),
        )  # fmt: skip

    def number(self, value: float) -> ir.Value:
        """A scalar of the operands' dtype."""
        assert self.q.dtype is not None
        return self.write.constant(np.array(value, self.q.dtype.numpy()))

    @property
    def floor(self) -> float:
        """A finite stand-in for minus infinity, with which softmax of a fully masked row is not NaN."""
        assert self.q.dtype is not None
        return float(finfo(self.q.dtype.numpy()).min) / 2

    def bias(self) -> ir.Value | None:
        """The mask as a bias on the scores; None without a mask."""
        call, mask = self.write.call, _causal(self) if self.causal else self.mask
        if mask is None:
            return None
        if mask.dtype == ir.DataType.BOOL:
            hidden = self.floor if self.zeros or self.causal else -np.inf
            return call("Where", mask, self.number(0.0), self.number(hidden))
        if not self.zeros:
            return mask
        # Finite, so that softmax of a fully masked row is not NaN. The least number stays above minus infinity, so that a query
        # that sees padding alone sees no key that its pattern hides.
        hidden = call("Equal", mask, self.number(-np.inf))
        return call("Where", hidden, self.number(self.floor), call("Max", mask, self.number(self.floor / 2)))

    def visible(self) -> ir.Value | None:
        """0 for fully masked rows and 1 for others, [.., queries or 1, 1]; None without a mask."""
        if self.mask is None or not self.zeros:
            return None
        assert self.q.dtype is not None
        call, told = self.write.call, self.mask.dtype == ir.DataType.BOOL
        highest = call("ReduceMax", self.bias() if told else self.mask, -1, keepdims=1)
        least = self.number(self.floor if told else -np.inf)
        return call("Cast", call("Greater", highest, least), to=int(self.q.dtype))


def _explicit(site: Site) -> ir.Value:
    """softmax(q kᵀ · scale + mask) v, one operator each."""
    call = site.write.call
    k, v = (_repeated(site, operand) for operand in (site.k, site.v))
    rank = len(shape_of(site.k))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = call("MatMul", call("Mul", site.q, site.number(site.scale)), call("Transpose", k, perm=swapped))
    if site.softcap:
        cap = site.number(site.softcap)
        scores = call("Mul", call("Tanh", call("Div", scores, cap)), cap)
    bias = site.bias()
    if bias is not None:
        scores = call("Add", scores, bias)
    if site.sinks is not None:
        rows = call("Concat", call("Shape", scores, end=-1), 1, axis=0)
        scores = call("Concat", scores, call("Expand", site.sinks, rows), axis=-1)
    weights = call("Softmax", scores, axis=-1)
    if site.sinks is not None:
        weights = call("Slice", weights, 0, -1, -1)
    result = call("MatMul", weights, v)
    visible = site.visible()
    return result if visible is None else call("Mul", result, visible)


def _repeated(site: Site, value: ir.Value) -> ir.Value:
    """Keys or values with heads repeated for grouped-query attention."""
    heads, own = (shape_of(operand)[1] if len(shape_of(operand)) == 4 else 1 for operand in (site.q, value))
    if heads == own or not (isinstance(heads, int) and isinstance(own, int)) or own == 1:
        return value
    spread = site.write.expanded(site.write.call("Unsqueeze", value, 2), 1, 1, heads // own, 1, 1)
    return site.write.shaped(spread, 0, heads, -1, fixed_size(value, -1))


def _causal(site: Site) -> ir.Value:
    """The causal mask, [queries, keys]."""
    call = site.write.call
    queries, keys = (site.write.counted(0, call("Shape", operand, start=-2, end=-1)) for operand in (site.q, site.k))
    seen = call("LessOrEqual", call("Unsqueeze", keys, 0), call("Unsqueeze", queries, 1))
    seen.dtype = ir.DataType.BOOL
    return seen


def _single(site: Site) -> ir.Value | None:
    """The attention as one operator; None where there is none for it."""
    if site.sinks is not None or site.softcap or site.q.dtype == ir.DataType.DOUBLE:
        return None
    if any(len(shape_of(operand)) != 4 or not isinstance(shape_of(operand)[1], int) for operand in (site.q, site.k, site.v)):
        return None
    if site.causal and shape_of(site.q)[2] != shape_of(site.k)[2]:
        return None
    bias = _whole_bias(site) if site.mask is not None else None
    if site.mask is not None and bias is None:
        return None
    operands = [projection(operand) for operand in (site.q, site.k, site.v)]
    alike = fixed_size(site.q, 1) == fixed_size(site.k, 1) == fixed_size(site.v, 1)
    if None in operands or not (alike or bias is not None or site.causal):
        return _by_heads(site, bias)
    return _by_projections(site, operands, bias)


def _by_heads(site: Site, bias: ir.Value | None) -> ir.Value | None:
    """`Attention` of [batch, heads, tokens, head_dim], with grouped key and value heads."""
    k, v = (_shared(operand) for operand in (site.k, site.v))
    call, heads, groups = site.write.call, fixed_size(site.q, 1), fixed_size(k, 1)
    if shape_of(v)[1] != groups or heads % groups:
        return None
    operands = [site.q, k, v, *([bias] if bias is not None else [])]
    result = call("Attention", *operands, scale=site.scale, is_causal=int(site.causal))
    visible = site.visible()
    return result if visible is None else call("Mul", result, visible)


def _shared(value: ir.Value) -> ir.Value:
    """Keys or values before their heads were repeated for grouped-query attention; the value itself otherwise."""
    between = _read_by(_read_by(value, "Reshape"), "Expand")
    source = _read_by(between, "Unsqueeze")
    if source is None or len(shape_of(source)) != 4:
        return value
    (batch, groups, tokens, width), heads = shape_of(source), shape_of(value)[1]
    repeated = (
        list(shape_of(between)) == [batch, groups, 1, tokens, width] and isinstance(groups, int) and isinstance(heads, int)
    )
    return source if repeated and list(shape_of(value)) == [batch, heads, tokens, width] else value


def _read_by(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The first input of the value's producer; None when that is another operator."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == op_type else None


def _by_projections(site: Site, sources: Sequence[ir.Value | None], bias: ir.Value | None) -> ir.Value:
    """One operator that reads and returns [batch, tokens, heads · head_dim]."""
    call, heads, width = site.write.call, fixed_size(site.q, 1), fixed_size(site.v, 3)
    if bias is None and not site.causal:
        result = call("MultiHeadAttention", *sources, domain=CONTRIB, num_heads=heads, scale=site.scale)
    else:
        operands = [*sources, *([bias] if bias is not None else [])]
        causal, groups = int(site.causal), fixed_size(site.k, 1)
        result = call("Attention", *operands, scale=site.scale, q_num_heads=heads, kv_num_heads=groups, is_causal=causal)
    batch, _, queries, _ = shape_of(site.q)
    visible = site.visible()
    if visible is not None:
        # Without the dimension of heads, which a mask of fewer dimensions lacks.
        flat = call("Squeeze", visible, 1) if len(shape_of(site.mask)) == 4 else visible
        result = call("Mul", result, flat)
    result.type, result.shape = site.q.type, ir.Shape([batch, queries, heads * width])
    apart = site.write.shaped(result, 0, 0, heads, width)
    skip_joins(site.result, result)
    return call("Transpose", apart, perm=_HEADS_FIRST)


def projection(value: ir.Value) -> ir.Value | None:
    """The projection [batch, tokens, heads · head_dim] that a value [batch, heads, tokens, head_dim] is a view of, or None."""
    apart = _transposed(value)
    if apart is None or len(shape_of(value)) != 4:
        return None
    reshape = apart.producer()
    x = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    batch, heads, tokens, width = shape_of(value)
    if x is None or not isinstance(heads, int) or not isinstance(width, int):
        return None
    return x if list(shape_of(x)) == [batch, tokens, heads * width] else None


def skip_joins(old: ir.Value, joined: ir.Value) -> None:
    """Replace merges of the attention's heads by `joined`, which has them merged."""
    for transpose, _ in list(old.uses()):
        if _transposed(transpose.outputs[0]) is not old:
            continue
        for reshape, _ in list(transpose.outputs[0].uses()):
            merged = reshape.outputs[0]
            same = reshape.op_type == "Reshape" and list(shape_of(merged)) == list(shape_of(joined))
            if same and not merged.is_graph_output():
                ir.convenience.replace_all_uses_with(merged, joined)


def _transposed(value: ir.Value) -> ir.Value | None:
    """The input of the transpose of heads and tokens that makes the value; None when there is none."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != _HEADS_FIRST:
        return None
    return node.inputs[0]


def _whole_bias(site: Site) -> ir.Value | None:
    """The mask as [batch or 1, heads or 1, queries, keys]; None when it has another shape, or differs between heads."""
    assert site.mask is not None
    batch, heads, queries, keys = shape_of(site.q)[0], shape_of(site.q)[1], shape_of(site.q)[2], shape_of(site.k)[2]
    shape = list(shape_of(site.mask))
    shape = [1] * (4 - len(shape)) + shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads) or (site.zeros and shape[1] != 1):
        return None
    bias = site.bias()
    assert bias is not None
    if list(shape_of(site.mask)) == [*shape[:2], queries, keys]:
        return bias
    sizes = [site.write.call("Shape", operand, start=2, end=3) for operand in (site.q, site.k)]
    return site.write.expanded(bias, 1, 1, *sizes)
