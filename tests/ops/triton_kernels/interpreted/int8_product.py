"""The kernel of `lissom::int8_product` in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.ops.quantized_products import int8_product_reference
from lissom.ops.triton_kernels import int8_product as kernel
from tests.ops.triton_kernels.interpreted.drawing import (
    ENDS,
    FEATURES,
    INPUTS,
    LAYOUTS,
    ROWS,
    SEEDS,
    drawn,
    integers,
    laid,
    normal,
)

# Sums are exact. The activations differ by a few roundings of float32, 6e-8 each: `tanh` is written by a sigmoid, and 1 + erf
# cancels for large negative values, which `atol` is for. A result in bfloat16 may round the other way: 2^-8 of it.
CLOSE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-10, 1e-5)}


@drawn
@given(
    rows=ROWS, features=FEATURES, inputs=INPUTS, seed=SEEDS, layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS), ends=ENDS,
    dtype=st.sampled_from(list(CLOSE)), per_row=st.booleans(), bias=st.booleans(), other=st.booleans(),
)  # fmt: skip
def test_product_is_that_of_the_reference(
    rows: int, features: int, inputs: int, seed: int, layouts: tuple[str, ...], ends: dict[str, str], dtype: torch.dtype,
    per_row: bool, bias: bool, other: bool,
) -> None:  # fmt: skip
    q = laid(integers(-128, 128, rows, inputs, seed=seed), layouts[0])
    weight = laid(integers(-128, 128, features, inputs, seed=seed + 1), layouts[1])
    known = (rows, 1) if per_row else ()
    operands: list[Any] = [
        normal(*known, seed=seed + 2).abs() * 1e-2, integers(-128, 128, *known, seed=seed + 3, dtype=torch.int32),
        normal(features, seed=seed + 4).abs() * 1e-2, weight.sum(1, dtype=torch.int32),
        normal(2 * features, seed=seed + 5, dtype=dtype)[::2] if bias else None,
        laid(normal(rows, features, seed=seed + 6, dtype=dtype), layouts[2]) if other else None,
    ]  # fmt: skip
    found = kernel.int8_product(q, weight, *operands, dtype=dtype, **ends)
    wanted = int8_product_reference(q, weight, *operands, dtype=dtype, **ends)
    rtol, atol = CLOSE[dtype]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def test_largest_sums_do_not_overflow() -> None:
    """2^16 inputs of the largest size: the sum is 2^31 - 2^23 before it is scaled."""
    inputs = 2**16
    q, weight = torch.full((1, inputs), 127, dtype=torch.int8), torch.full((2, inputs), -128, dtype=torch.int8)
    grid = torch.ones(1, 1), torch.full((1, 1), -128, dtype=torch.int32), torch.ones(2), weight.sum(1, dtype=torch.int32)
    found = kernel.int8_product(q, weight, *grid, None, None, activation="none", combine="add", dtype=torch.float32)
    assert torch.equal(found, torch.full((1, 2), -255.0 * 128 * inputs))


def test_a_row_whose_scale_is_nan_is_nan_and_no_other() -> None:
    q, weight = integers(-128, 128, 3, 20, seed=0), integers(-128, 128, 5, 20, seed=1)
    scale = torch.tensor([[1.0], [float("nan")], [1.0]])
    grid = scale, torch.zeros(3, 1, dtype=torch.int32), torch.ones(5), weight.sum(1, dtype=torch.int32)
    found = kernel.int8_product(q, weight, *grid, None, None, activation="relu", combine="add", dtype=torch.float32)
    assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, False]
