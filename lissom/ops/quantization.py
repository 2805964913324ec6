"""Quantization in the graph: `lissom::fake_quantize`, `lissom::fake_quantize_dynamic`, `lissom::dequantize`.

fake_quantize is quantize followed by dequantize (Q/DQ) with a static scale:

    y = (clamp(round(x / scale) + zero_point, low, high) - zero_point) · scale

fake_quantize_dynamic computes the scale from x itself, per-token (all but the last dimension), per-tensor, or per-group, of 32
neighbours in the last dimension. The result is in floating point, so a quantized program runs and trains as it is. Gradients
use the straight-through estimator: they pass where x is in range, and are zero where x is clamped. Jacob et al. 2018,
Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, §3. Bengio et al. 2013,
Estimating or Propagating Gradients Through Stochastic Neurons, §4. A scale that requires gradients gets
Σ (q - zero_point - x / scale) over its block, without x / scale where x is clamped: Esser et al. 2020, Learned Step Size
Quantization, eq. 3.

dequantize converts stored integers, fp8 or fp4 to floating point; see `lissom/ops/formats.py` for formats and scales.
"""

from __future__ import annotations

from typing import Any

import torch

from lissom.ops import formats
from lissom.ops.checks import require
from lissom.ops.formats import FORMATS
from lissom.ops.library import define

GROUP = 32
"""Neighbours in the last dimension that share a scale with granularity `group`."""


def check_granularity(x: torch.Tensor, granularity: str) -> None:
    """Raise unless the granularity is known and fits x."""
    known = granularity in ("token", "tensor", "group")
    require(known, "granularity is 'token', 'tensor' or 'group', not '{}'", granularity)
    fits = granularity != "group" or (x.dim() > 0 and x.shape[-1] % GROUP == 0)
    require(fits, "x has the sizes {}, and groups need a multiple of {} features", x.shape, GROUP)


