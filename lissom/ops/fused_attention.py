"""`lissom::fused_attention`: any attention this library knows, in one sweep that never holds more than a few rows of scores.
`lissom::merged_attention` is the same on the result of a merged projection, with heads cut and joined inside.

scores = q kᵀ · scale;  scores = softcap · tanh(scores / softcap);  weights = softmax([scores + bias, sinks]);  weights · v

Keys and values may be kept as int8 with a scale each, k ≈ k_int8 · k_scale, as `quantize-cache` keeps them.

It is what `lissom::attention` and PyTorch's `scaled_dot_product_attention` are lowered to on a CPU. A row that sees no key
yields zeros, as PyTorch's operator has it.
"""

from __future__ import annotations

import torch

from lissom.ops.attention import attention_reference

_LIBRARY = torch.library.Library("lissom", "FRAGMENT")
_LIBRARY.define(
    "fused_attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, float scale, float softcap=0.0, "
    "Tensor? sinks=None, bool causal=False, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "merged_attention(Tensor qkv, Tensor? bias=None, *, int heads, int key_heads, float scale, float softcap=0.0, "
    "bool causal=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    """The operator in PyTorch's own."""
    if k_scale is not None and v_scale is not None:
        k, v = ((item.float() * by).to(q.dtype) for item, by in ((k, k_scale), (v, v_scale)))
    group = q.shape[1] // k.shape[1]
    k, v = (item.repeat_interleave(group, 1) if group > 1 else item for item in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if causal else None
    mask = bias if seen is None else with_bias(seen, bias)
    found = attention_reference(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    if mask is not None and sinks is None:
        blind = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        found = found.masked_fill(blind.all(-1, keepdim=True), 0.0)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


def with_bias(seen: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What is seen, or what is added to the scores, of what is seen and a mask or bias beside it."""
    if bias is None:
        return seen
    return bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)


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
    """The operator in PyTorch's own."""
    whole = qkv.unflatten(-1, (heads + 2 * key_heads, -1)).transpose(1, 2)
    q, k, v = whole.split([heads, key_heads, key_heads], 1)
    found = fused_attention_reference(q, k, v, bias, scale=scale, softcap=softcap, causal=causal)
    return found.transpose(1, 2).flatten(2)


_LIBRARY.impl("fused_attention", fused_attention_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("merged_attention", merged_attention_reference, "CompositeExplicitAutograd")


def _shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    batch, heads, queries, _depth = q.shape
    return q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)


def _merged_shape_of(qkv: torch.Tensor, *_: object, heads: int, key_heads: int, **__: object) -> torch.Tensor:
    batch, tokens, width = qkv.shape
    return qkv.new_empty((batch, tokens, width // (heads + 2 * key_heads) * heads))


torch.library.register_fake("lissom::fused_attention", _shape_of, lib=_LIBRARY)
torch.library.register_fake("lissom::merged_attention", _merged_shape_of, lib=_LIBRARY)

fused_attention = torch.ops.lissom.fused_attention.default
"""The operator. q: [batch, heads, queries, head_dim]; k: [batch, key_heads, keys, head_dim]; v: [batch, key_heads, keys,
value_dim], where key_heads divides heads; bias, softcap, sinks: as in `lissom::attention`; causal: query i sees keys 0 to i;
k_scale, v_scale: [batch, key_heads, keys, 1] where k and v are int8.
Returns [batch, heads, queries, value_dim], laid out in memory as [batch, queries, heads, value_dim]."""

merged_attention = torch.ops.lissom.merged_attention.default
"""The operator. qkv: [batch, tokens, (heads + 2 key_heads) · head_dim], the heads of q, then those of k, then those of v; the
others as in `fused_attention`. Returns [batch, tokens, heads · head_dim]."""
