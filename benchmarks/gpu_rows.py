"""The rows of the GPU table: models, dtypes, engines and batches, for `gpu.py`, `tools.first_hour` and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import nn

BATCHES = (1, 8, 64)
SEQUENCE = 128
"""Tokens of a text. An image has its own number."""
VOCABULARY = 30_000
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        make: builds it, given the sizes.
        sizes: layers, width, heads and the rest, as `make` names them.
        sequence: tokens of an input; None for images.
    """

    make: Callable[..., nn.Module]
    sizes: Mapping[str, int]
    sequence: int | None = SEQUENCE

    def build(self, **sizes: int) -> nn.Module:
        """The model in float32 on the CPU, with some sizes replaced."""
        torch.manual_seed(0)
        return self.make(**{**self.sizes, **sizes}).eval()

    def inputs(self, batch: int, sequence: int | None = None, *, image: int = 224) -> Inputs:
        """Random tokens or images on the CPU, equal at every call."""
        drawn = torch.Generator().manual_seed(batch)
        if self.sequence is None:
            return {"pixel_values": torch.randn(batch, 3, image, image, generator=drawn)}
        ids = torch.randint(0, VOCABULARY, (batch, sequence or self.sequence), generator=drawn)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _bert(layers: int, width: int, heads: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return transformers.BertModel(config)


def _vit(layers: int, width: int, heads: int, image: int = 224) -> nn.Module:
    config = transformers.ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def _llama(layers: int, width: int, heads: int, key_heads: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=4 * width,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


SHAPES = {
    "bert-base": Shape(_bert, {"layers": 12, "width": 768, "heads": 12}),
    "bert-large": Shape(_bert, {"layers": 24, "width": 1024, "heads": 16}),
    "vit-b16": Shape(_vit, {"layers": 12, "width": 768, "heads": 12}, sequence=None),
    "llama-1b": Shape(_llama, {"layers": 16, "width": 2048, "heads": 32, "key_heads": 8}),
}
"""`llama-1b` has the shape of Llama 3.2 1B, 1.1 billion parameters with this vocabulary; it runs a prefill."""
TINY = {name: {"layers": 1, "width": 128, "heads": 4} for name in SHAPES}
TINY["llama-1b"]["key_heads"] = 2
TINY["vit-b16"]["image"] = 32
"""Sizes that replace those of `SHAPES` on the pretended GPU."""
SCHEMES = {"int8": "int8-dynamic", "fp8": "fp8", "int4": "int4-weight"}
"""Quantization by short name."""
BACKENDS = {"": "eager", "-inductor": "inductor"}
TITLES = {
    "eager": "PyTorch",
    "torch.compile": "torch.compile, max-autotune",
    "lissom": "Lissom, CUDA graphs",
    "lissom-inductor": "Lissom, inductor",
    **{f"lissom-{scheme}": f"Lissom, {scheme}, CUDA graphs" for scheme in SCHEMES},
    **{f"lissom-{scheme}-inductor": f"Lissom, {scheme}, inductor" for scheme in SCHEMES},
}
"""Engines and their names in tables."""
DTYPES = ("bfloat16", "float16", "float32")


def scheme_of(engine: str) -> str | None:
    """The short name of the quantization of an engine; None if it has none."""
    return next((scheme for scheme in SCHEMES if scheme in engine.split("-")), None)


def is_measured(dtype: str, engine: str) -> bool:
    """False where the table leaves an engine out: quantized layers in float32, and int4 outside bfloat16, which it needs."""
    scheme = scheme_of(engine)
    return scheme is None or dtype == "bfloat16" or (dtype == "float16" and scheme != "int4")


@dataclass(frozen=True)
class Row:
    """A model in a dtype on an engine, at all `BATCHES`."""

    model: str
    dtype: str
    engine: str

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} {self.engine}"


_LATER = ("torch.compile", *(engine for engine in TITLES if engine.endswith("-inductor")))
"""Engines that take minutes to compile."""
ROWS = sorted(
    (Row(model, dtype, engine) for model in SHAPES for dtype in DTYPES for engine in TITLES if is_measured(dtype, engine)),
    key=lambda row: (
        row.engine in _LATER and row.engine != "torch.compile",
        row.dtype != "bfloat16",
        row.engine in _LATER,
        row.dtype != "float16",
    ),
)
"""All rows, the most telling first, so that a run that is cut short has them."""
