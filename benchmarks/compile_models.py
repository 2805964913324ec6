"""The models of compile_time.py, of known shapes with random weights: in memory, or as checkpoints in a folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lissom
from lissom.generation.model import GenerationModel

PASSES = {
    "exact": "exact",
    "int8": "quantize{scheme=int8-dynamic}",
    "int4": "quantize{scheme=int4-weight}",
    "int4-gptq": "quantize{scheme=int4-weight},gptq",
}
_SHARD = 1 << 30
"""The largest size of a shard in bytes, unless it holds a single weight."""
_CAPACITY = 512
"""Tokens of the KV cache of a decoder; Whisper takes 448 at most."""
_INDEX = "model.safetensors.index.json"

Inputs = dict[str, torch.Tensor]
Compiled = lissom.CompiledModel | GenerationModel


def texts(rows: int, tokens: int) -> Inputs:
    """Random token ids of the vocabularies of all models, without padding."""
    ids = torch.randint(1000, 30000, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _prompts(rows: int, tokens: int) -> Inputs:
    return {"input_ids": texts(rows, tokens)["input_ids"]}


def _pictures(rows: int, _: int) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 224, 224)}


def _recordings(rows: int, tokens: int) -> Inputs:
    """Spectrograms of 30 seconds, with the token ids of their transcripts."""
    return {"input_features": torch.randn(rows, 80, 3000), "decoder_input_ids": texts(rows, tokens)["input_ids"]}


@dataclass(frozen=True)
class Model:
    """A model that is built in memory, in float32.

    Attributes:
        inputs: example inputs for a number of rows and tokens.
        max_length: capacity of the KV cache it is compiled with; None for an encoder.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs] = texts
    max_length: int | None = None


def _minilm() -> nn.Module:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False)


def _whisper_tiny() -> nn.Module:
    config = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
    )
    return WhisperForConditionalGeneration(config)


def _qwen3() -> nn.Module:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


_TRIALS = ("BERT-tiny", "Llama-tiny")
"""Shapes on which to try these benchmarks, not in the table."""
_BUILT = {
    "BERT-tiny": Model(lambda: BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, intermediate_size=48))),
    "MiniLM": Model(_minilm),
    "BERT-base": Model(lambda: BertModel(BertConfig(), add_pooling_layer=False)),
    "ModernBERT-base": Model(lambda: ModernBertModel(ModernBertConfig())),
    "ViT-B/16": Model(lambda: ViTModel(ViTConfig()), _pictures),
    "Whisper-tiny": Model(_whisper_tiny, _recordings, max_length=448),
    "Qwen3-0.6B": Model(_qwen3, _prompts, max_length=_CAPACITY),
}


def _llama(
    layers: int, width: int, heads: int, inner: int, head_dim: int, *, tied: bool, vocabulary: int = 128256
) -> LlamaConfig:
    """The configuration of a Llama 3 of this size.

    Args:
        width: of the hidden states.
        inner: width of the feed-forward layers.
        tied: the LM head is the embedding table.
    """
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=inner,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


_STORED = {
    "Llama-1B": _llama(16, 2048, 32, 8192, 64, tied=True),
    "Llama-3B": _llama(28, 3072, 24, 8192, 128, tied=True),
    "Llama-8B": _llama(32, 4096, 32, 14336, 128, tied=False),
    "Llama-tiny": _llama(2, 64, 8, 128, 8, tied=False, vocabulary=30000),
}
ALL_MODELS = (*_BUILT, *_STORED)
MODELS = tuple(name for name in ALL_MODELS if name not in _TRIALS)
ENCODERS = tuple(name for name, model in _BUILT.items() if model.max_length is None)


def generates(name: str) -> bool:
    """True for a model that is compiled with its KV cache."""
    return name not in ENCODERS


def example_inputs(name: str) -> Inputs:
    """16 tokens, a picture, or a recording: two rows of them for an encoder, one for a decoder."""
    return _inputs(name)(1 if generates(name) else 2, 16)


def calibration(name: str) -> list[Inputs]:
    """16 rows of 64 random token ids, or as many pictures or recordings, one a batch."""
    return [_inputs(name)(1, 64) for _ in range(16)]


def _inputs(name: str) -> Callable[[int, int], Inputs]:
    return _prompts if name in _STORED else _BUILT[name].inputs


def build(name: str) -> nn.Module:
    """A model in memory."""
    return _BUILT[name].build().eval()


def compile_model(name: str, model: nn.Module | Path, passes: str) -> Compiled:
    """Compile a model, or a checkpoint's folder, with these of `PASSES`."""
    data = calibration(name) if "gptq" in PASSES[passes] else ()
    if generates(name):
        max_length = (None if name in _STORED else _BUILT[name].max_length) or _CAPACITY
        return lissom.compile_generation(model, max_length=max_length, passes=PASSES[passes], data=data)
    assert isinstance(model, nn.Module)
    return lissom.compile(model, example_inputs(name), passes=PASSES[passes], data=data)


def weight_bytes(model: nn.Module | Path) -> int:
    """The bytes of the weights of a model, or of a checkpoint's folder."""
    if isinstance(model, Path):
        return json.loads((model / _INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"]
    return sum(weight.nbytes for weight in model.parameters())


@contextmanager
def checkpoint(name: str, keep: Path | None) -> Generator[Path | None]:
    """The folder of a model that is compiled from a checkpoint, deleted at the end of the block; None for other models.

    Args:
        keep: write to a folder in this one, unless it is there, and leave it there.
    """
    if name not in _STORED:
        yield None
    elif keep is not None:
        folder = keep / name
        if not (folder / _INDEX).exists():
            write_checkpoint(_STORED[name], folder)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="compile_time-") as folder:
            write_checkpoint(_STORED[name], Path(folder))
            yield Path(folder)


def write_checkpoint(config: LlamaConfig, folder: Path) -> None:
    """Write random weights in bfloat16 in shards of about 1 GB, with one shard in memory at a time, and last their index."""
    torch.manual_seed(0)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).bfloat16().state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    config.save_pretrained(folder)
    files: dict[str, str] = {}
    shards = _shards(weights)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(weights[name]) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    # What is measured next would wait for the disk.
    os.sync()


def _shards(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names of the weights of each shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    return shards


def _random(weight: torch.Tensor) -> torch.Tensor:
    """Values for a weight on meta: ones for a norm, small random ones for a matrix."""
    values = torch.empty(weight.shape, dtype=weight.dtype)
    return values.fill_(1) if weight.dim() == 1 else values.normal_(std=0.02)
