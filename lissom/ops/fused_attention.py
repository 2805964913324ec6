"""`lissom::fused_attention`: attention in one pass that holds a few rows of scores at a time.
`lissom::merged_attention` is the same on the output of a merged projection; it splits and merges the heads inside.
`lissom::unpadded_attention` is the first for texts that follow each other without padding.

scores = q kᵀ · scale;  scores = softcap · tanh(scores / softcap);  weights = softmax([scores + bias, sinks]);  weights · v

Keys and values may be int8 with per-token scales, k ≈ k_int8 · k_scale, as in a KV cache quantized by `quantize-cache`.

`lissom::attention` and PyTorch's `scaled_dot_product_attention` are lowered to it on a CPU. A fully masked row yields zeros, as
in PyTorch's operator.
"""

from __future__ import annotations

from typing import Any

import torch

from lissom.ops.attention import attention_reference
from lissom.ops.checks import check_broadcast, check_floats, require
from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> None:
    """Raise unless the operands of an attention fit.

    Args:
        scales: of int8 keys and of int8 values.
    """
    dims = [operand.dim() for operand in (q, k, v)]
    require(dims == [4, 4, 4], "q, k and v have {} dimensions, and must be [batch, heads, tokens, head_dim]", dims)
    fit = "q {}, k {} and v {} must have the same batch, q and k the same head_dim, k and v the same heads and keys, and key "
    fit += "and value heads must divide the query heads"
    sizes = q.shape, k.shape, v.shape
    for one, another in ((q.shape[0], k.shape[0]), (q.shape[0], v.shape[0]), (q.shape[3], k.shape[3])):
        require(one == another, fit, *sizes)
    for one, another in zip(k.shape[1:3], v.shape[1:3], strict=True):
        require(one == another, fit, *sizes)
    require(k.shape[1] > 0, fit, *sizes)
    require(q.shape[1] % k.shape[1] == 0, fit, *sizes)
    require((scales[0] is None) == (scales[1] is None), "k_scale and v_scale must be given together")
    kept = q.dtype if scales[0] is None else torch.int8
    for operand, name in ((k, "k"), (v, "v")):
        require(operand.dtype == kept, "{} is of {}, and must be of {}", name, operand.dtype, kept)
    for scale in scales:
        check_floats(scale, (*k.shape[:3], 1), "a scale of keys or values")
    scores = (*q.shape[:3], k.shape[2])
    if bias is not None:
        require(not bias.is_complex(), "a bias is of {}, and must be boolean or real", bias.dtype)
        check_broadcast(bias, scores, "a bias")
    if sinks is not None:
        require(sinks.dtype.is_floating_point, "sinks are of {}, and must be of a floating dtype", sinks.dtype)
        check_broadcast(sinks, (*scores[:2], 1, 1), "sinks")


def check_merged(qkv: torch.Tensor, heads: int, key_heads: int) -> None:
    """Raise unless a merged projection has `heads` query heads and `key_heads` heads of keys and of values."""
    require(qkv.dim() == 3, "qkv has {} dimensions, and must be [batch, tokens, all heads]", qkv.dim())
    width = qkv.shape[2]
    fits = heads > 0 and key_heads > 0 and width > 0 and width % (heads + 2 * key_heads) == 0
    message = "qkv has {} features, and must have some for each of {} heads and twice {} key heads"
    require(fits, message, width, heads, key_heads)


