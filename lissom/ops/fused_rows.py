"""`lissom::fused_layer_norm`, `lissom::fused_rms_norm` and `lissom::fused_rotary`: row-wise computations in one pass.

fused_layer_norm: (x - mean(x)) / sqrt(var(x) + eps) · weight + bias   Ba et al. 2016, eq. 4
fused_rms_norm: x / sqrt(mean(x²) + eps) · weight               Zhang and Sennrich 2019, eq. 4
fused_rotary: as `lissom::rotary`, for [batch, heads, tokens, head_dim]

`layer_norm`, `rms_norm` and `lissom::rotary` are lowered to them on a CPU. They compute in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lissom.ops.checks import cast, check_broadcast, check_floats, require
from lissom.ops.fused_attention import output_of
from lissom.ops.library import define
from lissom.ops.rotary import rotary_reference


def fused_layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, *, eps: float
) -> torch.Tensor:
    """The reference implementation."""
    _check_norm(x, weight, bias)
    return functional.layer_norm(x, (x.shape[-1],), cast(weight, x.dtype), cast(bias, x.dtype), eps)


def fused_rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float) -> torch.Tensor:
    """The reference implementation."""
    _check_norm(x, weight)
    return functional.rms_norm(x, (x.shape[-1],), cast(weight, x.dtype), eps)


def fused_rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """The reference implementation."""
    _check_rotary(x, cos, sin)
    return rotary_reference(x, cos, sin, interleaved=interleaved).transpose(1, 2).contiguous().transpose(1, 2)


def _check_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> None:
    require(x.dim() >= 1, "x is a scalar, and must be [..., features]")
    check_floats(weight, x.shape[-1:], "a norm's weight")
    check_floats(bias, x.shape[-1:], "a norm's bias")


def _check_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    require(x.dim() == 4, "x has {} dimensions, and must be [batch, heads, tokens, head_dim]", x.dim())
    features = x.shape[-1]
    require(features % 2 == 0, "x has {} features, and must have an even number", features)
    for table, name in ((cos, "cos"), (sin, "sin")):
        require(table.dtype == x.dtype, "{} is of {}, and must be of {}", name, table.dtype, x.dtype)
        require(
            table.dim() >= 1 and table.shape[-1] in (features, features // 2) and table.shape[-1] == cos.shape[-1],
            "cos and sin have the sizes {} and {}, and must have one number for each of {} features, or one a pair",
            cos.shape,
            sin.shape,
            features,
        )
        check_broadcast(table, (*x.shape[:-1], table.shape[-1]), name)


def _norm_shape(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    _check_norm(x, weight, bias)
    return x.new_empty(x.shape)


def _rotary_shape(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: object) -> torch.Tensor:
    _check_rotary(x, cos, sin)
    return output_of(x, x)


fused_layer_norm = define(
    "fused_layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor",
    fused_layer_norm_reference,
    _norm_shape,
)
"""The operator. x: [..., features]; weight, bias: [features]. Returns a contiguous tensor like x."""

fused_rms_norm = define(
    "fused_rms_norm(Tensor x, Tensor? weight=None, *, float eps) -> Tensor", fused_rms_norm_reference, _norm_shape
)
"""The operator. x: [..., features]; weight: [features]. Returns a contiguous tensor like x."""

fused_rotary = define(
    "fused_rotary(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor", fused_rotary_reference, _rotary_shape
)
"""The operator. x: [batch, heads, tokens, head_dim]; cos, sin: broadcast to x, with head_dim features or half as many, of x's
dtype. Returns a tensor like x, laid out in memory as [batch, tokens, heads, head_dim]."""
