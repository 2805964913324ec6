"""Low-precision formats, and tensors quantized to them: x ≈ (q - zero_point) · scale, with q an integer, fp8 or fp4.

The shape of the scale gives the granularity: it has no dimensions, or as many as x, and each of its sizes divides that of x.
For a weight [out, in]:

    []  or [1, 1]       per-tensor         [out, 1]        per-channel
    [1, in]             per-input          [out, in / g]   group-wise, with g neighbouring inputs per group

A scale may be negative, and is not zero. Stored weights may have zero points in floating point, which are subtracted after
scaling: x ≈ q · scale - zero_point. GGUF calls them minimums, torchao zero points of the float domain.

A scale in float8_e4m3fn, as NVFP4 has it, is multiplied with a float32 number for the whole tensor, `tensor_scale`.

Four-bit formats are packed two elements per byte along the last dimension, the first in the low half. Elements of fp4 that
are not packed are held in float8_e4m3fn, which has all of their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A low-precision format.

    Attributes:
        low: the least q.
        high: the greatest q.
        bits: per element.
        storage: the dtype it is stored in.
        symmetric: zero_point is always 0.
    """

    name: str
    low: float
    high: float
    bits: int
    storage: torch.dtype
    symmetric: bool

    @property
    def is_integer(self) -> bool:
        return not self.name.startswith("fp")


FP8_LARGEST = 448.0
FP4_LARGEST = 6.0
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("int8", -128, 127, 8, torch.int8, True),
        Format("uint8", 0, 255, 8, torch.uint8, False),
        Format("int4", -8, 7, 4, torch.uint8, True),
        Format("uint4", 0, 15, 4, torch.uint8, False),
        Format("fp8", -FP8_LARGEST, FP8_LARGEST, 8, torch.float8_e4m3fn, True),
        Format("fp4", -FP4_LARGEST, FP4_LARGEST, 4, torch.uint8, True),
    )
}
"""By name. `int8` and `int4` are symmetric, `uint8` and `uint4` have a zero point, `fp8` is e4m3 without infinities,
`fp4` is e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

LEAST = 1e-30
"""The smallest size of a scale; that of a block of zeros."""
SCALES = (torch.float16, torch.float32)
"""The dtypes of group-wise scales of packed weights, and of their zero points in floating point."""
BYTE_SCALES = (torch.float8_e8m0fnu, torch.float8_e4m3fn)
"""The dtypes of scales in block formats: powers of two, and numbers of e4m3."""
_LARGEST_INVERSE = 2.0**126
"""The largest inverse of a scale: one of 2^-127 has an inverse of 2^126, as in torchao."""
_FP4_SIZES = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)
_FP4_BYTES = torch.tensor([*_FP4_SIZES, *(0x80 | size for size in _FP4_SIZES)], dtype=torch.uint8, device="cpu")
"""The sixteen values of fp4 as bytes of e4m3, by their codes."""


def weight_format(name: str, symmetric: bool | None) -> Format:
    """The format of weights in `int8`, `int4` or `fp8`.

    Args:
        symmetric: without zero points; None: as is usual for the bits.
    """
    form = FORMATS[name]
    return form if symmetric or (symmetric is None and form.bits != 4) else FORMATS[f"u{name}"]


def scale_for(low: torch.Tensor, high: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point for the range from low to high, extended to contain zero. Both have the shape of low.

    symmetric: scale = max(|low|, |high|) / high of the format; else scale = (high - low) / (high - low of the format) and
    zero_point = round(-low / scale).
    """
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    if form.symmetric:
        return (torch.maximum(-low, high) / form.high).clamp_min(LEAST), None
    scale = ((high - low) / (form.high - form.low)).clamp_min(LEAST)
    return scale, (form.low - low / scale).round().clamp(form.low, form.high)


