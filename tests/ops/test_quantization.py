"""Tests of lissom.ops.quantization."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.ops.native import load_kernels
from lissom.ops.quantization import (
    dequantize,
    dynamic_scale,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_backward_reference,
    fake_quantize_dynamic,
    fake_quantize_dynamic_reference,
    fake_quantize_reference,
)

load_kernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BLOCKS = [
    ((6, 70), (6, 1)),
    ((6, 70), (1, 70)),
    ((6, 70), (6, 2)),
    ((6, 70), (2, 35)),
    ((5, 128), (5, 4)),
    ((3, 4, 33), (3, 2, 11)),
    ((3, 4, 33), ()),
    ((4, 1), (4, 1)),
    ((), ()),
    ((0, 8), (0, 2)),
]
"""Sizes of x and of its scale: per-channel, per-input, group-wise by any number, blocks of rows, per-tensor, and none."""


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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "shape"), BLOCKS)
def test_the_kernels_give_what_the_references_give(
    name: str, dtype: torch.dtype, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = ((torch.randn(sizes, generator=generator) * 3).to(dtype) for _ in range(2))
    scale, zero_point = scales(x.float(), shape, name) if shape and x.numel() else dynamic_scale(x.float(), name, "tensor")
    scale, zero_point = (None if item is None else item.broadcast_to(shape) for item in (scale, zero_point))
    assert scale is not None
    operands = x, 0.8 * scale, zero_point  # some values are clamped
    found, wanted = fake_quantize(*operands, format=name), fake_quantize_reference(*operands, format=name)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for learn in (False, True):
        options = {"format": name, "scales_learn": learn}
        found = fake_quantize_backward(gradient, *operands, **options)
        wanted = fake_quantize_backward_reference(gradient, *operands, **options)
        # The kernel reads float64 as float32.
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-6 if dtype == torch.float64 else 0, atol=0)
        # Sums in another order: a bound for each is the sum of absolute terms. The reference rounds every step to x's dtype.
        wanted = fake_quantize_backward_reference(gradient.float(), x.float(), *operands[1:], **options)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5 * float(gradient.float().abs().sum()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf, 3e38])
def test_kernels_scale_what_is_not_finite_as_reference_does(name: str, granularity: str, value: float) -> None:
    x = torch.randn(3, 2, 37, generator=torch.Generator().manual_seed(0))
    x[1, 0, 36] = value
    options = {"format": name, "granularity": granularity}
    for dtype in (torch.float32, torch.bfloat16):
        found, wanted = fake_quantize_dynamic(x.to(dtype), **options), fake_quantize_dynamic_reference(x.to(dtype), **options)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_kernels_take_any_strides() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).T
    scale, _ = scales(x, (6, 4), "int4")
    assert torch.equal(fake_quantize(x, scale, format="int4"), fake_quantize(x.contiguous(), scale, format="int4"))
    assert torch.equal(fake_quantize_dynamic(x, format="uint8"), fake_quantize_dynamic(x.contiguous(), format="uint8"))
    every = torch.ones(()).expand(6, 8)
    options = {"format": "int4", "scales_learn": True}
    wanted = fake_quantize_backward_reference(every, x, scale, **options)
    torch.testing.assert_close(fake_quantize_backward(every, x, scale, **options), wanted)


def test_the_kernels_refuse_scales_that_divide_nothing() -> None:
    if load_kernels():
        pytest.skip(load_kernels())
    for scale in (torch.ones(6, 3), torch.ones(8), torch.ones(6, 0)):
        with pytest.raises(RuntimeError, match="sizes that divide those of x"):
            fake_quantize(torch.ones(6, 8), scale, format="int4")
    with pytest.raises(RuntimeError, match="a gradient has the sizes"):
        fake_quantize_backward(torch.ones(6, 4), torch.ones(6, 8), torch.ones(6, 1), format="int4", scales_learn=True)


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


def test_a_negative_scale_mirrors_the_range() -> None:
    """Seven steps below zero and eight above: the gradient passes in [-7 s, 8 s], as in the reference."""
    x, scale = torch.tensor([[-8.0, -7.0, 8.0, 9.0]], requires_grad=True), torch.tensor([[-1.0]], requires_grad=True)
    y = fake_quantize(x, scale, format="int4")
    assert y.tolist() == [[-7.0, -7.0, 8.0, 8.0]]
    y.sum().backward()
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert scale.grad.tolist() == [[7.0 - 8.0]]


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
def test_zero_point_in_floating_point_is_subtracted_after_scaling(dtype: torch.dtype) -> None:
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
    for learn in (False, True):
        operands = x.detach(), x.detach(), scale, zero_point
        torch.library.opcheck(fake_quantize_backward, operands, {"format": name, "scales_learn": learn})
    q = formats.quantize(x.detach(), scale, zero_point, FORMATS[name])
    stored = formats.pack_halves(q) if FORMATS[name].bits == 4 else q
    # One of opcheck's own checks computes with its inputs, which PyTorch cannot in fp8.
    utilities = ("test_faketensor",) if name == "fp8" else ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"format": name, "dtype": torch.float32}
    torch.library.opcheck(dequantize, (stored, scale, zero_point), options, test_utils=utilities)
