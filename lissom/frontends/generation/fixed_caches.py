"""Attention of models that count keys from the end of the cache: exchanged for a capture over a cache of fixed size.

GPT-Neo takes the rows of its causal mask that end at the last key, and MPT compares the length of the text with that of its
position bias. In a cache of fixed size the last slots are not filled yet.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lissom.frontends.capture.isolation import exchanged

_NEO, _MPT = "GPTNeoSelfAttention", "MptAttention"


@contextmanager
def counted_from_start(model: nn.Module, start: torch.Tensor) -> Generator[None]:
    """Let these layers count from the first slot, until the block ends.

    Args:
        start: [1], the number of slots that are filled.
    """
    layers = [layer for layer in model.modules() if type(layer).__name__ in (_NEO, _MPT)]
    with ExitStack() as stack:
        for layer in layers:
            if type(layer).__name__ == _NEO:
                stack.enter_context(exchanged(layer, "_attn", partial(_neo, layer, start)))
        for module in {type(layer).__module__ for layer in layers if type(layer).__name__ == _MPT}:
            stack.enter_context(exchanged(sys.modules[module], "max", _largest))
        yield


def _neo(
    layer: Any,
    start: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPT-Neo's attention in float32, without a scale.

    Args:
        query: [batch, heads, tokens or slots, head_dim].
        key: [batch, heads, tokens or slots, head_dim].
        value: [batch, heads, tokens or slots, head_dim].
    """
    rows = torch.arange(query.shape[2], device=query.device) + start
    visible = layer.bias.index_select(2, rows)[..., : key.shape[2]]
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = torch.where(visible, scores, torch.finfo(scores.dtype).min)
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    weights = scores.softmax(-1).to(value.dtype)
    return weights @ value, weights


def _largest(first: Any, second: Any) -> Any:
    """`max(0, 1 - tokens)` is 0 for every number of tokens, also for one that a tensor holds."""
    return first if isinstance(second, torch.Tensor) else max(first, second)
