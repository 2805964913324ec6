"""Small decoders and tokenizers for tests of GGUF files, of sizes that blocks of 32 fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import lissom
from tests.support.models import seeded

TEXTS = ["the quick brown fox jumps over the lazy dog, and the dog barks at the fox"] * 4
_ASCII = [chr(code) for code in range(33, 127)]


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, of ASCII alone: llama.cpp tells no tokens that are parts of a character."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=140, special_tokens=["<s>", "</s>"], initial_alphabet=[*_ASCII, "Ġ", "Ċ"])
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> transformers.PreTrainedTokenizerFast:
    """BPE with single bytes for what it has no token for, as made from SentencePiece: Gemma, the first Llamas."""
    found = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    found.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], initial_alphabet=[*_ASCII, "▁"])
    )
    # Bytes are ordinary tokens, and not special ones that are found in texts.
    state = json.loads(found.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = vocabulary | {text: len(vocabulary) + at for at, text in enumerate(special[3:])}
    found = tokenizers.Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_checkpoint(path: Path, layers: int = 1) -> transformers.PreTrainedTokenizerFast:
    """Write a decoder with a tokenizer that llama.cpp has too, which is returned."""
    tokenizer = byte_level()
    # transformers adds a token to the tokenizers of this family.
    decoder("qwen2", len(tokenizer) + 6, layers=layers).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def decoder(family: str, vocabulary: int, layers: int = 3, **fields: Any) -> transformers.PreTrainedModel:
    """A decoder of three layers with random weights, large enough that its tokens differ."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": vocabulary, "num_hidden_layers": layers, "max_position_embeddings": 256, "initializer_range": 0.2}
    if family in ("qwen3", "gemma3_text"):
        sizes["head_dim"] = 32
    if family == "gemma3_text":
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
        sizes |= {"query_pre_attn_scalar": 32, "sliding_window": 16, "layer_types": kinds}
    if family == "mistral":
        sizes["sliding_window"] = None
    if family in ("phi3", "gpt2"):
        sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes |= fields
    if family == "gpt2":
        sizes["n_inner"] = sizes.pop("intermediate_size")
    config = transformers.CONFIG_MAPPING[family](**sizes)
    return seeded(lambda: transformers.AutoModelForCausalLM.from_config(config))


def optimized(model: Any, passes: str = "exact") -> lissom.api.Optimized:
    """The model after the passes, with data for those that calibrate."""
    ids = torch.randint(3, model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    return lissom.optimize(model, inputs, passes=passes, data=[inputs], checks="off")
