"""The header and blocks of a GGUF file, read in a second, and not in several: vocabularies have 10⁵ entries."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from lissom.compiler.paging import SPILLED, empty_values, release
from lissom.ops.gguf_blocks import BLOCK_TYPES, unpack_blocks

_DEQUANTIZE = gguf.dequantize


class HeaderReader(GGUFReader):
    """gguf's reader with arrays of the header read together, into the same fields."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        item, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, count, start = GGUFValueType(int(item[0])), int(length[0]), orig_offs + item.nbytes + length.nbytes
        if kind in self.gguf_scalar_to_np:
            values = np.asarray(self._get(start, self.gguf_scalar_to_np[kind], count))
            parts, step = list(values[:, None]), 1
            end = start + values.nbytes
        elif kind is GGUFValueType.STRING:
            parts, end = self._strings(start, count)
            step = 2
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        if len(parts) != step * count:
            raise ValueError(f"the header has {count} entries at byte {orig_offs}, and the file ends before them")
        places = list(range(1 + step, 2 + step * count, step))
        return end - orig_offs, [item, length, *parts], places, [GGUFValueType.ARRAY, kind] if count else [GGUFValueType.ARRAY]

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """The lengths and bytes of strings, in turn, as far as the file goes, and the byte after them."""
        data, raw, parts = np.asarray(self.data), self.data.data, list[Any]()
        for _ in range(count):
            first = start + 8
            end = first + int.from_bytes(raw[start:first], "little")
            if end > len(raw) or first > len(raw):
                break
            parts += data[start:first].view(np.uint64), data[first:end]
            start = end
        return parts, start


def dequantize(blocks: Any, kind: GGMLQuantizationType) -> Any:
    """The values of blocks, [..., bytes of a row] to [..., columns], as `gguf.dequantize` gives them; on the disk if many."""
    known = BLOCK_TYPES.get(kind.name)
    if known is None:
        return _DEQUANTIZE(blocks, kind)
    columns = blocks.shape[-1] // known.bytes * known.size
    rows = blocks.reshape(-1, blocks.shape[-1])
    values, step = empty_values((len(rows), columns)), max(1, _AT_ONCE // columns)
    for start in range(0, len(rows), step):
        stored = torch.from_numpy(np.array(rows[start : start + step], dtype=np.uint8))
        unpacked = unpack_blocks(stored.flatten(), known, len(stored), columns)
        part = values[start : start + step]
        part.copy_(unpacked.dequantize(slice(None)).view(len(stored), columns))
        release(part)
    return values.numpy().reshape(*blocks.shape[:-1], columns)


_AT_ONCE = 1 << 18
"""The values that are computed at once, in the cache of the processor."""


class OnDisk:
    """numpy for the loader of transformers, whose copies of weights are on the disk, where they are not already."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def copy(self, array: Any) -> Any:
        """A copy, on the disk if it is large; the array itself if `dequantize` made it."""
        if array.dtype != np.float32 or array.nbytes < SPILLED:
            return array.copy()
        if not array.flags.owndata and array.flags.c_contiguous and isinstance(_memory(array), torch.Tensor):
            return array
        copied = empty_values(array.shape).numpy()
        copied[...] = array
        return copied


def _memory(array: Any) -> object:
    """What an array's memory belongs to."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def parse_value(value: Any, types: Any) -> Any:
    """The value of an entry of a field, as `_gguf_parse_value` of transformers gives it."""
    kind = types[-1] if isinstance(types, list) else types
    return value.tobytes().decode() if kind == GGUFValueType.STRING else value[0].item()
