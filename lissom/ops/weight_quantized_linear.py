"""`lissom::weight_quantized_linear`, with `_norm` and `_grouped`: a weight-only quantized linear layer.

y = activation(x Wᵀ + b) + other, or activation(x Wᵀ + b) · other,   W = (W_q - zero_point) · scale
W = W_q · scale - zero_point for zero points in floating point
z = layer_norm(x Wᵀ + b + other)

The weight has 8, 6, 5 or 4 bits (W8A16, W4A16), as integers, fp8 or fp4; activations, products and sums are floating point.
This saves memory traffic, which takes most of the time for one row. The kernel dequantizes in registers for a few rows, and a
panel at a time for more.

A packed weight holds panels of 32 output features, [panels, inputs, bytes]. With 8 bits, a feature has a byte. With fewer,
features c and c + 16 of a panel share a byte of their lowest four bits, c in its low half; the other bits follow after these 16
bytes, feature by feature from the lowest bit of each byte up. Scales and zero points are [panels, groups, 32].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from lissom.ops.checks import cast, check_exact, require
from lissom.ops.epilogue import PANEL, LinearForm, in_panels
from lissom.ops.formats import BYTE_SCALES, FORMATS, SCALES, Format, fp4_codes, fp4_values
from lissom.ops.grouped_linear import GroupedLinear
from lissom.ops.quantization import dequantize_reference

FORMS: Mapping[str, Format] = {
    **FORMATS,
    "int6": Format("int6", -32, 31, 6, torch.uint8, True),
    "int5": Format("int5", -16, 15, 5, torch.uint8, True),
    "uint5": Format("uint5", 0, 31, 5, torch.uint8, False),
}
"""The formats of packed weights. In programs, weights of 5 and 6 bits are int8 or uint8."""


def narrowest(q: torch.Tensor, format: str) -> str:
    """The format with the fewest bits that holds a weight stored in eight."""
    if format not in ("int8", "uint8") or not q.numel():
        return format
    low, high = (int(extreme) for extreme in q.aminmax())
    names = ("int5", "int6") if FORMS[format].low else ("uint5",)
    return next((name for name in names if FORMS[name].low <= low and high <= FORMS[name].high), format)


def step_bytes(format: str) -> int:
    """The bytes of one input of a panel."""
    return PANEL * FORMS[format].bits // 8


def pack_stored(q: torch.Tensor, format: str) -> torch.Tensor:
    """The packed form of a weight [features, inputs], which is not packed in any format."""
    filled = in_panels(q if format != "fp4" else fp4_codes(q)).squeeze(3).transpose(1, 2)
    bits = FORMS[format].bits
    if bits == 8:
        return filled.clone(memory_format=torch.contiguous_format)
    filled = filled.to(torch.uint8)
    low, high = (filled & 15).split(PANEL // 2, -1)
    parts = [low | (high << 4)]
    if bits > 4:
        each = 8 // (bits - 4)
        rest = ((filled >> 4) & (1 << (bits - 4)) - 1).unflatten(-1, (-1, each))
        places = torch.arange(each, device=q.device).mul(bits - 4).to(torch.uint8)
        parts.append((rest << places).sum(-1, dtype=torch.uint8))
    return torch.cat(parts, -1).contiguous()


def unpack_stored(packed: torch.Tensor, format: str, features: int) -> torch.Tensor:
    """The weight [features, inputs] of a packed one."""
    form = FORMS[format]
    if form.bits < 8:
        halves, rest = packed.split((PANEL // 2, packed.shape[-1] - PANEL // 2), -1)
        q = torch.cat((halves & 15, halves >> 4), -1)
        if form.bits > 4:
            places = torch.arange(8 // (form.bits - 4), device=q.device).mul(form.bits - 4).to(torch.uint8)
            q = q | ((rest.unsqueeze(-1) >> places & (1 << (form.bits - 4)) - 1).flatten(-2) << 4)
        sign = 1 << (form.bits - 1)
        packed = fp4_values(q) if format == "fp4" else (q.to(torch.int8) ^ sign) - sign if form.low < 0 else q
    return packed.transpose(1, 2).flatten(0, 1)[:features]


def pack_blocks(values: torch.Tensor, features: int) -> torch.Tensor:
    """Group-wise scales or zero points, [features or 1, groups] or [], as [panels, groups, 32]: a panel's side by side."""
    blocks = values.reshape(-1, values.shape[-1] if values.dim() else 1).expand(features, -1)
    stored = blocks.view(torch.uint8) if blocks.dtype in BYTE_SCALES else blocks
    filled = functional.pad(stored, (0, 0, 0, -features % PANEL))
    return filled.view(-1, PANEL, filled.shape[1]).transpose(1, 2).contiguous().view(blocks.dtype)


