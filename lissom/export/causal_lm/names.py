"""Which models are decoders, the names of a decoder's inputs and outputs, and the sizes of its attention layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def describe_layers(layers: Sequence[Layer]) -> str:
    """For a sentence: `26 layers of attention, 22 of them with a sliding window`."""
    windows = sum(1 for layer in layers if layer.window is not None)
    return f"{len(layers)} layers of attention" + (f", {windows} of them with a sliding window" if windows else "")


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


def is_decoder(model: object) -> TypeGuard[PreTrainedModel]:
    """True for a causal language model of transformers."""
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and not getattr(config, "is_encoder_decoder", False)
