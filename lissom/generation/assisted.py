"""Greedy and sampled texts of transformers' `generate` with a draft."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lissom.generation.choice import Choice
from lissom.generation.speculate import Speculator

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""The processors that a draft is sampled with too: they keep nothing between calls and read no text."""


def generate_with_draft(
    speculator: Speculator,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    seen: Sequence[int],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """As `GenerationMixin._sample` after the prefill, for one sequence.

    Args:
        input_ids: [1, tokens], all in the KV cache.
        logits: of the next token, [1, vocabulary].
        seen: the tokens without padding.
    """
    scores, raw_logits = list[torch.Tensor](), list[torch.Tensor]()
    wanted: Any = config
    output: Any = GenerateDecoderOnlyOutput  # its fields are typed as tuples of one tensor
    stops: Any = criteria
    choice = Choice(partial(_processed, processors), bool(wanted.do_sample), partial(_warped, processors))
    longest = criteria.max_length or speculator.decoder.max_length + 1
    with closing(speculator.steps(input_ids, logits, choice, longest - input_ids.shape[1], seen)) as steps:
        for step in steps:
            token = torch.tensor([step.token], device=input_ids.device)
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            if wanted.return_dict_in_generate:
                scores += [step.scores] if wanted.output_scores else []
                raw_logits += [_float(step.logits)] if wanted.output_logits else []
            if streamer is not None:
                streamer.put(token.cpu())
            if bool(stops(input_ids, tuple(scores) if wanted.output_scores else None).all()):
                break
    if streamer is not None:
        streamer.end()
    if not wanted.return_dict_in_generate:
        return input_ids
    return output(
        sequences=input_ids,
        scores=tuple(scores) if wanted.output_scores else None,
        logits=tuple(raw_logits) if wanted.output_logits else None,
    )


def _float(logits: torch.Tensor) -> torch.Tensor:
    """A copy in float32, as transformers makes it."""
    return logits.to(torch.float32, copy=True)


def _processed(processors: LogitsProcessorList, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    process: Any = processors
    return process(text, _float(logits))


def _warped(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """The scores of a draft's logits."""
    empty = torch.zeros(1, 0, dtype=torch.int64, device=logits.device)
    warpers: list[Any] = [processor for processor in processors if isinstance(processor, _WARPERS)]
    for warper in warpers:
        logits = warper(empty, logits)
    return logits
