"""Shrinks any transformers configuration: narrow, few layers, every kind of layer kept.

A field is set by its name, never raised above its default. Lists with one item per layer are cut to the kept layers, which are
chosen so that every value in each such list still occurs: a hybrid keeps an attention and a mamba layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from tools.zoo.entry import words

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY, POSITIONS = 64, 4, 2, 16, 96, 2, 128, 128
MOST_LAYERS = 4

_NAMES: Sequence[tuple[int, str]] = (
    (
        HIDDEN,
        """
        hidden_size d_model n_embd dim embed_dim embedding_dim emb_dim attention_hidden_size decoder_hidden_size
        pooler_output_size lru_width output_hidden_size router_hidden_size pronunciation_embed_dim shape_embed_dim
        output_embedding_size t2u_variance_predictor_embed_dim prediction_head_size word_embed_proj_dim projection_size
        """,
    ),
    (
        32,
        """
        embedding_size input_embedding_size projection_dim adapter_rank hidden_size_per_layer_input mamba_dt_rank
        time_step_rank embedding_rank intra_bottleneck_size hc_lowrank ple_embed_dim classifier_proj_size laurel_rank
        image_size
        """,
    ),
    (
        HEADS,
        """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_self_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads linear_num_heads
        linear_num_value_heads num_attention_heads_per_layer
        """,
    ),
    (KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (
        HEAD_DIM,
        """
        head_dim d_kv d_head attention_head_size kv_channels v_head_dim swa_head_dim linear_head_dim linear_key_head_dim
        linear_value_head_dim index_head_dim query_pre_attn_scalar mamba_d_head mamba_head_dim qk_head_dim
        """,
    ),
    (HEAD_DIM // 2, "qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (24, "q_lora_rank kv_lora_rank o_lora_rank"),
    (
        INTERMEDIATE,
        """
        intermediate_size dff encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner hidden_dim ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size speech_encoder_intermediate_size
        t2u_encoder_ffn_dim t2u_decoder_ffn_dim feed_forward_size dim_ff moe_shared_expert_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size
        """,
    ),
    (
        LAYERS,
        """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers
        speech_encoder_layers num_self_attends_per_block num_blocks depth num_encoder_blocks
        """,
    ),
    (
        VOCABULARY,
        """
        vocab_size shape_vocab_size pronunciation_vocab_size t2u_vocab_size char_vocab_size tgt_vocab_size src_vocab_size
        vocab_size_per_layer_input unpadded_vocab_size entity_vocab_size ngram_vocab_size_base
        make_ngram_vocab_size_divisible_by audio_vocab_size decoder_vocab_size
        """,
    ),
    (
        POSITIONS,
        """
        max_position_embeddings n_positions max_seq_len n_ctx max_source_positions max_target_positions
        max_2d_position_embeddings t2u_max_position_embeddings context_length rel_extent original_max_position_embeddings
        """,
    ),
    (
        8,
        """
        sliding_window window_size local_attention attention_window_size sliding_window_size chunk_size mamba_chunk_size
        attention_window block_size attention_chunk_size index_topk segment_means_seq_len num_landmarks mamba_n_heads
        mamba_num_heads state_size mamba_d_state ssm_state_size patch_size num_latents
        """,
    ),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts hc_mult hc_count"),
    (
        2,
        """
        num_experts_per_tok moe_topk moe_k n_group encoder_sparse_step decoder_sparse_step max_window_layers
        """,
    ),
    (
        1,
        """
        topk_group n_shared_experts num_shared_experts first_k_dense_replace moe_num_shared_experts num_dense_layers
        num_sparse_encoder_layers num_sparse_decoder_layers moe_layer_start_index
        """,
    ),
    # With few heads, many keys of an indexer score exactly 0, and which of them are the best is left to the sort.
    (16, "num_mel_bins index_n_heads"),
)
SIZES: Mapping[str, int] = {name: size for size, names in _NAMES for name in words(names)}
"""The value of a field of that name, unless it is smaller already."""

STAGE_WIDTHS = ("hidden_sizes", "embed_dims", "neck_hidden_sizes", "stage_out_channels", "stage_mid_channels", "conv_dim")


def shrink(default: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A tiny configuration derived from `default`.

    changes: field values; for a nested configuration, a mapping of its fields.
    """
    kept = _kept_layers(default)
    fields: dict[str, Any] = _latent_attention(default)
    for name, value in _values(default).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrink(value, changes.get(name, {}))
        elif name not in changes and name not in fields:
            small = _small(default, name, value, kept)
            if small is not value:
                fields[name] = small
    plain = {name: value for name, value in changes.items() if name not in fields}
    return type(default)(**_own_values(default) | fields | plain)