def check_unpadded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise unless the operands of an attention without padding fit."""
    check_attention(q, k, v)
    fit = "q {}, k {}, slots {} and rows {} must be [1, heads, tokens of all texts, head_dim], the same, [batch, tokens] and "
    fit += "[rows]"
    sizes = q.shape, k.shape, slots.shape, rows.shape
    require(q.shape[0] == 1, fit, *sizes)
    require(q.shape[2] == k.shape[2], fit, *sizes)
    require((slots.dim(), rows.dim()) == (2, 1), fit, *sizes)
    for indices in (slots, rows):
        require(indices.dtype in (torch.int64, torch.int32), "indices are of {}, and must be int64 or int32", indices.dtype)
    if bias is not None:
        require(not bias.is_complex(), "a bias is of {}, and must be boolean or real", bias.dtype)
        check_broadcast(bias, (slots.shape[0], q.shape[1], slots.shape[1], slots.shape[1]), "a bias")


def fused_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    causal: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference implementation."""
    check_attention(q, k, v, bias, sinks, (k_scale, v_scale))
    if k_scale is not None and v_scale is not None:
        k, v = ((operand.float() * by).to(q.dtype) for operand, by in ((k, k_scale), (v, v_scale)))
    group = q.shape[1] // k.shape[1]
    k, v = (operand.repeat_interleave(group, 1) if group > 1 else operand for operand in (k, v))
    seen = band_mask(q.shape[2], k.shape[2], None, 0 if causal else None, q.device)
    mask = bias if seen is None else with_bias(seen, bias)
    output = attention_reference(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def band_mask(queries: int, keys: int, low: int | None, high: int | None, device: torch.device) -> torch.Tensor | None:
    """The keys i + low to i + high that query i sees, boolean [queries, keys]; None where it sees all."""
    if low is None and high is None:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    return (distance >= (-queries if low is None else low)) & (distance <= (keys if high is None else high))


def with_bias(seen: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A boolean mask combined with another mask or bias."""
    if bias is None:
        return seen
    if bias.dtype == torch.bool:
        return bias & seen
    return (bias if bias.is_floating_point() else bias.float()).masked_fill(~seen, -torch.inf)


def merged_attention_reference(
    qkv: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    key_heads: int,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
) -> torch.Tensor:
    """The reference implementation."""
    check_merged(qkv, heads, key_heads)
    whole = qkv.unflatten(-1, (heads + 2 * key_heads, -1)).transpose(1, 2)
    q, k, v = whole.split([heads, key_heads, key_heads], 1)
    output = fused_attention_reference(q, k, v, bias, scale=scale, softcap=softcap, causal=causal)
    return output.transpose(1, 2).flatten(2)


def unpadded_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    low: int | None = None,
    high: int | None = None,
) -> torch.Tensor:
    """The reference implementation."""
    check_unpadded(q, k, v, slots, rows, bias)
    padded = [operand[0].index_select(1, slots.flatten()).unflatten(1, slots.shape).transpose(0, 1) for operand in (q, k, v)]
    seen = band_mask(slots.shape[1], slots.shape[1], low, high, q.device)
    mask = bias if seen is None else with_bias(seen, bias)
    output = fused_attention_reference(padded[0], padded[1], padded[2], mask, scale=scale, softcap=softcap)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, rows)[None].transpose(1, 2)


def output_of(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An uninitialized output of an attention, contiguous as [batch, queries, heads, value_dim]."""
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    check_attention(q, k, v, bias, options.get("sinks"), (options.get("k_scale"), options.get("v_scale")))
    return output_of(q, v)


def _merged_shape_of(qkv: torch.Tensor, *_: object, heads: int, key_heads: int, **__: object) -> torch.Tensor:
    check_merged(qkv, heads, key_heads)
    batch, tokens, width = qkv.shape
    return qkv.new_empty((batch, tokens, width // (heads + 2 * key_heads) * heads))


def _unpadded_shape_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    check_unpadded(q, k, v, slots, rows, bias)
    return q.new_empty((1, rows.shape[0], q.shape[1], v.shape[3])).transpose(1, 2)


fused_attention = define(
    "fused_attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, float scale, float softcap=0.0, "
    "Tensor? sinks=None, bool causal=False, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    fused_attention_reference,
    _fake,
    dimensions=Dimensions("... (g r) q d, ... g t d, ... g t v, _ -> ... (g r) q v : ... (g r) q d t + ... (g r) q t v"),
)
"""The operator. q: [batch, heads, queries, head_dim]; k: [batch, key_heads, keys, head_dim]; v: [batch, key_heads, keys,
value_dim], where key_heads divides heads; bias, softcap, sinks: as in `lissom::attention`; causal: query i sees keys 0 to i;
k_scale, v_scale: [batch, key_heads, keys, 1] where k and v are int8.
Returns [batch, heads, queries, value_dim], contiguous as [batch, queries, heads, value_dim]."""

merged_attention = define(
    "merged_attention(Tensor qkv, Tensor? bias=None, *, int heads, int key_heads, float scale, float softcap=0.0, "
    "bool causal=False) -> Tensor",
    merged_attention_reference,
    _merged_shape_of,
    dimensions=Dimensions("b t packed, _ -> b t f : 2 b t t f"),
)
"""The operator. qkv: [batch, tokens, (heads + 2 key_heads) · head_dim], the heads of q, then those of k, then those of v; the
others as in `fused_attention`. Returns [batch, tokens, heads · head_dim]."""

unpadded_attention = define(
    "unpadded_attention(Tensor q, Tensor k, Tensor v, Tensor slots, Tensor rows, Tensor? bias=None, *, float scale, "
    "float softcap=0.0, int? low=None, int? high=None) -> Tensor",
    unpadded_attention_reference,
    _unpadded_shape_of,
    dimensions=Dimensions(
        "b heads all d, b groups all d, b groups all v, batch text, _ -> b heads rows v : heads rows text d + heads rows text v"
    ),
)
"""The operator. q: [1, heads, tokens of all texts, head_dim]; k, v: [1, key_heads, tokens of all texts, …]; slots: [batch,
tokens of a padded text], the token at each position; rows: the positions of slots whose results are returned; bias: of the
padded texts; low, high: query i of a text sees keys i + low to i + high; the others as in `fused_attention`.
Returns [1, heads, rows, value_dim], contiguous as [1, rows, heads, value_dim]."""
