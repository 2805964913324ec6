"""Weights in a safetensors file: each block of memory once, in the order it lies there, mapped into memory when read.

A weight with many zeros is written as a bit for each of its elements, 1 where it is not zero, and the values that are not. At
N:M this takes M bits a group; indices would take N·log₂M, which is the same at 2:4 and more at 4:8. Zero means all bits zero,
so that a negative zero comes back as one. Such a weight is put together in memory when read.

Mapped memory is the file: whoever writes into the file changes the weights, and whoever cuts it short ends the process with
SIGBUS at the next read of what is gone. Saving writes a new file and renames it, so it does neither. `LISSOM_MAP_WEIGHTS=0`
copies the weights into memory instead.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import nn

from lissom.artifacts.fields import count, number, parse_json, take, take_list
from lissom.compiler.ir.program import Program
from lissom.errors import ArtifactError

Place = Callable[[torch.device], torch.device]
"""Where a tensor saved on a device goes."""
SWITCH = "LISSOM_MAP_WEIGHTS"
"""Set to 0 in the environment, it has weights copied from the file."""
ALIGNMENT = 64
_BITS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""For the bytes of an element, the numbers its bits are looked at as."""
SMALLEST = 4096
"""Bytes below which a weight is not worth compressing."""
SAVING = 0.9
"""A weight is compressed when that makes it smaller than this share of its bytes; else it is mapped, which costs no memory."""
_MOST_MEMORY = 1 << 40
"""Bytes, where the system does not tell how many it has."""
_ENTRIES = "entries"
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


def save_weights(program: Program, path: Path, *, alone: bool = False) -> dict[str, object]:
    """Write the program's weights, and say for each how it is read back.

    alone: write that into the file too, for `load_alone`.

    Raises: ArtifactError for a weight safetensors cannot hold; OSError when it cannot be written.
    """
    entries, tensors = stored_weights(program)
    _write(tensors, path, {_ENTRIES: json.dumps(entries)} if alone else {})
    return entries


