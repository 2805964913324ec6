"""Tests of lissom.ops.dense_linear: one row of 16 bits goes in as a matrix."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lissom.ops.dense_linear import linear
from tests.support.models import normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 3, 32), (1, 32), (32,), (1, 1, 1, 32)])
def test_values_and_shape_are_those_of_pytorch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = normal(*shape).to(dtype), normal(8, 32).to(dtype), normal(8).to(dtype)
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    actual = linear(x, weight, bias)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), wanted, rtol=2e-2, atol=2e-2)  # one rounding of a sum in 16 bits
    assert linear(x, weight).shape == wanted.shape


def test_gradients_pass() -> None:
    x = normal(1, 1, 4).bfloat16().requires_grad_()
    linear(x, torch.eye(4, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 1, 4, dtype=torch.bfloat16))
