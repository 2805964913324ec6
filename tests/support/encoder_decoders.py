"""Small encoder-decoders of the zoo with random weights, and sources for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers.models.auto import modeling_auto

import lissom
from lissom.frontends.generation.encoder_decoder import encoder_example
from tools.zoo import huggingface

MAX_LENGTH = 24
_TABLES = {
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


@cache
def model(name: str) -> Any:
    """The tiny model of an entry of the zoo, such as `speech/whisper`."""
    family, kind = name.split("/")
    class_name = _TABLES[family][kind]
    made: Any = huggingface.build(family, kind, class_name if isinstance(class_name, str) else class_name[0]).model
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # so that attention is not even, and the tokens of an answer differ
    if made.generation_config.decoder_start_token_id is None:
        made.generation_config.decoder_start_token_id = 1
    return made


@cache
def compiled(name: str, batch: int = 2) -> Any:
    """What is compiled of it, once a session. Nothing is timed, and the tokens of an answer are the check."""
    return lissom.compile_generation(model(name), max_length=MAX_LENGTH, batch=batch, goal=None, checks="off")


def source(name: str, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of the encoder: random ones; rows of text and masked sound but the first end in padding."""
    draw = torch.Generator().manual_seed(tokens)
    found: dict[str, torch.Tensor] = {}
    for key, value in encoder_example(model(name), None).items():
        wanted = value[torch.arange(rows) % len(value)]
        if key == "input_ids":
            wanted = torch.randint(5, int(value.max()) + 1, (rows, tokens), generator=draw)
        elif value.is_floating_point():
            wanted = torch.randn(wanted.shape, generator=draw)
        elif "input_ids" in found:
            wanted = torch.ones(rows, tokens, dtype=torch.int64)
            for row in range(1, rows):
                wanted[row, tokens - row - 1 :] = 0
        found[key] = wanted
    return found
