"""What is wrong with a draft is said in one sentence."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import lissom
from lissom.errors import InputError, UnsupportedError
from lissom.generation.model import GenerationModel
from tests.support.decoders import VOCABULARY, decoder, prompt
from tests.support.refusals import Refusal, check, table

pytestmark = pytest.mark.usefixtures("shared_captures")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXTS = [torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(index)) for index in range(2)]
HALF = "prune-layers{keep=0.5,criterion=magnitude}"


@cache
def compiled(draft: str | None = "prompt-lookup") -> GenerationModel:
    return lissom.compile_generation(decoder("llama"), max_length=16, goal=None, draft=draft)


def generation(**options: object) -> object:
    name = options.pop("name", "llama")
    return lissom.compile_generation(decoder(str(name)), **{"max_length": 16, "goal": None, **options})


def wide() -> torch.nn.Module:
    config = copy.deepcopy(decoder("llama").config)
    config.vocab_size = VOCABULARY + 1
    return type(decoder("llama"))(config).eval()


def deep() -> torch.nn.Module:
    config = copy.deepcopy(decoder("llama").config)
    config.num_hidden_layers = 5
    return type(decoder("llama"))(config).eval()


REFUSALS: dict[str, Refusal] = {
    "number": (InputError, "draft= is a int; give 'prompt-lookup', the text of a pipeline", lambda: generation(draft=4)),
    "unknown text": (InputError, "draft='prompt-lookdown' is not known; give", lambda: generation(draft="prompt-lookdown")),
    "batch": (
        UnsupportedError,
        "draft= takes one sequence, and batch is 2",
        lambda: generation(draft="prompt-lookup", batch=2),
    ),
    "ranks": (
        UnsupportedError,
        "draft= takes a decoder in one process",
        lambda: generation(draft="prompt-lookup", backend="distributed", world_size=2),
    ),
    "recurrence": (
        UnsupportedError,
        "the recurrent state of Mamba2ForCausalLM cannot be cropped",
        lambda: generation(name="mamba2", draft="prompt-lookup"),
    ),
    "recurrent draft": (UnsupportedError, "give a draft with a KV cache alone", lambda: generation(draft=decoder("mamba2"))),
    "vocabulary": (InputError, "has a vocabulary of 100 tokens, and the decoder one of 99", lambda: generation(draft=wide())),
    "large": (InputError, "give a smaller draft", lambda: generation(draft=deep())),
    "short": (
        InputError,
        "the draft's cache holds 16 tokens, and the decoder's 32; compile the draft with max_length=32",
        lambda: generation(draft=generation(), max_length=32),
    ),
    "draft of two rows": (InputError, "reads 2 sequences at once", lambda: generation(draft=generation(batch=2))),
    "dropped tokens": (
        InputError,
        "prune-vocabulary kept other tokens in the draft",
        lambda: generation(draft="prune-vocabulary{ids=graph,coverage=1.0}", data=TEXTS),
    ),
    "itself": (InputError, "the draft is the decoder itself", lambda: compiled().use_draft(compiled())),
    "one token": (
        UnsupportedError,
        "returns the logits of one token per call, and verifying a draft takes several; compile it with draft=",
        lambda: compiled(None).use_draft("prompt-lookup"),
    ),
    "passes for a compiled one": (InputError, f"draft='{HALF}' is no draft for a compiled", lambda: compiled().use_draft(HALF)),
    "beams": (
        UnsupportedError,
        "generates greedy and sampled text, and num_beams is 2",
        lambda: compiled().generate(**prompt(), **GREEDY, num_beams=2),
    ),
    "encoder-decoder": (
        UnsupportedError,
        "draft= takes a causal language model, and T5ForConditionalGeneration is an encoder-decoder",
        lambda: lissom.compile_generation(t5(), max_length=16, draft="prompt-lookup"),
    ),
}


def t5() -> torch.nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=100, **sizes)).eval()


@table(REFUSALS)
def test_refusals(refusal: Refusal) -> None:
    check(refusal)
