"""Example inputs for a transformers model, chosen by the parameters of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tools.zoo.entry import words

BATCH, TOKENS, SAMPLES, FRAMES, BINS = 2, 12, 1600, 64, 16
_END = 2

Inputs = dict[str, Any]


def example_inputs(family: str, model_type: str, model: nn.Module, config: PreTrainedConfig) -> Inputs:
    """Example inputs of two rows; the second ends in padding. Decoders get `use_cache=False`."""
    takes = set(inspect.signature(model.forward).parameters)
    special = SPECIAL.get(f"{family}/{model_type}") or SPECIAL.get(model_type)
    inputs = special(config, takes) if special else _usual(model, config, takes)
    if config.is_encoder_decoder and "decoder_input_ids" in takes and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = tokens(config, seed=1)
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


def _usual(model: nn.Module, config: PreTrainedConfig, takes: set[str]) -> Inputs:
    usual = ("input_ids", "pixel_values", "input_features", "input_values")
    named = getattr(model, "main_input_name", None)
    main = named if named in usual and named in takes else next((name for name in usual if name in takes), "input_ids")
    return {"input_ids": text, "pixel_values": image, "input_features": spectrogram, "input_values": sound}[main](config, takes)


def text(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Tokens and their mask."""
    ids, mask = tokens(config), torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, -4:] = 0
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    ids[1, -4:] = pad if isinstance(pad, int) and pad >= 0 else ids[1, -4:]
    return {"input_ids": ids} | ({"attention_mask": mask} if "attention_mask" in takes else {})


def tokens(config: PreTrainedConfig, seed: int = 0) -> torch.Tensor:
    """Random token ids that avoid the special tokens, which are at both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    size = getattr(config.get_text_config(), "vocab_size", 128)
    return torch.randint(10, max(20, min(size, 128) - 28), (BATCH, TOKENS), generator=generator)


def image(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Images of the configured size."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]
    size = next((part.image_size for part in parts if getattr(part, "image_size", None)), 64)
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)
    return {"pixel_values": normal(BATCH, channels, height, width)}


def spectrogram(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Mel bins by frames."""
    return {"input_features": normal(BATCH, getattr(config, "num_mel_bins", BINS), FRAMES)}


def sound(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Samples of sound."""
    return {"input_values": normal(BATCH, SAMPLES)}


def normal(*shape: int) -> torch.Tensor:
    """Normally distributed numbers, equal at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _frames(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Frames by mel bins."""
    return {"input_features": normal(BATCH, FRAMES, BINS)}


def _ends(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Text with one end-of-sentence token per row, at the same position, which the classifier looks for."""
    inputs = text(config, takes)
    inputs["input_ids"][:, -1] = config.eos_token_id if isinstance(config.eos_token_id, int) else _END
    return inputs


def _boxes(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Text with the bounding box of every token on its page."""
    corners = torch.randint(0, 50, (BATCH, TOKENS, 2), generator=torch.Generator().manual_seed(2))
    return text(config, takes) | {"bbox": torch.cat([corners, corners + 7], -1)}


def _wave(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    return {"input_values": normal(BATCH, 1, SAMPLES)}


def _codebooks(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Audio codes: the codebooks of a row are consecutive in the batch."""
    books = config.num_codebooks
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(10, 100, (BATCH * books, TOKENS), generator=generator)}


def _patches(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    """Images split into patches, with their mask and shapes."""
    vision = getattr(config, "vision_config", config)
    inputs = {
        "pixel_values": normal(BATCH, 16, 3 * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    return {name: value for name, value in inputs.items() if name in takes}


def _video(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    return {"pixel_values": normal(BATCH, config.num_frames, 3, config.image_size, config.image_size)}


def _series(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    return {"past_values": normal(BATCH, config.context_length, config.num_input_channels)}


def _perceiver(config: PreTrainedConfig, takes: set[str]) -> Inputs:
    inputs = text(config, {"attention_mask"})
    return {"inputs": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


_FRAMES = words(
    """
    seamless_m4t seamless_m4t_v2 lasr_ctc parakeet_ctc canary cohere_asr speech_to_text wav2vec2-bert lasr_encoder
    parakeet_encoder
    """
)
SPECIAL: Mapping[str, Callable[[PreTrainedConfig, set[str]], Inputs]] = {
    **{name: _frames for name in _FRAMES},
    **dict.fromkeys(words("bart bigbird_pegasus mbart mt5 mvp plbart t5 umt5"), _ends),
    **dict.fromkeys(words("layoutlm layoutlmv3 lilt bros"), _boxes),
    **dict.fromkeys(words("musicgen musicgen_melody"), _codebooks),
    **dict.fromkeys(words("siglip2 siglip2_vision_model"), _patches),
    **dict.fromkeys(words("videomae vivit timesformer"), _video),
    **dict.fromkeys(words("patchtst patchtsmixer"), _series),
    "audio-spectrogram-transformer": lambda config, takes: {
        "input_values": normal(BATCH, config.max_length, config.num_mel_bins)
    },
    "vit_mae": lambda config, takes: (
        image(config, takes) | {"noise": normal(BATCH, (config.image_size // config.patch_size) ** 2)}
    ),
    "timm_wrapper": lambda config, takes: {"pixel_values": normal(BATCH, 3, 32, 32)},
    "encoder-decoder/seamless_m4t": text,
    "encoder-decoder/seamless_m4t_v2": text,
    "dia": lambda config, takes: text(config, takes) | {"decoder_input_ids": torch.randint(10, 100, (BATCH, TOKENS, 9))},
    "granite_speech5_ctc": lambda config, takes: {"input_features": normal(BATCH, FRAMES, 4 * BINS)},
    "omniasr_ctc": _wave,
    "speech-encoder-decoder": sound,
    "perceiver": _perceiver,
}
"""Types whose inputs do not follow from the parameters of their forward."""
