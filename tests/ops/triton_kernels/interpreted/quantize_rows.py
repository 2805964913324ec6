"""The kernel of `lissom::quantize_rows` in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.ops.quantized_products import quantize_rows_reference
from lissom.ops.triton_kernels import row_quantization
from tests.ops.triton_kernels.interpreted.drawing import LAYOUTS, SEEDS, drawn, laid, normal

COLUMNS = st.sampled_from([0, 1, 2, 31, 33, 255, 1000, 4096, 4099, 9001])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-38, -1e-45, 0.0, -0.0]


def same(x: torch.Tensor) -> None:
    """The kernel gives the integers of the reference: both divide, multiply and round by IEEE, in one order."""
    found, wanted = row_quantization.quantize_rows(x), quantize_rows_reference(x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@drawn
@given(
    rows=st.integers(0, 5), columns=COLUMNS, dtype=DTYPES, layout=LAYOUTS, seed=SEEDS,
    size=st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4]), shift=st.sampled_from([-9.0, 0.0, 2.0]),
)  # fmt: skip
def test_rows_are_those_of_the_reference(
    rows: int, columns: int, dtype: torch.dtype, layout: str, seed: int, size: float, shift: float
) -> None:
    same(laid((normal(rows, columns, seed=seed) * size + shift * size).to(dtype), layout))


@drawn
@given(
    columns=st.integers(1, 70), places=st.lists(st.tuples(st.integers(0, 69), st.sampled_from(SPECIAL)), max_size=4), seed=SEEDS
)
def test_values_that_are_no_numbers_make_a_row_nan(columns: int, places: list[tuple[int, float]], seed: int) -> None:
    x = normal(2, columns, seed=seed)
    for place, value in places:
        x[0, place % columns] = value
    same(x)
    q, scale, offset = row_quantization.quantize_rows(x)
    values = (q - offset) * scale
    wide = not torch.isfinite(x[0].clamp(min=0).amax() - x[0].clamp(max=0).amin())
    assert bool(values[0].isnan().all()) == wide
    assert torch.isfinite(values[1]).all()


@pytest.mark.parametrize("scale", [1.0, 0.03125])
def test_ties_round_to_even(scale: float) -> None:
    """A row from 0 to 255 scales has a step of one, so halves are ties."""
    same((torch.cat((torch.arange(0, 255) + 0.5, torch.tensor([0.0, 255.0]))) * scale)[None])
