"""`lissom::quantize_rows`, `lissom::int8_product` and `lissom::int4_product`: what quantized layers take on CUDA devices.

    quantize_rows(x)   q = round(x / s) + z - 128, with the s and z of `lissom::fake_quantize_dynamic`, per-token
    int8_product       y = activation((q Wᵀ - (z - 128) · Σ W) · s · s_w + b) + other, or · other
    int4_product       y = activation(x Wᵀ + b) + other, or · other,   W = (W_q - z_w) · s_w, rounded to x's dtype

Their kernels are in `lissom/ops/triton_kernels`. Without Triton, and on devices that it has no kernels for, the references run.
Sizes are arbitrary: `_int_mm` of PyTorch takes multiples of 8, and more than 16 rows. x and q have any number of leading
dimensions, and kernels take them as the rows of a matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from lissom.ops import formats
from lissom.ops.checks import check_exact, check_floats, check_sizes, require
from lissom.ops.dimensions import ROWS, Dimensions
from lissom.ops.epilogue import ACTIVATIONS
from lissom.ops.formats import FORMATS
from lissom.ops.library import LIBRARY, define
from lissom.ops.quantization import dynamic_scale
from lissom.ops.quantized_linear import MOST_INPUTS
from lissom.ops.triton_kernels import has_kernels

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Operand = torch.Tensor | None

_MIDDLE = 128
"""Subtracted from uint8, it gives int8."""
_HALVES = (torch.float16, torch.bfloat16)
_EPILOGUE = 'str activation="none", str combine="add"'


def quantize_rows_reference(x: torch.Tensor) -> Rows:
    """The reference implementation."""
    _check_rows(x)
    scale, zero_point = dynamic_scale(x.float(), "uint8", "token")
    assert zero_point is not None
    whole = formats.nearest(x, scale, zero_point, FORMATS["uint8"])
    # NaN has no integer. A row with one, or with an infinity, has a scale that makes it NaN again.
    zero_point = zero_point.nan_to_num(0.0)
    q = torch.where(whole.isnan(), zero_point, whole) - _MIDDLE
    return q.to(torch.int8), scale, (zero_point - _MIDDLE).to(torch.int32)


def int8_product_reference(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, weight_scale: torch.Tensor,
    sums: torch.Tensor, bias: Operand = None, other: Operand = None, *, dtype: torch.dtype, activation: str = "none",
    combine: str = "add",
) -> torch.Tensor:  # fmt: skip
    """The reference implementation. Sums of integers are exact in float64."""
    options = {"dtype": dtype, "activation": activation, "combine": combine}
    _check_int8(q, weight, scale, offset, weight_scale, sums, bias, other, **options)
    product = functional.linear(q.double(), weight.double()) - offset.double() * sums.double()
    return _finish(product.float() * (scale * weight_scale), bias, other, activation, combine, dtype)


def int4_product_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero_point: Operand = None, bias: Operand = None,
    other: Operand = None, *, signed: bool, activation: str = "none", combine: str = "add",
) -> torch.Tensor:  # fmt: skip
    """The reference implementation. Products are summed in float32."""
    _check_int4(x, weight, scale, zero_point, bias, other, activation=activation, combine=combine)
    q = formats.unpack_halves(weight, FORMATS["int4" if signed else "uint4"])
    matrix = formats.dequantize_stored(q, scale, zero_point, x.dtype)
    return _finish(functional.linear(x.float(), matrix.float()), bias, other, activation, combine, x.dtype)


def _finish(y: torch.Tensor, bias: Operand, other: Operand, activation: str, combine: str, dtype: torch.dtype) -> torch.Tensor:
    y = ACTIVATIONS[activation](y if bias is None else y + bias.float())
    if other is not None:
        y = y * other.float() if combine == "mul" else y + other.float()
    return y.to(dtype)


def _check_rows(x: torch.Tensor) -> None:
    require(x.dim() >= 1, "x is a scalar, and must be [..., features]")
    require(x.dtype in (torch.float32, *_HALVES), "x is of {}, and must be of float32, float16 or bfloat16", x.dtype)


def _check_epilogue(x: torch.Tensor, features: int, operands: tuple[Operand, Operand], options: Any) -> None:
    activation, combine = options["activation"], options["combine"]
    require(activation in ACTIVATIONS, "the activation is '{}', and must be one of {}", activation, ", ".join(ACTIVATIONS))
    require(combine in ("add", "mul"), "combine is 'add' or 'mul', not '{}'", combine)
    bias, other = operands
    check_floats(bias, (features,), "a bias")
    check_floats(other, (*x.shape[:-1], features), "the other operand")


def _check_int8(q: torch.Tensor, weight: torch.Tensor, *operands: Operand, **options: Any) -> None:
    """Raise unless the operands fit q."""
    scale, offset, weight_scale, sums, bias, other = operands
    assert scale is not None and offset is not None and weight_scale is not None and sums is not None
    message = "q and the weight have the sizes {} and {}, and must be [..., inputs] and [features, inputs]"
    require(q.dim() >= 1 and weight.dim() == 2, message, q.shape, weight.shape)
    inputs, features, dtype = q.shape[-1], weight.shape[0], options["dtype"]
    require(dtype.is_floating_point, "the dtype of the result is {}, and must be a floating dtype", dtype)
    require(inputs <= MOST_INPUTS, "there are {} inputs, and sums of 32 bits take {}", inputs, MOST_INPUTS)
    check_sizes(weight, (features, inputs), "the weight")
    require(
        q.dtype == weight.dtype == torch.int8, "q is of {}, and the weight of {}: both must be of int8", q.dtype, weight.dtype
    )
    for known, dtype, name in ((scale, torch.float32, "the scale of q"), (offset, torch.int32, "the offset of q")):
        require(known.dtype == dtype, name + " is of {}, and must be of {}", known.dtype, dtype)
        if known.dim() > 0:
            check_exact(known, (*q.shape[:-1], 1), dtype, name)
    check_exact(weight_scale, (features,), torch.float32, "the weight's scale")
    check_exact(sums, (features,), torch.int32, "the sums of the weight")
    _check_epilogue(q, features, (bias, other), options)


def _check_int4(x: torch.Tensor, weight: torch.Tensor, *operands: Operand, **options: Any) -> None:
    """Raise unless the operands fit x."""
    scale, zero_point, bias, other = operands
    assert scale is not None
    message = "x and the weight have the sizes {} and {}, and must be [..., inputs] and [features, inputs / 2]"
    require(x.dim() >= 1 and weight.dim() == 2, message, x.shape, weight.shape)
    require(x.dtype in _HALVES, "x is of {}, and must be of float16 or bfloat16", x.dtype)
    inputs, features = x.shape[-1], weight.shape[0]
    require(inputs % 2 == 0, "there are {} inputs, and bytes hold two each", inputs)
    check_exact(weight, (features, inputs // 2), torch.uint8, "the weight")
    fits = scale.dim() == 2 and scale.shape[1] > 0 and inputs % scale.shape[1] == 0
    require(
        fits, "scales have the sizes {}, and must be [features, groups], where the groups divide {} inputs", scale.shape, inputs
    )
    check_exact(scale, (features, scale.shape[1]), scale.dtype, "the weight's scale")
    require(scale.is_floating_point(), "the weight's scale is of {}, and must be of a floating dtype", scale.dtype)
    if zero_point is not None:
        check_exact(zero_point, tuple(scale.shape), zero_point.dtype, "the weight's zero point")
    _check_epilogue(x, features, (bias, other), options)


def _fake_rows(x: torch.Tensor) -> Rows:
    _check_rows(x)
    by_row = *x.shape[:-1], 1
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(by_row, dtype=torch.float32),
        x.new_empty(by_row, dtype=torch.int32),
    )


def _fake_int8(q: torch.Tensor, weight: torch.Tensor, *operands: Operand, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    _check_int8(q, weight, *operands, *[None] * (6 - len(operands)), dtype=dtype, **_DEFAULTS | options)
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_int4(x: torch.Tensor, weight: torch.Tensor, *operands: Operand, signed: bool, **options: Any) -> torch.Tensor:
    _check_int4(x, weight, *operands, *[None] * (4 - len(operands)), **_DEFAULTS | options)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_DEFAULTS = {"activation": "none", "combine": "add"}

quantize_rows = define("quantize_rows(Tensor x) -> (Tensor, Tensor, Tensor)", quantize_rows_reference, _fake_rows)
"""The operator. x: [..., features], any strides. Returns q in int8, the scale [..., 1] in float32, and the zero point - 128
[..., 1] in int32. A row with NaN or infinities has a scale that makes its products NaN."""

int8_product = define(
    "int8_product(Tensor q, Tensor weight, Tensor scale, Tensor offset, Tensor weight_scale, Tensor sums, Tensor? bias=None, "
    f"Tensor? other=None, *, ScalarType dtype, {_EPILOGUE}) -> Tensor",
    int8_product_reference,
    _fake_int8,
    dimensions=Dimensions("... k, n k, _ -> ... n : ... n k"),
)
"""The operator. q: [..., inputs] and weight: [features, inputs], int8; scale, offset: [..., 1] or [], float32 and int32;
weight_scale, sums: [features], float32 and int32, the sums of the weight over its inputs; bias: [features]; other: [...,
features]; dtype: of the result [..., features]; activation: a name in ACTIVATIONS; combine: `add` or `mul`."""

int4_product = define(
    "int4_product(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point=None, Tensor? bias=None, Tensor? other=None, *, "
    f"bool signed, {_EPILOGUE}) -> Tensor",
    int4_product_reference,
    _fake_int4,
    dimensions=ROWS,
)
"""The operator. x: [..., inputs], float16 or bfloat16; weight: [features, inputs / 2], as `formats.pack_halves` packs it;
scale, zero_point: [features, groups]; signed: elements are from -8 to 7, else from 0 to 15. The rest is as above."""


def _matrix(operand: Any) -> Any:
    """[rows, features] of [..., features]; None and scalars as they are."""
    if operand is None or operand.dim() in (0, 2):
        return operand
    return operand.reshape(math.prod(operand.shape[:-1]), operand.shape[-1])


def _cuda_rows(x: torch.Tensor) -> Rows:
    if not has_kernels(x.device):
        return quantize_rows_reference(x)
    _check_rows(x)
    from lissom.ops.triton_kernels import row_quantization  # imports Triton

    q, *known = row_quantization.quantize_rows(_matrix(x))
    scale, offset = (part.reshape(*x.shape[:-1], 1) for part in known)
    return q.reshape(x.shape), scale, offset


def _cuda_int8(
    q: torch.Tensor,
    weight: torch.Tensor,
    *operands: Operand,
    dtype: torch.dtype,
    activation: str = "none",
    combine: str = "add",
) -> torch.Tensor:
    options: dict[str, Any] = {"dtype": dtype, "activation": activation, "combine": combine}
    if not has_kernels(q.device):
        return int8_product_reference(q, weight, *operands, **options)  # pyright: ignore[reportArgumentType]
    scale, offset, weight_scale, sums, bias, other = [*operands, *[None] * (6 - len(operands))]
    _check_int8(q, weight, scale, offset, weight_scale, sums, bias, other, **options)
    from lissom.ops.triton_kernels import int8_product as kernel  # imports Triton

    given: list[Any] = [_matrix(scale), _matrix(offset), weight_scale, sums, bias, _matrix(other)]
    return kernel.int8_product(_matrix(q), weight, *given, **options).reshape(*q.shape[:-1], len(weight))


def _cuda_int4(
    x: torch.Tensor, weight: torch.Tensor, *operands: Operand, signed: bool, activation: str = "none", combine: str = "add"
) -> torch.Tensor:
    options: dict[str, Any] = {"signed": signed, "activation": activation, "combine": combine}
    if not has_kernels(x.device):
        return int4_product_reference(x, weight, *operands, **options)  # pyright: ignore[reportArgumentType]
    scale, zero_point, bias, other = [*operands, *[None] * (4 - len(operands))]
    _check_int4(x, weight, scale, zero_point, bias, other, activation=activation, combine=combine)
    from lissom.ops.triton_kernels import int4_product as kernel  # imports Triton

    given: list[Any] = [scale, zero_point, bias, _matrix(other)]
    return kernel.int4_product(_matrix(x), weight, *given, **options).reshape(*x.shape[:-1], len(weight))


LIBRARY.impl("quantize_rows", _cuda_rows, "CUDA")
LIBRARY.impl("int8_product", _cuda_int8, "CUDA")
LIBRARY.impl("int4_product", _cuda_int4, "CUDA")
