"""Vision and audio transformers of one or two layers with random weights, whose convolutions and matrices become cheaper."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.support.models import VOCABULARY, Case, normal, seeded, tokens

_AUDIO: dict[str, object] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


class Stem(nn.Module):
    """A convolutional stem such as Whisper's: channels are mixed over three places, then again over every second."""

    def __init__(self, channels: int = 6, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.gelu(self.first(x)))


def stem() -> nn.Module:
    return seeded(Stem)


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that change slowly along the last dimension, and with it more slowly along those before it."""
    found = normal(*shape, seed=seed)
    for dim in range(2, len(shape)):
        found = found.cumsum(dim) * 0.3
    return found - found.mean(tuple(range(2, len(shape))), keepdim=True)


def tiny_vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
    )
    return Case(seeded(lambda: transformers.ViTModel(config)), {"pixel_values": smooth(2, 3, 16, 16)})


def tiny_segformer() -> Case:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    return Case(seeded(lambda: transformers.SegformerModel(config)), {"pixel_values": smooth(2, 3, 32, 32)})


def tiny_wav2vec2() -> Case:
    config = transformers.Wav2Vec2Config(**_AUDIO)
    return Case(seeded(lambda: transformers.Wav2Vec2Model(config)), {"input_values": smooth(2, 1, 400)[:, 0]})


def tiny_conformer() -> Case:
    config = transformers.Wav2Vec2ConformerConfig(**_AUDIO, conv_depthwise_kernel_size=3)
    return Case(seeded(lambda: transformers.Wav2Vec2ConformerModel(config)), {"input_values": smooth(2, 1, 400)[:, 0]})


def tiny_whisper() -> Case:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        pad_token_id=0, decoder_start_token_id=1, vocab_size=VOCABULARY, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = seeded(lambda: transformers.WhisperModel(config))
    return Case(model, {"input_features": smooth(2, 8, 20), "decoder_input_ids": tokens()})


def tiny_convbert() -> Case:
    config = transformers.ConvBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return Case(seeded(lambda: transformers.ConvBertModel(config)), {"input_ids": tokens()})
