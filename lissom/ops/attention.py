"""`lissom::attention`: attention with soft-capped scores and with sinks, which `scaled_dot_product_attention` lacks.

scores = q kᵀ · scale
scores = softcap · tanh(scores / softcap)                       Gemma Team 2024 (Gemma 2), §2
weights = softmax([scores + bias, sinks])                       Xiao et al. 2023; GPT-OSS: one learnt logit per head
result = weights without the sinks' column · v
"""

from __future__ import annotations

import torch

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference implementation. A fully masked query yields zeros, as in `scaled_dot_product_attention`."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    result = torch.matmul(weights if sinks is None else weights[..., :-1], v)
    if bias is None or sinks is not None:
        return result
    blind = ~bias if bias.dtype == torch.bool else bias == -torch.inf
    return result.masked_fill(blind.all(-1, keepdim=True), 0.0)


attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, "
    "float scale, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    attention_reference,
    dimensions=Dimensions(
        "... q d, ... t d, ... t v, ~... q t, ~... q 1 -> ... q v : ... q d t + ... q t v",
        factors=("v",),
        whole="t",
        positions="q",
    ),
)
"""The operator. q: [batch, heads, queries, head_dim]; k, v: [batch, heads, keys, head_dim]; bias: added to the scores, or a
boolean mask of visible keys, broadcast to [batch, heads, queries, keys]; softcap: 0 for none; sinks: one logit per head,
broadcast to [batch, heads, queries, 1]. Returns [batch, heads, queries, head_dim of v]. Differentiable; any device."""
