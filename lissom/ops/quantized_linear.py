"""`lissom::quantized_linear` and `lissom::quantized_linear_norm`: an int8 linear layer (W8A8, W4A8) with a fused epilogue.

y = activation(Q(x) Wᵀ + b) + other, or activation(Q(x) Wᵀ + b) · other
z = layer_norm(Q(x) Wᵀ + b + other)

Q quantizes x to `uint8` inside the kernel, or, with a scale for 32 neighbours, to `int8`, as `lissom::fake_quantize_dynamic`
and `lissom::fake_quantize` do. W is int8 with per-channel scales, or int8 or int4 with a scale for each group of inputs; in
four bits it may have a zero point for each too, where x has a scale for 32 neighbours. Products are summed in int32 and
dequantized at the end, with group-wise scales at the end of each group:

    Q(x) Wᵀ = s_x · s_w · (Σ x_q w_q - z_x · Σ w_q)
    Q(x) Wᵀ = s_x · (Σ_g s_wg · Σ x_q w_q - z_x · Σ_g s_wg · Σ w_q)
    Q(x) Wᵀ = Σ_g s_xg · s_wg · (Σ x_q w_q - z_wg · Σ x_q)

Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, eq. 7.

A packed weight holds panels of 32 output features, [panels, inputs / 4, 32, 4]: an instruction multiplies four values of the
reduction axis, or, with AVX2, two: the first and third, then the others. Inputs are padded with zeros to a multiple of four,
features to whole panels. With four bits, features c and c + 16 of a panel share a byte, c in its low half:
[panels, inputs / 4, 16, 4]. Group-wise scales are [panels, groups, 32].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lissom.ops.checks import cast, check_exact, require
from lissom.ops.epilogue import PANEL, LinearForm, in_panels
from lissom.ops.formats import SCALES, dequantize
from lissom.ops.grouped_linear import GroupedLinear
from lissom.ops.quantization import GROUP, check_granularity, fake_quantize_dynamic_reference, fake_quantize_reference
from lissom.ops.weight_quantized_linear import pack_blocks, unpack_blocks

X_FORMATS = {"token": "uint8", "tensor": "uint8", "group": "int8"}
"""The format of x by the granularity of its scale."""
MOST_INPUTS = 2**16
"""The most inputs; the sum of more int8 products could overflow int32."""
STEP = 4
"""Inputs that an instruction multiplies at once."""


def pack_bytes(weight: torch.Tensor) -> torch.Tensor:
    """The packed form of a weight [features, inputs] of int8."""
    return in_panels(weight, STEP).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def pack_halves_of_bytes(weight: torch.Tensor) -> torch.Tensor:
    """The packed form of a weight [features, inputs] of four bits, not packed before."""
    low, high = (pack_bytes(weight).to(torch.uint8) & 15).split(PANEL // 2, 2)
    return low | (high << 4)


def pack_groups(
    q: torch.Tensor, scale: torch.Tensor, bits: int, zero_point: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operands for a weight [features, inputs] of 8 or 4 bits with scales [features or 1, groups], and its sums.

    Args:
        zero_point: in the shape of the scale.
    """
    sums = dequantize(q, scale, zero_point, torch.float32).sum(1)
    packed = pack_bytes(q) if bits == 8 else pack_halves_of_bytes(q)
    return packed, pack_blocks(scale, len(q)), fill_panels(sums, len(q))


def unpack_bytes(packed: torch.Tensor, features: int, inputs: int, *, signed: bool = True) -> torch.Tensor:
    """The weight [features, inputs] of a packed one, of eight bits or four.

    Args:
        signed: whether those of four bits have a sign.
    """
    if packed.dtype == torch.uint8:
        packed = torch.cat((packed & 15, packed >> 4), 2)
        packed = (packed.to(torch.int8) ^ 8) - 8 if signed else packed
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:features, :inputs]


def fill_panels(values: torch.Tensor, features: int) -> torch.Tensor:
    """A vector [features], or a single element, as [packed features]: padded to whole panels."""
    return functional.pad(values.reshape(-1).expand(features), (0, -features % PANEL)).contiguous()


def _is_by_row(known: torch.Tensor, x: torch.Tensor) -> bool:
    """True for the known scale or zero point of each row of x, [..., 1]."""
    return known.dtype == torch.float32 and tuple(known.shape) == (*x.shape[:-1], 1)


