"""Names of the inputs and outputs of a decoder with a KV cache, and the sizes of its attention layers."""

from __future__ import annotations

from dataclasses import dataclass

INPUT_IDS, ATTENTION_MASK, POSITION_IDS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PAST = ("past_key_values.{}.key", "past_key_values.{}.value")
PRESENT = ("present.{}.key", "present.{}.value")
"""The names of a layer's keys and values before and after a call."""


@dataclass(frozen=True)
class Layer:
    """The sizes of one attention layer.

    Attributes:
        window: the tokens that a query sees, itself included; None for all before it.
    """

    heads: int
    key_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class Runtime:
    """The library that runs a decoder, in words for errors.

    Attributes:
        name: of the library.
        engine: of the library that it runs graphs with.
        attention: what an attention has to do there, after "cannot".
    """

    name: str
    engine: str
    attention: str
