"""Weights in a safetensors file: each storage is written once, in memory order, and memory-mapped when read.

A weight with many zeros is compressed to a bitmask, one bit per element, and its nonzero values. For N:M sparsity the mask
takes M bits per group; indices would take N·log₂M, the same at 2:4 and more at 4:8. Zero means all bits zero, so that negative
zeros are kept. Such a weight is decompressed into memory when read.

Mapped memory is the file itself: writing into the file changes the weights, and truncating it ends the process with SIGBUS at
the next access to the missing part. Saving writes a new file and renames it, so it does neither. `load(..., map_weights=False)`
and `LISSOM_MAP_WEIGHTS=0` read the weights into memory instead.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.compiler.memory import unwritten_zeros
from lissom.errors import ArtifactError
from lissom.io.fields import count, fields_of, number, parse_json, take, take_list
from lissom.io.tensor_files import ALIGNMENT, DTYPES, write_tensors

Place = Callable[[torch.device], torch.device]
"""Maps the device a tensor was saved on to the device to load it on."""
SWITCH = "LISSOM_MAP_WEIGHTS"
"""The environment variable; 0 reads weights into memory instead of mapping them."""
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_BITS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by element size in bytes, to view the bits of a value."""
SMALLEST = 4096
"""The smallest weight that is compressed, in bytes."""
SAVING = 0.9
"""A weight is compressed if that makes it smaller than this fraction of its bytes; else it is mapped, which needs no memory."""
_MOST_MEMORY = 1 << 40
"""The assumed memory in bytes if the system does not report it."""
_ENTRIES = "entries"
_KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)


def save_weights(program: Program, path: Path, *, alone: bool = False, transposed: Collection[str] = ()) -> dict[str, object]:
    """Write the program's weights; returns for each weight the entry to read it back.

    Args:
        alone: write the entries into the file too, for `load_alone`.
        transposed: matrices, by name, to write transposed.

    Raises:
        ArtifactError: for a weight safetensors cannot hold.
        OSError: if it cannot be written.
    """
    entries, tensors = stored_weights(program, transposed)
    with path.open("wb") as file:
        write_tensors(file, tensors, {_ENTRIES: json.dumps(entries)} if alone else {})
    return entries


def stored_weights(program: Program, transposed: Collection[str] = ()) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The entry of each weight of the program, and the tensors to store, by name.

    Weights that share memory are one tensor in the file, under the first one's name. A transposed or expanded weight is
    written in memory order, without repetition; `order` and `shape` in its entry restore it.

    Args:
        transposed: as for `save_weights`.

    Raises:
        ArtifactError: for a weight safetensors cannot hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[object, str] = {}
    compressed: set[str] = set()
    entries: dict[str, object] = {}
    for name, weight in program.weights().items():
        if type(weight) not in _KINDS or weight.layout is not torch.strided or weight.dtype not in DTYPES:
            raise ArtifactError(
                f"weight '{name}' is a {type(weight).__name__} of {weight.dtype} and {weight.layout}, which an artifact cannot "
                f"hold; make it a plain tensor of a plain dtype before compiling"
            )
        stored, entry = _as_stored(weight)
        if name in transposed and "order" not in entry:
            # Tied weights keep one key: each is a transposed view of the same memory.
            stored, entry["order"] = stored.t(), [1, 0]
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
    """The bytes of the program's weights in an artifact, after compression; state counts uncompressed, because runs fill it."""
    sizes: dict[object, int] = {}
    for name, weight in program.weights().items():
        stored, _ = _as_stored(weight)
        nonzero = None if name in program.state else _nonzero(stored)
        size = stored.nbytes if nonzero is None else _compressed_bytes(stored, nonzero)
        sizes[stored.data_ptr(), stored.dtype, stored.shape] = size
    return sum(sizes.values())


_SAMPLED = 1 << 14
"""The elements by which a dense weight is told from a sparse one."""


def _nonzero(stored: torch.Tensor) -> torch.Tensor | None:
    """The mask of nonzero elements, bool [elements]; None if compressing saves too little."""
    if stored.nbytes < SMALLEST or stored.is_complex():
        return None
    elements = stored.reshape(-1).view(_BITS[stored.itemsize])
    places = torch.randint(len(elements), (_SAMPLED,), generator=torch.Generator().manual_seed(0))
    some = elements[places.to(elements.device)]
    if stored.itemsize * float((some != 0).float().mean()) + 1 / 8 > (1 + SAVING) / 2 * stored.itemsize:
        return None  # far from sparse
    nonzero = elements.cpu() != 0
    return nonzero if _compressed_bytes(stored, nonzero) <= SAVING * stored.nbytes else None