def unpack_blocks(packed: torch.Tensor, features: int) -> torch.Tensor:
    """Group-wise scales or zero points of packed ones, [features, groups]."""
    return packed.transpose(1, 2).flatten(0, 1)[:features]


def _check(x: torch.Tensor, *operands: Any, features: int, format: str, tensor_scale: float = 1.0) -> None:
    """Raise unless the operands fit x."""
    weight, scale, zero_point = operands
    inputs, panels = x.shape[-1], -(-features // PANEL)
    finite = abs(tensor_scale) <= torch.finfo(torch.float32).max
    require(finite, "the scale of the tensor is {}, and must be finite in float32", tensor_scale)
    require(format in FORMS, "a weight is stored as one of {}, not as '{}'", ", ".join(FORMS), format)
    check_exact(weight, (panels, inputs, step_bytes(format)), FORMS[format].storage, "a packed weight")
    if x.dtype == torch.bfloat16:
        require(inputs % 2 == 0, "there are {} inputs, and bfloat16 takes an even number", inputs)
    fits = scale.dim() == 3 and scale.shape[1] > 0 and inputs % scale.shape[1] == 0
    message = "scales have the sizes {}, and must be [panels, groups, 32], where the groups divide {} inputs"
    require(fits, message, scale.shape, inputs)
    sizes = panels, scale.shape[1], PANEL
    taken = (*SCALES, *BYTE_SCALES)
    check_exact(scale, sizes, scale.dtype if scale.dtype in taken else torch.float32, "a weight's scale")
    if zero_point is not None:
        dtype = zero_point.dtype if zero_point.dtype in SCALES else torch.uint8
        check_exact(zero_point, sizes, dtype, "a weight's zero point")


def _product(x: torch.Tensor, *operands: Any, features: int, format: str, tensor_scale: float = 1.0) -> torch.Tensor:
    weight, scale, zero_point, bias = operands
    q = unpack_stored(weight, format, features)
    blocks = [None if operand is None else unpack_blocks(operand, features).contiguous() for operand in (scale, zero_point)]
    # The unpacked elements are dequantized like an eight-bit format.
    options: dict[str, Any] = {"format": "int8", "dtype": x.dtype, "tensor_scale": tensor_scale}
    matrix = dequantize_reference(q, *blocks, **options)  # pyright: ignore[reportArgumentType]
    return functional.linear(x, matrix, cast(bias, x.dtype))


_STORED = ("Tensor weight", "Tensor scale", "Tensor? zero_point=None")
_FORM = LinearForm("weight_quantized_linear", _STORED, "str format, float tensor_scale=1.0", _check, _product)
_FORM.define()
weight_quantized_linear_reference = _FORM.reference
_GROUPED = GroupedLinear(_FORM)
weight_quantized_linear_grouped_reference = _GROUPED.reference

weight_quantized_linear = torch.ops.lissom.weight_quantized_linear.default
"""The operator. x: [..., inputs], float32 or bfloat16; weight: packed; scale: [panels, groups, 32], float16, float32 or
one of BYTE_SCALES; zero_point: in that shape, float16, float32 or uint8; bias: [features]; other: [..., features], like the
result; features: of the result; format: of the weight, a name in FORMS; tensor_scale: multiplied with every scale;
activation: a name in ACTIVATIONS; combine: `add` or `mul`. Returns [..., features], of x's dtype."""

weight_quantized_linear_norm = torch.ops.lissom.weight_quantized_linear_norm.default
"""`weight_quantized_linear` followed by a layer norm over the features; norm_weight, norm_bias: [features]."""

weight_quantized_linear_grouped = _GROUPED.define()
"""The layers of experts. x: [rows, inputs], sorted by group; weight, scale, zero_point: as above, each [groups, ...]; offs:
[groups], the end of each group's rows. Returns [rows, features]."""
