"""Calls that a training step with products in half precision computes in float32.

PyTorch's attention on a CPU is slower in bfloat16 than in float32 for few tokens, above all its gradients. Forward and
backward, 12 heads of 32 features, ms in bfloat16 and in float32 (AMD EPYC with bfloat16 products, 2 threads, torch 2.13): 32
rows of 13 tokens 8.7 and 1.9, of 64 23 and 7.5, of 128 54 and 30; 8 rows of 256 23 and 23. Its `rms_norm` of values in bfloat16
with a weight in float32 prints a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

SHORT = 256
"""The tokens from which bfloat16 is as fast as float32."""


def short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention`; in float32 where autocast takes half precision for fewer than `SHORT` tokens on a CPU."""
    attend = functional.scaled_dot_product_attention
    if query.device.type != "cpu" or key.shape[-2] >= SHORT or not torch.is_autocast_enabled("cpu"):
        return attend(query, key, value, attn_mask, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        return attend(query.float(), key.float(), value.float(), mask, *args, **kwargs)


def rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`torch.nn.functional.rms_norm`, in the weight's dtype where that is wider."""
    wide = x if weight is None else x.to(torch.promote_types(x.dtype, weight.dtype))
    return functional.rms_norm(wide, list(shape), weight, eps)
