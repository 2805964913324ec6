"""Dynamic int8 quantization of rows in one kernel: `lissom::quantize_rows`. One program reads a row twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_BLOCK = 4096
_LEAST = tl.constexpr(1e-30)  # formats.LEAST
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2^23: a float32 added to it has no bits for fractions, and rounds to even


@triton.jit
def quantize_rows_kernel(x, q, scale, offset, columns, x_row, x_column, BLOCK: tl.constexpr):
    """Scale, zero point - 128 and q - 128 of one row. NaN and infinities give q = zero point, and no finite scale."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    q += row * columns
    place = tl.arange(0, BLOCK).to(tl.int64)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        at = start + place
        value = tl.load(x + at * x_column, mask=at < columns, other=0.0).to(tl.float32)
        nan = value != value
        value = tl.where(nan, 0.0, value)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
        nans = nans | nan.to(tl.int32)
    least = tl.min(low)
    step = tl.maximum(tl.div_rn(tl.max(high) - least, 255.0), _LEAST)
    step = tl.where(tl.max(nans) > 0, float("nan"), step)
    zero = tl.div_rn(-least, step)
    zero = tl.where(zero == zero, tl.minimum(zero, 255.0), 0.0)
    zero = (zero + _ROUNDING) - _ROUNDING
    tl.store(scale + row, step)
    tl.store(offset + row, zero.to(tl.int32) - 128)
    inverse = tl.div_rn(1.0, step)
    for start in range(0, columns, BLOCK):
        at = start + place
        value = tl.load(x + at * x_column, mask=at < columns, other=0.0).to(tl.float32) * inverse
        # The bounds saturate with every zero point. They also keep the product and the sum from becoming one operation.
        value = tl.where(value == value, tl.minimum(tl.maximum(value, -512.0), 512.0), 0.0)
        whole = (value + _ROUNDING) - _ROUNDING + zero
        whole = tl.minimum(tl.maximum(whole, 0.0), 255.0).to(tl.int32) - 128
        tl.store(q + at, whole.to(tl.int8), mask=at < columns)


def blocks_for(columns: int) -> tuple[int, int]:
    """The elements a program reads at once, and its warps."""
    block = min(max(triton.next_power_of_2(columns), 32), LARGEST_BLOCK)
    return block, max(1, min(8, block // 256))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernel on x [rows, columns] of any strides."""
    rows, columns = x.shape
    q = x.new_empty(rows, columns, dtype=torch.int8)
    scale, offset = x.new_empty(rows, 1, dtype=torch.float32), x.new_empty(rows, 1, dtype=torch.int32)
    block, warps = blocks_for(columns)
    if rows:
        with torch.cuda.device_of(x):
            operands = x, q, scale, offset, columns, *x.stride()
            quantize_rows_kernel[(rows,)](*operands, BLOCK=block, num_warps=warps, enable_fp_fusion=False)
    return q, scale, offset
