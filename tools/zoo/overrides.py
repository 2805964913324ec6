"""Types that need other values than their field names suggest, or cannot be in the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tools.zoo.entry import words

Changes = Mapping[str, Any]

_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2, "image_size": 32}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_GLM_ROPE = {"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
_PARAKEET = {"subsampling_conv_channels": 8, "num_mel_bins": 16, "encoder_layers": 2}
_SEAMLESS = {
    "feature_projection_input_dim": 16,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 8,
}
_WAV2VEC2 = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
_CONFORMER = {"vocab_size": 128}

_DECODERS_TOO = words(
    """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert roberta
    roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """
)
"""Encoders that are also decoders if their configuration says so."""

CONFIGS: Mapping[str, Changes] = {
    # Text.
    "bamba": {"attn_layer_indices": [1]},
    **{f"causal/{name}": {"is_decoder": True} for name in _DECODERS_TOO},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": None},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "is_decoder": False, "num_hidden_layers": 2},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "squeezebert": {"embedding_size": 64},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "glm4v_text": _GLM_ROPE,
    "glm4v_moe_text": _GLM_ROPE,
    "glm_ocr_text": _GLM_ROPE,
    "glm_image_text": _GLM_ROPE,
    "voxtral_encoder": {"max_source_positions": 32},
    "qwen2_audio_encoder": {"max_source_positions": 32},
    # Images.
    "clip": {"vision_config": {"image_size": 32, "patch_size": 8}},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "donut-swin": _SWIN,
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "patch_size": 4,
    },
    "hiera": {
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "depths": [1, 1, 2],
        "num_heads": [1, 2, 4],
        "embed_dim": 16,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
        "num_query_pool": 2,
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
    },
    "maskformer-swin": _SWIN,
    "metaclip_2": {"vision_config": {"image_size": 32, "patch_size": 8}},
    "mobilevitv2": {"image_size": 128},
    "perceiver": {"num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 64, "d_latents": 64, "image_size": 16},
    "poolformer": {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "pvt": {
        "image_size": 32,
        "depths": [1, 1, 1, 1],
        "num_encoder_blocks": 4,
        "hidden_sizes": [16, 16, 32, 32],
        "num_attention_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "pvt_v2": {
        "image_size": 32,
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "sr_ratios": [4, 2],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "siglip": {"vision_config": {"image_size": 32, "patch_size": 8}},
    "siglip2": {"vision_config": {"patch_size": 8, "num_patches": 16}},
    "siglip2_vision_model": {"patch_size": 8, "num_patches": 16},
    "swin": _SWIN,
    "swinv2": _SWIN | {"pretrained_window_sizes": [0, 0]},
    "timm_wrapper": {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "depth": 2, "embed_dim": 48, "patch_size": 8},
    },
    "lw_detr_vit": {"num_windows": 4, "window_block_indices": [0]},
    "sapiens2": {"num_key_value_attention_heads": 2, "num_key_value_heads_per_layer": [2, 4]},
    # Sound.
    "audio-spectrogram-transformer": {"max_length": 32, "frequency_stride": 8, "time_stride": 8},
    "canary": {"encoder_config": _PARAKEET},
    "cohere_asr": {"encoder_config": _PARAKEET},
    "data2vec-audio": _WAV2VEC2 | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    "hubert": _WAV2VEC2 | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8},
    "dia": {
        "decoder_config": {
            "cross_hidden_size": 64,
            "cross_head_dim": 16,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 2,
        }
    },
    "granite_speech5_ctc": {
        "encoder_config": {"num_mel_bins": 16, "context_size": 8, "num_key_value_heads": 4, "subsample_layers": [1]}
    },
    "lasr_ctc": {"encoder_config": {"subsampling_conv_channels": 8, "num_mel_bins": 16}},
    "moonshine": {
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 2,
    },
    "moonshine_streaming": {
        "num_key_value_heads": 4,
        "encoder_config": {"sliding_windows": [[4, 2], [4, 0]], "num_key_value_heads": 4},
    },
    "parakeet_ctc": {"encoder_config": _PARAKEET},
    "seamless_m4t": _SEAMLESS,
    "seamless_m4t_v2": _SEAMLESS,
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    "unispeech": _WAV2VEC2 | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8, "vocab_size": 128},
    "unispeech-sat": _WAV2VEC2 | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8},
    "wav2vec2": _WAV2VEC2 | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8},
    "wav2vec2-bert": {"vocab_size": 128, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": _WAV2VEC2 | {"vocab_size": 128, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8},
    "wavlm": _WAV2VEC2 | {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8},
    "whisper": {"max_source_positions": 32},
}
"""Field values by type, or by `family/type`."""

_NO_LIBRARY = "needs a library that is not a dependency of the tests"
_TOO_LARGE = "has parts whose size no field of its configuration sets"
_SPEECH_FRONT = "a speech front on a decoder that is in the zoo by itself"
_DRAFT = "drafts from the keys and values of another model"
LEFT_OUT: Mapping[str, str] = {
    "blt": "entropy patching runs on the values of its input",
    "dinat": _NO_LIBRARY,
    "layoutlmv2": _NO_LIBRARY,
    "vibevoice": _TOO_LARGE,
    "vibevoice_asr": _TOO_LARGE,
    "gemma3n": _TOO_LARGE,
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "fun_asr_nano": _SPEECH_FRONT,
    "nemo_speechlm": _SPEECH_FRONT,
    **{
        f"encoder-decoder/{name}": _SPEECH_FRONT
        for name in words(
            """
            audioflamingo3 glmasr granite_speech granite_speech_plus moss_transcribe_diarize musicflamingo omniasr
            qwen2_audio qwen3_asr voxtral voxtral_realtime
            """
        )
    },
    **{
        f"speech/{name}": _SPEECH_FRONT
        for name in words("granite_speech granite_speech_plus omniasr qwen3_asr voxtral voxtral_realtime kyutai_speech_to_text")
    },
    "vision/perceiver": "no model of its class takes its configuration as it is",
    "shieldgemma2": "an image front on a decoder that is in the zoo by itself",
    **dict.fromkeys(
        words(
            """
            bit convnext convnextv2 dinov3_convnext efficientnet hgnet_v2 mobilenet_v1 mobilenet_v2 pp_lcnet pp_lcnet_v3
            pp_lcnet_v4 regnet rt_detr_resnet textnet uvdoc_backbone
            """
        ),
        "a convolutional network; the zoo has one, resnet",
    ),
    "timm_backbone": "the models of timm are a family of their own",
}
"""Types, or `family/type`, that are not in the zoo, with the reason."""


def changes(family: str, model_type: str) -> dict[str, Any]:
    """The fields to set for this type in this family."""
    return {**CONFIGS.get(model_type, {}), **CONFIGS.get(f"{family}/{model_type}", {})}


def left_out(name: str) -> bool:
    """True if a `family/type` is not in the zoo."""
    return name in LEFT_OUT or name.split("/", 1)[1] in LEFT_OUT


def adjust_model(model_type: str, model: nn.Module) -> nn.Module:
    """The model after the changes its type needs before the first call."""
    if model_type == "xmod":
        model.set_default_language("en_XX")
    return model
