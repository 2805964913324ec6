"""The quantized layers of a program in the modules of the checkpoint: sizes, dtypes, and what servers ask of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lissom.errors import UnsupportedError
from lissom.export.compressed_tensors.schemes import FUSED, Layer
from lissom.ops.gguf_blocks import StoredBlocks

_PACKED_INPUTS, _PACKED_OUTPUTS, _PACKED_GROUPS = 128, 64, (None, 32, 64, 128)
"""Of layers with inputs in floating point, for vLLM's Marlin kernels: multiples of in and out features, and groups."""
_INTEGER_MULTIPLE = 16
"""Of the in and out features of layers with quantized inputs, for vLLM's CUTLASS kernels."""


def width_multiple(layers: Iterable[Layer]) -> int:
    """The multiple of feed-forward neurons that servers ask for; 1 where groups do not divide it."""
    layers = [*layers]
    multiple = _PACKED_INPUTS if any(layer.scheme.inputs is None for layer in layers) else _INTEGER_MULTIPLE
    groups = {layer.scheme.weights.group or 1 for layer in layers}
    return multiple if all(_PACKED_INPUTS % group == 0 for group in groups) else 1


def placed(found: Mapping[str, Layer], names: Mapping[str, str], model: Any) -> tuple[dict[str, Layer], tuple[str, ...]]:
    """The layers of the checkpoint by their paths, and the paths of those that it has in floating point.

    Args:
        found: the layers of the program, by the names of their weights in the original model.
        names: the name in the checkpoint for each weight of the original model.
        model: of the checkpoint, without quantization.

    Raises:
        UnsupportedError: for a layer that is no linear layer of the model, or whose padding would end within a group.
    """
    layers: dict[str, Layer] = {}
    dense: list[str] = []
    for name, layer in found.items():
        if name not in names:
            raise UnsupportedError(f"'{name}' is no weight of {type(model).__name__}, so no checkpoint has a place for it")
        path, _, leaf = names[name].rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, leaf)
        readers = sum(1 for other in model.modules() if other._parameters.get("weight") is weight)
        # transformers loads no quantized table, nor an LM head that is one.
        if isinstance(module, nn.Embedding) or readers > 1:
            if layer.scheme.inputs is not None:
                raise UnsupportedError(
                    f"the input of '{path}' is quantized, and the checkpoint has its weight in floating point, because it is "
                    f"an embedding table too; leave out embeddings=true"
                )
            dense.append(path)
        elif not isinstance(module, nn.Linear):
            raise UnsupportedError(f"'{path}' is a {type(module).__name__}, and compressed-tensors quantizes nn.Linear alone")
        else:
            layers[path] = _ready(path, layer, tuple(weight.shape))
    if not layers:
        raise UnsupportedError(f"no linear layer of {type(model).__name__} is quantized but its embedding table")
    return layers, tuple(dense)


def _ready(path: str, layer: Layer, shape: tuple[int, int]) -> Layer:
    """The layer in the size of the checkpoint's, with scales in the dtype of the model. Raises UnsupportedError."""
    group = layer.scheme.weights.group
    if group is not None and shape[1] % group:
        raise UnsupportedError(
            f"'{path}' is padded to {shape[1]} inputs like the widest layer, and its groups have {group}; choose a group size "
            f"that divides both, or prune with scope=layer"
        )
    stored = padded(layer.stored, shape)
    scale = stored.scale.to(layer.dtype)
    # A scale of weights that are all zero may be too small for float16.
    scale = torch.where(scale == 0, torch.finfo(layer.dtype).tiny, scale)
    is_rounded = not torch.equal(scale.float(), stored.scale.float())
    return replace(layer, stored=replace(stored, scale=scale), is_rounded=is_rounded)


