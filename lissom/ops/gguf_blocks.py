"""Weights as GGUF files store them: blocks of integers with scales and minimums, unpacked without rounding anything.

    Q4_0, Q5_0, Q8_0, Q3_K, Q6_K       w = scale · q
    Q4_1, Q5_1, Q2_K, Q4_K, Q5_K       w = scale · q - minimum
    MXFP4                              w = scale · q, with q in fp4 and the scale a power of two

In the K types a block of 256 has one float16 factor, and each group of 16 or 32 an integer factor; their product, the scale, is
exact in float32. So is scale · q, so w has the same bits however it is computed.
The layout is that of ggml (ggml-common.h, ggml-quants.c), github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lissom.ops.formats import FORMATS, dequantize_stored, fp4_values, pack_halves

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class BlockType:
    """A type of block.

    Attributes:
        size: weights of a block.
        bytes: of a block.
        group: neighbouring weights with the same scale.
        format: a name in FORMATS that holds q.
        unpack: q [blocks, size], scale and minimum [blocks, size / group], of blocks [blocks, bytes].
    """

    name: str
    size: int
    bytes: int
    group: int
    format: str
    unpack: Callable[[torch.Tensor], Parts]


@dataclass(frozen=True)
class StoredBlocks:
    """A weight of stored blocks, in the form of `lissom::dequantize`.

    Attributes:
        q: [rows, columns], not packed; int8, or uint8 where there are zero points, or fp4 in float8_e4m3fn.
        scale: [rows, groups]; float8_e8m0fnu for fp4.
        zero_point: the minimums, [rows, groups] in floating point; None for types without.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    format: str

    def dequantize(self, rows: slice) -> torch.Tensor:
        """These rows in float32."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return dequantize_stored(self.q[rows], self.scale[rows], zero_point, torch.float32)

    def of_rows(self, rows: slice) -> StoredBlocks:
        """Some rows of the weight. Scales and zero points of all rows stay."""
        grids = (self.scale, self.zero_point)
        scale, zero_point = (grid if grid is None or not grid.dim() or len(grid) == 1 else grid[rows] for grid in grids)
        assert scale is not None
        return StoredBlocks(self.q[rows], scale, zero_point, self.format)

    def transposed(self) -> StoredBlocks:
        """The transposed weight, [columns, rows]."""
        grids = (self.scale, self.zero_point)
        scale, zero_point = (grid if grid is None or not grid.dim() else grid.T.contiguous() for grid in grids)
        assert scale is not None
        return StoredBlocks(self.q.T.contiguous(), scale, zero_point, self.format)

    def packed(self) -> torch.Tensor:
        """q as `lissom::dequantize` reads it: four-bit formats two per byte."""
        return pack_halves(self.q) if FORMATS[self.format].bits == 4 else self.q


def unpack_blocks(stored: torch.Tensor, kind: BlockType, rows: int, columns: int, chunk: int = 1 << 20) -> StoredBlocks:
    """The integers, scales and zero points of a weight [rows, columns].

    Args:
        stored: its bytes, uint8.
        chunk: how many weights are unpacked at once, which bounds the memory that is needed meanwhile.

    Raises:
        ValueError: unless the bytes are those of so many rows and columns.
    """
    if columns % kind.size or stored.numel() != rows * columns // kind.size * kind.bytes:
        raise ValueError(f"{stored.numel()} bytes are no {rows} rows of {columns} weights in {kind.name}")
    blocks, each = stored.view(-1, kind.bytes), max(1, chunk // kind.size)
    wholes: list[torch.Tensor | None] = []
    for start in range(0, len(blocks), each):
        parts = kind.unpack(blocks[start : start + each])
        wholes = wholes or [None if part is None else part.new_empty(len(blocks), *part.shape[1:]) for part in parts]
        for whole, part in zip(wholes, parts, strict=True):
            if whole is not None and part is not None:
                whole[start : start + each] = part
    q, scale, minimum = (None if whole is None else whole.view(rows, -1) for whole in wholes)
    assert q is not None and scale is not None
    return StoredBlocks(q, scale, minimum, kind.format)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 number at a byte of each block, [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _bits(stored: torch.Tensor, run: int, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """Small integers of bytes: of each run of bytes those at the first shift, then those at the next.

    Args:
        stored: [blocks, bytes]. Returns [blocks, bytes · shifts].
    """
    runs = stored.reshape(len(stored), -1, run)
    outputs = torch.empty(len(stored), runs.shape[1], len(shifts), run, dtype=torch.uint8, device="cpu")
    for place, shift in enumerate(shifts):
        torch.bitwise_right_shift(runs, shift, out=outputs[:, :, place])
    return outputs.bitwise_and_(mask).flatten(1)


def _single_bits(stored: torch.Tensor) -> torch.Tensor:
    """The eight bits of each byte, the lowest first: [blocks, bytes] to [blocks, 8 · bytes]."""
    return _EIGHT_BITS.index_select(0, stored.reshape(-1).int()).view(torch.uint8).view(len(stored), -1)


_EIGHT_BITS = (
    ((torch.arange(256, device="cpu").view(-1, 1) >> torch.arange(8, device="cpu")) & 1)
    .to(torch.uint8)
    .view(torch.int64)
    .view(-1)
)
"""For each byte its bits, a byte each, in one number: looking a byte up is faster than shifting it eight times."""


def _nibbles(stored: torch.Tensor, run: int) -> torch.Tensor:
    return _bits(stored, run, (0, 4), 15)


def _signed(q: torch.Tensor, middle: int) -> torch.Tensor:
    return q.view(torch.int8).sub_(middle)


def _q4_0(blocks: torch.Tensor) -> Parts:
    return _signed(_nibbles(blocks[:, 2:], 16), 8), _half(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> Parts:
    high = _single_bits(blocks[:, 2:6])
    return _signed(_nibbles(blocks[:, 6:], 16) | (high << 4), 16), _half(blocks, 0), None


def _q5_1(blocks: torch.Tensor) -> Parts:
    high = _single_bits(blocks[:, 4:8])
    return _nibbles(blocks[:, 8:], 16) | (high << 4), _half(blocks, 0), -_half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _q2_k(blocks: torch.Tensor) -> Parts:
    factors = blocks[:, :16]
    scale, minimum = _half(blocks, 80).float() * (factors & 15), _half(blocks, 82).float() * (factors >> 4)
    return _bits(blocks[:, 16:80], 32, (0, 2, 4, 6), 3), scale, minimum


def _q3_k(blocks: torch.Tensor) -> Parts:
    low, high = _bits(blocks[:, 32:96], 32, (0, 2, 4, 6), 3), _bits(blocks[:, :32], 32, range(8), 1)
    factors = _nibbles(blocks[:, 96:104], 8) | (_bits(blocks[:, 104:108], 4, (0, 2, 4, 6), 3) << 4)
    # A high bit that is not set subtracts 4.
    return _signed(low | (high << 2), 4), _half(blocks, 108).float() * _signed(factors, 32), None


def _factors(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight 6-bit factors of scales and of minimums in 12 bytes: Q4_K, Q5_K."""
    first, second, rest = packed.unflatten(1, (3, 4)).unbind(1)
    scale = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    return scale, torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)


