"""The kernel of `lissom::int4_product` in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.ops.formats import pack_halves
from lissom.ops.quantized_products import int4_product_reference
from lissom.ops.triton_kernels import int4_product as kernel
from tests.ops.triton_kernels.interpreted.drawing import ENDS, FEATURES, LAYOUTS, ROWS, SEEDS, drawn, integers, laid, normal

# NumPy has no bfloat16: the interpreter multiplies its bits as integers. The compiled kernel alone has it.
STEP = 2**-11  # half the distance of neighbours in float16, of 1


@drawn
@given(
    rows=ROWS, features=FEATURES, group=st.sampled_from([2, 6, 32, 64, 128, 150]), groups=st.integers(1, 4), seed=SEEDS,
    layouts=st.tuples(LAYOUTS, LAYOUTS), ends=ENDS, signed=st.booleans(),
    zero=st.sampled_from([None, torch.uint8, torch.float32]), bias=st.booleans(), other=st.booleans(),
)  # fmt: skip
def test_product_is_that_of_the_reference(
    rows: int, features: int, group: int, groups: int, seed: int, layouts: tuple[str, ...], ends: dict[str, str],
    signed: bool, zero: torch.dtype | None, bias: bool, other: bool,
) -> None:  # fmt: skip
    inputs, grid = group * groups, (features, groups)
    x = laid(normal(rows, inputs, seed=seed, dtype=torch.float16), layouts[0])
    weight = pack_halves(
        integers(-8, 8, features, inputs, seed=seed + 1) if signed else integers(0, 16, features, inputs, seed=seed)
    )
    operands: list[Any] = [
        normal(*grid, seed=seed + 2) * 0.1,
        None if zero is None else integers(0, 16, *grid, seed=seed + 3, dtype=zero),
        normal(2 * features, seed=seed + 4, dtype=torch.float16)[::2] if bias else None,
        laid(normal(rows, features, seed=seed + 5, dtype=torch.float16), layouts[1]) if other else None,
    ]
    found = kernel.int4_product(x, weight, *operands, signed=signed, **ends)
    wanted = int4_product_reference(x, weight, *operands, signed=signed, **ends)
    # Weights are rounded alike and products are exact in float32: only the order of the sum differs, by at most inputs · 2^-24
    # of the sum of sizes, and the result may round the other way. An activation has a slope of at most 2 · |y| + 1.13.
    atol = bound(x, operands, ends["activation"])
    torch.testing.assert_close(found, wanted, rtol=2 * STEP, atol=atol)


def bound(x: torch.Tensor, operands: list[Any], activation: str) -> float:
    """The largest difference by the order of a sum: elements of the weight are at most 15 steps large."""
    if not x.numel() or not operands[0].numel():
        return 0.0
    scale, zero_point, bias, other = (None if operand is None else float(operand.abs().amax()) for operand in operands)
    assert scale is not None
    sizes = float(x.float().abs().sum(1).amax()) * (15 * scale + (zero_point or 0.0))
    slope = 1.13 + (2 * (sizes + (bias or 0.0)) if activation == "squared_relu" else 0)
    return x.shape[1] * 2**-24 * sizes * slope * max(1.0, other or 0.0)
