"""Block floating-point formats: elements of fp4 or fp8 with a scale in eight bits for each block of neighbours.

| format | elements | block | scale |
|---|---|---|---|
| mxfp4 | e2m1 | 32 | e8m0, a power of two |
| mxfp8 | e4m3 | 32 | e8m0, a power of two |
| nvfp4 | e2m1 | 16 | e4m3, and one float32 for the tensor |

    mxfp4, mxfp8   scale = 2^(floor(log2(max |x|)) - e),   e = 2 for e2m1 and 8 for e4m3, the exponent of their largest value
    nvfp4          tensor_scale = max |X| / (448 · 6),   scale = e4m3(clamp(max |x| / 6 / tensor_scale, 2^-6, 448))

Elements are rounded to nearest with ties to even, and saturate. Open Compute Project 2023, OCP Microscaling Formats (MX)
Specification 1.0, §5 and §6.3. NVIDIA 2025, Pretraining Large Language Models with NVFP4, https://arxiv.org/abs/2509.25149.
The numbers are those of torchao's `to_mx`, in its mode FLOOR, and `nvfp4_quantize`, bit for bit; a tensor of zeros, for which
`nvfp4_quantize` returns NaN, stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lissom.ops.formats import FORMATS, FP4_LARGEST, FP8_LARGEST, Format, block_range

_BIAS = 127
_FRACTION_BITS = 23
_NAN = 255
"""The byte of e8m0 that stands for NaN."""


@dataclass(frozen=True)
class BlockFormat:
    """A block floating-point format.

    Attributes:
        element: the format of elements.
        size: neighbouring elements per scale.
        scale: the dtype of scales.
    """

    name: str
    element: Format
    size: int
    scale: torch.dtype

    @property
    def bits(self) -> float:
        """Of an element, with its part of the scale."""
        return self.element.bits + 8 / self.size


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    form.name: form
    for form in (
        BlockFormat("mxfp4", FORMATS["fp4"], 32, torch.float8_e8m0fnu),
        BlockFormat("mxfp8", FORMATS["fp8"], 32, torch.float8_e8m0fnu),
        BlockFormat("nvfp4", FORMATS["fp4"], 16, torch.float8_e4m3fn),
    )
}
"""By name, the beginning of a scheme's name."""
_LARGEST_EXPONENT = {"fp4": 2, "fp8": 8}
"""The exponent of the largest value of a format of elements."""


def block_scale(x: torch.Tensor, shape: tuple[int, ...], form: BlockFormat) -> tuple[torch.Tensor, float]:
    """The scale of each block of x, and the scale of the tensor: 1 where the format has none.

    Args:
        shape: of the scale.
    """
    low, high = (end.float() for end in block_range(x.detach(), shape))
    largest = torch.maximum(-low, high)
    if form.scale == torch.float8_e8m0fnu:
        return _power_of_two(largest, _LARGEST_EXPONENT[form.element.name]), 1.0
    tensor_scale = (largest.amax() / (FP8_LARGEST * FP4_LARGEST)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = (largest / FP4_LARGEST / tensor_scale).clamp(torch.finfo(form.scale).tiny, FP8_LARGEST)
    return scale.to(form.scale), float(tensor_scale)


def _power_of_two(largest: torch.Tensor, exponent: int) -> torch.Tensor:
    """2^(floor(log2(largest)) - exponent) in e8m0; 2^-127 is the least."""
    biased = (largest.view(torch.int32) >> _FRACTION_BITS & 0xFF) - exponent
    stored = torch.where(largest.isnan(), _NAN, biased.clamp_min(0))
    return stored.to(torch.uint8).view(torch.float8_e8m0fnu)