def padded(stored: StoredBlocks, shape: tuple[int, int]) -> StoredBlocks:
    """The weight with zeros after its rows and columns, whole groups of them."""
    (rows, columns), scale, zero_point = stored.q.shape, stored.scale, stored.zero_point
    if (rows, columns) == shape:
        return stored
    if scale.numel() > 1:
        size = shape[0], shape[1] * scale.shape[1] // columns if scale.shape[1] > 1 else 1
        scale, zero_point = _enlarged(scale, size, 1), None if zero_point is None else _enlarged(zero_point, size, 0)
    if zero_point is None:
        q = torch.zeros(shape).to(stored.q.dtype)
    else:
        whole = zero_point.reshape(1, 1) if zero_point.numel() == 1 else zero_point
        q = whole.repeat_interleave(shape[1] // whole.shape[1], 1).expand(shape).to(stored.q.dtype).clone()
    q[:rows, :columns] = stored.q
    return StoredBlocks(q, scale, zero_point, stored.format)


def _enlarged(values: torch.Tensor, shape: tuple[int, int], fill: int) -> torch.Tensor:
    enlarged = values.new_full(shape, fill)
    enlarged[: values.shape[0], : values.shape[1]] = values
    return enlarged


def notes(layers: Mapping[str, Layer], dense: Sequence[str], widths: tuple[int, int] | None) -> Iterator[str]:
    """Sentences on what differs from the program, and on what servers ask for.

    Args:
        dense: the paths of layers that the checkpoint has in floating point.
        widths: of the feed-forward, in the program and in the checkpoint; None if they are the same.
    """
    if widths is not None:
        yield f"the feed-forward is padded with zeros from {widths[0]} to {widths[1]} neurons, which servers' kernels ask for"
    if dense:
        yield f"{' and '.join(dense)} in floating point, with the quantized values: transformers loads no quantized table"
    rounded = sum(layer.is_rounded for layer in layers.values())
    if rounded:
        dtype = str(next(iter(layers.values())).dtype).removeprefix("torch.")
        yield f"the scales of {rounded} weights are rounded to {dtype}, the model's dtype, which the library computes with"
    if any(layer.scheme.has_packed_zero_points for layer in layers.values()):
        yield "transformers loads its packed zero points with CompressedTensorsConfig(dequantize=True) alone"
    yield from _on_servers(layers)


def _on_servers(layers: Mapping[str, Layer]) -> Iterator[str]:
    """Sentences on layers that vLLM may have no kernel for."""
    for path, layer in layers.items():
        rows, columns = layer.stored.q.shape
        parent, _, leaf = path.rpartition(".")
        family = next((family for family in FUSED if leaf in family), (leaf,))
        rows = sum(len(layers[part].stored.q) for name in family if (part := f"{parent}.{name}") in layers)
        weights, inputs = layer.scheme.weights, layer.scheme.inputs
        if inputs is None:
            fits = rows % _PACKED_OUTPUTS == 0 and columns % _PACKED_INPUTS == 0 and weights.group in _PACKED_GROUPS
            asks = f"{_PACKED_OUTPUTS} outputs, {_PACKED_INPUTS} inputs, and groups of 32, 64, 128 or all inputs"
        else:
            fits = rows % _INTEGER_MULTIPLE == 0 and columns % _INTEGER_MULTIPLE == 0
            asks = f"{_INTEGER_MULTIPLE} outputs and inputs"
        if not fits:
            yield f"'{path}' has {rows} outputs and {columns} inputs, and vLLM's fastest kernels ask for multiples of {asks}"
            break
    for path, layer in layers.items():
        weights, inputs = layer.scheme.weights, layer.scheme.inputs
        by_tensor = inputs is not None and inputs.is_dynamic and inputs.format != "fp8" and inputs.strategy == "tensor"
        if inputs is not None and (not weights.symmetric or weights.group or by_tensor):
            yield (
                f"'{path}' is in {layer.scheme}, and vLLM multiplies integers of symmetric weights per channel or tensor with "
                f"inputs per token, or with a fixed scale"
            )
            break