def stored_weights(program: Program) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """For each of the program's weights how it is read back, and the tensors they are read from, by name.

    Weights that are the same memory are one tensor in the file, under the first one's name. One that lies in memory in another
    order than its dimensions', or repeats itself along one, is written as it lies: `order` and `shape` bring it back.

    Raises: ArtifactError for a weight safetensors cannot hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[object, str] = {}
    compressed: set[str] = set()
    entries: dict[str, object] = {}
    for name, weight in program.weights().items():
        if type(weight) not in _KINDS or weight.layout is not torch.strided or weight.dtype not in _DTYPES:
            raise ArtifactError(
                f"weight '{name}' is a {type(weight).__name__} of {weight.dtype} and {weight.layout}, which an artifact cannot "
                f"hold; make it a plain tensor of a plain dtype before compiling"
            )
        stored, entry = _as_stored(weight)
        key = (stored.data_ptr(), stored.dtype, stored.device, stored.shape, stored.stride()) if stored.numel() else name
        if key not in names:
            parts = _compress(name, stored)
            tensors |= parts or {name: stored}
            compressed |= {name} if parts else set()
        first = names.setdefault(key, name)
        entry |= {"nonzero": list(stored.shape)} if first in compressed else {}
        entries[name] = {"tensor": first, "device": str(weight.device), **entry}
    return entries, tensors


def stored_bytes(program: Program) -> int:
    """The bytes its weights take in an artifact, compressed where they would be; state whole, since it is filled as it runs."""
    sizes: dict[object, int] = {}
    for name, weight in program.weights().items():
        stored, _ = _as_stored(weight)
        nonzero = None if name in program.state else _nonzero(stored)
        size = stored.nbytes if nonzero is None else _compressed_bytes(stored, nonzero)
        sizes[stored.data_ptr(), stored.dtype, stored.shape] = size
    return sum(sizes.values())


def _nonzero(stored: torch.Tensor) -> torch.Tensor | None:
    """Where a tensor is not zero, of booleans, [elements]; None when leaving out zeros saves little."""
    if stored.nbytes < SMALLEST or stored.is_complex():
        return None
    nonzero = stored.reshape(-1).view(_BITS[stored.itemsize]).cpu() != 0
    return nonzero if _compressed_bytes(stored, nonzero) <= SAVING * stored.nbytes else None


def _compressed_bytes(stored: torch.Tensor, nonzero: torch.Tensor) -> int:
    return -(-stored.numel() // 8) + int(nonzero.sum()) * stored.itemsize


def _compress(name: str, stored: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """A tensor as the bits and the values described above, by their names in the file; None when that saves little."""
    nonzero = _nonzero(stored)
    if nonzero is None:
        return None
    bits = torch.from_numpy(numpy.packbits(nonzero.numpy(), bitorder="little"))
    bits_name, values_name = _part_names(name)
    return {bits_name: bits, values_name: stored.reshape(-1).cpu()[nonzero]}


def _part_names(name: str) -> tuple[str, str]:
    return f"{name}:nonzero", f"{name}:values"


def _decompress(bits: torch.Tensor, values: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The tensor that `_compress` took apart.

    Raises: ValueError when the two do not fit the shape.
    """
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-size // 8):
        raise ValueError(f"{bits.numel()} bytes of bits do not fit a weight of {shape}")
    nonzero = torch.from_numpy(numpy.unpackbits(bits.numpy(), count=size, bitorder="little")).view(torch.bool)
    if values.dim() != 1 or int(nonzero.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values do not fit {int(nonzero.sum())} places")
    found = torch.zeros(size, dtype=values.dtype)
    found[nonzero] = values
    return found.reshape(shape)


def check_memory(needed: int, what: str) -> None:
    """Refuse what takes more bytes than this machine has. Raises: ValueError."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _MOST_MEMORY
    if needed > limit:
        raise ValueError(f"{what} would take {needed} bytes of memory; the limit is {limit}, which this machine has")


def _write(tensors: Mapping[str, torch.Tensor], path: Path, notes: Mapping[str, str]) -> None:
    """Write a safetensors file in which tensors lie as PyTorch allocates them, at multiples of 64 bytes.

    The library that reads it leaves no choice of where they lie, and kernels round differently, and are slower, elsewhere.
    The format has no room for gaps, so tensors whose size is no multiple of 64 bytes come last.
    """
    order = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
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
    """The weights by name, mapped from the file; for another device than the CPU they are copied.

    place: which device.

    Raises: ValueError when the file does not hold what the entries say.
    """
    with _open(path) as file:
        return read_weights(entries, file.get_tensor, place)


def load_alone(path: Path, place: Place) -> dict[str, torch.Tensor]:
    """The weights of a file that says itself how they are read; else as `load_weights`."""
    with _open(path) as file:
        entries = parse_json((file.metadata() or {}).get(_ENTRIES, "").encode(), path)
        if not isinstance(entries, dict):
            raise ValueError(f"'{path}' does not say how its weights are read")
        return read_weights(cast("dict[str, object]", entries), file.get_tensor, place)


@contextmanager
def _open(path: Path) -> Generator[Any]:
    """A safetensors file. Raises: ValueError when it is none."""
    # Not before it is needed.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"the weights cannot be read: {error}") from error


def read_weights(
    entries: Mapping[str, object], tensor_of: Callable[[str], torch.Tensor], place: Place
) -> dict[str, torch.Tensor]:
    """The weights by name; tensor_of: gives a tensor that `stored_weights` gave. Arguments and errors as for `load_weights`."""
    wanted = {take(item, "tensor", str): item for item in entries.values()}
    whole = {name: math.prod(take_list(item, "nonzero", count)) for name, item in wanted.items() if "nonzero" in _fields(item)}
    # The values, and a byte each that says where they are not zero.
    check_memory(
        sum(size * (1 + tensor_of(_part_names(name)[1]).itemsize) for name, size in whole.items()), "compressed weights"
    )
    tensors = {
        name: _read(tensor_of, name, item).to(place(torch.device(take(item, "device", str)))) for name, item in wanted.items()
    }
    return {name: _as_used(tensors[take(entry, "tensor", str)], entry) for name, entry in entries.items()}


def _fields(entry: object) -> dict[str, object]:
    return cast("dict[str, object]", entry)


def _read(tensor_of: Callable[[str], torch.Tensor], name: str, entry: object) -> torch.Tensor:
    """A tensor of the file, put together where it was taken apart."""
    if "nonzero" not in _fields(entry):
        return _aligned(tensor_of(name))
    bits, values = map(tensor_of, _part_names(name))
    return _decompress(bits, values, list(take_list(entry, "nonzero", count)))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT or os.environ.get(SWITCH) == "0" else tensor


def _as_used(stored: torch.Tensor, entry: object) -> torch.Tensor:
    fields = _fields(entry)
    if "order" in fields:
        order = take_list(entry, "order", number)
        if sorted(order) != list(range(stored.dim())):
            raise ValueError(f"{order} is no order of {stored.dim()} dimensions")
        stored = stored.permute([order.index(dim) for dim in range(stored.dim())])
    if "shape" in fields:
        stored = stored.expand(take_list(entry, "shape", count))
    return nn.Parameter(stored, requires_grad=take(entry, "trainable", bool)) if "trainable" in fields else stored
