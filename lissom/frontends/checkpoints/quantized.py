"""Checkpoints that are quantized already: compressed-tensors, GPTQ and AWQ, read without the packages that wrote them.

`read_quantized` gives the state of the plain model in float32, and each weight as the files store it, for `use-stored-weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints import compressed_tensors, gptq_awq
from lissom.frontends.checkpoints.packed_integers import in_float32, values_of
from lissom.frontends.checkpoints.quantized_layers import QuantizedLayer
from lissom.frontends.checkpoints.stored_tensors import StoredTensors
from lissom.frontends.checkpoints.stored_weights import PackedWeight, keep_stored

METHODS = ("compressed-tensors", "gptq", "awq")
"""The values of quant_method that are read here; transformers reads others, where their packages are installed."""
FIELDS = ("quantization_config", "compression_config")
"""The fields of config.json with a quantization configuration."""
_OF_AUTOGPTQ = "quantize_config.json"
_TRANSPOSED = "Conv1D"
"""The linear layer of GPT-2, whose weight is [in, out] in the model, and [out, in] like any other in the files."""


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization configuration of a checkpoint: its fields, and the file that has them."""

    file: Path
    fields: Mapping[str, object]

    @property
    def method(self) -> str:
        """One of METHODS."""
        return str(self.fields["quant_method"])


@dataclass(frozen=True)
class QuantizedState:
    """The weights of a quantized checkpoint.

    Attributes:
        values: the state of the model, in float32.
        stored: weights as stored, by the names in `values`.
        notes: sentences on what is not kept.
    """

    values: dict[str, torch.Tensor]
    stored: dict[str, PackedWeight]
    notes: tuple[str, ...]

    def keep_in(self, model: nn.Module) -> tuple[str, ...]:
        """Let every weight of a model that was loaded from `values` remember how it is stored; returns notes on the rest."""
        by_address = {self.values[name].data_ptr(): name for name in self.stored}
        found: set[str] = set()
        for weight in model.parameters():
            name = by_address.get(weight.data_ptr())
            if name is not None and weight.shape == self.values[name].shape and weight.dtype == torch.float32:
                keep_stored(weight, self.stored[name])
                found.add(name)
        lost = sorted(self.stored.keys() - found)
        if not lost:
            return ()
        return (f"{len(lost)} quantized weights, '{lost[0]}' first, are in floating point: the model joins or changes them",)


def quantization_config(directory: Path, fields: Mapping[str, object]) -> QuantizationConfig | None:
    """The quantization configuration of a directory; None for a checkpoint that is read by transformers.

    Args:
        fields: of config.json.

    Raises:
        ArtifactError: if the older file of AutoGPTQ cannot be read.
    """
    text = fields.get("text_config")
    for holder in (fields, text if isinstance(text, dict) else {}):
        for name in FIELDS:
            found = cast("Mapping[str, object]", holder).get(name)
            if isinstance(found, dict):
                given = cast("Mapping[str, object]", found)
                return QuantizationConfig(directory / "config.json", given) if given.get("quant_method") in METHODS else None
    older = directory / _OF_AUTOGPTQ
    if not older.is_file():
        return None
    try:
        read = json.loads(older.read_text(encoding="utf-8"))
        return QuantizationConfig(older, {"quant_method": "gptq", **read})
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{older} is no configuration of GPTQ; copy the file again") from error


def read_quantized(directory: Path, config: QuantizationConfig, model: nn.Module) -> QuantizedState:
    """The weights of a directory whose files `check_shards` accepted.

    Args:
        model: of the architecture, without values.

    Raises:
        ArtifactError: for tensors that are missing, or have other shapes or dtypes.
        UnsupportedError: for a format, a number of bits or groups that are not read.
    """
    tensors = StoredTensors(directory)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    transposed = {name for name, module in model.named_modules() if type(module).__name__ == _TRANSPOSED}
    values: dict[str, torch.Tensor] = {}
    stored: dict[str, PackedWeight] = {}
    used: set[str] = set()
    scattered: list[str] = []
    for layer, quantized in _layers(tensors, config, model):
        name = f"{layer}.weight"
        used |= quantized.names
        if quantized.weight is None:
            scattered.append(layer)
            values[name] = cast("torch.Tensor", quantized.values)
        else:
            weight = stored[name] = replace(quantized.weight, transposed=layer in transposed)
            shape = weight.rows, weight.columns
            _check_shape(directory, name, shape[::-1] if weight.transposed else shape, shapes)
            values[name] = values_of(weight.unpack(), weight.column_order)
        if layer in transposed:
            values[name] = values[name].T.contiguous()
    for name in tensors:
        if name not in used and name.rpartition(".")[2] not in compressed_tensors.LEAVES:
            _check_shape(directory, name, tensors.shape(name), shapes)
            values[name] = in_float32(_plain(tensors, name, config))
    return QuantizedState(values, stored, (*_notes(config), *_describe_scattered(scattered)))


def _layers(tensors: StoredTensors, config: QuantizationConfig, model: nn.Module) -> Iterable[tuple[str, QuantizedLayer]]:
    if config.method != "compressed-tensors":
        return gptq_awq.quantized_layers(tensors, config.file, config.fields)
    classes = {name: tuple(kind.__name__ for kind in type(module).__mro__) for name, module in model.named_modules()}
    return compressed_tensors.quantized_layers(tensors, config.file, config.fields, classes)


def _check_shape(directory: Path, name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check a weight against the model's configuration, before transformers makes one. Raises ArtifactError."""
    if shapes.get(name, shape) != shape:
        raise ArtifactError(f"{directory} has '{name}' in the shape {[*shape]}, and its configuration says {[*shapes[name]]}")


def _plain(tensors: StoredTensors, name: str, config: QuantizationConfig) -> torch.Tensor:
    """A tensor that is not quantized. Raises ArtifactError for one that is, but without what its layer needs."""
    leaf = name.rpartition(".")[2]
    if leaf in ("qzeros", "scales", "g_idx") and config.method != "compressed-tensors":
        raise ArtifactError(f"{tensors.directory} has '{name}' without its qweight; copy the checkpoint again")
    return tensors.tensor(name)


def _notes(config: QuantizationConfig) -> Iterable[str]:
    """Sentences on what the configuration asks for beyond weights."""
    groups = config.fields.get("config_groups")
    if isinstance(groups, dict):
        schemes = [
            cast("dict[str, object]", group) for group in cast("dict[str, object]", groups).values() if isinstance(group, dict)
        ]
        if any(scheme.get("input_activations") or scheme.get("output_activations") for scheme in schemes):
            yield "the checkpoint quantizes activations too; here they stay in floating point, which is weight-only"
    if config.fields.get("kv_cache_scheme"):
        yield "the checkpoint quantizes the KV cache; here it stays in floating point, unless quantize-cache is a pass"


def _describe_scattered(layers: list[str]) -> Iterable[str]:
    if layers:
        yield (
            f"{len(layers)} layers, '{layers[0]}' first, are in floating point: their g_idx has groups of different sizes, "
            f"which no kernel reads"
        )
