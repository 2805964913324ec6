"""Operators of quantized layers on CUDA, by their references; tests/ops/triton_kernels has their kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lissom.ops import int4_product, int8_product, quantize_rows
from lissom.ops.formats import FORMATS, dequantize, pack_halves
from lissom.ops.quantization import fake_quantize_dynamic


@pytest.mark.parametrize(("rows", "inputs", "features"), [(0, 5, 3), (1, 1, 1), (3, 37, 5), (20, 64, 16)])
def test_rows_and_product_are_those_of_the_simulation(rows: int, inputs: int, features: int) -> None:
    x, bias, other = torch.randn(rows, inputs), torch.randn(features), torch.randn(rows, features)
    weight, step = torch.randint(-128, 128, (features, inputs), dtype=torch.int8), torch.rand(features)
    q, scale, offset = quantize_rows(x)
    rounded = fake_quantize_dynamic(x, format="uint8", granularity="token")
    assert torch.equal((q - offset) * scale, rounded)
    operands = q, weight, scale, offset, step, weight.sum(1, dtype=torch.int32), bias, other
    found = int8_product(*operands, dtype=torch.float32, activation="relu", combine="mul")
    wanted = functional.linear(rounded.double(), weight.double() * step.double()[:, None], bias.double()).relu() * other
    # One rounding of float32 for each factor, against a sum of sizes of up to 64 · 3 · 128.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-2)
    torch.library.opcheck(int8_product, operands, {"dtype": torch.float32}, test_utils="test_faketensor")
    torch.library.opcheck(quantize_rows, (x,), test_utils="test_faketensor")


@pytest.mark.parametrize("signed", [True, False])
def test_int4_product_is_that_of_the_dequantized_weight(signed: bool) -> None:
    form = FORMATS["int4" if signed else "uint4"]
    q = torch.randint(int(form.low), int(form.high) + 1, (5, 12), dtype=torch.int8 if signed else torch.uint8)
    x, scale, zero = torch.randn(3, 12, dtype=torch.float16), torch.rand(5, 3), torch.randint(0, 16, (5, 3), dtype=torch.uint8)
    found = int4_product(x, pack_halves(q), scale, zero, signed=signed)
    wanted = functional.linear(x.double(), dequantize(q, scale, zero, torch.float16).double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-10, atol=1e-4)  # rounded to float16 once
    operands = x, pack_halves(q), scale, zero
    torch.library.opcheck(int4_product, operands, {"signed": signed}, test_utils="test_faketensor")


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (2, 0, 4)])
def test_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    x, other = torch.randn(*shape, 6), torch.randn(*shape, 3)
    weight, step = torch.randint(-128, 128, (3, 6), dtype=torch.int8), torch.rand(3)
    rows, known = quantize_rows(x), quantize_rows(x.reshape(-1, 6))
    for found, wanted in zip(rows, known, strict=True):
        assert torch.equal(found, wanted.reshape(*shape, -1) if x.numel() else found)
    grid = step, weight.sum(1, dtype=torch.int32), None
    found = int8_product(rows[0], weight, *rows[1:], *grid, other, dtype=torch.float32)
    wanted = int8_product(known[0], weight, *known[1:], *grid, other.reshape(-1, 3), dtype=torch.float32)
    assert found.shape == (*shape, 3) and torch.equal(found, wanted.reshape(found.shape))
    packed, scale = pack_halves(weight.clamp(-8, 7)), torch.rand(3, 2)
    found = int4_product(x.half(), packed, scale, None, None, other.half(), signed=True)
    wanted = int4_product(x.half().reshape(-1, 6), packed, scale, None, None, other.half().reshape(-1, 3), signed=True)
    assert found.shape == (*shape, 3) and torch.equal(found, wanted.reshape(found.shape))


def test_operands_that_do_not_fit_are_refused() -> None:
    q, scale, offset = quantize_rows(torch.randn(3, 8))
    weight, step, sums = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"the weight's scale has the sizes \[3\], and must have \[4\]"):
        int8_product(q, weight, scale, offset, step[:3], sums, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"the scale of q has the sizes \[2, 1\], and must have \[3, 1\]"):
        int8_product(q, weight, scale[:2], offset, step, sums, dtype=torch.float32)
    turned = torch.ones(4, 1).expand(4, 2)
    with pytest.raises(RuntimeError, match=r"the weight's scale has the strides \(1, 0\), and must be contiguous"):
        int4_product(torch.randn(3, 8).half(), torch.zeros(4, 4, dtype=torch.uint8), turned, signed=True)
    with pytest.raises(RuntimeError, match=r"the other operand has the sizes \[1, 4\], and must have \[3, 4\]"):
        int8_product(q, weight, scale, offset, step, sums, None, torch.ones(1, 4), dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"x is of torch.float32, and must be of float16 or bfloat16"):
        int4_product(torch.randn(3, 8), torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1), signed=True)


@pytest.mark.gpu
def test_operators_have_kernels_for_cuda() -> None:
    q, scale, offset = quantize_rows(torch.randn(3, 7).cuda())
    weight = torch.ones(5, 7, dtype=torch.int8).cuda()
    sums = weight.sum(1, dtype=torch.int32)
    assert int8_product(q, weight, scale, offset, torch.ones(5).cuda(), sums, dtype=torch.bfloat16).device.type == "cuda"
