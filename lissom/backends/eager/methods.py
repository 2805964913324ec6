"""What the eager backend calls in place of some operators: faster ways to call them, and checks they lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lissom.ops import IMPLEMENTATIONS

aten = torch.ops.aten


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """PyTorch's attention with a check of lengths: on a CPU it reads past the end of the shorter of k and v (torch 2.13).

    Raises: ValueError, which needs no second run for an explanation.
    """
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"attention has {key.shape[-2]} keys and {value.shape[-2]} values")
    return functional.scaled_dot_product_attention(query, key, value, *rest, **options)


def _batch_norm(input: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PyTorch's batch norm with a check of sizes: it reads past the end of too short arguments (torch 2.13)."""
    for given in (*rest, *options.values()):
        if isinstance(given, torch.Tensor) and given.shape != input.shape[1:2]:
            raise ValueError(f"batch norm has {list(given.shape)} for {input.shape[1]} channels")
    return aten._native_batch_norm_legit_no_training.default(input, *rest, **options)


# A tensor method takes half the time of its operator to call, which matters for small models.
METHODS: dict[object, Callable[..., object]] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    # A program from a file may return uninitialized memory.
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.transpose.int: torch.Tensor.transpose,
    aten.select.int: torch.Tensor.select,
    **{
        getattr(aten, name).default: getattr(torch.Tensor, name)
        for name in ("reshape", "view", "permute", "unsqueeze", "expand", "split_with_sizes")
    },
    aten.sym_size.int: torch.Tensor.size,
    **IMPLEMENTATIONS,
}
