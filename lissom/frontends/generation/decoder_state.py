"""Decoder state between calls, as buffers: the KV cache of attention, the convolution and state of recurrent layers.

`cache.N.keys` and `cache.N.values` of layer N are [batch, key_heads, max_length, head_dim]; a call writes
`index_copy(state, 2, slots, new)`. `cache.N.convolution` is the last inputs of a causal convolution, [batch, channels, kernel];
`cache.N.recurrence` is a recurrent state, [batch, heads, ...]. Where a layer keeps several, their names end in `_1`, `_2`, …
All are zeros before the first token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lissom.errors import UnsupportedError
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.export import evaluating
from lissom.frontends.capture.failures import first_line
from lissom.frontends.capture.isolation import exchanged
from lissom.frontends.capture.recurrences import modules_with, scans_continued
from lissom.frontends.capture.untouched import untouched
from lissom.frontends.generation.fixed_caches import counted_from_start
from lissom.frontends.generation.state_names import INDEXER_KEYS, KEYS_AND_VALUES, OF_RECURRENT, is_kv_cache, numbered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_START = "lissom_start"
"""The attribute of a cache over buffers that holds the number of filled slots."""
_MASK = "create_recurrent_attention_mask"
"""The function of transformers that cuts the padding mask to a call's tokens, which it takes to be the last of the mask."""

State = Mapping[str, torch.Tensor]
"""A layer's tensors by name; none for a layer that keeps nothing."""


def layer_states(model: PreTrainedModel) -> list[State]:
    """The state of each layer after one token, in a cache of transformers.

    Raises:
        UnsupportedError: if a layer keeps anything else.
    """
    cache = _new_cache(model)
    try:
        with untouched(model), evaluating(model), torch.no_grad():
            call(model, cache, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)))
        states = [layer_tensors(layer) for layer in cache.layers]
    # The model's own code may raise anything for a cache class it does not know.
    except Exception as error:
        raise unsupported_state(model, error) from error
    if not any(states) or any(name in KEYS_AND_VALUES and x.dim() != 4 for state in states for name, x in state.items()):
        raise unsupported_state(model)
    return states


def _new_cache(model: PreTrainedModel) -> Any:
    """An empty cache: by the configuration where it names recurrent layers or indexers, else one that grows with the layers."""
    from transformers import Cache
    from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer, LinearAttentionCacheLayerMixin

    try:
        cache = DynamicCache(config=model.config)
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration without what the cache asks for
        cache = None
    known = (LinearAttentionCacheLayerMixin, DynamicIndexedLayer)
    if cache is not None and any(isinstance(layer, known) for layer in cache.layers):
        return cache
    return Cache(layer_class_to_replicate=DynamicLayer)


def layer_tensors(layer: Any) -> State:
    """The state of a layer of a transformers cache. Raises TypeError for anything but the state that is described here."""
    from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

    tensors: dict[str, Any] = {}
    if isinstance(layer, DummyLayer):
        return tensors
    if hasattr(layer, "keys"):
        tensors |= {name: getattr(layer, name) for name in KEYS_AND_VALUES}
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for kind, states in zip(OF_RECURRENT, (layer.conv_states, layer.recurrent_states), strict=True):
            tensors |= {numbered(kind, index): state for index, state in states.items() if state is not None}
    indexer_keys: torch.Tensor | None = getattr(layer, INDEXER_KEYS, None)
    if indexer_keys is not None:
        if getattr(layer, "indexer_position_ids", None) is not None:
            raise TypeError("a layer that keeps the positions of an indexer's keys")
        tensors[INDEXER_KEYS] = indexer_keys.unsqueeze(1)
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors.values()):
        raise TypeError("a layer that keeps no keys and values, or whole numbers")
    return tensors


