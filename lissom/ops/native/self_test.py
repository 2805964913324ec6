"""Compares the kernels of a library with their references: `python -m lissom.ops.native.self_test LIBRARY`.

It ends with an error that names the first kernel whose result differs. Sizes are small and odd, so that every kernel runs
full vectors and remainders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch.utils._pytree import tree_leaves

from lissom.ops.block_sparse_linear import (
    BLOCK,
    block_sparse_linear_reference,
    block_sparse_quantized_linear_reference,
    pack_nonzero_blocks,
)
from lissom.ops.blocked_attention import block_sparse_attention_reference
from lissom.ops.divergence import token_divergence_reference
from lissom.ops.epilogue import PANEL
from lissom.ops.formats import BYTE_SCALES, FORMATS, SCALES, quantize
from lissom.ops.fused_attention import (
    fused_attention_reference,
    merged_attention_reference,
    unpadded_attention_reference,
)
from lissom.ops.fused_rows import fused_layer_norm_reference, fused_rms_norm_reference, fused_rotary_reference
from lissom.ops.packed_linear import pack, packed_embedding_reference, packed_linear_reference
from lissom.ops.quantization import (
    GROUP,
    fake_quantize_backward_reference,
    fake_quantize_dynamic_reference,
    fake_quantize_reference,
)
from lissom.ops.quantized_linear import (
    fill_panels,
    pack_bytes,
    pack_groups,
    quantized_linear_grouped_reference,
    quantized_linear_reference,
)
from lissom.ops.recurrences import gated_delta_rule_reference, selective_scan_reference
from lissom.ops.weight_quantized_linear import (
    FORMS,
    pack_blocks,
    pack_stored,
    weight_quantized_linear_grouped_reference,
    weight_quantized_linear_reference,
)

# Outputs are about 1. A wrong instruction has an error of that size, sums in another order 1e-6, and bfloat16, which rounds
# inputs, weights and outputs to 8 bits, 2e-2.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
INTEGERS = [name for name, form in FORMS.items() if form.is_integer]
FAILED = 3
"""The exit status for a fault of the library. `build`, which starts this module and is not imported here, has the same."""

Case = tuple[
    str,
    Callable[..., "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"],
    tuple[torch.Tensor | None, ...],
    Mapping[str, object],
]
"""The operator's name, its reference, and positional and keyword arguments of both."""


