"""The header and blocks of a GGUF file, read in a second, and not in several: vocabularies have 10⁵ entries."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from lissom.compiler.paging import SPILLED, empty_on_disk
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
    """The values of blocks, [..., bytes of a row] to [..., columns], as `gguf.dequantize` gives them."""
    known = BLOCK_TYPES.get(kind.name)
    if known is None:
        return _DEQUANTIZE(blocks, kind)
    stored = torch.from_numpy(np.array(blocks, dtype=np.uint8))
    columns = stored.shape[-1] // known.bytes * known.size
    unpacked = unpack_blocks(stored.flatten(), known, stored.numel() // stored.shape[-1], columns)
    return unpacked.dequantize(slice(None)).view(*stored.shape[:-1], columns).numpy()


class OnDisk:
    """numpy for the loader of transformers, whose copies of weights are in files without names."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def copy(self, array: Any) -> Any:
        """A copy, on the disk if it is large. Raises UnsupportedError if that is full."""
        if array.nbytes < SPILLED:
            return array.copy()
        copied = empty_on_disk(array.nbytes).numpy().view(array.dtype).reshape(array.shape)
        copied[...] = array
        return copied


def parse_value(value: Any, types: Any) -> Any:
    """The value of an entry of a field, as `_gguf_parse_value` of transformers gives it."""
    kind = types[-1] if isinstance(types, list) else types
    return value.tobytes().decode() if kind == GGUFValueType.STRING else value[0].item()
