"""Writes an optimized decoder as a GGUF file, the format of llama.cpp.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written by the package gguf. What each family
needs is in llama.cpp's own converters, https://github.com/ggml-org/llama.cpp, conversion/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from lissom.artifacts.pruned_tokenizer import renumbered_config
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.export.checkpoint import kept_layers
from lissom.export.gguf.families import INTERLEAVED, describe, family_of, head_dim_of
from lissom.export.gguf.k_types import Types, check_types, quantized, type_of
from lissom.export.gguf.layers import LAYER, Layers, complete, confirm, fit, sizes_of
from lissom.export.gguf.projections import GATE, KEY, QUERY, UP, VALUE, transposed_weights
from lissom.export.gguf.rope import rope_factors, rope_of
from lissom.export.gguf.vocabulary import read_vocabulary
from lissom.export.gguf.weights import Blocks, Weight, joined, read_weights, with_rows
from lissom.io.files import check_writable, writing_whole
from lissom.ops.quantization import fake_quantize, fake_quantize_dynamic
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["f32", "f16", "bf16"]
_DTYPES: Mapping[torch.dtype, Dtype] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
_QKV = {"attn_qkv": (QUERY, KEY, VALUE)}
_FUSED_IN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "openelm": _QKV,
    "gpt2": _QKV,
    "phi3": {**_QKV, "ffn_up": (GATE, UP)},
}
"""The tensors of a graph that hold the rows of several projections."""
_POSITIONS = "position_embd.weight"
"""The table that llama.cpp's own converter leaves in float32 too."""


@dataclass(frozen=True)
class GgufFile:
    """The written file.

    Attributes:
        architecture: llama.cpp's graph.
        types: the number of tensors of each type.
        megabytes: of the file.
    """

    architecture: str
    types: Mapping[str, int]
    megabytes: float

    def __str__(self) -> str:
        types = ", ".join(f"{count} in {name}" for name, count in self.types.items())
        return f"{self.megabytes:.1f} MB for the graph '{self.architecture}' of llama.cpp; tensors: {types}"


def check_dtype(dtype: str | None) -> Dtype | None:
    """The dtype of that name. Raises UnsupportedError for another name."""
    known = next((known for known in get_args(Dtype) if known == dtype), None)
    if dtype is not None and known is None:
        raise UnsupportedError(f"dtype= is {dtype!r:.80}; choose {', '.join(get_args(Dtype))}, or quantize with a pass")
    return known


def write_gguf(
    program: Program,
    model: PreTrainedModel,
    example: Sample,
    path: Path,
    tokenizer: object = None,
    dtype: Dtype | None = None,
    types: Types | None = None,
) -> GgufFile:
    """Write the file, completely or not at all, after comparing the weights with the program.

    Args:
        program: captured from the model and not lowered.
        example: flat inputs for the comparison.
        tokenizer: by default that of the model's folder.
        dtype: of matrices in floating point; by default the program's own. Vectors are float32.
        types: K types for matrices in floating point; `dtype` is for those whose rows have no whole blocks of 32.

    Raises:
        UnsupportedError: if llama.cpp has no graph for the program, or no tokenizer like this one, or gguf is not installed.
        ArtifactError: if the file cannot be written.
    """
    check_dtype(dtype)
    check_types(types)
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError("writing a GGUF file needs gguf: pip install 'lissom[gguf]'") from error
    check_writable(path)
    family, config = family_of(model.config), model.config
    rope_of(config)
    table: Any = model.get_input_embeddings()
    rows = int(table.weight.shape[0]) if program.vocabulary is None else len(program.vocabulary.kept)
    vocabulary = read_vocabulary(tokenizer, str(config._name_or_path or "") or None, rows)
    program = _folded(program, example)
    program_weights = read_weights(program, model, family.norm_offset, transposed_weights(model))
    names, config = kept_layers(program_weights, model)
    config = renumbered_config(config, program)
    old = {new: name for name, new in names.items()}
    kept = {names[name]: weight for name, weight in program_weights.items() if name in names}
    weights = complete(kept, model, config, family, old)
    sizes = sizes_of(weights, config)
    confirm(program, model, config, family, weights, sizes, example, old)
    layers = fit(weights, sizes, family, config)
    writer: Any = gguf.GGUFWriter(None, layers.architecture)
    writer.add_name(vocabulary.name_of_file(program.name))
    describe(writer, config, layers.sizes)
    vocabulary.write(writer)
    tensors = _tensors(gguf, layers, family.norm_offset, head_dim_of(config), rope_factors(config, model))
    if types is not None:
        tensors = {name: _quantizer(name, make, types, len(sizes.heads)) for name, make in tensors.items()}
    written = _write(gguf, writer, tensors, path, dtype)
    return GgufFile(layers.architecture, written, path.stat().st_size / 1e6)


