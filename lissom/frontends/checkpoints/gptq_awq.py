"""Linear layers of GPTQ and AWQ checkpoints: qweight, qzeros, scales, and for GPTQ the order of inputs, g_idx.

    w = (q - zero_point) · scale

The shapes are those of `packed_integers`, and follow from `scales` and the bits. With `desc_act` the groups of GPTQ hold inputs
that are not neighbours: the columns are sorted by group, and the input is read in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints.packed_integers import (
    WORD,
    as_stored,
    awq_integers,
    column_order,
    exact_scale,
    gptq_zero_points,
    unpack_words,
)
from lissom.frontends.checkpoints.quantized_layers import (
    QuantizedLayer,
    Settings,
    describe,
    group_of_inputs,
    partial_group,
    scattered_values,
)
from lissom.frontends.checkpoints.stored_tensors import FLOATS, StoredTensors
from lissom.frontends.checkpoints.stored_weights import PackedWeight
from lissom.ops.gguf_blocks import StoredBlocks

_GPTQ_FORMATS = ("gptq", "gptq_v2")
_BITS = (4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Scheme:
    """How the layers of a checkpoint are stored.

    Attributes:
        bits: of the layers without a rule of their own.
        group: inputs of a scale; -1 for all.
        has_rules: single layers may have other bits and groups, which their shapes tell.
        less_one: zero points are stored minus one.
    """

    is_awq: bool
    bits: int
    group: int
    has_rules: bool = False
    less_one: bool = False


def quantized_layers(tensors: StoredTensors, file: Path, fields: Mapping[str, object]) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a checkpoint by their names.

    Args:
        file: the configuration's, for errors.
        fields: its quantization configuration.

    Raises:
        UnsupportedError: for a format, bits or groups that are not read.
        ArtifactError: for a tensor that is missing, or has another shape or dtype.
    """
    scheme = _scheme(Settings(file, fields))
    for name in sorted(tensors):
        layer, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            yield layer, _layer(tensors, layer, scheme)


def _scheme(settings: Settings) -> _Scheme:
    is_awq = settings.fields.get("quant_method") == "awq"
    names = ("version", "format", "checkpoint_format") if is_awq else ("checkpoint_format", "format")
    given = next((name for name in names if settings.fields.get(name) is not None), None)
    named = Settings(settings.file, {given: _lower(settings.fields[given])} if given else {})
    # The words of the configurations of transformers, and what they stand for where they are left out.
    if is_awq:
        named.one_of(given or names[0], ("gemm",), "the layout of AWQ", "gemm")
        return _Scheme(True, settings.one_of("bits", (4,), "the number of bits of AWQ", 4), settings.group_size())
    format = named.one_of(given or names[0], _GPTQ_FORMATS, "the layout of GPTQ", "gptq")
    bits = settings.one_of("bits", _BITS, "the number of bits of GPTQ")
    return _Scheme(False, bits, settings.group_size(), bool(settings.fields.get("dynamic")), format == "gptq")


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _layer(tensors: StoredTensors, layer: str, scheme: _Scheme) -> QuantizedLayer:
    """One layer, checked by its headers before its values are read."""
    names = {leaf: f"{layer}.{leaf}" for leaf in _PARTS}
    used = frozenset(name for name in names.values() if name in tensors)
    if len(tensors.shape(names["scales"])) != 2:
        raise ArtifactError(
            f"{tensors.directory} has '{names['scales']}' in {[*tensors.shape(names['scales'])]}, and it is a matrix"
        )
    groups, rows = tensors.shape(names["scales"])
    bits = _bits(tensors, names["qzeros"], rows, scheme)
    columns = _columns(tensors, names["qweight"], bits, scheme)
    group = _group(tensors.directory, layer, columns, groups, scheme)
    reason = f"a weight of {rows} outputs, {columns} inputs and {bits} bits in groups of {group}"
    packed = (columns, rows * bits // WORD) if scheme.is_awq else (columns * bits // WORD, rows)
    tensors.check(names["qweight"], ("I32",), [packed], reason)
    tensors.check(names["qzeros"], ("I32",), [(groups, rows * bits // WORD)], reason)
    tensors.check(names["scales"], FLOATS, [(groups, rows)], reason)
    zeros = tensors.tensor(names["qzeros"])
    zero_point = awq_integers(zeros) if scheme.is_awq else gptq_zero_points(zeros, bits, less_one=scheme.less_one)
    scale = exact_scale(tensors.finite(names["scales"]).T)
    words = tensors.tensor(names["qweight"])
    group_of = group_of_inputs(tensors, names["g_idx"], columns, groups, group)
    order = None if group_of is None else column_order(group_of, groups)
    read = partial(_read, words, scale, zero_point, bits, order, is_awq=scheme.is_awq)
    if group_of is not None and order is None:
        whole = partial(_read, words, scale, zero_point, bits, None, is_awq=scheme.is_awq)
        return QuantizedLayer(used, None, scattered_values(whole(), group_of))
    is_signed = bool((zero_point == 1 << (bits - 1)).all())
    form = f"{'' if is_signed else 'u'}int{bits}"
    return QuantizedLayer(used, PackedWeight(describe(form, groups, group), form, rows, columns, read, order))


def _bits(tensors: StoredTensors, zeros: str, rows: int, scheme: _Scheme) -> int:
    """The bits of a layer: those of the configuration, unless its rules may give the layer others."""
    shape = tensors.shape(zeros)
    if not scheme.has_rules or len(shape) != 2 or not rows:
        return scheme.bits
    return next((bits for bits in _BITS if shape[1] * WORD == rows * bits), scheme.bits)


def _columns(tensors: StoredTensors, words: str, bits: int, scheme: _Scheme) -> int:
    """The inputs of a layer, from the shape of its integers."""
    shape = tensors.shape(words)
    if len(shape) != 2:
        raise ArtifactError(f"{tensors.directory} has '{words}' in the shape {[*shape]}, and packed integers are a matrix")
    return shape[0] if scheme.is_awq else shape[0] * WORD // bits


def _group(directory: Path, layer: str, columns: int, groups: int, scheme: _Scheme) -> int:
    """The inputs of a scale. Raises UnsupportedError for a partial group, ArtifactError for another number of groups."""
    wanted = columns if scheme.group == -1 or scheme.group > columns else scheme.group
    if scheme.has_rules and groups and columns % groups == 0:
        wanted = columns // groups
    if columns % wanted if wanted else True:
        raise partial_group(directory, layer, columns, wanted)
    if groups != columns // wanted:
        raise ArtifactError(
            f"{directory} has {groups} scales for each output of '{layer}', and {columns} inputs in groups of {wanted} need "
            f"{columns // wanted}; copy the checkpoint again"
        )
    return wanted


def _read(
    words: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, order: torch.Tensor | None, *, is_awq: bool
) -> StoredBlocks:
    """The integers, scales and zero points, their columns sorted by group."""
    q = awq_integers(words) if is_awq else unpack_words(words.T, bits)
    return as_stored(q if order is None else q[:, order], scale, zero_point, bits)
