"""`lissom::packed_linear` and `lissom::packed_linear_norm`: a linear layer with a packed weight and a fused epilogue.

y = activation(x Wᵀ + b) + other, or activation(x Wᵀ + b) · other
z = layer_norm(x Wᵀ + b + other)

`lissom::packed_embedding` looks up rows of a packed weight, so that an LM head tied to the embedding table is stored once.

A packed weight holds panels of 32 output features. For float32 it is [panels, inputs, 32]; for bfloat16, whose instruction
multiplies two values of the reduction axis, [panels, inputs / 2, 32, 2]. Features are padded with zeros to whole panels. It is
an ordinary tensor, so it can be saved, moved and unpacked.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lissom.ops.checks import cast, check_exact, require
from lissom.ops.epilogue import PANEL, LinearForm, in_panels
from lissom.ops.library import define


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The packed form of a weight [features, inputs], float32 or bfloat16; bfloat16 needs an even number of inputs."""
    filled = in_panels(weight, 2) if weight.dtype == torch.bfloat16 else in_panels(weight).squeeze(3)
    return filled.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def unpack(packed: torch.Tensor, features: int) -> torch.Tensor:
    """The weight [features, inputs] of a packed one."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:features]


def packed_sizes(x: torch.Tensor, features: int) -> tuple[int, ...]:
    """The shape of a packed weight for this many output features.

    Raises:
        RuntimeError: for an odd number of inputs in bfloat16.
    """
    panels, inputs = -(-features // PANEL), x.shape[-1]
    if x.dtype != torch.bfloat16:
        return panels, inputs, PANEL
    require(inputs % 2 == 0, "there are {} inputs, and bfloat16 takes an even number", inputs)
    return panels, inputs // 2, PANEL, 2


def _check(x: torch.Tensor, weight: torch.Tensor, features: int) -> None:
    check_exact(weight, packed_sizes(x, features), x.dtype, "a packed weight")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, features: int) -> torch.Tensor:
    """x Wᵀ + b."""
    return functional.linear(x, unpack(weight, features), cast(bias, x.dtype))


def packed_embedding_reference(weight: torch.Tensor, indices: torch.Tensor, *, features: int, bits: int) -> torch.Tensor:
    """The reference implementation."""
    _check_rows(weight, indices, features=features, bits=bits)
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= features):
        raise IndexError(f"index out of range in packed_embedding, which has rows 0 to {features - 1}")
    panel, column = indices // PANEL, indices % PANEL
    if bits > 4:
        return weight[panel, :, column].flatten(indices.dim())
    bytes = weight[panel, :, column % (PANEL // 2)].flatten(indices.dim())
    single = (bytes >> (column // (PANEL // 2) * 4).to(torch.uint8).unsqueeze(-1)) & 15
    low, high = single.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def _check_rows(weight: torch.Tensor, indices: torch.Tensor, *, features: int, bits: int) -> None:
    require(indices.dtype in (torch.int64, torch.int32), "indices are of {}, and must be int64 or int32", indices.dtype)
    width = PANEL // 2 if bits == 4 else PANEL
    fits = weight.dim() in (3, 4) and weight.shape[2] == width and weight.is_contiguous()
    message = "a packed weight has the sizes {}, and must be contiguous and [panels, steps, {}] or that and a step's values"
    require(fits, message, weight.shape, width)
    even = weight.shape[1:].numel() // width % 2 == 0
    fits = weight.dtype == torch.uint8 and even if bits == 4 else bits in (8, 16, 32)
    require(fits, "a number takes {} bits, and must take 8, 16, 32, or 4 in bytes of an even number of inputs", bits)
    message = "a packed weight has {} panels of {} rows, and must have those of {} features"
    require(features >= 0 and weight.shape[0] == -(-features // PANEL), message, weight.shape[0], PANEL, features)


def _rows_of(weight: torch.Tensor, indices: torch.Tensor, *, features: int, bits: int) -> torch.Tensor:
    _check_rows(weight, indices, features=features, bits=bits)
    inputs = weight.shape[1] * (weight.shape[3] if weight.dim() == 4 else 1)
    return weight.new_empty((*indices.shape, inputs if bits > 4 else inputs // 2))


_FORM = LinearForm("packed_linear", ("Tensor weight",), "", _check, product)
_FORM.define()
packed_linear_reference = _FORM.reference

packed_linear = torch.ops.lissom.packed_linear.default
"""The operator. x: [..., inputs]; weight: packed; bias: [features]; other: [..., features], like the result; features: of the
result; activation: a name in ACTIVATIONS; combine: `add` or `mul`. Returns [..., features], of x's dtype."""

packed_linear_norm = torch.ops.lissom.packed_linear_norm.default
"""`packed_linear` followed by a layer norm over the features; norm_weight, norm_bias: [features]."""

packed_embedding = define(
    "packed_embedding(Tensor weight, Tensor indices, *, int features, int bits) -> Tensor", packed_embedding_reference, _rows_of
)
"""The rows `indices`, integers of any shape, of a packed weight: [..., inputs], of the weight's dtype. features: the number of
rows. bits: per element; with 4, where a weight is [panels, inputs, 16] or [panels, inputs / 4, 16, 4] bytes, the result is
packed two per byte: [..., inputs / 2]. Raises: IndexError for an index out of range."""
