"""The model families of ONNX Runtime GenAI, and the configuration from which it generates.

Its types of language models are listed in src/models/model_type.h, and the fields of the configuration in src/config.h,
github.com/microsoft/onnxruntime-genai. The decoder is one graph whatever the type: windows and rotary frequencies are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lissom.errors import UnsupportedError
from lissom.export.causal_lm.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    PAST,
    POSITION_IDS,
    PRESENT,
    Layer,
    Runtime,
    is_decoder,
)
from lissom.frontends.generation.decoder import longest_text, longrope_switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TYPES: Mapping[str, str] = {
    "ernie4_5": "ernie4_5",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "phi": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
"""The type in ONNX Runtime GenAI by the model type of transformers."""
SHORTEST = 16
"""The tokens of a text that is compared at least."""
MODEL, CONFIG = "model.onnx", "genai_config.json"
RUNTIME = Runtime("ONNX Runtime GenAI", "ONNX Runtime", "be GroupQueryAttention of ONNX Runtime")


def type_of(model: PreTrainedModel) -> str:
    """The type of a model in ONNX Runtime GenAI. Raises UnsupportedError if it has none."""
    if not is_decoder(model):
        raise UnsupportedError(
            f"ONNX Runtime GenAI folders are written for causal language models, and {type(model).__name__} is none; "
            f"CompiledModel.export_onnx writes encoders"
        )
    known = TYPES.get(model.config.model_type)
    if known is None:
        raise UnsupportedError(
            f"ONNX Runtime GenAI has no type for models of type '{model.config.model_type}'; it has some for {', '.join(TYPES)}"
        )
    return known


def context_length(model: PreTrainedModel) -> int:
    """The most tokens of a text. Raises UnsupportedError for a model that does not say it, or knows few."""
    lengths = [length for length in (longest_text(model), longrope_switch(model)) if length is not None]
    if not lengths:
        raise UnsupportedError(
            f"the configuration of {type(model).__name__} has no max_position_embeddings, and ONNX Runtime GenAI needs the "
            f"longest text; set it in the model's config"
        )
    if min(lengths) < SHORTEST:
        raise UnsupportedError(
            f"{type(model).__name__} knows texts of {min(lengths)} tokens at most, and a comparison takes {SHORTEST}; give its "
            f"config a larger max_position_embeddings"
        )
    return min(lengths)


def configuration(
    model: PreTrainedModel, kind: str, layers: Sequence[Layer], vocabulary: int, tokenizer: object = None
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Args:
        kind: the type in ONNX Runtime GenAI.
        vocabulary: the number of logits of a token.
        tokenizer: names the special ids that the model does not.
    """
    first, length = layers[0], context_length(model)
    names = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK, "position_ids": POSITION_IDS}
    past = {f"past_{part}_names": name.format("%d") for part, name in zip(("key", "value"), PAST, strict=True)}
    present = {f"present_{part}_names": name.format("%d") for part, name in zip(("key", "value"), PRESENT, strict=True)}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": first.head_dim,
        "hidden_size": int(model.config.get_text_config().hidden_size),
        "inputs": names | past,
        "outputs": {"logits": LOGITS} | present,
        "num_attention_heads": first.heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": first.key_heads,
    }
    content = {"type": kind, "context_length": length, "vocab_size": vocabulary, "decoder": decoder}
    content |= _special_ids(model, tokenizer)
    return {"model": content, "search": _search(model, length)}


def _special_ids(model: PreTrainedModel, tokenizer: object) -> dict[str, object]:
    """The ids that begin, end and pad texts, as far as they are known."""
    ids: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = (getattr(source, name, None) for source in (model.generation_config, model.config.get_text_config(), tokenizer))
        ids[name] = next((value for value in given if value is not None), None)
    ends = ids["eos_token_id"]
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    return {name: value for name, value in ids.items() if value is not None}


def _search(model: PreTrainedModel, length: int) -> dict[str, object]:
    """How the next token is chosen: as the model's generation configuration says, with the defaults of transformers."""
    given: Any = model.generation_config

    def field(name: str, default: object) -> object:
        value = getattr(given, name, None)
        return default if value is None else value

    return {
        "do_sample": field("do_sample", False),
        "early_stopping": True,
        "length_penalty": field("length_penalty", 1.0),
        "max_length": length,
        "min_length": 0,
        "no_repeat_ngram_size": field("no_repeat_ngram_size", 0),
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": field("repetition_penalty", 1.0),
        "temperature": field("temperature", 1.0),
        "top_k": field("top_k", 50),
        "top_p": field("top_p", 1.0),
    }
