"""Tests of lissom.ops.quantization."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic


def scales(x: torch.Tensor, shape: tuple[int, ...], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return formats.scale_for(*formats.block_range(x, shape), FORMATS[name])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_values_turn_back_into_the_rounded_ones(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = scales(x.float(), (6, 2), name)
    q = formats.quantize(x, scale, zero_point, FORMATS[name])
    stored = formats.pack_halves(q) if FORMATS[name].bits == 4 else q
    rounded = fake_quantize(x, scale, zero_point, format=name)
    assert rounded.dtype == dtype
    zero_point = None if zero_point is None else zero_point.to(torch.uint8)
    torch.testing.assert_close(dequantize(stored, scale, zero_point, format=name, dtype=dtype), rounded, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["uint8", "int8", "fp8"])
def test_a_token_is_rounded_as_it_would_be_alone(name: str) -> None:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    found = fake_quantize_dynamic(x, format=name)
    for batch in range(2):
        for token in range(3):
            alone = fake_quantize_dynamic(x[batch, token], format=name, granularity="tensor")
            torch.testing.assert_close(found[batch, token], alone, rtol=0, atol=0)


def test_per_tensor_takes_one_scale() -> None:
    x = torch.tensor([[0.0, 0.1], [0.0, 255.0]])
    assert fake_quantize_dynamic(x, format="uint8", granularity="tensor").tolist() == [[0.0, 0.0], [0.0, 255.0]]


def test_the_gradient_of_a_scale() -> None:
    """By hand, one scale a row: round(x / s) - x / s where x fits, else the end of the range."""
    x, scale = torch.tensor([[0.9, -0.3, 50.0], [-1.2, 0.4, 0.1]]), torch.tensor([[0.5], [0.25]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (fake_quantize(x, scale, format="int4") * weights).sum().backward()
    rows = [
        [(2 - 1.8) * 1, (-1 + 0.6) * 2, 7.0 * 3],
        [(-5 + 4.8) * 4, (2 - 1.6) * 5, (0 - 0.4) * 6],
    ]
    assert scale.grad is not None
    assert scale.grad[:, 0].tolist() == pytest.approx([sum(row) for row in rows], rel=1e-5)


def test_the_gradient_passes_straight_through_where_values_fit() -> None:
    x = torch.tensor([-3.0, 0.3, 0.5, 3.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1 / 127), format="int8").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    y = torch.randn(3, 4, requires_grad=True)
    (fake_quantize_dynamic(y, format="uint8") * torch.arange(4.0)).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_point_in_floating_point_is_subtracted_after_scaling(dtype: torch.dtype) -> None:
    q = torch.tensor([[0, 3, 15, 7]], dtype=torch.uint8)
    scale, zero_point = torch.tensor([[0.5, 0.0]], dtype=dtype), torch.tensor([[0.3, -2.0]], dtype=dtype)
    wanted = torch.tensor([[0.0, 1.5, 0.0, 0.0]]) - torch.tensor([[0.3, 0.3, -2.0, -2.0]], dtype=dtype).float()
    assert torch.equal(dequantize(q, scale, zero_point, format="uint8", dtype=torch.float32), wanted)
    packed = formats.pack_halves(q)
    assert torch.equal(dequantize(packed, scale, zero_point, format="uint4", dtype=torch.float32), wanted)


def test_products_with_stored_weights_are_differentiable() -> None:
    q, scale = torch.randint(-127, 128, (3, 4), dtype=torch.int8), torch.rand(3, 1, dtype=torch.float64)

    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ dequantize(q, scale, format="int8", dtype=torch.float64).T

    assert gradcheck(product, torch.randn(2, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", ["int8", "uint4", "fp8"])
def test_the_operators_are_well_behaved(name: str) -> None:
    x = torch.randn(6, 8, requires_grad=True)
    scale, zero_point = scales(x.detach(), (6, 1), name)
    torch.library.opcheck(fake_quantize, (x, scale, zero_point), {"format": name})
    torch.library.opcheck(fake_quantize_dynamic, (x,), {"format": "uint8"})
    q = formats.quantize(x.detach(), scale, zero_point, FORMATS[name])
    stored = formats.pack_halves(q) if FORMATS[name].bits == 4 else q
    # One of opcheck's own checks computes with its inputs, which PyTorch cannot in fp8.
    utilities = ("test_faketensor",) if name == "fp8" else ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"format": name, "dtype": torch.float32}
    torch.library.opcheck(dequantize, (stored, scale, zero_point), options, test_utils=utilities)
