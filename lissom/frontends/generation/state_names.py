"""The names of a decoder's state, layer by layer: keys and values, and the state of convolutions and recurrences."""

from __future__ import annotations

KEYS_AND_VALUES = ("keys", "values")
INDEXER_KEYS = "indexer_keys"
"""The keys by which a layer chooses the tokens that it attends to, [batch, 1, slots, head_dim]."""
OF_RECURRENT = ("convolution", "recurrence")


def is_kv_cache(name: str) -> bool:
    """True if a state, named as in the program, has one slot for each token; False for convolutions and recurrences."""
    return not name.rpartition(".")[2].startswith(OF_RECURRENT)


def numbered(kind: str, index: int) -> str:
    """The name of a layer's state of a kind."""
    return f"{kind}_{index}" if index else kind
