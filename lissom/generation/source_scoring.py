"""A caller's metric of an encoder-decoder: it scores a function of a source and the decoder's tokens, without a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lissom.compiler.ir.program import Program
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.generation.encoder_decoder import decoder_inputs
from lissom.generation.decoder import unpadded
from lissom.generation.scoring import LAST_ALONE
from lissom.runtime.compiled_model import CompiledModel, own_state

Part = Program | CompiledModel


@dataclass(frozen=True)
class SourceScorer:
    """The caller's metric as a metric of one of the two programs, with the other one as it is.

    Attributes:
        encoder: the encoder's program; None if it is scored.
        decoder: the decoder's program; None if it is scored.
    """

    metric: Callable[..., float]
    batch: int
    max_length: int
    encoder: Part | None = None
    decoder: Part | None = None

    def __call__(self, program: Part) -> float:
        parts = self.encoder or program, self.decoder or program
        return self.metric(_Scored(*parts, self.batch, self.max_length))


@dataclass(frozen=True)
class _Scored:
    """Encoder and decoder as a function of whole texts."""

    encoder: Part
    decoder: Part
    batch: int
    max_length: int

    def __call__(self, decoder_input_ids: torch.Tensor, *, all_positions: bool = False, **inputs: torch.Tensor) -> torch.Tensor:
        """The logits of the next token, [batch, vocabulary]; with all_positions those of every token of the decoder.

        Args:
            inputs: of the encoder, by name.
            decoder_input_ids: [batch, tokens].

        Raises:
            InputError: if the ids are no tensor of `batch` rows.
            UnsupportedError: for all positions of a decoder that computes the last alone.
        """
        is_tensor = isinstance(decoder_input_ids, torch.Tensor)
        if not is_tensor or decoder_input_ids.dim() != 2 or len(decoder_input_ids) != self.batch:
            raise InputError(f"metric gave other decoder_input_ids than a tensor [{self.batch}, tokens]; compile with batch=")
        given = unpadded(decoder_input_ids, self.max_length)
        source = _run(self.encoder, inputs)
        logits: torch.Tensor = _run(self.decoder, given | decoder_inputs(source))
        if all_positions and logits.shape[1] != decoder_input_ids.shape[1]:
            raise UnsupportedError(LAST_ALONE)
        return logits if all_positions else logits[:, -1]


def _run(part: Part, inputs: Mapping[str, object]) -> Any:
    signature = (part if isinstance(part, Program) else part.program).signature
    with own_state(part):
        return signature.unflatten(part.run(signature.flatten((), inputs)))