def main(library: str) -> None:
    """Load the library and compare. Raises SystemExit with the first difference."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise SystemExit(str(error)) from error
    with torch.inference_mode():
        for dtype, dots, amx in instructions():
            torch.ops.lissom.dots_bfloat16(dots)
            torch.ops.lissom.use_amx(amx)
            for name, reference, operands, options in cases(dtype):
                outputs = getattr(torch.ops.lissom, name)(*operands, **options)
                wanted = reference(*operands, **options)
                for one, other in zip(tree_leaves(outputs), tree_leaves(wanted), strict=True):
                    difference = float((one.float() - other.float()).abs().max())
                    if one.shape != other.shape or not difference <= ALLOWED[dtype]:
                        raise SystemExit(f"{name} of {dtype} has an error of {difference:.2g}")


def instructions() -> list[tuple[torch.dtype, bool, bool]]:
    """The dtypes, and how each is multiplied: by vectors, an instruction for bfloat16, or tiles (AMX, or their emulation)."""
    combinations = [(torch.float32, False, False), (torch.bfloat16, False, False)]
    combinations += [(torch.bfloat16, True, False)] if torch.ops.lissom.dots_bfloat16(True) else []
    return combinations + ([(dtype, False, True) for dtype in ALLOWED] if torch.ops.lissom.use_amx(True) else [])


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Calls of every kernel."""
    yield from _linear_cases(dtype)
    yield from _quantized_cases(dtype)
    q, k, v = (_numbers(2, heads, tokens, 18, dtype=dtype) for heads, tokens in ((4, 19), (2, 37), (2, 37)))
    for queries in (2, 19):
        seen = torch.arange(37) <= torch.arange(queries)[:, None] + 9
        for bias in (seen, torch.zeros(queries, 37).masked_fill(~seen, -torch.inf)):
            options = {"scale": 0.3, "softcap": 2.0, "sinks": _numbers(4, 1, 1, dtype=dtype), "causal": queries > 2}
            yield "fused_attention", fused_attention_reference, (q[:, :, :queries], k, v, bias), options
        window = {"pattern": [0, -1, 1, -5, 0, 1, 0], "block": 16, "scale": 0.3}
        yield "block_sparse_attention", block_sparse_attention_reference, (q[:, :, :queries], k, v, None, None), window
    whole = _numbers(2, 21, (4 + 2 * 2) * 10, dtype=dtype)
    yield "merged_attention", merged_attention_reference, (whole,), {"heads": 4, "key_heads": 2, "scale": 0.3, "causal": True}
    seen = torch.arange(21) < torch.tensor([[21], [7]])
    rows, slots = seen.flatten().nonzero().squeeze(1), seen.flatten().cumsum(0).sub(1).unflatten(0, (2, 21))
    heads = whole.flatten(0, 1)[None, rows].unflatten(-1, (8, 10)).transpose(1, 2).split([4, 2, 2], 1)
    for bias, low in ((seen[:, None, None], None), (seen[:, None, None], -3), (None, None)):
        yield "unpadded_attention", unpadded_attention_reference, (*heads, slots, rows, bias), {"scale": 0.3, "low": low}
    x, weight, bias = (_numbers(*sizes, dtype=dtype) for sizes in ((5, 37), (37,), (37,)))
    yield "fused_layer_norm", fused_layer_norm_reference, (x, weight, bias), {"eps": 1e-5}
    yield "fused_rms_norm", fused_rms_norm_reference, (x, weight), {"eps": 1e-5}
    for interleaved in (False, True):
        angles = [_numbers(19, 9, dtype=dtype) for _ in range(2)]
        yield "fused_rotary", fused_rotary_reference, (q, *angles), {"interleaved": interleaved}
    yield from _recurrence_cases(dtype)
    yield from _fake_quantize_cases(dtype)
    logits = [_numbers(5, width, dtype=dtype)[:, :203] for width in (203, 204)]
    yield "token_divergence", token_divergence_reference, (*logits, torch.rand(5)), {"temperature": 2.0}


def _fake_quantize_cases(dtype: torch.dtype) -> Iterator[Case]:
    x, gradient = _numbers(6, 38, dtype=dtype), _numbers(38, 6, dtype=dtype).T
    for name, form in FORMATS.items():
        for sizes in ((6, 2), (1, 38), (1, 1)):
            operands = x, torch.full(sizes, 2 / form.high), None if form.symmetric else torch.full(sizes, 3.0)
            yield "fake_quantize", fake_quantize_reference, operands, {"format": name}
            options = {"format": name, "scales_learn": True}
            yield "fake_quantize_backward", fake_quantize_backward_reference, (gradient / 100, *operands), options
        for granularity in ("token", "tensor"):
            options = {"format": name, "granularity": granularity}
            yield "fake_quantize_dynamic", fake_quantize_dynamic_reference, (x,), options
        options = {"format": name, "granularity": "group"}
        yield "fake_quantize_dynamic", fake_quantize_dynamic_reference, (_numbers(6, 2 * GROUP, dtype=dtype),), options


def _recurrence_cases(dtype: torch.dtype) -> Iterator[Case]:
    q, k, v = (_numbers(2, 5, heads, width, dtype=dtype) for heads, width in ((2, 18), (2, 18), (4, 37)))
    rates = -_numbers(2, 5, 4, 18, dtype=dtype).abs()
    for decay in (rates, rates[..., 0]):
        operands = q, k, v, decay, rates[..., 1].exp(), _numbers(2, 4, 18, 37, dtype=dtype)
        yield "gated_delta_rule", gated_delta_rule_reference, operands, {"scale": 0.3, "normalizes": True}
    x, step = _numbers(2, 5, 37, 1, dtype=dtype), rates[..., 0].exp()
    b, c = (_numbers(2, 5, 1, 18, dtype=dtype) for _ in range(2))
    a, state = -_numbers(37, 18, dtype=dtype).abs(), _numbers(2, 37, 1, 18, dtype=dtype)
    yield "selective_scan", selective_scan_reference, (x, x[..., 0].exp(), a, b, c, a[:, 0], state), {}
    yield "selective_scan", selective_scan_reference, (v, step, a[:4, 0], q, k, None, _numbers(2, 4, 37, 18, dtype=dtype)), {}


