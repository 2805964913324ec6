"""Tests of lissom.ops.formats, with loops over blocks in NumPy as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.ops import formats
from lissom.ops.formats import FORMATS

SHAPES = {"tensor": (1, 1), "channel": (6, 1), "column": (1, 8), "group": (6, 2), "tiles": (3, 4)}


def weight() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def by_hand(x: np.ndarray, shape: tuple[int, int], name: str) -> np.ndarray:
    """Quantize and dequantize block by block, in float64."""
    form, result = FORMATS[name], np.empty_like(x, dtype=np.float64)
    rows, columns = x.shape[0] // shape[0], x.shape[1] // shape[1]
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            block = x[place].astype(np.float64)
            low, high = min(block.min(), 0), max(block.max(), 0)
            if form.symmetric:
                scale, zero = max(-low, high) / form.high, 0.0
            else:
                scale = (high - low) / (form.high - form.low)
                zero = np.clip(np.round(form.low - low / scale), form.low, form.high)
            q = np.clip(np.round(block / scale) + zero, form.low, form.high)
            result[place] = (q - zero) * scale
    return result


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.is_integer])
def test_values_are_rounded_block_by_block(name: str, shape: tuple[int, int]) -> None:
    x = weight()
    scale, zero_point = formats.scale_for(*formats.block_range(x, shape), FORMATS[name])
    assert scale.shape == shape
    found = formats.dequantize(formats.quantize(x, scale, zero_point, FORMATS[name]), scale, zero_point, torch.float64)
    np.testing.assert_allclose(found.numpy(), by_hand(x.numpy(), shape, name), rtol=1e-5, atol=1e-6)


def test_fp8_is_rounded_as_pytorch_casts() -> None:
    x = weight()
    scale, _ = formats.scale_for(*formats.block_range(x, (6, 1)), FORMATS["fp8"])
    found = formats.dequantize(formats.quantize(x, scale, None, FORMATS["fp8"]), scale, None, torch.float32)
    wanted = (x * (1 / scale)).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert float(((found - x).abs() / x.abs()).max()) < 2**-4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), st.sampled_from(["int8", "uint8", "int4", "uint4"]))
def test_what_is_rounded_stays_and_errs_by_half_step(values: list[float], name: str) -> None:
    x = torch.tensor([values])
    form = FORMATS[name]
    scale, zero_point = formats.scale_for(*formats.block_range(x, (1, 1)), form)
    once = formats.dequantize(formats.quantize(x, scale, zero_point, form), scale, zero_point, torch.float32)
    twice = formats.dequantize(formats.quantize(once, scale, zero_point, form), scale, zero_point, torch.float32)
    torch.testing.assert_close(once, twice, rtol=0, atol=0)
    # A zero point is rounded too, which costs the ends another half.
    assert float((once - x).abs().max()) <= float(scale) * (1.01 if zero_point is not None else 0.51) + 1e-30


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_four_bit_values_survive_packing_in_pairs(name: str) -> None:
    form = FORMATS[name]
    q = torch.arange(int(form.low), int(form.high) + 1).to(torch.int8 if form.low < 0 else torch.uint8).view(2, 8)
    packed = formats.pack_halves(q)
    assert packed.shape == (2, 4)
    assert int(packed[0, 0]) == (int(q[0, 0]) & 15) | (int(q[0, 1]) & 15) << 4
    torch.testing.assert_close(formats.unpack_halves(packed, form), q, rtol=0, atol=0)


def test_zeros_have_a_scale_and_stay_zeros() -> None:
    x = torch.zeros(2, 4)
    for name, form in FORMATS.items():
        scale, zero_point = formats.scale_for(*formats.block_range(x, (2, 1)), form)
        found = formats.dequantize(formats.quantize(x, scale, zero_point, form), scale, zero_point, torch.float32)
        assert bool((found == 0).all()), name


def test_what_lies_within_is_told() -> None:
    x = torch.tensor([[-2.0, 0.0, 1.0, 3.0]])
    scale = torch.tensor([[1 / 127]])
    assert formats.within(x, scale, None, FORMATS["int8"]).tolist() == [[False, True, True, False]]
    x, scale = torch.tensor([[-1.0, -0.8, 0.9, 1.1]]), torch.tensor([[1 / 8]])
    assert formats.within(x, scale, None, FORMATS["int4"]).tolist() == [[True, True, False, False]]
    assert formats.within(x, -scale, None, FORMATS["int4"]).tolist() == [[False, True, True, False]]


def test_blocks_are_summed() -> None:
    x = torch.arange(8.0).view(2, 4)
    assert formats.block_sum(x, (2, 2)).tolist() == [[1.0, 5.0], [9.0, 13.0]]


@pytest.mark.parametrize("sizes", [(), (1,), (1, 1)])
def test_one_zero_point_may_have_any_number_of_dimensions(sizes: tuple[int, ...]) -> None:
    """Found by tests.ops.generated_calls: the kernel took a zero point of one dimension, the reference refused it."""
    x, scale, zero_point = torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor(0.01), torch.full((), 128, dtype=torch.uint8)
    wanted = formats.quantize(x, scale, zero_point, FORMATS["uint8"])
    assert torch.equal(formats.quantize(x, scale, zero_point.reshape(sizes), FORMATS["uint8"]), wanted)
