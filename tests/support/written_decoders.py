"""What tests of decoders in formats of other runtimes share: passes, a prompt, and small models, two without a KV cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support.gguf_models import decoder
from tests.support.models import seeded

VOCABULARY = 90
PROMPT = [5, 17, 40, 3, 66, 21, 9, 71, 30, 12, 55, 8]
INT4, INT8 = "quantize{scheme=int4-weight}", "quantize{scheme=int8-weight}"
PRUNED = "prune-layers{keep=0.67},prune-heads{keep=0.5},prune-neurons{keep=0.5}"


class Anchored(transformers.LlamaForCausalLM):
    """Adds the logits of the first token to those of all others, which no KV cache has."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        found = super().forward(input_ids, **kwargs)
        found.logits = found.logits + found.logits[:, :1]
        return found


class Backwards(transformers.LlamaForCausalLM):
    """Every token sees every other."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        tokens = input_ids.shape[1]
        mask = torch.zeros(input_ids.shape[0], 1, tokens, tokens, dtype=self.dtype, device=input_ids.device)
        return super().forward(input_ids, attention_mask=mask, **kwargs)


def small(kind: type, **fields: Any) -> Any:
    return seeded(lambda: kind(decoder("llama", VOCABULARY, layers=1, **fields).config))