def _with_zero_blocks(weight: torch.Tensor) -> torch.Tensor:
    """The matrix with some blocks that `block_sparse_linear` leaves out."""
    rows, columns = (torch.arange(size) // width for size, width in zip(weight.shape, (PANEL, BLOCK), strict=True))
    return weight.masked_fill((rows[:, None] + columns) % 3 != 0, 0)


def _linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    features, inputs = 45, 38
    weight = pack(_numbers(features, inputs, dtype=dtype) / 6)
    vectors = [_numbers(features, dtype=dtype) for _ in range(3)]
    for rows in (1, 5, 31):
        x, other = _numbers(rows, inputs, dtype=dtype), _numbers(rows, features, dtype=dtype)
        for activation in ("relu", "gelu", "gelu_tanh", "silu"):
            options = {"features": features, "activation": activation, "combine": "mul"}
            yield "packed_linear", packed_linear_reference, (x, weight, vectors[0], other), options
        options = {"features": features, "activation": "squared_relu"}
        yield "packed_linear", packed_linear_reference, (x / 2, weight), options
        operands = x, weight, vectors[0], other, *vectors[1:]
        yield "packed_linear_norm", packed_linear_reference, operands, {"features": features, "eps": 1e-5}
        blocks = pack_nonzero_blocks(pack(_with_zero_blocks(_numbers(features, 2 * GROUP, dtype=dtype))))
        operands = _numbers(rows, 2 * GROUP, dtype=dtype) / 8, *blocks, vectors[0], other
        yield "block_sparse_linear", block_sparse_linear_reference, operands, {"features": features}
        options = {"features": features, "eps": 1e-5}
        yield "block_sparse_linear_norm", block_sparse_linear_reference, (*operands, *vectors[1:]), options
    ids = torch.tensor([[0, 44], [31, 32]])
    yield "packed_embedding", packed_embedding_reference, (weight, ids), {"features": features, "bits": 8 * dtype.itemsize}


def _quantized_cases(dtype: torch.dtype) -> Iterator[Case]:
    features, inputs = 45, 38
    scale = torch.rand(features, 2, generator=torch.Generator().manual_seed(1)) / 300
    sizes = {"features": features}
    norm = {**sizes, "eps": 1e-5}
    for rows in (1, 5, 31):
        x = _numbers(rows, inputs, dtype=dtype)
        if torch.ops.lissom.has_int8():
            q = _whole(features, inputs, -127, 128).to(torch.int8)
            operands = pack_bytes(q), fill_panels(scale[:, 0], features), fill_panels(q.sum(1, dtype=torch.int32), features)
            yield "quantized_linear", quantized_linear_reference, (x, *operands), {**sizes, "activation": "silu"}
            yield "quantized_linear_norm", quantized_linear_reference, (x, *operands), norm
            q = _with_zero_blocks(q)
            blocks = *pack_nonzero_blocks(pack_bytes(q)), operands[1], fill_panels(q.sum(1, dtype=torch.int32), features)
            yield "block_sparse_quantized_linear", block_sparse_quantized_linear_reference, (x, *blocks), sizes
            yield "block_sparse_quantized_linear_norm", block_sparse_quantized_linear_reference, (x, *blocks), norm
            given = {**sizes, "offs": torch.tensor([1, 1, rows])}
            yield "quantized_linear_grouped", quantized_linear_grouped_reference, (x, *_stacked(operands)), given
            yield "quantized_linear", quantized_linear_reference, (x, *operands, *_row_scales(rows)), sizes
            yield from _grouped_cases(_numbers(rows, 40, dtype=dtype), features, {})
            by_group, wide = {"granularity": "group"}, _numbers(rows, 2 * GROUP, dtype=dtype)
            yield from _grouped_cases(wide, features, by_group)
            wide = _numbers(rows, 3 * GROUP, dtype=dtype)
            q = _whole(features, 3 * GROUP, -127, 128).to(torch.int8)
            operands = pack_bytes(q), fill_panels(scale[:, 0], features), fill_panels(q.sum(1, dtype=torch.int32), features)
            yield "quantized_linear", quantized_linear_reference, (wide, *operands), {**sizes, **by_group}
        if torch.ops.lissom.has_weight_quantized():
            for given in (x, _numbers(rows, 4 * GROUP, dtype=dtype)):
                yield from _float_cases(given, features)
                yield from _weight_cases(given, features)


def _weight_cases(x: torch.Tensor, features: int) -> Iterator[Case]:
    """A layer whose weight has integers of each format, with two scales for a feature."""
    scale = torch.rand(features, 2, generator=torch.Generator().manual_seed(1)) / 300
    for form in INTEGERS:
        low, high = int(FORMS[form].low), int(FORMS[form].high) + 1
        q = _whole(features, x.shape[1], low, high).to(torch.int8 if low else torch.uint8)
        zero_point = None if low else pack_blocks(torch.full((features, 2), high // 2, dtype=torch.uint8), features)
        operands = pack_stored(q, form), pack_blocks(scale * 256 / (high - low), features), zero_point
        options = {"features": features, "format": form}
        if not low:
            shifted = *operands[:2], pack_blocks(scale, features)
            yield "weight_quantized_linear", weight_quantized_linear_reference, (x, *shifted), options
        yield "weight_quantized_linear", weight_quantized_linear_reference, (x, *operands), options
        yield "weight_quantized_linear_norm", weight_quantized_linear_reference, (x, *operands), {**options, "eps": 1e-5}
        given = {**options, "offs": torch.tensor([1, 1, len(x)])}
        yield "weight_quantized_linear_grouped", weight_quantized_linear_grouped_reference, (x, *_stacked(operands)), given


def _float_cases(x: torch.Tensor, features: int) -> Iterator[Case]:
    """A layer whose weight is in fp8 or fp4, with scales of each dtype."""
    for form in sorted({*FORMS} - {*INTEGERS}):
        q = quantize(_numbers(features, x.shape[1], dtype=torch.float32), torch.tensor(0.5), None, FORMS[form])
        for dtype in (*SCALES, *BYTE_SCALES):
            scale = (torch.rand(features, 2, generator=torch.Generator().manual_seed(1)) / 4 + 0.02).to(dtype)
            options = {"features": features, "format": form}
            options |= {"tensor_scale": 0.7} if dtype == torch.float8_e4m3fn else {}
            operands = x, pack_stored(q, form), pack_blocks(scale, features)
            yield "weight_quantized_linear", weight_quantized_linear_reference, operands, options
            norm = {**options, "eps": 1e-5}
            yield "weight_quantized_linear_norm", weight_quantized_linear_reference, operands, norm


def _grouped_cases(x: torch.Tensor, features: int, options: Mapping[str, object]) -> Iterator[Case]:
    """A linear layer whose weight has a scale for half of the inputs, of 8 and 4 bits, in float32 and float16; of 4 bits also
    with zero points, where x has groups."""
    for bits, dtype in ((8, torch.float32), (4, torch.float16)):
        q = _whole(features, x.shape[1], -(1 << (bits - 1)), 1 << (bits - 1)).to(torch.int8)
        scale = (torch.rand(features, 2, generator=torch.Generator().manual_seed(1)) / (1 << bits)).to(dtype)
        given = {"features": features, "activation": "silu", **options}
        yield "quantized_linear", quantized_linear_reference, (x, *pack_groups(q, scale, bits)), given
    if options:
        q, scale = (q + 8).to(torch.uint8), scale.half()
        zero_point = _whole(features, 2, 0, 16).to(torch.uint8)
        operands = *pack_groups(q, scale, 4, zero_point), None, None, pack_blocks(zero_point, features)
        yield "quantized_linear", quantized_linear_reference, (x, *operands), given


def _stacked(operands: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The operands of three groups that have equal weights."""
    return [None if operand is None else operand.expand(3, *operand.shape).contiguous() for operand in operands]


def _row_scales(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A known scale and zero point for each row of x."""
    return (torch.arange(rows) + 20.0)[:, None] / 1000, (100.0 + torch.arange(rows))[:, None]


def _numbers(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def _whole(features: int, inputs: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, (features, inputs), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except SystemExit as fault:
        sys.stderr.write(f"{fault}\n")
        sys.exit(FAILED)
