"""Example inputs for a transformers model: from its tokenizer, its feature extractor, or its configuration.

Candidates follow from the model's `main_input_name` and the parameters of its forward. The model is called with each, and the
first inputs it runs on are used.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lissom.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SENTENCES = (
    "A compiler rewrites a program without changing what it means.",
    "The lake lies still this morning.",
)

_ROWS, _TOKENS, _SAMPLES, _FRAMES = 2, 12, 16000, 128
_SIDE = 4
"""The rows and columns of a picture that is given as patches."""
_CACHES = {"cache", "past_key_values", "cache_params", "state"}
"""The names of the output that holds the KV cache, in different versions of transformers."""

Inputs = dict[str, object]


def make_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> tuple[Inputs, str]:
    """Two rows of inputs on the model's device, and a sentence on how they were made. Decoders get `use_cache=False`.

    Raises:
        UnsupportedError: if the model's inputs are of an unknown kind, or it runs on none of the candidates.
    """
    takes = set(inspect.signature(model.forward).parameters)
    first: Exception | None = None
    for inputs, note in _candidates(model, takes, tokenizer, directory):
        completed = _completed(model, takes, {name: value for name, value in inputs.items() if name in takes})
        completed = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in completed.items()
        }
        asked = {"use_cache": True} if "use_cache" in takes else {}
        try:
            with torch.no_grad():
                outputs = model(**completed, **asked)
        # The model's own code may raise anything for wrong inputs; the first error is reported if no candidate works.
        except Exception as error:
            first = first or error
            continue
        # Encoders have the parameter too, because they can be configured as decoders, but return no cache.
        keeps = isinstance(outputs, Mapping) and not _CACHES.isdisjoint(outputs)
        return completed | ({"use_cache": False} if asked and keeps else {}), note
    reason = f"runs on none of those tried: {first}" if first else f"takes '{model.main_input_name}', of which none are known"
    raise UnsupportedError(
        f"no example inputs can be made for {type(model).__name__}: it {reason}; call lissom.compile with inputs of your own"
    ) from first


def encode(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], length: int | None = None) -> dict[str, torch.Tensor]:
    """Token ids and masks of the sentences: padded to the longest, or truncated and padded to `length` tokens."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    padding = True if length is None else "max_length"
    encoded = tokenizer(list(sentences), padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return dict(encoded)


def _candidates(
    model: PreTrainedModel, takes: set[str], tokenizer: PreTrainedTokenizerBase | None, directory: Path
) -> Iterator[tuple[Inputs, str]]:
    """The candidates, the likeliest first."""
    config, main = model.config, _main(model)
    if main == "input_ids" or (main not in _MAKERS and "input_ids" in takes):
        pictures: list[Inputs] = list(_pictures(config, directory)) if "pixel_values" in takes else []
        for text, note in _texts(model, tokenizer):
            yield from ((text | picture, f"{note}; pictures of random pixels") for picture in pictures)
            yield text, note
    elif main in _MAKERS:
        if main in ("input_features", "input_values") and (directory / "preprocessor_config.json").is_file():
            yield from _audio(directory)
        what, make = _MAKERS[main]
        for inputs in make(config, directory):
            value = inputs[main]
            assert isinstance(value, torch.Tensor)
            sizes = " x ".join(map(str, value.shape))
            note = f"example inputs: random {what}, {sizes}, from the configuration"
            yield inputs, note
            if "input_ids" in takes:
                yield from ((inputs | text, f"{note}; {made}") for text, made in _texts(model, tokenizer))


def _main(model: PreTrainedModel) -> str:
    """The name of the model's main input; where it is a name for any, that of its encoder."""
    named = model.main_input_name
    return model.get_encoder().main_input_name if named == "inputs" and model.config.is_encoder_decoder else named


def _completed(model: PreTrainedModel, takes: set[str], inputs: Inputs) -> Inputs:
    """The inputs with those of an encoder-decoder model's decoder, and `use_cache=False` if its configuration sets True."""
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        start = getattr(model.config, "decoder_start_token_id", None)
        ids = inputs.get("input_ids")
        shifted = (ids if isinstance(ids, torch.Tensor) else _random_tokens(model.config)).roll(1, 1)
        shifted[:, 0] = start if isinstance(start, int) else 0
        inputs = inputs | {"decoder_input_ids": shifted}
    for config in (model.config, model.config.get_text_config()):
        # Some forwards pass this on to their decoder through **kwargs.
        if "use_cache" not in takes and getattr(config, "use_cache", False):
            config.use_cache = False
    return inputs


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[Inputs, str]]:
    """Sentences by the tokenizer, and token ids from the configuration."""
    if tokenizer is not None:
        if model.can_generate() and not model.config.is_encoder_decoder:
            # A decoder continues from the last position, which must not be padding.
            tokenizer.padding_side = "left"
        side = tokenizer.padding_side
        yield dict(encode(tokenizer, SENTENCES)), f"example inputs: {len(SENTENCES)} sentences by its tokenizer, padded {side}"
    ids = _random_tokens(model.config)
    note = "the tokenizer's ids do not fit the model" if tokenizer is not None else "there is no tokenizer beside the model"
    sizes = f"{_ROWS} x {ids.shape[1]}"
    inputs: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield inputs, f"example inputs: {sizes} random token ids from the configuration, because {note}"


