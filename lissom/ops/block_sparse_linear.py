"""`lissom::block_sparse_linear` and `lissom::block_sparse_quantized_linear`: linear layers that skip zero blocks.

y = activation(x Wᵀ + b) + other, or activation(x Wᵀ + b) · other
z = layer_norm(x Wᵀ + b + other)

and the same with Q(x) in place of x, as in `lissom::quantized_linear`. A block is 4 neighbouring inputs of a panel of 32 output
features, which a dense packed weight has side by side. Only blocks that are not zero are stored, panel after panel:
[stored, 4, 32] of float32, [stored, 2, 32, 2] of bfloat16, or [stored, 32, 4] of int8. `places`, [stored], says which four
inputs each has, and `ends`, [panels], where the blocks of each panel end; both are int32. The kernels skip the other blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from lissom.ops.checks import check_exact, require
from lissom.ops.dimensions import Dimensions
from lissom.ops.epilogue import PANEL, LinearForm
from lissom.ops.packed_linear import product as dense_product
from lissom.ops.quantized_linear import check as check_dense_quantized
from lissom.ops.quantized_linear import product as dense_quantized_product

BLOCK = 4
"""Neighbouring inputs of a block."""
_BLOCKS = {torch.float32: (BLOCK, PANEL), torch.bfloat16: (BLOCK // 2, PANEL, 2), torch.int8: (PANEL, BLOCK)}
"""The sizes of a block by the dtype of the weight."""


def pack_nonzero_blocks(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks of a dense packed weight that are not zero, their places, and the ends of panels.

    Args:
        packed: as `packed_linear.pack` or `quantized_linear.pack_bytes` gives it, of a multiple of BLOCK inputs.
    """
    stored = nonzero_blocks(packed)
    places = stored.nonzero()[:, 1].to(torch.int32)
    return _in_blocks(packed)[stored], places, stored.sum(1).cumsum(0).to(torch.int32)


def nonzero_blocks(packed: torch.Tensor) -> torch.Tensor:
    """True for the blocks of a dense packed weight that are not zero, [panels, blocks]."""
    return (_in_blocks(packed) != 0).flatten(2).any(2)


def _in_blocks(packed: torch.Tensor) -> torch.Tensor:
    """A packed weight as [panels, blocks, sizes of a block]."""
    block = _BLOCKS[packed.dtype]
    return packed if packed.dtype == torch.int8 else packed.unflatten(1, (-1, block[0]))


def unpack_blocks(weight: torch.Tensor, places: torch.Tensor, ends: torch.Tensor, inputs: int) -> torch.Tensor:
    """The dense packed weight of this many inputs.

    Raises:
        RuntimeError: for places outside the inputs, and for ends that are not those of the blocks.
    """
    blocks = -(-inputs // BLOCK)
    counts = ends.diff(prepend=ends.new_zeros(1))
    ordered = bool((counts >= 0).all()) and (int(ends[-1]) if len(ends) else 0) == len(places)
    require(ordered, "the ends of panels must not fall, and the last must be {}, the number of blocks", len(places))
    inside = not len(places) or (int(places.min()) >= 0 and int(places.max()) < blocks)
    require(inside, "the places of blocks must be from 0 to {}", blocks - 1)
    dense = weight.new_zeros(len(ends), blocks, *weight.shape[1:])
    panels = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), counts)
    dense[panels, places.long()] = weight
    return dense if weight.dtype == torch.int8 else dense.flatten(1, 2)


def _check_blocks(dtype: torch.dtype, weight: torch.Tensor, places: torch.Tensor, ends: torch.Tensor, features: int) -> None:
    """Raise unless the tensors have sizes that fit each other; what they hold is looked at when a call runs."""
    require(weight.dim() >= 1 and dtype in _BLOCKS, "a weight has {} dimensions in {}", weight.dim(), dtype)
    check_exact(weight, (weight.shape[0], *_BLOCKS[dtype]), dtype, "the blocks of a weight")
    check_exact(places, (weight.shape[0],), torch.int32, "the places of blocks")
    check_exact(ends, (-(-features // PANEL),), torch.int32, "the ends of panels")


def _check(x: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, ends: torch.Tensor, *, features: int) -> None:
    require(x.shape[-1] % BLOCK == 0, "there are {} inputs, and blocks take a multiple of {}", x.shape[-1], BLOCK)
    _check_blocks(x.dtype, weight, places, ends, features)


def _product(x: torch.Tensor, *operands: Any, features: int) -> torch.Tensor:
    weight, places, ends, bias = operands
    return dense_product(x, unpack_blocks(weight, places, ends, x.shape[-1]), bias, features=features)


def _check_quantized(x: torch.Tensor, *operands: Any, features: int, granularity: str = "token") -> None:
    weight, places, ends, *others = operands
    _check_blocks(torch.int8, weight, places, ends, features)
    require(
        granularity != "group" and others[0].dim() == 1,
        "a weight with zero blocks has one scale a feature, x one a row or in all",
    )
    sizes = len(ends), -(-x.shape[-1] // BLOCK), *_BLOCKS[torch.int8]
    dense = torch.empty(sizes, dtype=torch.int8, device="meta")
    check_dense_quantized(x, dense, *others, None, features=features, granularity=granularity)


def _quantized_product(x: torch.Tensor, *operands: Any, features: int, granularity: str = "token") -> torch.Tensor:
    """Q(x) Wᵀ + b in float32."""
    weight, places, ends, *others, bias = operands
    dense = unpack_blocks(weight, places, ends, x.shape[-1])
    return dense_quantized_product(x, dense, *others, None, bias, features=features, granularity=granularity)


_BLOCK_OPERANDS = ("Tensor weight", "Tensor places", "Tensor ends")
_SCALES = ("Tensor scale", "Tensor sums", "Tensor? x_scale=None", "Tensor? x_zero_point=None")
_DIMENSIONS = Dimensions(
    "... k, !stored !a !b, _ -> ... n : ... stored a b | ... k, !stored !a !b !c, _ -> ... n : ... stored a b c"
)
"""Each row is multiplied by the blocks that are stored, of two or three dimensions."""
_FORM = LinearForm("block_sparse_linear", _BLOCK_OPERANDS, "", _check, _product, _DIMENSIONS)
_FORM.define()
block_sparse_linear_reference = _FORM.reference
_QUANTIZED = LinearForm(
    "block_sparse_quantized_linear",
    (*_BLOCK_OPERANDS, *_SCALES),
    'str granularity="token"',
    _check_quantized,
    _quantized_product,
    _DIMENSIONS,
)
_QUANTIZED.define()
block_sparse_quantized_linear_reference = _QUANTIZED.reference

block_sparse_linear = torch.ops.lissom.block_sparse_linear.default
"""The operator. x: [..., inputs], float32 or bfloat16, of a multiple of four inputs; weight, places, ends: as above, the weight
of x's dtype; the others as in `packed_linear`. Returns [..., features], of x's dtype."""

block_sparse_linear_norm = torch.ops.lissom.block_sparse_linear_norm.default
"""`block_sparse_linear` followed by a layer norm over the features; norm_weight, norm_bias: [features]."""

block_sparse_quantized_linear = torch.ops.lissom.block_sparse_quantized_linear.default
"""The operator. x: [..., inputs], float32 or bfloat16; weight, places, ends: as above, int8; the others as in
`quantized_linear`, with one scale a feature. Returns [..., features], of x's dtype."""

block_sparse_quantized_linear_norm = torch.ops.lissom.block_sparse_quantized_linear_norm.default
"""`block_sparse_quantized_linear` followed by a layer norm over the features; norm_weight, norm_bias: [features]."""
