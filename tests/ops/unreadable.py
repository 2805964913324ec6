"""Tensors whose memory a kernel cannot read."""

from __future__ import annotations

import torch


def is_gone(value: torch.Tensor) -> bool:
    return value.numel() > 0 and value.untyped_storage().nbytes() == 0


def without_storage(value: torch.Tensor) -> torch.Tensor:
    found = value.clone()
    found.untyped_storage().resize_(0)
    return found


def unaligned(value: torch.Tensor) -> torch.Tensor:
    if value.numel() == 0 or value.element_size() == 1:
        return value
    memory = bytearray(value.numel() * value.element_size() + 1)
    return torch.frombuffer(memory, dtype=value.dtype, offset=1, count=value.numel()).view(value.shape)