def _random_tokens(config: PreTrainedConfig) -> torch.Tensor:
    """Token ids from the middle of the vocabulary: special tokens are at its ends."""
    text = config.get_text_config()
    size = int(getattr(text, "vocab_size", 0) or 128)
    longest = getattr(text, "max_position_embeddings", None)
    tokens = min(_TOKENS, longest) if isinstance(longest, int) and longest > 2 else _TOKENS
    lowest, highest = (size // 4, size - size // 4) if size > 4 else (0, size)
    return torch.randint(lowest, highest, (_ROWS, tokens), generator=torch.Generator().manual_seed(0))


def _pictures(config: PreTrainedConfig, directory: Path) -> Iterator[Inputs]:
    """Pictures with the size and channels of the configuration or the image processor; videos if it has `num_frames`."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config", "encoder"))]
    channels = next((count for part in parts if isinstance(count := getattr(part, "num_channels", None), int)), 3)
    size = next((sizes for part in parts if (sizes := two_sizes(getattr(part, "image_size", None)))), None)
    size = size or _processor_size(directory) or (224, 224)
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):
        yield {"pixel_values": _normal(_ROWS, frames, channels, *size)}
    yield {"pixel_values": _normal(_ROWS, channels, *size)}


def _processor_size(directory: Path) -> tuple[int, int] | None:
    file = directory / "preprocessor_config.json"
    if not file.is_file():
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    return two_sizes(fields.get("crop_size")) or two_sizes(fields.get("size"))


def two_sizes(size: object) -> tuple[int, int] | None:
    """Height and width from a number, a pair or a mapping; None for anything else."""
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        return two_sizes(size.get("shortest_edge"))
    return None


def _audio(directory: Path) -> Iterator[tuple[Inputs, str]]:
    """A second of noise through the model's own feature extractor, if it can be loaded."""
    import transformers

    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        rate = int(extractor.sampling_rate)
        sounds = [wave.numpy() for wave in _normal(_ROWS, rate)]
        inputs = dict(extractor(sounds, sampling_rate=rate, return_tensors="pt"))
        yield inputs, f"example inputs: {_ROWS} seconds of noise by its feature extractor"
    except (OSError, ValueError, ImportError, AttributeError, TypeError):
        return


def _spectrograms(config: PreTrainedConfig, directory: Path) -> Iterator[Inputs]:
    """Spectrograms [rows, mel bins, frames] and [rows, frames, mel bins]."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size")
    parts = [config, *(getattr(config, name, None) for name in ("encoder_config", "audio_config", "encoder"))]
    sizes = [getattr(part, name, None) for part in parts for name in names]
    bins = next((size for size in sizes if isinstance(size, int)), 80)
    positions = getattr(config, "max_source_positions", None)
    # Whisper's encoder has a position for every two frames, and requires exactly that many frames.
    yield {"input_features": _normal(_ROWS, bins, 2 * positions if isinstance(positions, int) else _FRAMES)}
    yield {"input_features": _normal(_ROWS, _FRAMES, bins)}


def _sounds(config: PreTrainedConfig, directory: Path) -> Iterator[Inputs]:
    """Spectrograms if the configuration gives their size; then a second of samples, without and with a channel."""
    length, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    if isinstance(length, int) and isinstance(bins, int):
        yield {"input_values": _normal(_ROWS, length, bins)}
    yield {"input_values": _normal(_ROWS, _SAMPLES)}
    yield {"input_values": _normal(_ROWS, 1, _SAMPLES)}


def _patches(config: PreTrainedConfig, directory: Path) -> Iterator[Inputs]:
    """Patches of pictures, [rows, patches, 2 + width]: each begins with its row and column in the picture, counted from 1."""
    vision = getattr(config, "vision_config", config)
    patches = _normal(_ROWS, _SIDE**2, 2 + int(vision.patch_embed_hidden_size))
    patches[..., :2] = torch.cartesian_prod(torch.arange(_SIDE), torch.arange(_SIDE)) + 1
    yield {"flattened_patches": patches}


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_MAKERS = {
    "pixel_values": ("pictures", _pictures),
    "input_features": ("spectrograms", _spectrograms),
    "input_values": ("sound", _sounds),
    "flattened_patches": ("patches of pictures", _patches),
}
"""By main input of models that do not read text: its name for notes, and its candidates."""
