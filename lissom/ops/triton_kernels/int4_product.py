"""The W4A16 product with its epilogue: `lissom::int4_product`. A weight has a scale, and may have a zero point, per group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lissom.ops.triton_kernels.epilogue import ends, finish, tile_of, with_rows

GROUP = 8
FEW_ROWS = 32


@triton.jit
def int4_product_kernel(
    x, weight, scale, zero_point, bias, other, result, rows, features, inputs, group, x_row, other_row,
    SIGNED: tl.constexpr, ZERO: tl.constexpr, ACTIVATION: tl.constexpr, COMBINE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """activation(x Wᵀ + bias) and `other`; one tile. W is rounded to x's dtype, as where it is dequantized before."""
    down, across = tile_of(rows, features, BLOCK_M, BLOCK_N, GROUP)
    row = (down * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = across * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = column.to(tl.int64)[:, None]
    place = tl.arange(0, BLOCK_K)
    half = tl.arange(0, BLOCK_K // 2)
    groups = inputs // group
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        at = start + place
        a = tl.load(x + row[:, None] * x_row + at[None, :], mask=(row[:, None] < rows) & (at[None, :] < inputs), other=0.0)
        pair = start // 2 + half
        held = (column[:, None] < features) & (pair[None, :] < inputs // 2)
        both = tl.load(weight + feature * (inputs // 2) + pair[None, :], mask=held, other=0).to(tl.int32)
        low, high = both & 15, both >> 4
        if SIGNED:
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        value = tl.interleave(low, high).to(tl.float32)
        known = (column[:, None] < features) & (at[None, :] < inputs)
        block = feature * groups + (at // group)[None, :]
        step = tl.load(scale + block, mask=known, other=0.0).to(tl.float32)
        if ZERO == "integer":
            value -= tl.load(zero_point + block, mask=known, other=0).to(tl.float32)
        value *= step
        if ZERO == "float":
            value -= tl.load(zero_point + block, mask=known, other=0.0).to(tl.float32)
        total = tl.dot(a, tl.trans(value.to(a.dtype)), total)
    finish(total, row[:, None], column[None, :], rows, features, bias, other, result, other_row, ACTIVATION, COMBINE)


def blocks_for(rows: int) -> dict[str, int]:
    """The tile sizes, warps and stages for a number of rows."""
    if rows <= FEW_ROWS:
        sizes = {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    else:
        sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    return {**sizes, "GROUP": GROUP}


def int4_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bias: torch.Tensor | None,
    other: torch.Tensor | None, *, signed: bool, activation: str, combine: str,
) -> torch.Tensor:  # fmt: skip
    """Launches the kernel. x: [rows, inputs] in float16 or bfloat16; the weight and its grid are contiguous."""
    x = with_rows(x)
    bias, other, other_row = ends(bias, other)
    (rows, inputs), features = x.shape, weight.shape[0]
    result = x.new_empty(rows, features)
    if result.numel() == 0:
        return result
    blocks = blocks_for(rows)
    zero = "none" if zero_point is None else "float" if zero_point.is_floating_point() else "integer"
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(features, blocks["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        int4_product_kernel[grid](
            x, weight, scale, zero_point, bias, other, result, rows, features, inputs, max(inputs // max(scale.shape[1], 1), 1),
            x.stride(0), other_row, SIGNED=signed, ZERO=zero, ACTIVATION=activation,
            COMBINE=combine, enable_fp_fusion=False, **blocks,
        )  # fmt: skip
    return result