def _scaled_twice(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums of Q4_K and Q5_K."""
    scale, minimum = _factors(blocks[:, 4:16])
    return _half(blocks, 0).float() * scale, _half(blocks, 2).float() * minimum


def _q4_k(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_scaled_twice(blocks)


def _q5_k(blocks: torch.Tensor) -> Parts:
    high = _bits(blocks[:, 16:48], 32, range(8), 1)
    return _nibbles(blocks[:, 48:], 32) | (high << 4), *_scaled_twice(blocks)


def _q6_k(blocks: torch.Tensor) -> Parts:
    low, high = _nibbles(blocks[:, :128], 64), _bits(blocks[:, 128:192], 32, (0, 2, 4, 6), 3)
    factors = blocks[:, 192:208].contiguous().view(torch.int8)
    return _signed(low | (high << 4), 32), _half(blocks, 208).float() * factors, None


def _mxfp4(blocks: torch.Tensor) -> Parts:
    codes = _nibbles(blocks[:, 1:], 16)
    # ggml has no negative zero, whose code is 8.
    return fp4_values(codes.masked_fill_(codes == 8, 0)), blocks[:, :1].contiguous().view(torch.float8_e8m0fnu), None


BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 32, 18, 32, "int4", _q4_0),
        BlockType("Q4_1", 32, 20, 32, "uint4", _q4_1),
        BlockType("Q5_0", 32, 22, 32, "int8", _q5_0),
        BlockType("Q5_1", 32, 24, 32, "uint8", _q5_1),
        BlockType("Q8_0", 32, 34, 32, "int8", _q8_0),
        BlockType("Q2_K", 256, 84, 16, "uint4", _q2_k),
        BlockType("Q3_K", 256, 110, 16, "int4", _q3_k),
        BlockType("Q4_K", 256, 144, 32, "uint4", _q4_k),
        BlockType("Q5_K", 256, 176, 32, "uint8", _q5_k),
        BlockType("Q6_K", 256, 210, 16, "int8", _q6_k),
        BlockType("MXFP4", 32, 17, 32, "fp4", _mxfp4),
    )
}
"""By ggml's names. Five and six bits are held in eight."""
