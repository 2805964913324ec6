"""Transformers whose attention is written out in parts, one layer each with random weights, compiled once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import transformers

from lissom.api import Optimized
from lissom.runtime.compiled_model import CompiledModel
from tests.support import captures
from tests.support.models import VOCABULARY, Case, seeded, tokens

_DECODER: dict[str, object] = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}


def with_mask(build: Callable[[], torch.nn.Module]) -> Case:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return Case(seeded(build), {"input_ids": tokens(), "attention_mask": mask})


def tiny_bert() -> Case:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return with_mask(lambda: transformers.BertModel(config))


def tiny_llama() -> Case:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=32, attn_implementation="eager", **_DECODER,
    )  # fmt: skip
    return with_mask(lambda: transformers.LlamaForCausalLM(config))


def tiny_gpt2() -> Case:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, attn_implementation="eager", **_DECODER)
    return with_mask(lambda: transformers.GPT2Model(config))


def tiny_t5() -> Case:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )  # fmt: skip
    return with_mask(lambda: transformers.T5EncoderModel(config))


def tiny_bloom() -> Case:
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, attn_implementation="eager", **_DECODER)
    return with_mask(lambda: transformers.BloomModel(config))


def tiny_deberta() -> Case:
    config = transformers.DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", max_relative_positions=-1, attn_implementation="eager",
    )  # fmt: skip
    return with_mask(lambda: transformers.DebertaV2Model(config))


def tiny_mpnet() -> Case:
    config = transformers.MPNetConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return with_mask(lambda: transformers.MPNetModel(config))


def tiny_mpt() -> Case:
    config = transformers.MptConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, max_seq_len=32, use_cache=False)
    return with_mask(lambda: transformers.MptModel(config))


def tiny_gemma3() -> Case:
    config = transformers.Gemma3TextConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=24,
        max_position_embeddings=32, sliding_window=3, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
        attn_implementation="eager", **_DECODER,
    )  # fmt: skip
    return with_mask(lambda: transformers.Gemma3ForCausalLM(config))


def tiny_whisper() -> Case:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        pad_token_id=0, decoder_start_token_id=1, attn_implementation="eager", **_DECODER,
    )  # fmt: skip
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    model = seeded(lambda: transformers.WhisperModel(config))
    return Case(model, {"input_features": sound, "decoder_input_ids": tokens()})


# Each with how many attentions it computes: layers, and for Whisper one in the encoder and two in the decoder.
EAGER: dict[str, tuple[Callable[[], Case], int]] = {
    "bert": (tiny_bert, 1),
    "llama": (tiny_llama, 1),
    "t5": (tiny_t5, 1),
    "gpt2": (tiny_gpt2, 1),
    "bloom": (tiny_bloom, 1),
    "deberta": (tiny_deberta, 1),
    "mpnet": (tiny_mpnet, 1),
    "mpt": (tiny_mpt, 1),
    "gemma3": (tiny_gemma3, 2),
    "whisper": (tiny_whisper, 3),
}


@cache
def case_of(name: str) -> Case:
    return EAGER[name][0]()


@cache
def compiled(name: str) -> CompiledModel:
    """The model compiled with the recipe `exact` for the eager backend."""
    case = case_of(name)
    return captures.compile(case.model, case.inputs)


@cache
def optimized(name: str) -> Optimized:
    """The model after the recipe `exact`, before a backend lowers it."""
    case = case_of(name)
    return captures.optimize(case.model, case.inputs)
