"""PyTorch's linear layer without a trap: one row of bfloat16 or float16 in three dimensions."""

from __future__ import annotations

import torch

_HALVES = (torch.bfloat16, torch.float16)
_linear = torch.ops.aten.linear.default


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b, as `aten.linear` computes it.

    A single row goes in as a matrix: torch 2.13 multiplies [1, 1, k] on a CPU as a vector, a hundred times slower than [1, k]
    where the weight is in 16 bits and requires no gradient.
    """
    if type(x) is torch.Tensor and x.dtype in _HALVES and x.dim() > 2 and x.numel() == x.shape[-1] and x.device.type == "cpu":
        return _linear(x.reshape(1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
    return _linear(x, weight, bias)
