"""What the products share: the order of tiles, and the epilogue of a linear layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def tile_of(rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program: GROUP tiles of rows share each tile of the weight while it is in L2."""
    place = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    first = place // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = place % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activations of `lissom.ops.epilogue.ACTIVATIONS`, in float32."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "squared_relu":
        x = tl.where(x < 0, 0.0, x)
        x = x * x
    return x


@triton.jit
def finish(y, row, column, rows, features, bias, other, result, other_row, ACTIVATION: tl.constexpr, COMBINE: tl.constexpr):
    """Add the bias, apply the epilogue, and store the tile.

    Args:
        row: [tile rows, 1] in int64.
        column: [1, tile features].
        other_row: the stride of rows of `other`, whose features are contiguous.
    """
    if bias is not None:
        y += tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    inside = (row < rows) & (column < features)
    if other is not None:
        value = tl.load(other + row * other_row + column, mask=inside, other=0.0).to(tl.float32)
        if COMBINE == "mul":
            y *= value
        else:
            y += value
    tl.store(result + row * features + column, y.to(result.dtype.element_ty), mask=inside)


def with_rows(operand: torch.Tensor) -> torch.Tensor:
    """A matrix with contiguous rows: as it is, or a copy."""
    return operand if operand.stride(1) == 1 or operand.shape[1] <= 1 else operand.contiguous()


def ends(bias: torch.Tensor | None, other: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The operands of `finish`, and the stride of rows of `other`."""
    other = None if other is None else with_rows(other)
    return None if bias is None else bias.contiguous(), other, 0 if other is None else other.stride(0)