def _compressed_bytes(stored: torch.Tensor, nonzero: torch.Tensor) -> int:
    return -(-stored.numel() // 8) + int(nonzero.count_nonzero()) * stored.itemsize


def _compress(name: str, stored: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The bitmask and nonzero values of a tensor, by their names in the file; None if that saves too little."""
    nonzero = _nonzero(stored)
    if nonzero is None:
        return None
    bits = torch.from_numpy(numpy.packbits(nonzero.numpy(), bitorder="little"))
    bits_name, values_name = _part_names(name)
    return {bits_name: bits, values_name: stored.reshape(-1).cpu()[nonzero]}


def _part_names(name: str) -> tuple[str, str]:
    return f"{name}:nonzero", f"{name}:values"


def _decompress(bits: torch.Tensor, values: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The tensor from its bitmask and nonzero values. Raises ValueError if they do not fit the shape."""
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-size // 8):
        raise ValueError(f"{bits.numel()} bytes of bits do not fit a weight of {shape}")
    if not values.numel() and values.dim() == 1 and not bool(bits.any()):
        return unwritten_zeros([size * values.itemsize])[0].view(values.dtype).reshape(shape)
    nonzero = torch.from_numpy(numpy.unpackbits(bits.numpy(), count=size, bitorder="little")).view(torch.bool)
    if values.dim() != 1 or int(nonzero.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values do not fit {int(nonzero.sum())} places")
    dense = torch.zeros(size, dtype=values.dtype)
    dense[nonzero] = values
    return dense.reshape(shape)


def check_memory(needed: int, what: str) -> None:
    """Refuse an allocation larger than this machine's memory. Raises ValueError."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _MOST_MEMORY
    if needed > limit:
        raise ValueError(f"{what} would take {needed} bytes of memory; the limit is {limit}, which this machine has")


def _as_stored(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """The weight with its dimensions in memory order and not expanded, and the entry to restore it."""
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


def load_weights(entries: Mapping[str, object], path: Path, place: Place, *, mapped: bool = True) -> dict[str, torch.Tensor]:
    """The weights by name, mapped from the file; for another device than the CPU they are copied.

    Args:
        place: maps the saved device to the device to load on.
        mapped: False reads them into memory, which later changes of the file do not affect.

    Raises:
        ValueError: if the file does not fit the entries.
    """
    with _open(path, mapped) as file:
        return read_weights(entries, file.get_tensor, place)


def load_alone(path: Path, place: Place, *, mapped: bool = True) -> dict[str, torch.Tensor]:
    """The weights of a file that holds its own entries; otherwise as `load_weights`."""
    with _open(path, mapped) as file:
        entries = parse_json((file.metadata() or {}).get(_ENTRIES, "").encode(), path)
        if not isinstance(entries, dict):
            raise ValueError(f"'{path}' does not say how its weights are read")
        return read_weights(entries, file.get_tensor, place)


@contextmanager
def _open(path: Path, mapped: bool) -> Generator[Any]:
    """An open safetensors file. Raises ValueError if it is not one."""
    # Imported when first needed.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if mapped and os.environ.get(SWITCH) != "0":
                yield file
            else:
                with path.open("rb") as plain:
                    yield _Unmapped(plain, path, file.metadata())
    except SafetensorError as error:
        raise ValueError(f"the weights cannot be read: {error}") from error


class _Unmapped:
    """Reads tensors into memory from a safetensors file whose header the library has checked.

    Truncating the file meanwhile is an error here; in mapped memory it would end the process.
    """

    def __init__(self, file: BufferedReader, path: Path, notes: Mapping[str, str] | None) -> None:
        self._file, self._notes = file, notes
        # 8 bytes with the length of the header, the header, and the tensors.
        self._start = 8 + int.from_bytes(self._read(0, 8), "little")
        self._header = parse_json(self._read(8, self._start - 8), path)

    def metadata(self) -> Mapping[str, str] | None:
        return self._notes

    def get_tensor(self, name: str) -> torch.Tensor:
        entry = take(self._header, name, dict)
        shape = take_list(entry, "shape", count)
        tensor = torch.empty(shape, dtype=_DTYPES[take(entry, "dtype", str)])
        begin, _ = take_list(entry, "data_offsets", count)
        if tensor.numel():
            self._fill(begin + self._start, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def _read(self, start: int, size: int) -> bytes:
        self._fill(start, memoryview(buffer := bytearray(size)))
        return bytes(buffer)

    def _fill(self, start: int, into: memoryview) -> None:
        self._file.seek(start)
        if self._file.readinto(into) != into.nbytes:
            raise ValueError("the file was truncated while it was read")


def read_weights(
    entries: Mapping[str, object], tensor_of: Callable[[str], torch.Tensor], place: Place
) -> dict[str, torch.Tensor]:
    """The weights by name.

    Args:
        tensor_of: returns a stored tensor by name. Other arguments and errors as for `load_weights`.
    """
    wanted = {take(entry, "tensor", str): entry for entry in entries.values()}
    whole = {
        name: math.prod(take_list(entry, "nonzero", count)) for name, entry in wanted.items() if "nonzero" in fields_of(entry)
    }
    # The decompressed values, and one byte per element for the unpacked bitmask.
    check_memory(
        sum(size * (1 + tensor_of(_part_names(name)[1]).itemsize) for name, size in whole.items()), "compressed weights"
    )
    tensors = {
        name: _read(tensor_of, name, entry).to(place(torch.device(take(entry, "device", str))))
        for name, entry in wanted.items()
    }
    return {name: _as_used(tensors[take(entry, "tensor", str)], entry) for name, entry in entries.items()}


def _read(tensor_of: Callable[[str], torch.Tensor], name: str, entry: object) -> torch.Tensor:
    """A tensor of the file, decompressed if needed."""
    if "nonzero" not in fields_of(entry):
        return _aligned(tensor_of(name))
    bits, values = map(tensor_of, _part_names(name))
    return _decompress(bits, values, list(take_list(entry, "nonzero", count)))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _as_used(stored: torch.Tensor, entry: object) -> torch.Tensor:
    fields = fields_of(entry)
    if "order" in fields:
        order = take_list(entry, "order", number)
        if sorted(order) != list(range(stored.dim())):
            raise ValueError(f"{order} is not an order of {stored.dim()} dimensions")
        stored = stored.permute([order.index(dim) for dim in range(stored.dim())])
    if "shape" in fields:
        stored = stored.expand(take_list(entry, "shape", count))
    return nn.Parameter(stored, requires_grad=take(entry, "trainable", bool)) if "trainable" in fields else stored