def _folded(program: Program, example: Sample) -> Program:
    """The program with its quantized weights as integers. Raises UnsupportedError for quantized activations."""
    program, _ = Pipeline([FoldQuantizedWeights()], [example], checks="structural").run(program)
    left = program.nodes(fake_quantize, fake_quantize_dynamic)
    if left:
        raise UnsupportedError(
            f"{program.name} quantizes activations, at '{left[0].name}', which a GGUF file cannot say; choose "
            f"quantize{{scheme=int8-weight}} or quantize{{scheme=int4-weight}}"
        )
    return program


def _tensors(
    gguf: Any, layers: Layers, norm_offset: float, head_dim: int, factors: Mapping[str, torch.Tensor]
) -> dict[str, Callable[[], Weight]]:
    """The tensors of the file by their names, made when they are written."""
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layers.architecture.upper()], len(layers.sizes.heads))
    tensors: dict[str, Callable[[], Weight]] = {name: lambda factor=factor: factor for name, factor in factors.items()}
    weights, fused = dict(layers.weights), _FUSED_IN.get(layers.architecture, {})
    for index, (tensor, parts), leaf in product(range(len(layers.sizes.heads)), fused.items(), ("weight", "bias")):
        names = [f"{LAYER.format(index)}{part}.{leaf}" for part in parts]
        whole = [weights.pop(name) for name in names if name in weights]
        if whole:
            tensors[f"blk.{index}.{tensor}.{leaf}"] = lambda whole=whole: joined(whole)
    for name, weight in weights.items():
        tensors[named.get_name(name, try_suffixes=(".weight", ".bias"))] = _maker(
            name, weight, norm_offset, head_dim, interleaved=layers.architecture in INTERLEAVED
        )
    return tensors


def _maker(name: str, weight: Weight, norm_offset: float, head_dim: int, *, interleaved: bool) -> Callable[[], Weight]:
    """A function that gives the weight as llama.cpp reads it."""
    if norm_offset and name.endswith("norm.weight"):
        assert isinstance(weight, torch.Tensor)
        return lambda: weight.float() + norm_offset
    if interleaved and (".q_proj." in name or ".k_proj." in name):
        # The two halves of every head, one feature of each in turn.
        order = torch.arange(weight.shape[0]).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)
        return lambda: with_rows(weight, order)
    return lambda: weight


def _quantizer(name: str, make: Callable[[], Weight], types: Types, layers: int) -> Callable[[], Weight]:
    """A function that gives the weight in a K type, if it is a matrix in floating point; it is quantized once."""

    kept: list[Blocks] = []

    def give() -> Weight:
        if kept:
            return kept[0]
        weight = make()
        if isinstance(weight, Blocks) or weight.dim() != 2:
            return weight
        kind = type_of(name, weight.shape[1], types, layers)
        if kind is None:
            return weight
        kept.append(quantized(weight, kind))
        return kept[0]

    return give


def _write(
    gguf: Any, writer: Any, tensors: Mapping[str, Callable[[], Weight]], path: Path, dtype: Dtype | None
) -> Mapping[str, int]:
    """Write all tensors, one at a time; returns the number of tensors of each type."""
    types: Counter[str] = Counter()
    for name, make in tensors.items():
        weight = make()
        kind, data = encoded(name, weight, dtype)
        types[kind] += 1
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, gguf.GGMLQuantizationType[kind])
    matrices = Counter({kind: count for kind, count in types.items() if kind != "F32"}) or types
    writer.add_file_type(_file_type(gguf, matrices.most_common(1)[0][0]))
    if any(kind not in {name.upper() for name in _TORCH} for kind in types):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with writing_whole(path) as file:
        # The writer opens files by their name; this one is open already, under a name of its own.
        writer.write_header_to_file(Path(f"/proc/self/fd/{file.fileno()}"))
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, make in tensors.items():
                writer.write_tensor_data(encoded(name, make(), dtype)[1])
        finally:
            writer.close()
    return dict(types.most_common())


def _file_type(gguf: Any, kind: str) -> int:
    """ggml's number for a file that has mostly this type."""
    names = ("ALL_F32",) if kind == "F32" else (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", "GUESSED")
    return next(int(gguf.LlamaFileType[name]) for name in names if name in gguf.LlamaFileType.__members__)


def encoded(name: str, weight: Weight, dtype: Dtype | None) -> tuple[str, np.ndarray[Any, Any]]:
    """The type and the bytes of a tensor. Raises UnsupportedError for values that the type cannot hold."""
    if isinstance(weight, Blocks):
        return weight.kind.name, weight.data.numpy()
    wanted = _TORCH[dtype] if dtype is not None else weight.dtype
    if weight.dim() < 2 or name == _POSITIONS or wanted not in _DTYPES:
        wanted = torch.float32
    data = weight.to(wanted).contiguous()
    if not bool(data.isfinite().all()):
        raise UnsupportedError(f"'{name}' has values that {_DTYPES[wanted]} cannot hold; choose dtype='bf16' or 'f32'")
    kind = _DTYPES[wanted].upper()
    return kind, data.view(torch.uint8).numpy() if wanted == torch.bfloat16 else data.numpy()
