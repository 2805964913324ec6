"""One copy of the weights in an artifact: the ONNX model reads those it shares with the program from the program's file.

The ONNX standard lets a tensor lie anywhere in a file beside the model, and in a safetensors file tensors lie as plain bytes.
Linear layers are transposed in ONNX; the program's file then holds their weights in ONNX's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy
import onnx
import torch

from lissom.backends.base import WEIGHTS_FILE
from lissom.backends.onnx.export import MODEL, WEIGHTS
from lissom.compiler.ir.program import Program
from lissom.frontends.onnx.file import external_place, is_external, parts_of, read_proto

_ALIGNMENT = 64
"""The alignment in bytes of tensors in the model's own file."""
Content = tuple[int, str]
"""The size and the hash of a tensor's bytes."""


def transposed_weights(program: Program, folder: Path) -> frozenset[str]:
    """The weights, by name, that the ONNX model in a folder holds transposed."""
    contents = {_content(data) for _, data in _external(folder / MODEL)}
    sizes = {size for size, _ in contents}
    transposed: set[str] = set()
    for name, weight in program.weights().items():
        if weight.dim() != 2 or weight.layout is not torch.strided or weight.nbytes not in sizes or name in program.state:
            continue
        plain, turned = (_content(_bytes(tensor)) for tensor in (weight, weight.t()))
        if turned in contents and plain not in contents:
            transposed.add(name)
    return frozenset(transposed)


def share_weights(folder: Path) -> None:
    """Let the model in a folder read tensors from the program's weights there, and drop its copies of them."""
    places = _places(folder / WEIGHTS_FILE)
    source = folder / f"{WEIGHTS}.all"
    (folder / WEIGHTS).rename(source)
    write_model(folder / MODEL, folder, places, own=source.name)
    source.unlink()
    if not (folder / WEIGHTS).stat().st_size:
        (folder / WEIGHTS).unlink()


def write_model(path: Path, folder: Path, places: Mapping[Content, int] | None = None, own: str = WEIGHTS) -> None:
    """Write a model to a folder, its tensors to the model's own file there, except those in the program's file.

    Args:
        path: of the model.
        places: offsets in the program's file by content.
        own: the present name of the model's own file.
    """
    proto = read_proto(path)
    end = 0
    with (folder / WEIGHTS).open("wb") as file:
        for tensor, data in _external(path, proto, own):
            offset = (places or {}).get(_content(data)) if len(data) else None
            if offset is not None:
                _refer(tensor, WEIGHTS_FILE, offset, len(data))
                continue
            file.write(bytes(-end % _ALIGNMENT))
            end += -end % _ALIGNMENT
            file.write(data)
            _refer(tensor, WEIGHTS, end, len(data))
            end += len(data)
    (folder / MODEL).write_bytes(proto.SerializeToString())


def _external(
    path: Path, proto: onnx.ModelProto | None = None, own: str = WEIGHTS
) -> Iterator[tuple[onnx.TensorProto, memoryview]]:
    """The external tensors of a model with their bytes.

    Args:
        own: the present name of its own file.
    """
    for tensor in parts_of(proto or read_proto(path), onnx.TensorProto):
        if is_external(tensor):
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value == WEIGHTS:
                    entry.value = own
            file, offset, length = external_place(tensor, path, path.absolute().parent)
            if length:
                yield tensor, numpy.memmap(file, dtype=numpy.uint8, mode="r", offset=offset, shape=(length,)).data
            else:
                yield tensor, memoryview(b"")


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _places(path: Path) -> dict[Content, int]:
    """The offset of every tensor of a safetensors file, by content."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    places: dict[Content, int] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            places.setdefault(_content(data[begin:end].data), begin)
    return places


def _bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def _content(data: memoryview) -> Content:
    return data.nbytes, hashlib.sha256(data).hexdigest()
