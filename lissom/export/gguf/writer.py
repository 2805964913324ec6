"""Writes an optimized decoder as a GGUF file, the format of llama.cpp.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written by the package gguf. What each family
needs is in llama.cpp's own converters, https://github.com/ggml-org/llama.cpp, conversion/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BufferedWriter
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from lissom.artifacts.pruned_tokenizer import renumbered_config
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.export.checkpoint import kept_layers
from lissom.export.gguf.comparison import compare
from lissom.export.gguf.families import INTERLEAVED, Family, describe, family_of, head_dim_of
from lissom.export.gguf.k_types import Types, check_types, quantized, type_of
from lissom.export.gguf.layers import LAYER, Layers, complete, fit, sizes_of
from lissom.export.gguf.projections import GATE, KEY, QUERY, UP, VALUE, transposed_weights
from lissom.export.gguf.rebuilt import confirm, rebuilt
from lissom.export.gguf.rope import rope_factors, rope_of
from lissom.export.gguf.vocabulary import read_vocabulary
from lissom.export.gguf.weights import Blocks, Weight, joined, read_weights, value_of, with_rows
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
        difference: the largest of llama.cpp's log probabilities from those of the model with the file's weights; None where
            they were not compared.
        note: on the comparison.
    """

    architecture: str
    types: Mapping[str, int]
    megabytes: float
    difference: float | None
    note: str

    def __str__(self) -> str:
        types = ", ".join(f"{count} in {name}" for name, count in self.types.items())
        return f"{self.megabytes:.1f} MB for the graph '{self.architecture}' of llama.cpp; tensors: {types}; {self.note}"


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

    Where llama.cpp is installed, a fresh process runs the file, and its log probabilities of a text are compared with those of
    the model with the file's weights.

    Args:
        program: captured from the model and not lowered.
        example: flat inputs for the comparison.
        tokenizer: by default that of the model's folder.
        dtype: of matrices in floating point; by default the program's own. Vectors are float32.
        types: K types for matrices in floating point; `dtype` is for those whose rows have no whole blocks of 32.

    Raises:
        UnsupportedError: if llama.cpp has no graph for the program, or no tokenizer like this one, or computes something else,
            or gguf is not installed.
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
    confirm(program, rebuilt(model, config, family, weights, sizes, old), example)
    layers = fit(weights, sizes, family, config)
    writer: Any = gguf.GGUFWriter(None, layers.architecture)
    writer.add_name(vocabulary.name_of_file(program.name))
    describe(writer, config, layers.sizes)
    vocabulary.write(writer)
    tensors = _tensors(gguf, layers, family, head_dim_of(config), types)
    makers: dict[str, Callable[[], Weight]] = {
        name: lambda factor=factor: factor for name, factor in rope_factors(config, model).items()
    }
    makers |= {tensor.name: tensor.make for tensor in tensors}
    with writing_whole(path) as file:
        written = _write(gguf, writer, makers, file, dtype)

        def made() -> tuple[nn.Module, Mapping[str, str]]:
            stored, kinds = _in_file(tensors, dtype)
            return rebuilt(model, config, family, stored, layers.sizes, old).float(), kinds

        compared = compare(program.name, _path_of(file).resolve(), made, family, vocabulary.plain_ids())
    return GgufFile(layers.architecture, written, path.stat().st_size / 1e6, compared.difference, compared.note)


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


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        parts: what it holds the rows of: functions that give weights as the file stores them, by the names of Llama.
        arrange: the rows in the order and with the values of llama.cpp.
    """

    name: str
    parts: Mapping[str, Callable[[], Weight]]
    arrange: Callable[[Weight], Weight]

    def make(self) -> Weight:
        return self.arrange(joined([part() for part in self.parts.values()]))


def _tensors(gguf: Any, layers: Layers, family: Family, head_dim: int, types: Types | None) -> list[_Tensor]:
    """The tensors of the file, made when they are written."""
    count, fused = len(layers.sizes.heads), _FUSED_IN.get(layers.architecture, {})
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layers.architecture.upper()], count)
    parts: dict[str, list[str]] = {}
    left = dict(layers.weights)
    for index, (tensor, projections), leaf in product(range(count), fused.items(), ("weight", "bias")):
        names = [f"{LAYER.format(index)}{part}.{leaf}" for part in projections]
        whole = [name for name in names if left.pop(name, None) is not None]
        if whole:
            parts[f"blk.{index}.{tensor}.{leaf}"] = whole
    parts |= {named.get_name(name, try_suffixes=(".weight", ".bias")): [name] for name in left}
    tensors: list[_Tensor] = []
    for tensor, names in parts.items():
        weights = {name: layers.weights[name] for name in names}
        if len({weight.kind.name if isinstance(weight, Blocks) else None for weight in weights.values()}) > 1:
            weights = {name: value_of(weight) for name, weight in weights.items()}
        stored = {name: _storing(tensor, weight, types, count) for name, weight in weights.items()}
        interleaved = layers.architecture in INTERLEAVED
        tensors.append(_Tensor(tensor, stored, _arranging(names[0], family.norm_offset, head_dim, interleaved=interleaved)))
    return tensors


def _storing(tensor: str, weight: Weight, types: Types | None, layers: int) -> Callable[[], Weight]:
    """A function that gives the weight, in a K type if it is a matrix in floating point; it is quantized once."""
    if types is None or isinstance(weight, Blocks) or weight.dim() != 2:
        return lambda: weight
    kind = type_of(tensor, weight.shape[1], types, layers)
    return (lambda: weight) if kind is None else cache(lambda: quantized(weight, kind))


def _arranging(name: str, norm_offset: float, head_dim: int, *, interleaved: bool) -> Callable[[Weight], Weight]:
    """A function that gives the weight as llama.cpp reads it."""

    def arrange(weight: Weight) -> Weight:
        if norm_offset and name.endswith("norm.weight"):
            assert isinstance(weight, torch.Tensor)
            return weight.float() + norm_offset
        if interleaved and (".q_proj." in name or ".k_proj." in name):
            # The two halves of every head, one feature of each in turn.
            order = torch.arange(weight.shape[0]).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)
            return with_rows(weight, order)
        return weight

    return arrange


def _write(
    gguf: Any, writer: Any, tensors: Mapping[str, Callable[[], Weight]], file: BufferedWriter, dtype: Dtype | None
) -> Mapping[str, int]:
    """Write all tensors, one at a time; returns the number of tensors of each type."""
    types: Counter[str] = Counter()
    for name, make in tensors.items():
        kind, data = encoded(name, make(), dtype)
        types[kind] += 1
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, gguf.GGMLQuantizationType[kind])
    matrices = Counter({kind: count for kind, count in types.items() if kind != "F32"}) or types
    writer.add_file_type(_file_type(gguf, matrices.most_common(1)[0][0]))
    if any(kind not in {name.upper() for name in _TORCH} for kind in types):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # The writer opens files by their name; this one is open already, under a name of its own.
    writer.write_header_to_file(_path_of(file))
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, make in tensors.items():
            writer.write_tensor_data(encoded(name, make(), dtype)[1])
    finally:
        writer.close()
    return dict(types.most_common())


def _path_of(file: BufferedWriter) -> Path:
    return Path(f"/proc/self/fd/{file.fileno()}")


def _file_type(gguf: Any, kind: str) -> int:
    """ggml's number for a file that has mostly this type."""
    names = ("ALL_F32",) if kind == "F32" else (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", "GUESSED")
    return next(int(gguf.LlamaFileType[name]) for name in names if name in gguf.LlamaFileType.__members__)


def encoded(name: str, weight: Weight, dtype: Dtype | None) -> tuple[str, np.ndarray[Any, Any]]:
    """The type and the bytes of a tensor. Raises UnsupportedError for values that the type cannot hold."""
    if isinstance(weight, Blocks):
        return weight.kind.name, weight.data.numpy()
    data = weight.to(_dtype_in_file(name, weight, dtype)).contiguous()
    kind = _DTYPES[data.dtype]
    if not bool(data.isfinite().all()):
        raise UnsupportedError(f"'{name}' has values that {kind} cannot hold; choose dtype='bf16' or 'f32'")
    return kind.upper(), data.view(torch.uint8).numpy() if kind == "bf16" else data.numpy()


def _dtype_in_file(name: str, weight: torch.Tensor, dtype: Dtype | None) -> torch.dtype:
    """The dtype of a tensor in floating point."""
    wanted = _TORCH[dtype] if dtype is not None else weight.dtype
    return torch.float32 if weight.dim() < 2 or name == _POSITIONS or wanted not in _DTYPES else wanted


def _in_file(tensors: Sequence[_Tensor], dtype: Dtype | None) -> tuple[dict[str, Weight], dict[str, str]]:
    """The weights with the file's values, and their types in it, by the names of Llama."""
    weights: dict[str, Weight] = {}
    kinds: dict[str, str] = {}
    for tensor in tensors:
        for name, part in tensor.parts.items():
            weight = part()
            if isinstance(weight, Blocks):
                weights[name], kinds[name] = weight.value(), weight.kind.name
            else:
                stored = _dtype_in_file(tensor.name, weight, dtype)
                weights[name], kinds[name] = weight.to(stored).float(), _DTYPES[stored].upper()
    return weights, kinds
