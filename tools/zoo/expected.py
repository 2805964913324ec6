"""The attention and feed-forward sites expected from a transformers configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from tools.zoo.entry import Expected, words

_WITHOUT_ATTENTION = {"linear_attention", "conv", "moe", "mlp", "recurrent", "mamba", "sparse", "dense"}
_EXPERTS = words(
    "num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts num_experts_per_tok moe_topk moe_top_k"
)

UNCLEAR: frozenset[str] = frozenset(
    words(
        """
        canine convbert dbrx diffllama dory falcon_h1 funnel hrm_text inkling_text inkling2_text inkling2_loop_text
        layoutlmv3 levit mobilevit mobilevitv2 mra mllama perceiver pop2piano reformer swiftformer yoso zamba zamba2
        zaya speech/seamless_m4t speech/seamless_m4t_v2 speecht5 phi4_multimodal xlstm cvt focalnet moonshine_streaming
        lilt mobilebert sam3_lite_text_text_model aimv2_vision_model siglip_vision_model siglip2_vision_model cohere_asr
        sapiens2 mimo_v2_flash timesformer segformer glpn speech/whisper t5gemma2 timm_wrapper speech-encoder-decoder dots3_note
        """
    )
)
"""Types whose number of attentions does not follow from their fields: two per layer, shared layers, extra local layers."""

_UNCLEAR_FEED_FORWARD: frozenset[str] = frozenset(
    words(
        """
        xmod mobilebert squeezebert wav2vec2-bert wav2vec2-conformer parakeet_ctc lasr_ctc canary cohere_asr seggpt
        longcat_flash granite_speech5_ctc fnet mamba mamba2 falcon_mamba rwkv nystromformer hiera glpn segformer
        pvt_v2 esmc ultrabert ultravbert altclip openelm git patchtst patchtsmixer
        """
    )
)


def expected(family: str, model_type: str, config: PreTrainedConfig) -> Expected:
    """The number and sizes of the sites, as far as the configuration gives them."""
    if not {model_type, f"{family}/{model_type}"}.isdisjoint(UNCLEAR):
        return Expected()
    attention, feed_forward = _counts(family, config)
    if model_type in _UNCLEAR_FEED_FORWARD or _has_experts(config):
        feed_forward = None
    if not attention:
        return Expected(attention=attention, feed_forward=feed_forward)
    return Expected(attention, *_sizes(config), feed_forward)


def _counts(family: str, config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """The number of attention and feed-forward sites of every stack that runs."""
    encoder, decoder = _stack(config, "encoder"), _stack(config, "decoder")
    if family == "causal" and decoder is not None:
        return decoder, decoder
    if config.is_encoder_decoder and encoder is not None and decoder is not None:
        return encoder + 2 * decoder, encoder + decoder
    text = _text(config)
    depths = _first(config, ("depths",))
    if isinstance(depths, Sequence):
        has_heads = _first(config, ("num_heads", "num_attention_heads")) is not None
        return (sum(depths), sum(depths)) if has_heads else (0, None)
    types = _first(text, ("layer_types", "layers_block_type", "attention_layers"))
    if isinstance(types, Sequence) and not isinstance(types, str):
        return sum(kind not in _WITHOUT_ATTENTION for kind in types), _feed_forwards(types)
    layers = _first(text, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"))
    if not isinstance(layers, int):
        return None, None
    return (layers if _heads(text) is not None else 0), layers


def _feed_forwards(types: Sequence[str]) -> int | None:
    """The number of feed-forward sites: one per layer, unless the configuration lists feed-forward layers separately."""
    return None if {"mlp", "moe"} & set(types) else len(types)


def _stack(config: PreTrainedConfig, part: str) -> int | None:
    """The layers of the encoder or the decoder of a model that has both."""
    inside = getattr(config, part, None)
    if isinstance(inside, PreTrainedConfig):
        return getattr(_text(inside), "num_hidden_layers", None)
    names = (f"{part}_layers", f"num_{part}_layers", f"{part}_num_hidden_layers")
    layers = _first(config, names)
    if isinstance(layers, int):
        return layers
    inside = getattr(config, f"{part}_config", None)
    if isinstance(inside, PreTrainedConfig):
        return getattr(inside, "num_hidden_layers", None)
    if config.is_encoder_decoder:
        return _first(config, ("num_layers", "num_hidden_layers"))
    return None


def _sizes(config: PreTrainedConfig) -> tuple[int | None, int | None, int | None]:
    """Heads, key/value heads and head_dim, if they are the same in every layer."""
    if _first(config, ("depths", "encoder_attention_heads")) is not None or config.is_encoder_decoder:
        heads = {_first(config, (f"{part}_attention_heads", f"num_{part}_attention_heads")) for part in ("encoder", "decoder")}
        number = heads.pop() if len(heads) == 1 else None
        number = _heads(config) if number is None and config.is_encoder_decoder else number
        return number, number, None
    text = _text(config)
    heads = _heads(text)
    if not isinstance(heads, int):
        return None, None, None
    groups = _first(text, ("num_key_value_heads", "num_kv_heads"))
    if _first(text, ("multi_query",)) and not _first(text, ("new_decoder_architecture",)):
        groups = 1
    groups = heads if groups is None else groups
    width = _first(text, ("head_dim", "dim_head", "attention_head_size", "d_head", "d_kv", "kv_channels"))
    hidden = _first(text, ("hidden_size", "d_model", "n_embd", "dim", "emb_dim"))
    if _first(text, ("kv_lora_rank",)) is not None:
        return heads, None, None
    if width is None and isinstance(hidden, int):
        width = hidden // heads
    same = all(isinstance(size, int) for size in (heads, groups, width)) and _uniform(text)
    return (heads, groups, width) if same else (None, None, None)


def _uniform(config: PreTrainedConfig) -> bool:
    """True if no field gives some layers another number of heads."""
    other = ("swa_num_attention_heads", "global_head_dim", "num_attention_heads_per_layer", "num_global_key_value_heads")
    return _first(config, other) is None and not getattr(config, "is_heterogeneous", False)


def _heads(config: PreTrainedConfig) -> Any:
    return _first(
        config, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads")
    )


def _has_experts(config: PreTrainedConfig) -> bool:
    return _first(_text(config), _EXPERTS) is not None or "nllb-moe" in config.model_type


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    part = getattr(config, "text_config", None)
    return part if isinstance(part, PreTrainedConfig) else config


def _first(config: PreTrainedConfig, names: Sequence[str]) -> Any:
    """The value of the first of these fields that has one."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:
            # Fields that differ from layer to layer have no single value.
            continue
        if value is not None:
            return value
    return None
