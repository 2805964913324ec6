"""`lissom::quantized_linear` and its relative with a norm: kernel and reference against whole numbers in NumPy."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.ops.epilogue import ACTIVATIONS
from lissom.ops.formats import dequantize
from lissom.ops.native import kernel_dtypes, missing_int8_kernel
from lissom.ops.quantized_linear import (
    X_FORMATS,
    fill_panels,
    pack_bytes,
    pack_groups,
    pack_halves_of_bytes,
    quantized_linear,
    quantized_linear_norm,
    quantized_linear_reference,
    unpack_bytes,
)
from lissom.ops.weight_quantized_linear import pack_blocks

CPU = torch.device("cpu")
# The operator calls the C++ kernel where this processor has one for the dtype, else the reference.
FORMS = {
    "operator": (quantized_linear, quantized_linear_norm),
    "reference": (quantized_linear_reference, quantized_linear_reference),
}
# float32: whole numbers turned into floats once, times two scales; an activation good to 2e-7.  The reference sums floats.
# bfloat16: one rounding of the result.
ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 5e-3}
# The reference takes both; where there are kernels, the operator takes what they do.
DTYPES = kernel_dtypes() or tuple(ALLOWED)


def numbers(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    return torch.randn(sizes, generator=generator).to(dtype)


def layer(features: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of bytes, all values in it, and a scale for each feature."""
    generator = torch.Generator().manual_seed(features + inputs)
    return (
        torch.randint(-128, 128, (features, inputs), generator=generator).to(torch.int8),
        (torch.rand(features, generator=generator) + 0.5) / (128 * inputs**0.5),
    )


