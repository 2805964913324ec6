"""The W8A8 product with its epilogue: `lissom::int8_product`. Sums are exact, in int32; sizes are arbitrary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lissom.ops.triton_kernels.epilogue import ends, finish, tile_of, with_rows

GROUP = 8
FEW_ROWS = 32


@triton.jit
def int8_product_kernel(
    q, weight, scale, offset, weight_scale, sums, bias, other, result, rows, features, inputs, scale_row, offset_row, q_row,
    weight_row, other_row, ACTIVATION: tl.constexpr, COMBINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """activation((q Wᵀ - offset · sums) · scale · weight_scale + bias) and `other`; one tile."""
    down, across = tile_of(rows, features, BLOCK_M, BLOCK_N, GROUP)
    row = (down * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = across * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_K)
    left = q + row[:, None] * q_row + place[None, :]
    right = weight + column[None, :].to(tl.int64) * weight_row + place[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, inputs, BLOCK_K):
        inside = place < inputs - start
        a = tl.load(left, mask=(row[:, None] < rows) & inside[None, :], other=0)
        b = tl.load(right, mask=(column[None, :] < features) & inside[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K
    by_row, by_column = row < rows, column < features
    shift = tl.load(offset + row * offset_row, mask=by_row, other=0)
    total -= shift[:, None] * tl.load(sums + column, mask=by_column, other=0)[None, :]
    step = tl.load(scale + row * scale_row, mask=by_row, other=0.0)
    step = step[:, None] * tl.load(weight_scale + column, mask=by_column, other=0.0)[None, :]
    y = total.to(tl.float32) * step
    finish(y, row[:, None], column[None, :], rows, features, bias, other, result, other_row, ACTIVATION, COMBINE)


def blocks_for(rows: int, size: int) -> dict[str, int]:
    """The tile sizes, warps and stages for a number of rows whose results have `size` bytes an element.

    Stages fit the 99 KiB of shared memory of an sm_120. In float32 the epilogue of larger tiles spills registers.
    """
    if rows <= FEW_ROWS:
        sizes = {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    else:
        sizes = {"BLOCK_M": 128 if size <= 2 else 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {**sizes, "GROUP": GROUP}


def int8_product(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, weight_scale: torch.Tensor,
    sums: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, *, activation: str, combine: str,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Launches the kernel. q: [rows, inputs], weight: [features, inputs]."""
    q, weight = with_rows(q), with_rows(weight)
    bias, other, other_row = ends(bias, other)
    (rows, inputs), features = q.shape, weight.shape[0]
    result = q.new_empty(rows, features, dtype=dtype)
    if result.numel() == 0:
        return result
    blocks = blocks_for(rows, result.element_size())
    strides = [int(known.numel() > 1) for known in (scale, offset)]
    strides += [q.stride(0), weight.stride(0), other_row]
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(features, blocks["BLOCK_N"]),)
    with torch.cuda.device_of(q):
        int8_product_kernel[grid](
            q, weight, scale, offset, weight_scale, sums, bias, other, result, rows, features, inputs, *strides,
            ACTIVATION=activation, COMBINE=combine, enable_fp_fusion=False, **blocks,
        )  # fmt: skip
    return result