def check(x: torch.Tensor, *operands: Any, features: int, granularity: str = "token") -> None:
    """Raise unless the operands fit x."""
    weight, scale, sums, x_scale, x_zero_point, zero_point = operands
    inputs, panels, grouped = x.shape[-1], -(-features // PANEL), scale.dim() == 3
    require(inputs <= MOST_INPUTS, "there are {} inputs, and sums of 32 bits take {}", inputs, MOST_INPUTS)
    packed = grouped and weight.dtype == torch.uint8
    sizes = panels, -(-inputs // STEP), PANEL // 2 if packed else PANEL, STEP
    check_exact(weight, sizes, torch.uint8 if packed else torch.int8, "a packed weight")
    if grouped:
        fits = scale.shape[1] > 0 and inputs % (STEP * scale.shape[1]) == 0
        message = "scales have the sizes {}, and must be [panels, groups, 32], with a multiple of four of {} inputs a group"
        require(fits, message, scale.shape, inputs)
        kind = scale.dtype if scale.dtype in SCALES else torch.float32
        check_exact(scale, (panels, scale.shape[1], PANEL), kind, "a weight's scale")
    else:
        check_exact(scale, (panels * PANEL,), torch.float32, "a weight's scale")
    check_exact(sums, (panels * PANEL,), torch.float32 if grouped else torch.int32, "the sums of a weight")
    check_granularity(x, granularity)
    if granularity == "group":
        require(x_scale is None, "x has a known scale, and granularity 'group' computes scales")
        each = inputs // scale.shape[1] if grouped else inputs
        message = "a scale of the weight is of {} inputs, and must be of a multiple of {} where x has groups of {}"
        require(each % GROUP == 0, message, each, GROUP, GROUP)
    known = [operand for operand in (x_scale, x_zero_point) if operand is not None]
    if not all(_is_by_row(operand, x) for operand in known):
        message = "x has one scale and one zero point where they are known, or both in float32 for each row"
        require(all(operand.numel() == 1 for operand in known), message)
    require(x_zero_point is None or x_scale is not None, "x has a zero point only with a scale")
    if zero_point is not None:
        message = "a weight has zero points only with four bits, where x has the granularity 'group'"
        require(packed and granularity == "group", message)
        check_exact(zero_point, tuple(scale.shape), torch.uint8, "a weight's zero point")


def product(x: torch.Tensor, *operands: Any, features: int, granularity: str = "token") -> torch.Tensor:
    """Q(x) Wᵀ + b in float32."""
    weight, scale, _, x_scale, x_zero_point, zero_point, bias = operands
    if x_scale is None:
        rounded = fake_quantize_dynamic_reference(x.float(), format=X_FORMATS[granularity], granularity=granularity)
    else:
        rounded = fake_quantize_reference(x.float(), x_scale, x_zero_point, format=X_FORMATS[granularity])
    q = unpack_bytes(weight, features, x.shape[-1], signed=zero_point is None)
    blocks = unpack_blocks(scale, features) if scale.dim() == 3 else scale[:features, None]
    zeros = None if zero_point is None else unpack_blocks(zero_point, features)
    matrix = dequantize(q, blocks, zeros, torch.float32)
    return functional.linear(rounded, matrix, cast(bias, torch.float32))


_STORED = ("Tensor weight", "Tensor scale", "Tensor sums")
_OPTIONAL = ("Tensor? x_scale=None", "Tensor? x_zero_point=None", "Tensor? zero_point=None")
_FORM = LinearForm("quantized_linear", (*_STORED, *_OPTIONAL), 'str granularity="token"', check, product)
_FORM.define()
quantized_linear_reference = _FORM.reference
_GROUPED = GroupedLinear(_FORM)
quantized_linear_grouped_reference = _GROUPED.reference

quantized_linear = torch.ops.lissom.quantized_linear.default
"""The operator. x: [..., inputs], float32 or bfloat16; weight: packed; scale, sums: per-channel scale and sum of the
weights, float32 and int32, padded to whole panels; with group-wise scales [panels, groups, 32], float16 or float32, sums
are Σ_g s_wg · Σ w_q in float32; x_scale, x_zero_point: the known scale of x, [], or of each row, float32 [..., 1];
zero_point: of a four-bit weight, in the shape of its scale, uint8; bias: [features]; other: like the result, [..., features];
features: of the result; granularity: of the dynamic scale of x, `token`, `tensor` or `group`; activation: a name in
ACTIVATIONS; combine: `add` or `mul`. Returns [..., features], of x's dtype."""

quantized_linear_norm = torch.ops.lissom.quantized_linear_norm.default
"""`quantized_linear` followed by a layer norm over the features; norm_weight, norm_bias: [features]."""

quantized_linear_grouped = _GROUPED.define()
"""The layers of experts. x: [rows, inputs], sorted by group; weight, scale, sums, zero_point: as above, [groups, ...]; x_scale,
x_zero_point: of all rows; offs: [groups], the end of each group's rows. Returns [rows, features]."""
