"""The techniques of the survey as pipelines for three models: the rows of docs/tradeoffs.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantization import MIXED

MODELS: Mapping[str, str] = {
    "minilm": "all-MiniLM-L6-v2",
    "gemma3-270m": "Gemma 3 270M, decode",
    "vit": "ViT-S/16, random weights",
}
RANKS = "ranks"
"""Stands for the passes of a program on two ranks, which is measured in processes of its own."""
TEXTS = "texts"
"""What calibration data are for the encoder and the decoder; for the vision transformer they are pictures."""


@dataclass(frozen=True)
class Row:
    """One technique on one model.

    saved: fraction of the bytes of the weights, and of the KV cache of a decoder. faster: the speed-up. kept: fraction of the
    quality. quality: the same in the terms of the model. seconds: of the compile. failed: why there is no result.
    milliseconds: of a call. embeddings: the fraction of the bytes of weights that are embedding tables.
    """

    model: str
    technique: str
    passes: str
    machine: str
    saved: float = 0.0
    faster: float = 1.0
    kept: float = 1.0
    quality: str = ""
    seconds: float = 0.0
    failed: str = ""
    milliseconds: float = 0.0
    embeddings: float = 0.0


@dataclass(frozen=True)
class Technique:
    """A row of the page.

    section: of the survey. survey: its name in the survey's own table, empty where that has no row for it.
    minilm, gemma, vit: the passes; empty where the technique does not apply.
    data: needs inputs to calibrate or train on. training: trains weights. No row needs labels.
    hardware: what it needs to be faster; empty for any processor. without: why it has no passes for some model.
    """

    name: str
    section: str
    survey: str = ""
    minilm: str = ""
    gemma: str = ""
    vit: str = ""
    data: bool = False
    training: bool = False
    hardware: str = ""
    without: str = ""

    def passes(self, model: str) -> str:
        """The pipeline for a model; empty where there is none."""
        return {"minilm": self.minilm, "gemma3-270m": self.gemma, "vit": self.vit}[model]

    def needs(self, model: str) -> str:
        """Data, training and hardware, in words."""
        data = "pictures" if model == "vit" else TEXTS
        wanted = [*([data] if self.data else []), *(["training"] if self.training else [])]
        return "; ".join([", ".join(wanted) or "nothing", *([f"faster with {self.hardware}"] if self.hardware else [])])

    def options(self, model: str) -> int:
        """The number of options that are set, in the pipeline or, for ranks, in the call."""
        passes = self.passes(model)
        return 1 if passes == RANKS else len(re.findall(r"\w=", passes))

    @property
    def lines(self) -> int:
        """Lines that a user writes: the call, the data it calibrates or trains on, and a command that starts ranks."""
        return 1 + self.data + (self.minilm == RANKS)


_INT8 = "quantize{scheme=int8-dynamic}"
_PRUNING, _QUANTIZATION, _DISTILLATION = "Pruning", "Quantization", "Distillation"
_HEADS_NEURONS = "prune-heads{keep=0.75},prune-neurons{keep=0.5}"
_BLOCKS = "sparsify{pattern=block,keep=0.4,criterion=sparsegpt}"
_CHEAP_PRUNING = "prune-heads{keep=0.75,criterion=wanda},prune-neurons{keep=0.75,criterion=wanda}"
_INT8_CPU = "AVX-512 VNNI or AMX"
_SPARSE_GPU = "2:4 sparse tensor cores"
_BF16 = "AVX-512 BF16, AMX or a GPU"

TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        "attention heads",
        "1.1 Pruning",
        _PRUNING,
        "prune-heads{keep=0.75}",
        "prune-heads{keep=0.75,criterion=wanda}",
        "prune-heads{keep=0.75,criterion=wanda}",
        data=True,
    ),
    Technique(
        "feed-forward neurons",
        "1.1 Pruning",
        _PRUNING,
        "prune-neurons{keep=0.5}",
        "prune-neurons{keep=0.75,criterion=wanda}",
        "prune-neurons{keep=0.75,criterion=wanda}",
        data=True,
    ),
    Technique(
        "layers",
        "1.1 Pruning",
        _PRUNING,
        "prune-layers{keep=0.85}",
        "prune-layers{keep=0.95}",
        "prune-layers{keep=0.75}",
        data=True,
    ),
    Technique(
        "width",
        "1.1 Pruning",
        _PRUNING,
        "prune-hidden{keep=0.9}",
        vit="prune-hidden{keep=0.9,criterion=magnitude,reconstruct=false}",
        data=True,
        without="takes minutes on a decoder of this size",
    ),
    Technique(
        "width, in principal components",
        "1.1 Pruning",
        _PRUNING,
        gemma="rotate{where=residual,basis=pca},prune-hidden{keep=0.75}",
        vit="rotate{where=residual,basis=pca},prune-hidden{keep=0.75}",
        data=True,
        without="norms after its residual adds forbid the rotation",
    ),
    Technique(
        "single weights, smaller on disk alone",
        "1.1 Pruning",
        _PRUNING,
        "sparsify{keep=0.5,criterion=sparsegpt}",
        "sparsify{keep=0.5,criterion=wanda}",
        "sparsify{keep=0.5,criterion=wanda}",
        data=True,
    ),
    Technique(
        "2:4 weights",
        "1.1 Pruning",
        _PRUNING,
        "sparsify{pattern=2:4,criterion=sparsegpt}",
        "sparsify{pattern=2:4,criterion=wanda}",
        "sparsify{pattern=2:4,criterion=wanda}",
        data=True,
        hardware=_SPARSE_GPU,
    ),
    Technique(
        "blocks of weights",
        "1.1 Pruning",
        _PRUNING,
        _BLOCKS,
        vit="sparsify{pattern=block,keep=0.4,criterion=wanda}",
        data=True,
        without="what single weights and 2:4 lose on this decoder is more than anyone takes",
    ),
    Technique("int8, dynamic", "1.2 Quantization", _QUANTIZATION, _INT8, _INT8, _INT8, hardware=_INT8_CPU),
    Technique(
        "int8, static",
        "1.2 Quantization",
        _QUANTIZATION,
        "smooth-quant,quantize{scheme=int8-static}",
        "smooth-quant,quantize{scheme=int8-static}",
        "smooth-quant,quantize{scheme=int8-static}",
        data=True,
        hardware=_INT8_CPU,
    ),
    Technique(
        "int8 weights, tables too",
        "1.2 Quantization",
        _QUANTIZATION,
        "quantize{scheme=int8-weight,embeddings=true}",
        "quantize{scheme=int8-weight,granularity=group,embeddings=true}",
        "quantize{scheme=int8-weight}",
    ),
    Technique(
        "int4 weights, GPTQ",
        "1.2 Quantization",
        _QUANTIZATION,
        "quantize{scheme=int4-weight},gptq",
        "quantize{scheme=int4-weight},gptq{tables=false}",
        "quantize{scheme=int4-weight},gptq",
        data=True,
    ),
    Technique(
        "nvfp4 weights, GPTQ",
        "1.2 Quantization",
        _QUANTIZATION,
        "quantize{scheme=nvfp4-weight},gptq",
        "quantize{scheme=nvfp4-weight},gptq{tables=false}",
        "quantize{scheme=nvfp4-weight},gptq",
        data=True,
    ),
    Technique(
        "the file's own 4 to 8 bits",
        "1.2 Quantization",
        _QUANTIZATION,
        gemma="use-stored-weights",
        without="its weights come in floating point",
    ),
    Technique("int8 KV cache", "1.2 Quantization", gemma="quantize-cache", without="it keeps no cache", hardware="long texts"),
    Technique(
        "int4 KV cache, rotated keys",
        "1.2 Quantization",
        gemma="rotate,quantize-cache{bits=4}",
        without="it keeps no cache",
        data=True,
        hardware="long texts",
    ),
    Technique(
        "a student of fewer layers",
        "1.3 Distillation",
        _DISTILLATION,
        "prune-layers{keep=0.5},distill{minutes=0.75}",
        "prune-layers{keep=0.9},distill{minutes=0.75}",
        "prune-layers{keep=0.5},distill{minutes=0.25}",
        data=True,
        training=True,
    ),
    Technique(
        "window",
        "2.1 Sparse attention",
        "",
        "sparsify-attention{window=32}",
        "sparsify-attention{window=64}",
        "sparsify-attention{window=64}",
        hardware="inputs of a thousand tokens or more",
    ),
    Technique(
        "shared key/value heads",
        "2.1 Sparse attention",
        "",
        "pool-heads{groups=6},merge-equal-heads",
        vit="pool-heads{groups=3},merge-equal-heads",
        data=True,
        without="its heads share keys and values already",
    ),
    Technique(
        "low rank",
        "2.2 Lightweight layers",
        "",
        "low-rank{budget=0.75}",
        "low-rank{budget=0.75}",
        "low-rank{budget=0.75}",
        data=True,
    ),
    Technique(
        "linear attention",
        "2.2 Lightweight layers",
        "",
        'linear-attention{only="encoder.layer.5"}',
        vit='linear-attention{only="blocks.11"}',
        data=True,
        hardware="inputs of a thousand tokens or more",
        without="the pass takes no attention over a KV cache",
    ),
    Technique(
        "layers that share weights",
        "2.2 Lightweight layers",
        "",
        "share-layers{every=2}",
        "share-layers{every=2}",
        "share-layers{every=2}",
    ),
    Technique("two ranks", "3.1 Tensor parallelism", "", RANKS, RANKS, RANKS, hardware="a core or a device for each rank"),
    Technique("bfloat16", "3.2 Mixed precision", "", *["cast{dtype=bf16}"] * 3, hardware=_BF16),
    Technique("float16", "3.2 Mixed precision", "", *["cast{dtype=fp16}"] * 3, data=True, hardware="a GPU"),
    Technique(
        "bfloat16 and int8",
        "4 Hybrid",
        "",
        "cast{dtype=bf16},quantize{embeddings=true}",
        "cast{dtype=bf16},quantize{scheme=int8-weight,granularity=group,embeddings=true}",
        f"cast{{dtype=bf16}},{_INT8}",
        hardware=_INT8_CPU,
    ),
    Technique(
        "pruned and int8",
        "4 Hybrid",
        "",
        f"{_HEADS_NEURONS},quantize{{embeddings=true}}",
        f"{_CHEAP_PRUNING},quantize{{scheme=int8-weight,granularity=group,embeddings=true}}",
        f"{_CHEAP_PRUNING},{_INT8}",
        data=True,
        hardware=_INT8_CPU,
    ),
    Technique(
        "blocks of weights and int8",
        "4 Hybrid",
        "",
        f"{_BLOCKS},quantize{{embeddings=true}}",
        data=True,
        hardware=_INT8_CPU,
        without="measured where it has a task",
    ),
    Technique(
        "pruned, distilled and int8",
        "4 Hybrid",
        "",
        "prune-layers{keep=0.5},distill{minutes=0.75},quantize{embeddings=true}",
        data=True,
        training=True,
        hardware=_INT8_CPU,
        without="measured where it has a task and trains fast enough",
    ),
    Technique(
        "int8 table, int4 layers",
        "4 Hybrid",
        "",
        gemma=MIXED,
        data=True,
        without="the recipe is for decoders",
    ),
    *(
        Technique(f"recipe {name}", "Recipes", "", name, name, name, hardware=_INT8_CPU)
        for name in ("fast", "balanced", "small")
    ),
)
"""All rows, in the order of the survey."""