def dynamic_scale(x: torch.Tensor, format: str, granularity: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point from the range of x: [..., 1] for granularity `token`, [] for `tensor`, [..., features / 32] for
    `group`."""
    check_granularity(x, granularity)
    if granularity == "group":
        low, high = x.unflatten(-1, (x.shape[-1] // GROUP, GROUP)).aminmax(dim=-1)
        return formats.scale_for(low, high, FORMATS[format])
    if x.shape[-1:].numel() == 0 or (granularity == "tensor" and x.numel() == 0):
        low = high = x.new_zeros((*x.shape[:-1], 1) if granularity == "token" else ())
    elif granularity == "token":
        low, high = x.aminmax(dim=-1, keepdim=True)
    else:
        low, high = x.aminmax()
    return formats.scale_for(low, high, FORMATS[format])


def fake_quantize_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    format: str,
    tensor_scale: float = 1.0,
) -> torch.Tensor:
    """The reference implementation; NaN stays NaN."""
    q = formats.nearest(x, scale, zero_point, FORMATS[format], tensor_scale)
    return formats.dequantize(q, scale, zero_point, x.dtype, tensor_scale)


def fake_quantize_dynamic_reference(x: torch.Tensor, *, format: str, granularity: str = "token") -> torch.Tensor:
    """The reference implementation."""
    return fake_quantize_reference(x, *dynamic_scale(x, format, granularity), format=format)


def dequantize_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    format: str,
    dtype: torch.dtype,
    tensor_scale: float = 1.0,
) -> torch.Tensor:
    """The reference implementation."""
    form = FORMATS[format]
    whole = formats.unpack_halves(q, form) if form.bits == 4 else q
    return formats.dequantize_stored(whole, scale, zero_point, dtype, tensor_scale)


def _fake(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(x)


def _fake_dynamic(x: torch.Tensor, *, format: str, granularity: str = "token") -> torch.Tensor:
    check_granularity(x, granularity)
    return torch.empty_like(x)


def _fake_dequantize(q: torch.Tensor, *_: object, format: str, dtype: torch.dtype, **__: object) -> torch.Tensor:
    size = q.shape[-1] * (2 if FORMATS[format].bits == 4 else 1)
    return q.new_empty((*q.shape[:-1], size), dtype=dtype)


def fake_quantize_backward_reference(
    gradient: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    format: str,
    scales_learn: bool,
    tensor_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation."""
    inside = formats.within(x, scale, zero_point, FORMATS[format], tensor_scale)
    if not scales_learn:
        return gradient * inside, x.new_zeros(0, dtype=torch.float32)
    # y / scale is q - zero_point, which does not change with the scale where x is clamped.
    y = fake_quantize_reference(x, scale, zero_point, format=format, tensor_scale=tensor_scale)
    change = formats.block_sum((gradient * (y - inside * x)).float(), tuple(scale.shape)) / scale.float()
    return gradient * inside, change


def _fake_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *_: object, scales_learn: bool, **__: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), scale.new_empty(scale.shape if scales_learn else 0, dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    x, scale, zero_point = ctx.saved_tensors
    learn = ctx.needs_input_grad[1]
    # The kernel computes in float32, and a gradient in float64 passes through as it is.
    function = fake_quantize_backward_reference if x.dtype == torch.float64 else fake_quantize_backward
    passed, change = function(gradient, x, scale, zero_point, scales_learn=learn, **ctx.options)
    return passed, change.to(scale.dtype) if learn else None, None


def quantize_weight_reference(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    format: str,
    tensor_scale: float = 1.0,
) -> torch.Tensor:
    """The reference implementation."""
    form = FORMATS[format]
    q = formats.quantize(weight, scale, zero_point, form, tensor_scale)
    return formats.pack_halves(q) if form.bits == 4 else q


def _fake_quantize_weight(weight: torch.Tensor, *_: object, format: str) -> torch.Tensor:
    form = FORMATS[format]
    shape = (*weight.shape[:-1], weight.shape[-1] // 2) if form.bits == 4 else weight.shape
    return weight.new_empty(shape, dtype=form.storage)


def best_scales_reference(blocks: torch.Tensor, factors: torch.Tensor, *, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation."""
    form = FORMATS[format]
    low, high = (end.float() for end in blocks.aminmax(dim=1))
    # The lowest q of a symmetric format reaches further; of 256 levels one makes no difference.
    sign = torch.where(high > -low, -1.0, 1.0) if form.symmetric and form.bits == 4 else 1.0
    scale, zero_point, least = low, torch.zeros_like(low), torch.full_like(low, torch.nan)
    for factor in factors:
        narrow, shifted = formats.scale_for(factor * low, factor * high, form)
        narrow = sign * narrow
        grid = narrow[:, None], None if shifted is None else shifted[:, None]
        rounded = formats.dequantize(formats.quantize(blocks, *grid, form), *grid, torch.float32)
        error = (rounded - blocks).square().sum(1)
        better = ~(error >= least)  # the first is better than NaN
        least, scale = torch.where(better, error, least), torch.where(better, narrow, scale)
        zero_point = zero_point if shifted is None else torch.where(better, shifted, zero_point)
    return scale, zero_point


def _fake_scales(blocks: torch.Tensor, factors: torch.Tensor, *, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty(len(blocks), device=blocks.device)
    return scale, torch.empty_like(scale)


def _straight_through(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


fake_quantize_backward = define(
    "fake_quantize_backward(Tensor gradient, Tensor x, Tensor scale, Tensor? zero_point=None, *, str format, "
    "bool scales_learn, float tensor_scale=1.0) -> (Tensor, Tensor)",
    fake_quantize_backward_reference,
    _fake_backward,
)
"""The operator. gradient: of the result, in x's shape and dtype; the others as in `fake_quantize`. Returns the gradient of x,
and in float32 that of the scale, which is empty unless scales_learn. Not differentiable."""

fake_quantize = define(
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point=None, *, str format, float tensor_scale=1.0) -> Tensor",
    fake_quantize_reference,
    _fake,
    backward=_backward,
    setup_context=_remember,
)
"""The operator. x: any shape; scale, zero_point: [] or one per block, see `lissom/ops/formats.py`; format: a name in FORMATS;
tensor_scale: multiplied with every scale. Returns x's shape and dtype. Differentiable in x and scale."""

fake_quantize_dynamic = define(
    'fake_quantize_dynamic(Tensor x, *, str format, str granularity="token") -> Tensor',
    fake_quantize_dynamic_reference,
    _fake_dynamic,
    backward=_straight_through,
)
"""The operator. x: [..., features]; format: a name in FORMATS; granularity: `token`, `tensor`, or `group` with a multiple of 32
features. Differentiable: no value is clamped."""

_quantize_weight = define(
    "quantize_weight(Tensor weight, Tensor scale, Tensor? zero_point=None, *, str format) -> Tensor",
    quantize_weight_reference,
    _fake_quantize_weight,
)


def quantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    format: str,
    tensor_scale: float = 1.0,
) -> torch.Tensor:
    """A weight as elements of a format: [..., features], for four-bit formats [..., features / 2] of two elements a byte."""
    # There is no kernel for fp8 and fp4, nor for float64, which is rounded once.
    if FORMATS[format].is_integer and weight.dtype != torch.float64:
        return _quantize_weight(weight, scale, zero_point, format=format)
    return quantize_weight_reference(weight, scale, zero_point, format=format, tensor_scale=tensor_scale)


best_scales = define(
    "best_scales(Tensor blocks, Tensor factors, *, str format) -> (Tensor, Tensor)", best_scales_reference, _fake_scales
)
"""The operator: the scale and zero point of each block of a weight, [blocks, elements], with the least squared error; both
[blocks] in float32. factors: [count] in float32; the range of a block is its own times one of them, the first of equals.
format: a name in FORMATS, an integer format for the kernel. Without zero points these are 0, and the scale of an int4 block
whose largest magnitude is positive is negative."""

dequantize = define(
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point=None, *, str format, ScalarType dtype, float tensor_scale=1.0) "
    "-> Tensor",
    dequantize_reference,
    _fake_dequantize,
)
"""The operator. q: stored elements, for four-bit formats [..., features / 2]; scale: as above; zero_point: as above in uint8,
or floating point, subtracted after scaling; dtype: of the result, [..., features];
tensor_scale: multiplied with every scale."""
