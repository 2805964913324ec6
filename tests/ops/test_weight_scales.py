"""Tests of the operators that quantize weights: the scales with the least error, and the elements."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.calibration.observers import weight_scale
from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.ops.native import load_kernels
from lissom.ops.quantization import best_scales, best_scales_reference, quantize_weight, quantize_weight_reference
from tests.support.models import normal

missing = load_kernels()
FACTORS = torch.linspace(1.0, 0.5, 26)
INTEGERS = [name for name, form in FORMATS.items() if form.is_integer]
every_integer_format = pytest.mark.parametrize("name", INTEGERS)


def errors(blocks: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor], name: str) -> torch.Tensor:
    """The squared error of each block."""
    form, (scale, zero_point) = FORMATS[name], grid
    spread = scale[:, None], None if form.symmetric else zero_point[:, None]
    rounded = formats.dequantize(formats.quantize(blocks, *spread, form), *spread, torch.float32)
    return (rounded - blocks).square().sum(1)


@every_integer_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 32, 200])
def test_kernel_finds_scales_as_good_as_the_reference(name: str, dtype: torch.dtype, width: int) -> None:
    blocks = normal(37, width).to(dtype)
    blocks[3] = 0
    actual, wanted = best_scales(blocks, FACTORS, format=name), best_scales_reference(blocks, FACTORS, format=name)
    # Sums in another order may make another of two nearly equal candidates the better one.
    torch.testing.assert_close(errors(blocks, actual, name), errors(blocks, wanted, name), rtol=1e-5, atol=1e-12)
    assert (actual[0] != wanted[0]).sum() <= 1


@every_integer_format
def test_search_is_no_worse_than_the_whole_range(name: str) -> None:
    blocks = normal(64, 32)
    found, whole = best_scales(blocks, FACTORS, format=name), best_scales(blocks, torch.ones(1), format=name)
    assert (errors(blocks, found, name) <= errors(blocks, whole, name)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_of_blocks_that_are_not_finite_are_not_finite(value: float) -> None:
    blocks = normal(20, 32)
    blocks[5, 3] = value
    scale, _ = best_scales(blocks, FACTORS, format="uint4")
    assert not scale[5].isfinite()
    assert scale[torch.arange(20) != 5].isfinite().all()


@pytest.mark.parametrize("shape", [(24, 4), (24, 1), (1, 1), (3, 64)])
def test_every_granularity_has_a_scale_for_each_block(shape: tuple[int, int]) -> None:
    weight = normal(24, 64)
    scale, zero_point = weight_scale(weight, shape, FORMATS["uint4"], "mse")
    blocks = formats.as_blocks(weight, shape)
    wanted, shifted = best_scales_reference(blocks, FACTORS, format="uint4")
    assert zero_point is not None
    assert torch.equal(scale.flatten(), wanted)
    assert torch.equal(zero_point.flatten(), shifted)


@every_integer_format
@pytest.mark.parametrize("shape", [(24, 4), (24, 1), (1, 1), (1, 64), (), (24, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_gives_the_elements_of_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale = normal(24, 64).to(dtype), normal(*shape).abs() + 0.1
    zero_point = None if FORMATS[name].symmetric else torch.full(shape, 7, dtype=torch.uint8)
    actual = quantize_weight(weight, scale, zero_point, format=name)
    wanted = quantize_weight_reference(weight, scale, zero_point, format=name)
    assert actual.dtype == wanted.dtype
    assert torch.equal(actual, wanted)


def test_elements_of_a_transposed_stack() -> None:
    weight, scale = normal(3, 64, 8).transpose(1, 2), normal(3, 8, 2).abs() + 0.1
    actual = quantize_weight(weight, scale, format="int8")
    assert torch.equal(actual, quantize_weight_reference(weight, scale, format="int8"))


@pytest.mark.skipif(missing is not None, reason=f"there are no kernels: {missing}")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: torch.ops.lissom.best_scales(normal(4), FACTORS, format="int4"), "must be"),
        (lambda: torch.ops.lissom.best_scales(normal(4, 4), FACTORS[:0], format="int4"), "must be"),
        (lambda: torch.ops.lissom.quantize_weight(normal(4, 5), torch.ones(4, 1), format="int4"), "share a byte"),
        (lambda: torch.ops.lissom.quantize_weight(normal(4, 6), torch.ones(4, 4), format="int8"), "must have"),
    ],
)
def test_kernels_refuse_sizes_that_do_not_fit(call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
