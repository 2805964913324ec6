"""`lissom::weight_quantized_linear` and its relative with a norm: kernel and reference against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.ops.epilogue import ACTIVATIONS
from lissom.ops.formats import BYTE_SCALES, SCALES, quantize
from lissom.ops.native import kernel_dtypes, missing_weight_quantized_kernel
from lissom.ops.weight_quantized_linear import (
    FORMS,
    narrowest,
    pack_blocks,
    pack_stored,
    unpack_stored,
    weight_quantized_linear,
    weight_quantized_linear_norm,
    weight_quantized_linear_reference,
)

# The operator calls the C++ kernel where this processor has one, else the reference.
PATHS = {
    "operator": (weight_quantized_linear, weight_quantized_linear_norm),
    "reference": (weight_quantized_linear_reference, weight_quantized_linear_reference),
}
# float32: sums of up to 192 products, in another order.  bfloat16: weights and result rounded to 8 bits, as the Q/DQ program's.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
# The reference takes both; where there are kernels, the operator takes what they do.
DTYPES = kernel_dtypes() or tuple(ALLOWED)


def numbers(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    return torch.randn(sizes, generator=generator).to(dtype)


def layer(
    features: int,
    inputs: int,
    groups: int,
    form: str,
    scales: torch.dtype = torch.float16,
    zeros: torch.dtype = torch.uint8,
    tensor_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A weight's integers, its scales, and its zero points of the dtype `zeros` where the format has them."""
    generator = torch.Generator().manual_seed(features + inputs + groups)
    low, high = int(FORMS[form].low), int(FORMS[form].high) + 1
    if FORMS[form].is_integer:
        q = torch.randint(low, high, (features, inputs), generator=generator).to(torch.uint8 if low == 0 else torch.int8)
    else:
        low, high = -2, 2
        q = quantize(torch.randn(features, inputs, generator=generator), torch.tensor(0.5), None, FORMS[form])
    scale = (torch.rand(features, groups, generator=generator) + 0.5) / ((high - low) * inputs**0.5)
    scale = (scale / tensor_scale).to(scales)
    zero = torch.randint(0, high, (features, groups), generator=generator).to(torch.uint8) if low == 0 else None
    if zero is not None and zeros != torch.uint8:
        zero = (zero * scale.float() * tensor_scale).to(zeros)
    return q, scale, zero


