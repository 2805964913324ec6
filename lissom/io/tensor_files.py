"""Tensors written to a safetensors file, one at a time, without a copy of all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch

ALIGNMENT = 64
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes of safetensors files, with their names there."""


def write_tensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors aligned to 64 bytes, as PyTorch allocates them.

    The safetensors library does not align tensors, and on unaligned memory kernels are slower and round differently. The
    format allows no gaps, so tensors whose size is not a multiple of 64 bytes come last.

    Args:
        notes: the metadata of the file.
    """
    order = sorted(tensors.items(), key=lambda entry: (entry[1].nbytes % ALIGNMENT != 0, -entry[1].itemsize, entry[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
    end = 0
    for name, tensor in order:
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, tensor in order:
        file.write(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
