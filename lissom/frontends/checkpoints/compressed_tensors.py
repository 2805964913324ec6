"""Layers of compressed-tensors checkpoints, as llm-compressor writes them: integers packed or in bytes, and fp8.

    pack-quantized               weight_packed [out, words], weight_scale, weight_shape [2], weight_zero_point, weight_g_idx
    int-quantized, naive-quantized    weight [out, in] in int8, weight_scale, weight_zero_point
    float-quantized, naive-quantized  weight [out, in] in float8_e4m3fn, weight_scale

    w = (q - zero_point) · scale

Scales are one per tensor, [1]; per output channel, [out, 1]; per group, [out, in / group]; or per block of fp8. The layout is
that of github.com/vllm-project/compressed-tensors (compressors, quantization/lifecycle/forward.py), its package is not needed.
Activations stay in floating point: the format rounds them to -128 … 127 by max|x| / 127.5, and the kernels of W8A8 to uint8
with a zero point, which is other arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lissom.errors import ArtifactError, UnsupportedError
from lissom.frontends.checkpoints.compressed_tensors_config import Scheme, Schemes
from lissom.frontends.checkpoints.packed_integers import WORD, as_stored, column_order, exact_scale, unpack_words
from lissom.frontends.checkpoints.quantized_layers import (
    QuantizedLayer,
    describe,
    group_of_inputs,
    partial_group,
    scattered_values,
)
from lissom.frontends.checkpoints.stored_tensors import FLOATS, StoredTensors
from lissom.frontends.checkpoints.stored_weights import PackedWeight
from lissom.ops.gguf_blocks import StoredBlocks

LEAVES = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "input_zero_point"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "weight_global_scale", "input_global_scale"),
)
"""The names of tensors that no model of transformers has."""
_BYTES = {"I8": "int", "F8_E4M3": "float"}
"""Types of numbers by the dtypes of weights that are not packed."""


def quantized_layers(
    tensors: StoredTensors, file: Path, fields: Mapping[str, object], classes: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a checkpoint by their names.

    Args:
        file: the configuration's, for errors.
        fields: its quantization configuration.
        classes: the names of the classes of each module of the model, by its path.

    Raises:
        UnsupportedError: for a format or scheme that is not read.
        ArtifactError: for a tensor that is missing, or has another shape or dtype.
    """
    schemes = Schemes.read(file, fields)
    for name in sorted(tensors):
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight_packed" and not (leaf == "weight" and _is_quantized(tensors, layer, schemes)):
            continue
        scheme = schemes.of(layer, classes.get(layer, ("Linear",)))
        yield layer, (_packed if leaf == "weight_packed" else _in_bytes)(tensors, layer, scheme)


def _is_quantized(tensors: StoredTensors, layer: str, schemes: Schemes) -> bool:
    """True for a weight in bytes. Raises UnsupportedError for one in floating point that waits for its rounding."""
    dtype = tensors.dtype(f"{layer}.weight")
    if dtype in FLOATS and f"{layer}.weight_scale" in tensors and not schemes.is_dense:
        raise UnsupportedError(
            f"{tensors.directory} stores '{layer}.weight' as {dtype} next to its scale, so it is not rounded yet; save the "
            f"model with save_compressed=True"
        )
    return dtype in _BYTES


