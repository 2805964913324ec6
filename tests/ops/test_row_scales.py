"""`lissom::quantized_linear` with a known scale for each row of x: kernel and reference."""

from __future__ import annotations

import pytest
import torch

from lissom.ops.quantization import dynamic_scale
from lissom.ops.quantized_linear import quantized_linear
from tests.ops.test_quantized_linear import ALLOWED, DTYPES, FORMS, error, grouped, layer, numbers, packed


# The dynamic kernel has the same scales, and the same arithmetic after them; the reference multiplies in floating point.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 5, 15, 43])
def test_the_dynamic_scale_given_as_a_known_one(rows: int, dtype: torch.dtype, form: str) -> None:
    x = numbers(2, rows, 13, dtype=dtype) + 0.3
    operands = packed(*layer(100, 13))
    scale, zero_point = dynamic_scale(x.float(), "uint8", "token")
    wanted = quantized_linear(x, *operands, features=100)
    found = FORMS[form][0](x, *operands, scale, zero_point.float(), features=100)
    assert error(wanted.double(), found) < 2 * ALLOWED[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_scales(dtype: torch.dtype, form: str) -> None:
    x, (q, scale) = numbers(5, 64, dtype=dtype), layer(33, 64)
    steps = torch.tensor([0.01, 0.02, 0.03, 0.005, 1.0])[:, None]
    rounded = torch.fake_quantize_per_channel_affine(x.float(), steps[:, 0], torch.zeros(5, dtype=torch.int32), 0, 0, 255)
    found = FORMS[form][0](x, *packed(q, scale), steps, features=33)
    wanted = rounded.double() @ (q.double() * scale.double()[:, None]).T
    assert error(wanted, found) < 2 * ALLOWED[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_groups_too(form: str) -> None:
    x = numbers(7, 64)
    _, _, *operands = grouped(4, 33, 64, 2, torch.float16)
    scale, zero_point = dynamic_scale(x, "uint8", "token")
    found = FORMS[form][0](x, *operands, scale, zero_point.float(), features=33)
    assert error(quantized_linear(x, *operands, features=33).double(), found) < 2 * ALLOWED[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_a_row_whose_scale_is_nan_is_nan(form: str) -> None:
    x, operands = numbers(3, 64), packed(*layer(33, 64))
    scale = torch.tensor([[0.1], [torch.nan], [0.1]])
    found = FORMS[form][0](x, *operands, scale, torch.full((3, 1), 100.0), features=33)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "known",
    [
        (torch.ones(3, 2), None),
        (torch.ones(2, 1), None),
        (torch.ones(3, 1, dtype=torch.float64), None),
        (torch.ones(3, 1), torch.ones(3, 1, dtype=torch.uint8)),
    ],
)
def test_scales_that_do_not_fit_are_refused(known: tuple[torch.Tensor, torch.Tensor | None], form: str) -> None:
    operands = packed(*layer(33, 64))
    with pytest.raises(
        RuntimeError, match="x has one scale and one zero point where they are known, or both in float32 for each"
    ):
        FORMS[form][0](numbers(3, 64), *operands, *known, features=33)
