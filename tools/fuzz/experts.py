"""Mixtures of experts of the random transformers: all experts computed, or tokens sorted by the experts that are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers.integrations.moe  # noqa: F401  # registers `grouped_mm_fallback`
from torch import nn


class DenseExperts(nn.Module):
    """A mixture of experts that computes every expert and weights all but the best of each token by zero."""

    def __init__(self, width: int, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.router = nn.Linear(width, len(experts), False)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.router(x).softmax(-1)
        share = share * (share == share.amax(-1, keepdim=True))
        return sum((share[..., at : at + 1] * expert(x) for at, expert in enumerate(self.experts)), torch.zeros_like(x))


class RoutedExperts(nn.Module):
    """A mixture of experts that computes the best experts of each token by products of rows sorted by expert.

    The product is that of transformers, which has float64, for the oracle, and any size.
    """

    def __init__(
        self,
        width: int,
        neurons: int,
        experts: int,
        top_k: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        *,
        gate: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.top_k, self.activation, self.gate = top_k, activation, gate
        self.router = nn.Linear(width, experts, bias)
        self.up = nn.Parameter(torch.empty(experts, neurons * (2 if gate else 1), width))
        self.down = nn.Parameter(torch.empty(experts, width, neurons))
        self.down_bias = nn.Parameter(torch.empty(experts, width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        ids, order = chosen.reshape(-1).sort()
        counts = torch.histc(ids.float(), len(self.up), 0, len(self.up) - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = _product(rows[order // self.top_k], self.up, ends)
        if self.gate:
            gate, hidden = hidden.chunk(2, -1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        y = _product(hidden, self.down, ends)
        y = y if self.down_bias is None else y + self.down_bias[ids]
        y = y * weights.reshape(-1)[order][:, None]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return y[places].view(-1, self.top_k, x.shape[-1]).sum(1).view(x.shape)


def _product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows times the matrix of their expert. weight: [experts, out_features, in_features]."""
    return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(1, 2), ends)
