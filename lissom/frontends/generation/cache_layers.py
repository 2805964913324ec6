"""Layers of a cache of transformers over the buffers of a decoder, for its capture; imports transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from lissom.frontends.generation.state_names import INDEXER_KEYS, KEYS_AND_VALUES, OF_RECURRENT, is_kv_cache, numbered


class AttentionState(CacheLayerMixin):
    """Keys and values in buffers; the causal mask, offset by `start`, hides the slots that are not filled.

    Attributes:
        slots: of a call's tokens, [tokens]; None for those from `start` on.
    """

    is_sliding = False

    def __init__(self, layer: nn.Module, start: torch.Tensor, slots: torch.Tensor | None = None) -> None:
        CacheLayerMixin.__init__(self)
        self.slots = slots
        self.keys = layer.get_buffer("keys")
        self.values = layer.get_buffer("values")
        self.indexer_keys = getattr(layer, INDEXER_KEYS, None)
        self.start = start
        self.is_initialized = True

    def lazy_initialization(self, *_: object, **__: object) -> None:
        """Does nothing: the buffers exist already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values into their slots; returns all of them."""
        assert self.keys is not None and self.values is not None
        slots = self._slots(key_states)
        keys = self.keys.index_copy(2, slots, key_states)
        values = self.values.index_copy(2, slots, value_states)
        self.keys.copy_(keys)
        self.values.copy_(values)
        return keys, values

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Write the new keys of the indexer, [batch, tokens, head_dim]; returns all of them."""
        assert self.indexer_keys is not None
        new = indexer_key_states.unsqueeze(1)
        keys = self.indexer_keys.index_copy(2, self._slots(new), new)
        self.indexer_keys.copy_(keys)
        return keys.squeeze(1)

    def _slots(self, new: torch.Tensor) -> torch.Tensor:
        """The slots of a call's tokens.

        Args:
            new: [batch, heads, tokens, head_dim].
        """
        return torch.arange(new.shape[2], device=new.device) + self.start if self.slots is None else self.slots

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return cast(int, self.start)

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]


class RecurrentState(LinearAttentionCacheLayerMixin):
    """The state of a convolution and a recurrence in buffers, which hold zeros where there was no token."""

    def __init__(self, layer: nn.Module) -> None:
        given = {name: state for name, state in layer.named_buffers() if not is_kv_cache(name)}
        count = 1 + max(int(name.partition("_")[2] or 0) for name in given)
        LinearAttentionCacheLayerMixin.__init__(self, count)
        for index in range(count):
            self.conv_states[index] = given.get(numbered(OF_RECURRENT[0], index))
            self.recurrent_states[index] = given.get(numbered(OF_RECURRENT[1], index))
            self.has_previous_state[index] = True

    def lazy_initialization(self, *_: object, **__: object) -> None:
        """Does nothing: the buffers exist already."""

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_: object) -> torch.Tensor:
        """Keep the last inputs; returns them and the new ones."""
        kept = self.conv_states[state_idx]
        assert kept is not None
        whole = torch.cat([kept, conv_states.to(kept.dtype)], -1)
        kept.copy_(whole[..., -kept.shape[-1] :])
        return whole

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: object) -> torch.Tensor:
        kept = self.recurrent_states[state_idx]
        assert kept is not None
        return kept.copy_(recurrent_states)


class HybridState(RecurrentState, AttentionState):
    """A layer that attends and has a recurrence."""

    def __init__(self, layer: nn.Module, start: torch.Tensor) -> None:
        AttentionState.__init__(self, layer, start)
        RecurrentState.__init__(self, layer)

    def get_max_length(self) -> int:
        return AttentionState.get_max_length(self)


class SourceState(CacheLayerMixin):
    """The keys and values of cross-attention, which the encoder's output gave once for all tokens."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        CacheLayerMixin.__init__(self)
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, *_: object, **__: object) -> None:
        """Does nothing: the tensors exist already."""

    def update(self, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values as they are."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return self.get_seq_length()


def cache_with_source(own: Cache, cross: Sequence[torch.Tensor]) -> EncoderDecoderCache:
    """The cache of a decoder with cross-attention.

    Args:
        cross: its keys and values, layer by layer.
    """
    layers = [SourceState(*pair) for pair in zip(cross[::2], cross[1::2], strict=True)]
    cache = EncoderDecoderCache(own, Cache(layers=list(layers)))
    cache.is_updated = dict.fromkeys(range(len(layers)), True)
    return cache


def layer_over(
    layer: nn.Module, start: torch.Tensor, slots: torch.Tensor | None = None
) -> CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer:
    """The cache layer for what a layer's buffers hold.

    Args:
        start: [1], the number of slots that are filled.
        slots: as of `AttentionState`.
    """
    names = [name for name, _ in layer.named_buffers()]
    if not names:
        return DummyLayer()
    if all(map(is_kv_cache, names)):
        return AttentionState(layer, start, slots)
    return HybridState(layer, start) if KEYS_AND_VALUES[0] in names else RecurrentState(layer)
