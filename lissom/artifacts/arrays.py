"""Inputs and outputs as arrays in an `.npz` file, named after the arguments of the signature and the fields of the output."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from lissom.artifacts.weights import check_memory
from lissom.compiler.ir.signature import Signature, TensorArgument
from lissom.errors import ArtifactError, InputError
from lissom.frontends.capture.failures import first_line
from lissom.io.fields import shown
from lissom.io.files import writing_whole

_UNREADABLE = (
    *(OSError, ValueError, EOFError, MemoryError, OverflowError, RuntimeError, KeyError, SyntaxError, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
"""Exceptions that numpy, zipfile and its decompressors raise for a damaged file."""
_LONGEST = 1000
"""The longest name of an output."""


def read_inputs(signature: Signature, path: Path) -> tuple[tuple[object, ...], dict[str, object]]:
    """The positional and keyword arguments from a file, each array named by its path in the signature.

    Floating-point arrays are cast to the dtype of the argument, because numpy has no bfloat16.

    Raises:
        ArtifactError: if the file cannot be read.
        InputError: if it lacks an argument, or holds an unknown one.
    """
    arrays = read_arrays(path)
    wanted = {leaf.path: leaf for leaf in signature.tensors}
    for name in arrays:
        if name not in wanted:
            raise InputError(f"'{path}' holds '{name}', which is not an argument; the program takes {signature.describe()}")
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise InputError(f"'{path}' lacks '{missing[0]}'; the program takes {signature.describe()}")
    return signature.arguments([_tensor(leaf, arrays[name]) for name, leaf in wanted.items()])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, in this machine's byte order. Raises ArtifactError if they cannot be read."""
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            assert arrays.zip is not None
            # zipfile decompresses no member beyond the size in the directory of the archive.
            check_memory(sum(member.file_size for member in arrays.zip.infolist()), "its arrays")
            return {name: _native(arrays[name]) for name in arrays}
    except _UNREADABLE as error:
        raise ArtifactError(
            f"'{path}' cannot be read as arrays: {first_line(error)}; write it with numpy.savez, by the arguments' names"
        ) from error


def _native(array: object) -> np.ndarray:
    """The array in this machine's byte order. Raises ValueError for the bytes numpy returns of any other file."""
    if not isinstance(array, np.ndarray):
        raise ValueError("one of its files is not an array")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _tensor(leaf: TensorArgument, array: np.ndarray) -> torch.Tensor:
    try:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
    except (TypeError, ValueError) as error:
        raise InputError(f"argument '{leaf.path}' is an array of {array.dtype}, which is not a tensor dtype") from error
    casts = tensor.is_floating_point() and leaf.type.dtype.is_floating_point
    return tensor.to(leaf.type.device, leaf.type.dtype if casts else None)


def named_tensors(outputs: object, name: str = "") -> dict[str, torch.Tensor]:
    """A model's output tensors by name: fields, keys and indices, joined by dots; a single tensor is `output`."""
    if isinstance(outputs, torch.Tensor):
        return {name or "output": outputs}
    if isinstance(outputs, Mapping):
        fields = [(str(key), value) for key, value in outputs.items()]
    elif isinstance(outputs, (tuple, list)):
        fields = [(str(index), value) for index, value in enumerate(outputs)]
    else:
        return {}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in fields:
        tensors |= named_tensors(value, f"{name}.{key}" if name else key)
    return tensors


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a file, completely or not at all; bfloat16 and float8, which numpy lacks, as float32.

    Raises:
        ArtifactError: if it cannot be written, or for a name that a file cannot have.
    """
    odd = next((name for name in tensors if not _is_member(name)), None)
    if odd is not None:
        raise ArtifactError(f"an output is called {shown(odd)}, which a file in an archive cannot be called; rename the output")
    # numpy.savez takes names as keyword arguments, which cannot be `file`.
    with writing_whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _for_numpy(tensor).cpu().numpy(), allow_pickle=False)


def _is_member(name: str) -> bool:
    """True for the name of a file that a program which unpacks the archive writes into its own folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return name.isprintable() and len(name) <= _LONGEST and not path.is_absolute() and ".." not in path.parts


def _for_numpy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that numpy has, without a conjugation or sign that PyTorch has put off."""
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    lacking = tensor.is_floating_point() and (tensor.dtype == torch.bfloat16 or tensor.itemsize == 1)
    return tensor.float() if lacking else tensor.resolve_conj().resolve_neg()
