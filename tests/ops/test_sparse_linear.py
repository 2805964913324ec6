"""Tests of lissom.ops.sparse_linear."""

from __future__ import annotations

import pytest
import torch

from lissom.ops.sparse_linear import is_two_in_four, pack, sparse_linear, unpack
from tests.support.models import normal


def two_in_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    groups = normal(rows, columns // 4, 4, seed=seed)
    return groups.scatter(-1, groups.abs().topk(2, -1, largest=False).indices, 0).flatten(1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192)])
def test_packing_loses_nothing_and_takes_nine_sixteenths(rows, columns, dtype):
    weight = two_in_four(rows, columns, dtype)
    weight[0, :8] = 0
    weight[1, 2] = 0
    values, places = pack(weight)
    assert torch.equal(unpack(values, places), weight)
    assert (values.nbytes + places.nbytes) / weight.nbytes == 9 / 16


def test_what_is_two_in_four():
    weight = two_in_four(32, 64)
    assert is_two_in_four(weight)
    weight[3, 4:7] = 1
    assert not is_two_in_four(weight)
    assert not is_two_in_four(torch.zeros(4, 6))
    assert not is_two_in_four(torch.zeros(4))


@pytest.mark.parametrize("bias", [True, False])
def test_numbers(bias):
    weight, x = two_in_four(32, 64), normal(2, 5, 64, seed=1).bfloat16()
    shift = normal(32, seed=2).bfloat16() if bias else None
    found = sparse_linear(x, *pack(weight), shift)
    wanted = x.double() @ weight.double().T + (shift.double() if bias else 0)
    assert found.dtype == torch.bfloat16
    # One rounding to 8 bits of a sum of order 10.
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2**-6)


def test_the_operator_is_well_formed():
    weight, x = two_in_four(32, 64), normal(2, 5, 64).bfloat16()
    torch.library.opcheck(sparse_linear, (x, *pack(weight)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 7, 64), (128, 64)])
def test_tensor_cores_give_the_same(shape):
    weight, x, bias = two_in_four(96, 64).cuda(), normal(*shape, seed=1).bfloat16().cuda(), normal(96, seed=2).bfloat16().cuda()
    found = sparse_linear(x, *pack(weight), bias)
    wanted = x.double() @ weight.double().T + bias.double()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-5)