def packed(q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pack_bytes(q), fill_panels(scale, len(q)), fill_panels(q.sum(1, dtype=torch.int32), len(q))


def bytes_of(x: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x in bytes with its scale and zero point, in float32 step by step as the formula says."""
    rows = x if granularity == "token" else x.reshape(1, -1)
    low = np.minimum(rows.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(rows.max(-1, keepdims=True), np.float32(0))
    scale = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x * (np.float32(1) / scale)) + zero, 0, 255).astype(np.int64), scale, zero.astype(np.int64)


def product(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, granularity: str) -> torch.Tensor:
    """The layer in whole numbers of 64 bits, in float64 at the end."""
    whole, step, zero = bytes_of(x.float().numpy(), granularity)
    sums = (whole - zero) @ q.numpy().astype(np.int64).T
    return torch.from_numpy(sums * (step.astype(np.float64) * scale.double().numpy()))


def error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((wanted - found.double()).abs().max() / wanted.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize(("features", "inputs"), [(1, 1), (31, 3), (32, 4), (33, 5), (96, 64)])
def test_packing_loses_nothing(features: int, inputs: int) -> None:
    q, _ = layer(features, inputs)
    assert torch.equal(unpack_bytes(pack_bytes(q), features, inputs), q)


@pytest.mark.parametrize(("features", "inputs"), [(1, 4), (31, 8), (33, 64), (96, 12)])
def test_packing_four_bits_loses_nothing(features: int, inputs: int) -> None:
    q = layer(features, inputs)[0] >> 4
    packed_q = pack_halves_of_bytes(q)
    assert packed_q.numel() * 2 == pack_bytes(q).numel()
    assert torch.equal(unpack_bytes(packed_q, features, inputs), q)


def grouped(bits: int, features: int, inputs: int, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A weight of that many bits, and a scale for each group of inputs; then both packed with their sums."""
    generator = torch.Generator().manual_seed(features + inputs)
    q = layer(features, inputs)[0] >> (8 - bits)
    scale = ((torch.rand(features, groups, generator=generator) + 0.5) / ((1 << bits - 1) * inputs**0.5)).to(dtype)
    return q, scale, *pack_groups(q, scale, bits)


# For 15 and 43 rows, threads and tiles split what is left; features that are no multiple of 32 leave a panel partly empty.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "features", "inputs", "groups"),
    [(1, 33, 64, 2), (2, 64, 96, 3), (3, 7, 4, 1), (6, 40, 40, 10), (7, 64, 64, 1), (15, 33, 128, 4), (43, 100, 12, 3)],
)
def test_scales_of_groups(rows: int, features: int, inputs: int, groups: int, bits: int, dtype: torch.dtype, form: str) -> None:
    x = numbers(rows, inputs, dtype=dtype) + 0.3
    q, scale, *operands = grouped(bits, features, inputs, groups, torch.float16 if groups > 1 else torch.float32)
    whole, step, zero = bytes_of(x.float().numpy(), "token")
    weight = q.double().numpy() * np.repeat(scale.double().numpy(), inputs // groups, 1)
    wanted = torch.from_numpy(((whole - zero) @ weight.T) * step)
    found = FORMS[form][0](x, *operands, features=features)
    # Sums of groups are added in float32, and the zero point's part is taken off at the end.
    assert error(wanted, found) < 2 * ALLOWED[dtype]
    for part in (1, 5):
        assert torch.equal(
            quantized_linear(x[:part], *operands, features=features), quantized_linear(x, *operands, features=features)[:part]
        )


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_groups_with_known_scale_and_epilogue(form: str) -> None:
    x, bias, other = numbers(5, 64), numbers(33), numbers(5, 33, seed=1)
    q, scale, *operands = grouped(4, 33, 64, 2, torch.float16)
    known = torch.tensor(0.02), torch.tensor(117, dtype=torch.uint8)
    rounded = torch.ops.lissom.fake_quantize(x, *known, format="uint8")
    weight = dequantize(q, scale, None, torch.float32)
    wanted = torch.nn.functional.silu(torch.nn.functional.linear(rounded, weight, bias)) * other
    found = FORMS[form][0](x, *operands, *known, None, bias, other, features=33, activation="silu", combine="mul")
    assert error(wanted.double(), found) < 2 * ALLOWED[torch.float32]


# Three rows share a tile, 15 and 43 are split among tiles and threads; a weight has a scale for each feature, or for groups.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "groups"), [(8, 0), (8, 1), (8, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize(("rows", "features"), [(1, 33), (3, 64), (15, 7), (43, 100)])
def test_groups_of_activations(rows: int, features: int, bits: int, groups: int, dtype: torch.dtype, form: str) -> None:
    x = numbers(rows, 128, dtype=dtype) * 10.0 ** numbers(rows, 128, seed=3).round().to(dtype)
    if groups:
        q, scale, *operands = grouped(bits, features, 128, groups, torch.float16)
    else:
        q, scale = layer(features, 128)
        operands, scale = packed(q, scale), scale[:, None]
    parts = x.float().numpy().reshape(rows, 4, 32)
    step = np.abs(parts).max(-1, keepdims=True) / np.float32(127)
    rounded = (np.rint(parts * (np.float32(1) / step)).astype(np.float64) * step).reshape(rows, 128)
    weight = q.double().numpy() * np.repeat(scale.double().numpy(), 128 // scale.shape[1], 1)
    found = FORMS[form][0](x, *operands, features=features, granularity="group")
    # Sums of four groups are added in float32.
    assert error(torch.from_numpy(rounded @ weight.T), found) < 2 * ALLOWED[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("rows", "features"), [(1, 33), (3, 64), (15, 7), (43, 100)])
def test_zero_points_of_groups(rows: int, features: int, groups: int, dtype: torch.dtype, form: str) -> None:
    x = numbers(rows, 128, dtype=dtype) + 1.0
    signed, scale, *_ = grouped(4, features, 128, groups, torch.float16)
    q, generator = (signed + 8).to(torch.uint8), torch.Generator().manual_seed(rows)
    zero_point = torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8)
    operands = *pack_groups(q, scale, 4, zero_point), None, None, pack_blocks(zero_point, features)
    rounded = torch.ops.lissom.fake_quantize_dynamic(x.float(), format="int8", granularity="group").double()
    wanted = rounded @ dequantize(q, scale.double(), zero_point, torch.float32).double().T
    found = FORMS[form][0](x, *operands, features=features, granularity="group")
    # Sums of up to four groups are added in float32.
    assert error(wanted, found) < 2 * ALLOWED[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_zero_points_without_a_kernel_are_refused(form: str) -> None:
    call, x, (_, _, *operands) = FORMS[form][0], numbers(2, 64), grouped(4, 33, 64, 2, torch.float16)
    zero_point = torch.full((2, 2, 32), 8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="only with four bits, where x has the granularity 'group'"):
        call(x, *operands, None, None, zero_point, features=33)
    with pytest.raises(RuntimeError, match="only with four bits, where x has the granularity 'group'"):
        call(x, *grouped(8, 33, 64, 2, torch.float16)[2:], None, None, zero_point, features=33, granularity="group")
    for wrong in (zero_point[:1], zero_point.int(), zero_point[..., :9]):
        with pytest.raises(RuntimeError, match="a weight's zero point"):
            call(x, *operands, None, None, wrong, features=33, granularity="group")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_group_without_numbers_is_seen_to_be_so(value: float) -> None:
    x, (q, scale) = numbers(20, 64), layer(33, 64)
    clean = quantized_linear(x, *packed(q, scale), features=33, granularity="group")
    x[5, 40] = value
    found = quantized_linear(x, *packed(q, scale), features=33, granularity="group")
    assert found[5].isnan().all()
    assert torch.equal(torch.cat((found[:5], found[6:])), torch.cat((clean[:5], clean[6:])))


@pytest.mark.parametrize("form", FORMS)
def test_groups_that_do_not_fit_are_refused(form: str) -> None:
    call = FORMS[form][0]
    with pytest.raises(RuntimeError, match="groups need a multiple of 32 features"):
        call(numbers(2, 40), *packed(*layer(6, 40)), features=6, granularity="group")
    with pytest.raises(RuntimeError, match="a scale of the weight is of 16 inputs, and must be of a multiple of 32"):
        call(numbers(2, 64), *grouped(4, 6, 64, 4, torch.float16)[2:], features=6, granularity="group")
    with pytest.raises(RuntimeError, match="x has a known scale"):
        call(numbers(2, 64), *packed(*layer(6, 64)), torch.tensor(0.1), features=6, granularity="group")


WRONG_GROUPS = {
    "a multiple of four": lambda weight, scale, sums: (weight, scale.repeat(1, 5, 1), sums),
    "a weight's scale": lambda weight, scale, sums: (weight, scale.double(), sums),
    "the sums of a weight": lambda weight, scale, sums: (weight, scale, sums.int()),
    "a packed weight": lambda weight, scale, sums: (weight[:, :3].contiguous(), scale, sums),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sentence", WRONG_GROUPS)
def test_wrong_scales_of_groups_are_refused(sentence: str, form: str) -> None:
    _, _, *operands = grouped(4, 33, 64, 2, torch.float16)
    with pytest.raises(RuntimeError, match=sentence):
        FORMS[form][0](numbers(2, 64), *WRONG_GROUPS[sentence](*operands), features=33)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 14, 15, 43, 130]),
    inputs=st.sampled_from([1, 3, 4, 17, 64, 190]),
    features=st.sampled_from([1, 31, 32, 33, 100]),
    granularity=st.sampled_from(["token", "tensor"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    combine=st.sampled_from(["none", "add", "mul"]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(list(FORMS)),
)
def test_numbers(
    rows: int,
    inputs: int,
    features: int,
    granularity: str,
    activation: str,
    combine: str,
    with_bias: bool,
    dtype: torch.dtype,
    form: str,
) -> None:
    x, (q, scale) = numbers(rows, inputs, dtype=dtype) + 0.3, layer(features, inputs)
    bias = numbers(features, dtype=dtype) if with_bias else None
    other = numbers(rows, features, dtype=dtype, seed=1) if combine != "none" else None
    wanted = product(x, q, scale, granularity)
    wanted = ACTIVATIONS[activation](wanted + (bias.double() if bias is not None else 0))
    if other is not None:
        wanted = wanted * other.double() if combine == "mul" else wanted + other.double()
    options = {"combine": combine} if other is not None else {}
    operands = (x, *packed(q, scale), None, None, None, bias, other)
    found = FORMS[form][0](*operands, features=features, granularity=granularity, activation=activation, **options)
    assert found.dtype == dtype
    # A result may be small, or zero behind ReLU, where its terms cancel; they are of the order of one.
    assert error(wanted, found) < ALLOWED[dtype] * max(1.0, 1 / max(float(wanted.abs().max()), 1e-30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_numbers_with_a_norm(rows: int, dtype: torch.dtype, form: str) -> None:
    x, (q, scale) = numbers(rows, 40, dtype=dtype), layer(33, 40)
    bias, other, gain, shift = (numbers(*sizes, dtype=dtype, seed=2) for sizes in ((33,), (rows, 33), (33,), (33,)))
    total = product(x, q, scale, "token") + bias.double() + other.double()
    wanted = torch.nn.functional.layer_norm(total, (33,), gain.double(), shift.double(), 1e-5)
    operands = (x, *packed(q, scale), None, None, None, bias, other, gain, shift)
    found = FORMS[form][1](*operands, features=33, eps=1e-5)
    # A norm of 33 values of order 1 magnifies little; the reference rounds once more, in front of it.
    assert error(wanted, found) < ALLOWED[dtype] * (1 if form == "operator" or dtype == torch.float32 else 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_point", [None, 0, 101, 255])
def test_a_known_scale_cuts_off_what_it_cannot_hold(dtype: torch.dtype, zero_point: int | None, form: str) -> None:
    x, (q, scale) = numbers(9, 20, dtype=dtype), layer(40, 20)
    x[0, 0], x[1, 1], x[2, 2] = 1e30, -1e30, 1e9
    step, zero = np.float32(0.011), zero_point or 0
    whole = np.clip(np.rint(x.float().numpy() * (np.float32(1) / step)) + zero, 0, 255).astype(np.int64) - zero
    wanted = torch.from_numpy((whole @ q.numpy().astype(np.int64).T) * (float(step) * scale.double().numpy()))
    known = (torch.tensor(step), None if zero_point is None else torch.tensor(zero_point, dtype=torch.uint8))
    found = FORMS[form][0](x, *packed(q, scale), *known, features=40)
    assert error(wanted, found) < ALLOWED[dtype]


@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
def test_values_are_rounded_as_formula_says_to_last_bit(granularity: str) -> None:
    """One product a feature and scales of one: the result is what x was rounded to."""
    for seed in range(20):
        x = numbers(37, 32, seed=seed) * 10.0 ** (seed - 10)
        q = torch.eye(32).to(torch.int8)
        found = quantized_linear(x, *packed(q, torch.ones(32)), features=32, granularity=granularity)
        assert torch.equal(
            found, torch.ops.lissom.fake_quantize_dynamic(x, format=X_FORMATS[granularity], granularity=granularity)
        )


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_spread(form: str) -> None:
    """Rows of zeros, of one value, of values of one sign, next to ordinary ones."""
    x = torch.stack([torch.zeros(24), torch.full((24,), 3.0), torch.full((24,), -2.0), numbers(24).abs(), numbers(24)])
    q, scale = layer(33, 24)
    found = FORMS[form][0](x, *packed(q, scale), features=33)
    assert error(product(x, q, scale, "token"), found) < ALLOWED[torch.float32]
    assert torch.equal(found[0], torch.zeros(33))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_numbers_is_seen_to_be_so(value: float, dtype: torch.dtype) -> None:
    x, (q, scale) = numbers(20, 30, dtype=dtype), layer(33, 30)
    clean = quantized_linear(x, *packed(q, scale), features=33)
    x[5, 17] = value
    found = quantized_linear(x, *packed(q, scale), features=33)
    assert found[5].isnan().all()
    assert torch.equal(found[:5], clean[:5])
    assert torch.equal(found[6:], clean[6:])
    assert quantized_linear(x, *packed(q, scale), features=33, granularity="tensor").isnan().all()


def test_rows_are_independent_of_the_batch() -> None:
    """A row's answer does not depend on how many others are computed beside it, nor on how they are shared out."""
    x, (q, scale) = numbers(300, 64), layer(96, 64)
    whole = quantized_linear(x, *packed(q, scale), features=96)
    for rows in (1, 7, 29, 84, 113):
        assert torch.equal(quantized_linear(x[:rows], *packed(q, scale), features=96), whole[:rows])


@pytest.mark.parametrize("form", ["int8", "int4", "uint4"])
def test_rows_with_scales_of_groups_are_independent_of_the_batch(form: str) -> None:
    """Tiles multiply many rows and vectors few, with the same sums of integers, added in the same order."""
    x, (q, scale, *_) = numbers(300, 96), grouped(4, 96, 96, 3, torch.float16)
    zero_point = torch.randint(0, 16, scale.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    operands = {
        "int8": pack_groups(q, scale, 8),
        "int4": pack_groups(q, scale, 4),
        "uint4": (*pack_groups((q + 8).to(torch.uint8), scale, 4, zero_point), None, None, pack_blocks(zero_point, 96)),
    }[form]
    whole = quantized_linear(x, *operands, features=96, granularity="group")
    for rows in (1, 7, 9, 29, 84, 113):
        assert torch.equal(quantized_linear(x[:rows], *operands, features=96, granularity="group"), whole[:rows])


@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("rows", [1, 5, 6, 60])
def test_the_largest_sums_are_exact(rows: int, weight: int) -> None:
    """Products of 255 with one weight throughout, which the instructions for bytes of some processors cut off at 16 bits."""
    x, q = torch.ones(rows, 4096), torch.full((33, 4096), weight, dtype=torch.int8)
    known = torch.tensor(1 / 255), torch.tensor(0, dtype=torch.uint8)
    found = quantized_linear(x, *packed(q, torch.full((33,), 255.0)), *known, features=33)
    # 255 x 4096 x 128 has few bits that are not zero; two factors whose product is one are each rounded once.
    torch.testing.assert_close(found, torch.full((rows, 33), 255.0 * 4096 * weight), rtol=3e-7, atol=0)


def test_inputs_of_any_layout_and_rank() -> None:
    x, (q, scale) = numbers(4, 3, 5, 8), layer(6, 8)
    turned = x.transpose(0, 2)
    found = quantized_linear(turned, *packed(q, scale), features=6)
    assert error(product(turned.contiguous(), q, scale, "token"), found) < ALLOWED[torch.float32]
    assert quantized_linear(x[:0], *packed(q, scale), features=6).shape == (0, 3, 5, 6)


@pytest.mark.skipif(missing_int8_kernel(torch.float32, CPU) is not None, reason="no kernel for bytes here")
def test_a_wrong_weight_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"a packed weight has the sizes .* must be contiguous with the sizes"):
        quantized_linear(numbers(2, 8), *packed(*layer(6, 9)), features=6)
    with pytest.raises(RuntimeError, match="granularity is 'token', 'tensor' or 'group'"):
        quantized_linear(numbers(2, 8), *packed(*layer(6, 8)), features=6, granularity="channel")


def test_what_has_no_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if missing_int8_kernel(torch.float32, CPU) is not None:
        pytest.skip("no kernel for bytes here")
    assert "no kernel for torch.float64" in str(missing_int8_kernel(torch.float64, CPU))
    monkeypatch.setattr(torch.ops.lissom, "has_int8", lambda: False)
    assert "lacks AVX2" in str(missing_int8_kernel(torch.float32, CPU))


def test_without_kernels_the_reference_runs() -> None:
    script = (
        "import torch\n"
        "from lissom.ops.quantized_linear import pack_bytes, fill_panels, quantized_linear\n"
        "x, q = torch.randn(3, 8), torch.randint(-9, 9, (6, 8)).to(torch.int8)\n"
        "y = quantized_linear(x, pack_bytes(q), fill_panels(torch.ones(6), 6), fill_panels(q.sum(1).int(), 6), features=6)\n"
        "torch.testing.assert_close(y, x @ q.float().T, rtol=0, atol=1)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "LISSOM_NATIVE": "0"})
