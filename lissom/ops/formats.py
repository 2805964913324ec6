"""Low-precision formats, and tensors quantized to them: x ≈ (q - zero_point) · scale, with q an integer in range, or fp8.

The shape of the scale gives the granularity: it has no dimensions, or as many as x, and each of its sizes divides that of x.
For a weight [out, in]:

    []  or [1, 1]       per-tensor         [out, 1]        per-channel
    [1, in]             per-input          [out, in / g]   group-wise, with g neighbouring inputs per group

A scale may be negative, and is not zero. Stored weights may have zero points in floating point, which are subtracted after
scaling: x ≈ q · scale - zero_point. GGUF calls them minimums, torchao zero points of the float domain.

Four-bit formats are packed two elements per byte along the last dimension, the first in the low half.
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
        return not self.storage.is_floating_point


FP8_LARGEST = 448.0
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("int8", -128, 127, 8, torch.int8, True),
        Format("uint8", 0, 255, 8, torch.uint8, False),
        Format("int4", -8, 7, 4, torch.uint8, True),
        Format("uint4", 0, 15, 4, torch.uint8, False),
        Format("fp8", -FP8_LARGEST, FP8_LARGEST, 8, torch.float8_e4m3fn, True),
    )
}
"""By name. `int8` and `int4` are symmetric, `uint8` and `uint4` have a zero point, `fp8` is e4m3 without infinities."""

LEAST = 1e-30
"""The smallest size of a scale; that of a block of zeros."""
SCALES = (torch.float16, torch.float32)
"""The dtypes of group-wise scales of packed weights, and of their zero points in floating point."""


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


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format) -> torch.Tensor:
    """q, rounded to nearest with ties to even, in the shape of x: four-bit formats are not packed."""
    whole = nearest(x, scale, zero_point, form)
    return whole if not form.is_integer else whole.to(torch.int8 if form.low < 0 else torch.uint8)


def nearest(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format) -> torch.Tensor:
    """q as integers in float32, where NaN stays NaN; for fp8 in its own dtype.

    Rounds x · (1 / scale) and not x / scale, as the kernels do.
    """
    scaled = _by_block(x.float(), 1.0 / scale.float(), torch.mul)
    if not form.is_integer:
        return scaled.clamp(form.low, form.high).to(form.storage)
    whole = scaled.round()
    if zero_point is not None:
        whole = _by_block(whole, zero_point.float(), torch.add)
    return whole.clamp(form.low, form.high)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(q - zero_point) · scale in that dtype.

    Args:
        q: not packed.
    """
    value = q.float()
    if zero_point is not None:
        value = _by_block(value, zero_point.float(), torch.sub)
    return _by_block(value, scale.float(), torch.mul).to(dtype)


def dequantize_stored(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantizes a stored weight. A floating-point zero point is subtracted after scaling: q · scale - zero_point."""
    if zero_point is None or not zero_point.is_floating_point():
        return dequantize(q, scale, zero_point, dtype)
    return _by_block(dequantize(q, scale, None, torch.float32), zero_point.float(), torch.sub).to(dtype)


def within(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format) -> torch.Tensor:
    """True where x is in the representable range of its block."""
    middle = 0.0 if zero_point is None else zero_point
    first, last = ((end - middle) * scale.float() for end in (form.low, form.high))
    return _by_block(x, torch.minimum(first, last), torch.ge) & _by_block(x, torch.maximum(first, last), torch.le)


def pack_halves(q: torch.Tensor) -> torch.Tensor:
    """Pack two four-bit elements per byte, [..., n] to [..., n / 2] of uint8; n is even."""
    low, high = (q.to(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_halves(packed: torch.Tensor, form: Format) -> torch.Tensor:
    """Unpack four-bit elements, [..., n / 2] to [..., n]."""
    q = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return (q.to(torch.int8) ^ 8) - 8 if form.low < 0 else q


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