def _values(default: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration, by the names of its constructor's parameters."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        try:
            values[field.name] = getattr(default, field.name)
        except AttributeError:
            continue
        except RuntimeError:
            # A field that differs from layer to layer has no single value; the class's default replaces it.
            values[field.name] = field.default
    return values


def _latent_attention(default: PreTrainedConfig) -> dict[str, int]:
    """Adjust latent attention: keys and values are expanded to every head, and only the rotary part is rotated."""
    values = _values(default)
    if not isinstance(values.get("kv_lora_rank"), int):
        return {}
    heads = {"num_key_value_heads": HEADS} if "num_key_value_heads" in values else {}
    rotary = values.get("head_dim") is not None and values.get("head_dim") == values.get("qk_rope_head_dim")
    return heads | ({"head_dim": SIZES["qk_rope_head_dim"]} if rotary else {})


def _own_values(default: PreTrainedConfig) -> dict[str, Any]:
    """The plain values of a nested configuration that differ from its class's defaults."""
    fresh = _values(type(default)())
    plain = {name: value for name, value in _values(default).items() if isinstance(value, (bool, int, float, str))}
    return {name: value for name, value in plain.items() if fresh.get(name) != value}


def _small(default: PreTrainedConfig, name: str, value: object, kept: Sequence[int]) -> object:
    if isinstance(value, bool) or name in ("id2label", "label2id"):
        return value
    if name == "head_dim" and value is None:
        return HEAD_DIM
    if name.endswith(("_token_id", "_token_index")):
        return _special_token(name, value)
    if name in SIZES and isinstance(value, int):
        size = len(kept) if SIZES[name] == LAYERS and name in _DEPTHS else SIZES[name]
        return value if value <= size else size
    if isinstance(value, (list, tuple)) and value and kept and len(value) == _depth(default) and name not in STAGE_WIDTHS:
        items = [_small(default, name, value[index], kept) for index in kept]
        return items if isinstance(value, list) else tuple(items)
    if name in STAGE_WIDTHS and isinstance(value, (list, tuple)):
        return [min(HIDDEN, 16 * (index + 1)) for index in range(len(value))]
    if name == "image_size" and isinstance(value, (list, tuple)):
        return [SIZES["image_size"]] * len(value)
    return value


_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _special_token(name: str, value: object) -> object:
    """A token id inside the vocabulary; the usual ones are distinct, the rest are taken from the end."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "pad_token_id" and (value is None or (isinstance(value, int) and not 0 <= value < VOCABULARY)):
        return 0
    if isinstance(value, (list, tuple)):
        return usual.get(name, VOCABULARY - 1)
    if isinstance(value, int) and not isinstance(value, bool) and value >= VOCABULARY:
        return usual.get(name, VOCABULARY - 1 - sum(map(ord, name)) % 16)
    return value


def _depth(default: PreTrainedConfig) -> int | None:
    return next((getattr(default, name) for name in _DEPTHS if isinstance(getattr(default, name, None), int)), None)


def _kept_layers(default: PreTrainedConfig) -> list[int]:
    """The layers of the default to keep, so that each value of each list with one item per layer occurs."""
    depth = _depth(default)
    if depth is None:
        return []
    lists = [value for value in _values(default).values() if isinstance(value, (list, tuple)) and len(value) == depth]
    seen: set[tuple[int, str]] = set()
    kept = []
    for index in range(depth):
        facts = {(number, repr(values[index])) for number, values in enumerate(lists)}
        if len(facts - seen) and len(kept) < MOST_LAYERS:
            kept.append(index)
            seen |= facts
    spare = [index for index in range(depth) if index not in kept]
    return sorted(kept + spare[: max(0, LAYERS - len(kept))])
