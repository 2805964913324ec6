"""Weights in a safetensors file: each block of memory once, in the order it lies there, mapped into memory when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lissom.artifacts.fields import number, take, take_list
from lissom.compiler.errors import ArtifactError
from lissom.compiler.program import Program

Place = Callable[[torch.device], torch.device]
"""Where a tensor saved on a device goes."""
ALIGNMENT = 64
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)
_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes of safetensors files, by their names there."""


def save_weights(program: Program, path: Path) -> dict[str, object]:
    """Write the program's weights, and say for each how it is read back.

    Weights that are the same memory are one tensor in the file, under the first one's name. One that lies in memory in another
    order than its dimensions', or repeats itself along one, is written as it lies: `order` and `shape` bring it back.

    Raises: ArtifactError for a weight safetensors cannot hold; OSError when it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[object, str] = {}
    entries: dict[str, object] = {}
    for name, weight in program.weights().items():
        if type(weight) not in _KINDS or weight.layout is not torch.strided or weight.dtype not in _DTYPES:
            raise ArtifactError(
                f"weight '{name}' is a {type(weight).__name__} of {weight.dtype} and {weight.layout}, which an artifact cannot "
                f"hold; make it a plain tensor of a plain dtype before compiling"
            )
        stored, entry = _as_stored(weight)
        key = (stored.data_ptr(), stored.dtype, stored.device, stored.shape, stored.stride()) if stored.numel() else name
        tensors.setdefault(names.setdefault(key, name), stored)
        entries[name] = {"tensor": names[key], "device": str(weight.device), **entry}
    _write(tensors, path)
    return entries


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file in which tensors lie as PyTorch allocates them, at multiples of 64 bytes.

    The library that reads it leaves no choice of where they lie, and kernels round differently, and are slower, elsewhere.
    The format has no room for gaps, so tensors whose size is no multiple of 64 bytes come last.
    """
    order = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in order:
            file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _as_stored(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """The weight with its dimensions in the order of memory and none repeated, and how to turn that back."""
    stored = weight.detach().resolve_conj().resolve_neg()
    for dim in range(stored.dim()):
        if stored.shape[dim] > 1 and stored.stride(dim) == 0:
            stored = stored.narrow(dim, 0, 1)
    order = range(stored.dim())
    if not stored.is_contiguous():
        order = sorted(order, key=lambda dim: -stored.stride(dim))
    entry: dict[str, object] = {}
    if list(order) != list(range(stored.dim())):
        entry["order"] = list(order)
    if stored.shape != weight.shape:
        entry["shape"] = list(weight.shape)
    if isinstance(weight, nn.Parameter):
        entry["trainable"] = weight.requires_grad
    return stored.permute(tuple(order)), entry


def load_weights(entries: Mapping[str, object], path: Path, place: Place) -> dict[str, torch.Tensor]:
    """The weights by name, mapped from the file; for another device than the CPU they are copied; place: which device.

    Raises: ValueError when the file does not hold what the entries say.
    """
    # Not before it is needed.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            devices = {take(item, "tensor", str): place(torch.device(take(item, "device", str))) for item in entries.values()}
            tensors: dict[str, torch.Tensor] = {name: _aligned(file.get_tensor(name)).to(devices[name]) for name in devices}
    except SafetensorError as error:
        raise ValueError(f"the weights cannot be read: {error}") from error
    return {name: _as_used(tensors[take(entry, "tensor", str)], entry) for name, entry in entries.items()}


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _as_used(stored: torch.Tensor, entry: object) -> torch.Tensor:
    fields = cast("dict[str, object]", entry)
    if "order" in fields:
        order = take_list(entry, "order", number)
        if sorted(order) != list(range(stored.dim())):
            raise ValueError(f"{order} is no order of {stored.dim()} dimensions")
        stored = stored.permute([order.index(dim) for dim in range(stored.dim())])
    if "shape" in fields:
        stored = stored.expand(take_list(entry, "shape", number))
    return nn.Parameter(stored, requires_grad=take(entry, "trainable", bool)) if "trainable" in fields else stored