def block_range(x: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum and maximum of each block.

    Args:
        shape: of the scale, and of both results.
    """
    parts = _split(x, shape)
    dims = tuple(range(1, parts.dim(), 2))
    return parts.amin(dims).reshape(shape), parts.amax(dims).reshape(shape)


def as_blocks(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The elements of each block, [blocks, elements]; a view where they lie side by side.

    Args:
        shape: of the scale.
    """
    parts = _split(x, shape)
    return parts.permute(*range(0, parts.dim(), 2), *range(1, parts.dim(), 2)).reshape(math.prod(shape), -1)


def block_sum(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The sum over each block.

    Args:
        shape: of the scale, and of the result.
    """
    parts = _split(x, shape)
    return parts.sum(tuple(range(1, parts.dim(), 2))).reshape(shape)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format, tensor_scale: float = 1.0
) -> torch.Tensor:
    """q, rounded to nearest with ties to even, in the shape of x: four-bit formats are not packed."""
    whole = nearest(x, scale, zero_point, form, tensor_scale)
    return whole if not form.is_integer else whole.to(torch.int8 if form.low < 0 else torch.uint8)


def nearest(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format, tensor_scale: float = 1.0
) -> torch.Tensor:
    """q as integers in float32, where NaN stays NaN; fp8 and fp4 in float8_e4m3fn.

    Rounds x · ((1 / tensor_scale) / scale) and not x / scale, as the kernels do, and torchao's `nvfp4_quantize`.
    """
    inverse = torch.tensor(1.0) / torch.tensor(tensor_scale, dtype=torch.float32)
    scaled = _by_block(x.float(), (inverse.to(scale.device) / scale.float()).clamp_max(_LARGEST_INVERSE), torch.mul)
    if not form.is_integer:
        clamped = scaled.clamp(form.low, form.high)
        return (_nearest_fp4(clamped) if form.bits == 4 else clamped).to(torch.float8_e4m3fn)
    whole = scaled.round()
    if zero_point is not None:
        whole = _by_block(whole, zero_point.float(), torch.add)
    return whole.clamp(form.low, form.high)


def _nearest_fp4(x: torch.Tensor) -> torch.Tensor:
    """The nearest value of e2m1, ties to the one with an even code: the steps are 0.5 below 2, 1 below 4, and 2 up to 6."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / step).round() * step


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dtype: torch.dtype,
    tensor_scale: float = 1.0,
) -> torch.Tensor:
    """(q - zero_point) · scale in that dtype.

    Args:
        q: not packed.
    """
    value = q.float()
    if zero_point is not None:
        value = _by_block(value, zero_point.float(), torch.sub)
    return _by_block(value, scale.float() * tensor_scale, torch.mul).to(dtype)


def dequantize_stored(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dtype: torch.dtype,
    tensor_scale: float = 1.0,
) -> torch.Tensor:
    """Dequantizes a stored weight. A floating-point zero point is subtracted after scaling: q · scale - zero_point."""
    if zero_point is None or not zero_point.is_floating_point():
        return dequantize(q, scale, zero_point, dtype, tensor_scale)
    return _by_block(dequantize(q, scale, None, torch.float32, tensor_scale), zero_point.float(), torch.sub).to(dtype)


def within(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format, tensor_scale: float = 1.0
) -> torch.Tensor:
    """True where x is in the representable range of its block."""
    middle = 0.0 if zero_point is None else zero_point
    first, last = ((end - middle) * (scale.float() * tensor_scale) for end in (form.low, form.high))
    return _by_block(x, torch.minimum(first, last), torch.ge) & _by_block(x, torch.maximum(first, last), torch.le)


def pack_halves(q: torch.Tensor) -> torch.Tensor:
    """Pack two four-bit elements per byte, [..., n] to [..., n / 2] of uint8; n is even."""
    codes = fp4_codes(q) if q.dtype == torch.float8_e4m3fn else q.to(torch.uint8) & 15
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def fp4_codes(q: torch.Tensor) -> torch.Tensor:
    """The codes of fp4 values in float8_e4m3fn, 0 to 15 in uint8."""
    # Bits 2 and 3 of an e4m3 byte are those of the fraction; 0.5 is the only subnormal of e2m1.
    stored = q.view(torch.uint8)
    size = stored & 0x7F
    return torch.where(size > 0x30, (size >> 2) - 12, size // 0x30) | (stored >> 7 << 3)


def unpack_halves(packed: torch.Tensor, form: Format) -> torch.Tensor:
    """Unpack four-bit elements, [..., n / 2] to [..., n]."""
    q = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    if not form.is_integer:
        return fp4_values(q)
    return (q.to(torch.int8) ^ 8) - 8 if form.low < 0 else q


def fp4_values(codes: torch.Tensor) -> torch.Tensor:
    """The values of fp4 codes, 0 to 15, in float8_e4m3fn."""
    return _FP4_BYTES.to(codes.device)[codes.int()].view(torch.float8_e4m3fn)


def _by_block(x: torch.Tensor, values: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
    """function(x, value of the block of x), elementwise."""
    if values.numel() == 1 or all(size in (1, whole) for size, whole in zip(values.shape, x.shape, strict=True)):
        return function(x, values)
    parts = _split(x, tuple(values.shape))
    spread = values.reshape([size for pair in zip(values.shape, (1,) * values.dim(), strict=True) for size in pair])
    return function(parts, spread).reshape(x.shape)


def _split(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """[d0, d1] as [s0, d0 / s0, s1, d1 / s1] for blocks of the shape [s0, s1]."""
    sizes = shape or (1,) * x.dim()
    return x.reshape([size for whole, parts in zip(x.shape, sizes, strict=True) for size in (parts, whole // max(parts, 1))])
