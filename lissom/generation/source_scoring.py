"""A caller's metric of an encoder-decoder: it scores a function of a source and the decoder's tokens, without a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch

from lissom.compiler.ir.program import Program
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.decoder import INPUTS
from lissom.frontends.encoder_decoder import decoder_inputs
from lissom.runtime.compiled_model import CompiledModel

Part = Program | CompiledModel


@dataclass(frozen=True)
class SourceScorer:
    """The caller's metric as a metric of one of the two programs, with the other one as it is.

    encoder, decoder: the program that stays; None for the one that is scored.
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

        inputs: of the encoder, by name. decoder_input_ids: [batch, tokens].

        Raises: InputError; UnsupportedError for all positions of a decoder that computes the last alone.
        """
        if not isinstance(decoder_input_ids, torch.Tensor) or decoder_input_ids.shape[:1] != (self.batch,):  # pyright: ignore
            raise InputError(f"metric gave other decoder_input_ids than a tensor [{self.batch}, tokens]; compile with batch=")
        tokens, device = decoder_input_ids.shape[1], decoder_input_ids.device
        counted = torch.arange(tokens, device=device).expand(self.batch, -1).contiguous()
        mask = torch.ones(self.batch, self.max_length, dtype=torch.int64, device=device)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        given = dict(zip(INPUTS, (decoder_input_ids, mask, counted, start), strict=True))
        source = cast("dict[str, torch.Tensor]", _run(self.encoder, inputs))
        logits = cast(torch.Tensor, _run(self.decoder, given | decoder_inputs(source)))
        if all_positions and logits.shape[1] != tokens:
            raise UnsupportedError(
                "the decoder computes the logits of the last token alone; compile it with all_logits=True for a metric of all "
                "positions"
            )
        return logits if all_positions else logits[:, -1]


def _run(part: Part, inputs: Mapping[str, object]) -> object:
    signature = (part if isinstance(part, Program) else part.program).signature
    return signature.unflatten(part.run(signature.flatten((), inputs)))