def buffers(states: Sequence[State], max_length: int, batch: int, device: torch.device) -> nn.Module:
    """A module with the buffers of all layers, filled with zeros."""
    holder = nn.Module()
    for index, state in enumerate(states):
        layer = nn.Module()
        for name, tensor in state.items():
            sizes = (tensor.shape[1], max_length, tensor.shape[3]) if is_kv_cache(name) else tensor.shape[1:]
            with torch.inference_mode(False):  # a tensor made under inference mode could not be restored outside of it
                layer.register_buffer(name, torch.zeros((batch, *sizes), dtype=tensor.dtype, device=device))
        holder.add_module(str(index), layer)
    return holder


def cache_of(holder: nn.Module, start: torch.Tensor, slots: torch.Tensor | None = None) -> Any:
    """A cache of transformers over these buffers.

    Args:
        start: [1], the number of slots that are filled.
        slots: of a call's tokens, [tokens]; None for those from `start` on.
    """
    from transformers import Cache

    from lissom.frontends.generation.cache_layers import layer_over  # imports transformers

    cache = Cache(layers=[layer_over(layer, start, slots) for layer in holder.children()])
    setattr(cache, _START, start)
    return cache


@contextmanager
def masks_of_new_tokens(model: nn.Module) -> Generator[None]:
    """Let recurrent layers see the padding of a call's own tokens in a mask of all slots, until the block ends."""
    with ExitStack() as stack:
        for module in modules_with(model, _MASK):
            stack.enter_context(exchanged(module, _MASK, _cut_mask(vars(module)[_MASK])))
        yield


def _cut_mask(own: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        cache, mask = kwargs.get("cache"), kwargs.get("attention_mask")
        start = getattr(cache, _START, None)
        if start is None or mask is None:  # a call of another thread
            return own(*args, **kwargs)
        tokens = kwargs["inputs_embeds"].shape[1]
        return _of_new_tokens(mask, start, tokens)

    return replacement


def _of_new_tokens(mask: torch.Tensor, start: torch.Tensor, tokens: int) -> torch.Tensor:
    """The part of a mask of all slots, [batch, slots], that belongs to a call's tokens."""
    return mask.index_select(1, torch.arange(tokens, device=mask.device) + start)


def call(model: nn.Module, cache: Any, **inputs: Any) -> Any:
    """The outputs of the model's own forward.

    Args:
        inputs: the token ids, [batch, tokens], among others.
    """
    ids: torch.Tensor = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]
    start = getattr(cache, _START, None)
    with exchanged(torch, "arange", _positions_or(torch.arange, ids.shape[1])), ExitStack() as stack:
        if start is not None:
            if not any(hasattr(layer, KEYS_AND_VALUES[0]) for layer in cache.layers) and not modules_with(model, _MASK):
                # Its layers multiply their inputs by the mask as it is.
                inputs["attention_mask"] = _of_new_tokens(inputs["attention_mask"], start, ids.shape[1])
            stack.enter_context(counted_from_start(model, start))
            stack.enter_context(scans_continued(model, cache))
        return type(model).forward(model, **inputs, cache=cache, use_cache=True)


def _positions_or(own: Callable[..., torch.Tensor], tokens: int) -> Callable[..., torch.Tensor]:
    """`torch.arange`, which in this thread also takes `(cached, cached + tokens)`, the positions of a call, as tensors."""
    thread = threading.get_ident()

    def arange(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 2 and isinstance(args[0], torch.Tensor) and threading.get_ident() == thread:
            return own(tokens, **kwargs) + args[0]
        return own(*args, **kwargs)

    return arange


def unsupported_state(model: nn.Module, error: Exception | None = None) -> UnsupportedError:
    """The error for a model whose layers keep other state.

    Args:
        error: what its own code raised.
    """
    why = f" ({type(error).__name__}: {first_line(error)})" if error else ""
    return UnsupportedError(
        f"{type(model).__name__} cannot be run with a cache that holds the state of every layer{why}; generation takes models "
        f"whose layers keep keys and values, or the state of a convolution and a recurrence"
    )