def packed(
    q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, form: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return pack_stored(q, form), pack_blocks(scale, len(q)), None if zero is None else pack_blocks(zero, len(q))


def matrix(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    spread = q.shape[1] // scale.shape[1]
    step = scale.double().repeat_interleave(spread, 1)
    if zero is None:
        return q.double() * step
    middle = zero.double().repeat_interleave(spread, 1)
    return q.double() * step - middle if zero.is_floating_point() else (q.double() - middle) * step


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("features", "inputs"), [(1, 2), (31, 4), (33, 6), (96, 64)])
def test_packing_loses_nothing(form: str, features: int, inputs: int) -> None:
    q, _, _ = layer(features, inputs, 1, form)
    packed_q = pack_stored(q, form)
    assert torch.equal(unpack_stored(packed_q, form, features).float(), q.float())
    assert packed_q.numel() == -(-features // 32) * 32 * inputs * FORMS[form].bits // 8


@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 15, 20, 21, 43, 130]),
    shape=st.sampled_from([(2, 1), (6, 3), (20, 1), (64, 2), (64, 1), (192, 6), (320, 1)]),
    features=st.sampled_from([1, 31, 32, 33, 100]),
    form=st.sampled_from(list(FORMS)),
    scales=st.sampled_from([*SCALES, *BYTE_SCALES]),
    zeros=st.sampled_from([torch.uint8, torch.float16, torch.float32]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    combine=st.sampled_from(["none", "add", "mul"]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(list(PATHS)),
)
def test_numbers(
    rows: int,
    shape: tuple[int, int],
    features: int,
    form: str,
    scales: torch.dtype,
    zeros: torch.dtype,
    activation: str,
    combine: str,
    with_bias: bool,
    dtype: torch.dtype,
    path: str,
) -> None:
    tensor_scale = 0.7e-3 if scales == torch.float8_e4m3fn else 1.0
    x, weight = numbers(rows, shape[0], dtype=dtype), layer(features, *shape, form, scales, zeros, tensor_scale)
    bias = numbers(features, dtype=dtype) if with_bias else None
    other = numbers(rows, features, dtype=dtype, seed=1) if combine != "none" else None
    total = x.double() @ matrix(weight[0], weight[1].double() * tensor_scale, weight[2]).T
    wanted = ACTIVATIONS[activation](total + (bias.double() if bias is not None else 0))
    if other is not None:
        wanted = wanted * other.double() if combine == "mul" else wanted + other.double()
    options = {"combine": combine} if other is not None else {}
    options |= {"tensor_scale": tensor_scale}
    operands = (x, *packed(*weight, form), bias, other)
    found = PATHS[path][0](*operands, features=features, format=form, activation=activation, **options)
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    # Terms are of order one, so a result that is smaller is one of cancelling.
    scale = max(1.0, float(wanted.abs().max()), float(total.abs().max()))
    allowed = ALLOWED[dtype] * (1 if path == "operator" or dtype == torch.float32 else 3)
    assert float((wanted - found.double()).abs().max()) < allowed * scale


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_numbers_with_a_norm(rows: int, dtype: torch.dtype, path: str) -> None:
    x, weight = numbers(rows, 64, dtype=dtype), layer(33, 64, 2, "uint4")
    bias, other, gain, shift = (numbers(*sizes, dtype=dtype, seed=2) for sizes in ((33,), (rows, 33), (33,), (33,)))
    total = x.double() @ matrix(*weight).T + bias.double() + other.double()
    wanted = torch.nn.functional.layer_norm(total, (33,), gain.double(), shift.double(), 1e-5)
    found = PATHS[path][1](x, *packed(*weight, "uint4"), bias, other, gain, shift, features=33, format="uint4", eps=1e-5)
    assert float((wanted - found.double()).abs().max() / wanted.abs().max()) < ALLOWED[dtype] * 2


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("form", ["int8", "uint4"])
def test_an_outlier_costs_the_values_beside_it_little(form: str, rows: int) -> None:
    """A kernel may take the values of 128 inputs to integers of one scale."""
    x, (q, scale, zero) = numbers(rows, 64, dtype=DTYPES[-1]), layer(33, 64, 1, form)
    x[:, 5] = 1000
    q[:, 5] = 0 if zero is None else zero[:, 0]
    wanted = x.double() @ matrix(q, scale, zero).T
    found = weight_quantized_linear(x, *packed(q, scale, zero, form), None, None, features=33, format=form)
    assert float((wanted - found.double()).abs().max() / wanted.abs().max()) < ALLOWED[x.dtype]


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_may_be_tiny_or_zero(dtype: torch.dtype, rows: int) -> None:
    weight, x = layer(33, 64, 2, "int8"), torch.zeros(rows, 64, dtype=dtype)
    x[:, :32] = 1e-25 * numbers(rows, 32)
    wanted = x.double() @ matrix(*weight).T
    found = weight_quantized_linear(x, *packed(*weight, "int8"), None, None, features=33, format="int8")
    assert float((wanted - found.double()).abs().max() / wanted.abs().max()) < ALLOWED[dtype]
    assert not weight_quantized_linear(0 * x, *packed(*weight, "int8"), None, None, features=33, format="int8").any()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_so(odd: float, dtype: torch.dtype, rows: int) -> None:
    x, weight = numbers(rows, 64, dtype=dtype), layer(33, 64, 2, "int8")
    x[0, 3] = odd
    found = weight_quantized_linear(x, *packed(*weight, "int8"), features=33, format="int8")
    assert not found[0].isfinite().any()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize(("scales", "stored"), [(torch.float8_e8m0fnu, 0xFF), (torch.float8_e4m3fn, 0x7F)])
@pytest.mark.parametrize("rows", [1, 40])
def test_block_with_scale_nan_is_nan(rows: int, scales: torch.dtype, stored: int) -> None:
    q, scale, _ = layer(33, 64, 2, "fp4", scales)
    scale.view(torch.uint8)[5, 1] = stored
    found = weight_quantized_linear(numbers(rows, 64), *packed(q, scale, None, "fp4"), features=33, format="fp4")
    assert found.isnan().any(0).nonzero().flatten().tolist() == [5]
    assert found.isnan().all(0)[5]


def test_least_power_of_two_is_a_scale() -> None:
    q, scale = torch.full((33, 32), 6.0).to(torch.float8_e4m3fn), torch.zeros(33, 1, dtype=torch.uint8)
    operands = packed(q, scale.view(torch.float8_e8m0fnu), None, "fp4")
    x = torch.full((1, 32), 2.0**100)
    found = weight_quantized_linear(x, *operands, features=33, format="fp4")
    assert found.eq(6 * 32 * 2.0**-27).all()


def test_inputs_of_any_layout_and_rank() -> None:
    x, weight = numbers(4, 3, 5, 8), layer(6, 8, 2, "int4")
    found = weight_quantized_linear(x.transpose(0, 2), *packed(*weight, "int4"), features=6, format="int4")
    wanted = x.transpose(0, 2).double() @ matrix(*weight).T
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=ALLOWED[torch.float32])
    assert weight_quantized_linear(x[:0], *packed(*weight, "int4"), features=6, format="int4").shape == (0, 3, 5, 6)


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_a_scale_of_zero_leaves_the_zero_point(rows: int) -> None:
    """A block of equal values: q says nothing, and the weight is the zero point with the other sign."""
    x, (q, scale, zero) = numbers(rows, 64), layer(33, 64, 2, "uint4", zeros=torch.float32)
    scale = torch.zeros_like(scale)
    found = weight_quantized_linear(x, *packed(q, scale, zero, "uint4"), features=33, format="uint4")
    wanted = -x.double().unflatten(1, (2, 32)).sum(-1) @ zero.double().T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_zero_point_of_another_dtype_is_refused() -> None:
    weight, scale, zero = packed(*layer(6, 6, 1, "uint8"), "uint8")
    with pytest.raises(RuntimeError, match=r"a weight's zero point"):
        weight_quantized_linear(numbers(2, 6), weight, scale, zero.to(torch.bfloat16), features=6, format="uint8")


def test_a_wrong_weight_is_refused() -> None:
    if missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) is not None:
        pytest.skip("no kernel for stored integers here")
    with pytest.raises(RuntimeError, match=r"a packed weight has the sizes .* must be contiguous with the sizes"):
        weight_quantized_linear(numbers(2, 8), *packed(*layer(6, 6, 1, "int8"), "int8"), features=6, format="int8")


@pytest.mark.parametrize(
    ("low", "high", "format", "wanted"),
    [
        *((-16, 15, "int8", "int5"), (-17, 0, "int8", "int6"), (-32, 31, "int8", "int6"), (0, 32, "int8", "int8")),
        *((0, 31, "uint8", "uint5"), (0, 32, "uint8", "uint8"), (-8, 7, "int4", "int4")),
    ],
)
def test_the_narrowest_format_that_holds_a_weight(low: int, high: int, format: str, wanted: str) -> None:
    q = torch.tensor([[low, high]]).to(torch.uint8 if format == "uint8" else torch.int8)
    assert narrowest(q, format) == wanted
