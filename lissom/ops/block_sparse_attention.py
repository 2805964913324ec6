"""`lissom::block_sparse_attention`: attention whose mask is a pattern, a formula of positions, and is never materialized.

weights = softmax(softcap(q kᵀ · scale) + bias) over the keys visible by the pattern;  result = weights · v

Dense attention with such a mask is lowered to it. Time and memory are proportional to the number of visible keys. Without a
kernel, and where gradients are required, it is computed by `lissom.ops.blocked_attention`.
"""

from __future__ import annotations

from typing import Any

import torch

from lissom.ops.blocked_attention import blocked_attention, check_pattern
from lissom.ops.fused_attention import check_attention, output_of
from lissom.ops.library import LIBRARY, define
from lissom.ops.native import kernel_dtypes


def _with_gradients(*operands: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """The operator; blocked attention where a gradient is required or no kernel computes in the dtype."""
    given = (*operands, options.get("sinks"))
    gradients = torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in given)
    q = operands[0]
    # A subclass may be a fake tensor.
    if gradients or (type(q) is torch.Tensor and q.device.type == "cpu" and q.dtype not in kernel_dtypes()):
        return blocked_attention(*operands, **options)  # pyright: ignore[reportArgumentType]
    with torch._C._AutoDispatchBelowAutograd():
        return block_sparse_attention(*operands, **options)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor | None, **options: Any) -> torch.Tensor:
    bias, layout = (*masks, None, None)[:2]
    check_pattern(q, layout, options["pattern"], options["block"])
    check_attention(q, k, v, bias, options.get("sinks"))
    return output_of(q, v)


block_sparse_attention = define(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? layout=None, *, int[] pattern, int block, "
    "float scale, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    blocked_attention,
    _fake,
)
"""The operator. q: [batch, heads, queries, head_dim]; k: [batch, key_heads, keys, head_dim]; v: [batch, key_heads, keys,
value_dim], where key_heads divides heads; bias: added to the scores, or a further boolean mask of visible keys, broadcast to
[batch, heads, queries, keys]; layout: boolean, [heads or 1, query blocks, key blocks], for patterns that read one; pattern and
block: `Pattern.encode()` and its block; softcap, sinks: as in `lissom::attention`. A fully masked row yields zeros.
Returns [batch, heads, queries, value_dim], contiguous as [batch, queries, heads, value_dim]."""
LIBRARY.impl("block_sparse_attention", _with_gradients, "Autograd")