@dataclass(frozen=True)
class _Grid:
    """The scales and zero points of a weight, [rows, groups].

    Attributes:
        zero_point: unsigned; None where it is the middle.
        group: inputs of a scale.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    group: int


def _packed(tensors: StoredTensors, layer: str, scheme: Scheme) -> QuantizedLayer:
    """A layer whose integers are packed in words, checked by its headers before its values are read."""
    packed, bits = f"{layer}.weight_packed", scheme.bits
    if scheme.type != "int":
        raise ArtifactError(
            f"{tensors.directory} packs '{packed}', whose scheme has the type '{scheme.type}'; copy the checkpoint again"
        )
    tensors.check(f"{layer}.weight_shape", ("I64", "I32"), [(2,)], "the shape of a packed weight")
    rows, columns = (int(size) for size in tensors.tensor(f"{layer}.weight_shape"))
    wanted = (rows, -(-columns * bits // WORD))
    if columns < 1 or wanted != tensors.shape(packed):
        raise ArtifactError(
            f"{tensors.directory} says that '{layer}.weight' has the shape [{rows}, {columns}], and '{packed}' has the shape "
            f"{[*tensors.shape(packed)]}, which is not that of {bits} bits; copy the checkpoint again"
        )
    tensors.check(packed, ("I32",), [wanted], f"a weight of {bits} bits")
    grid = _grid(tensors, layer, scheme, rows, columns)
    words = tensors.tensor(packed)
    groups = grid.scale.shape[1]
    group_of = group_of_inputs(tensors, f"{layer}.weight_g_idx", columns, groups, grid.group)
    order = None if group_of is None else column_order(group_of, groups)
    read = partial(_read_packed, words, grid, bits, columns, order)
    used = _used(tensors, layer)
    if group_of is not None and order is None:
        return QuantizedLayer(used, None, scattered_values(_read_packed(words, grid, bits, columns, None), group_of))
    return QuantizedLayer(used, _weight(grid, scheme, rows, columns, read, order))


def _in_bytes(tensors: StoredTensors, layer: str, scheme: Scheme) -> QuantizedLayer:
    """A layer with a weight in int8 or fp8."""
    name = f"{layer}.weight"
    dtype, shape = tensors.dtype(name), tensors.shape(name)
    if scheme.type != _BYTES[dtype] or len(shape) != 2:
        raise ArtifactError(
            f"{tensors.directory} stores '{name}' as {dtype} in the shape {[*shape]}, and its scheme has {scheme.bits} bits of "
            f"type '{scheme.type}' in a matrix; copy the checkpoint again"
        )
    rows, columns = shape
    grid = _grid(tensors, layer, scheme, rows, columns)
    if scheme.type == "float" and grid.zero_point is not None:
        raise UnsupportedError(
            f"{tensors.directory} has zero points for '{name}' in fp8, which has none; quantize the model again"
        )
    q = tensors.tensor(name)
    if scheme.bits == 4 and q.numel() and not -8 <= int(q.min()) <= int(q.max()) <= 7:
        raise ArtifactError(f"{tensors.directory} has integers of more than 4 bits in '{name}'; copy the checkpoint again")
    read = partial(_read_bytes, q, grid, scheme.bits)
    return QuantizedLayer(_used(tensors, layer), _weight(grid, scheme, rows, columns, read, None))


def _weight(
    grid: _Grid, scheme: Scheme, rows: int, columns: int, read: partial[StoredBlocks], order: torch.Tensor | None
) -> PackedWeight:
    form = "fp8" if scheme.type == "float" else f"{'' if grid.zero_point is None else 'u'}int{scheme.bits}"
    name = describe(form, grid.scale.shape[1], grid.group)
    return PackedWeight(name, form, rows, columns, read, order, scheme.quantizes_inputs)


def _used(tensors: StoredTensors, layer: str) -> frozenset[str]:
    return frozenset(name for leaf in ("weight", *LEAVES) if (name := f"{layer}.{leaf}") in tensors)


def _grid(tensors: StoredTensors, layer: str, scheme: Scheme, rows: int, columns: int) -> _Grid:
    """Scales and zero points, checked by their headers."""
    name, group = f"{layer}.weight_scale", scheme.group or columns
    if columns % group:
        raise partial_group(tensors.directory, layer, columns, group)
    groups, reason = columns // group, f"a weight of {rows} outputs and {columns} inputs, quantized by {scheme.strategy},"
    whole = {"tensor": [(1,), (), (1, 1)], "channel": [(rows, 1), (rows,)], "group": [(rows, groups)]}
    shapes = whole.get(scheme.strategy) or [(-(-rows // scheme.block_rows), groups)]
    tensors.check(name, FLOATS, shapes, reason)
    scale = _by_row(exact_scale(tensors.finite(name)), scheme, rows)
    zeros = f"{layer}.weight_zero_point"
    if zeros not in tensors:
        if not scheme.symmetric:
            raise ArtifactError(f"{tensors.directory} lacks '{zeros}', and the scheme is asymmetric; copy the checkpoint again")
        return _Grid(scale, None, group)
    packs = tensors.dtype(zeros) == "I32"
    packed = [(-(-rows * scheme.bits // WORD), groups)]
    tensors.check(zeros, ("I8", "I32", *(("F8_E4M3",) if scheme.type == "float" else ())), packed if packs else shapes, reason)
    stored = tensors.tensor(zeros)
    if scheme.type == "float":
        return _Grid(scale, None if bool((stored.float() == 0).all()) else stored, group)
    middle = 1 << (scheme.bits - 1)
    if packs:
        zero_point = unpack_words(stored.T, scheme.bits)[:, :rows].T.contiguous()
    else:
        zero_point = (_by_row(stored, scheme, rows).int() + middle).to(torch.uint8)
    return _Grid(scale, None if bool((zero_point == middle).all()) else zero_point, group)


def _by_row(values: torch.Tensor, scheme: Scheme, rows: int) -> torch.Tensor:
    """Scales or zero points as [rows, groups]."""
    if scheme.strategy in ("tensor", "channel"):
        return values.reshape(-1, 1).expand(rows, 1).contiguous()
    if scheme.strategy == "block":
        return values.repeat_interleave(scheme.block_rows, 0)[:rows].contiguous()
    return values.contiguous()


def _read_packed(words: torch.Tensor, grid: _Grid, bits: int, columns: int, order: torch.Tensor | None) -> StoredBlocks:
    """The integers, scales and zero points, their columns sorted by group."""
    q = unpack_words(words, bits)[:, :columns]
    return as_stored(q.contiguous() if order is None else q[:, order], grid.scale, grid.zero_point, bits)


def _read_bytes(q: torch.Tensor, grid: _Grid, bits: int) -> StoredBlocks:
    if q.dtype != torch.int8:
        return StoredBlocks(q, grid.scale, None, "fp8")
    if grid.zero_point is None:
        return StoredBlocks(q, grid.scale, None, f"int{bits}")
    unsigned = q.view(torch.uint8) ^ 128 if bits == 8 else (q + 8).view(torch.uint8)
    return StoredBlocks(unsigned, grid.scale, grid.zero_point, f"uint{bits}")
