"""Tests of lissom.ops.grouped_product."""

from __future__ import annotations

import pytest
import torch

from lissom.ops import grouped_product
from lissom.ops.grouped_product import grouped_product_reference
from tests.support.models import normal
from tools.pretend_cuda import pretend_cuda


def oracle(input, weight, offs):
    """Row by row, in float64."""
    rows = []
    for index, row in enumerate(input.double()):
        group = next((group for group, end in enumerate(offs.tolist()) if index < end), None)
        rows.append(row @ weight[group].double() if group is not None else torch.zeros(weight.shape[2]).double())
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[2]).double()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rows", "ends"),
    [(7, [2, 2, 5]), (9, [0, 4, 9]), (5, [0, 0, 5]), (4, [0, 0, 0]), (0, [0, 0, 0]), (1, [1, 1, 1])],
    ids=["rows behind the last group", "an empty first group", "one group", "no group", "no rows", "one row"],
)
def test_numbers(rows, ends, dtype):
    input, weight, offs = normal(rows, 4), normal(3, 4, 6, seed=1), torch.tensor(ends, dtype=dtype)
    # Sums of 4 terms of float32, unit roundoff 6e-8.
    torch.testing.assert_close(grouped_product(input, weight, offs).double(), oracle(input, weight, offs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ends", [[4, 4, 15], [0, 20, 20], [0, 0, 0]])
def test_numbers_in_a_graph_of_a_device_with_a_kernel(ends):
    """In bfloat16 nothing is read on the host, so a CUDA graph takes it."""
    operands = normal(20, 16).bfloat16(), normal(3, 16, 8, seed=1).bfloat16(), torch.tensor(ends)
    with pretend_cuda(capability=(9, 0)):
        given, graph = [operand.cuda() for operand in operands], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = grouped_product(*given)
        graph.replay()
        found = found.cpu()
    # Both round sums of 16 products to bfloat16, unit roundoff 4e-3.
    torch.testing.assert_close(found, grouped_product_reference(*operands), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize(
    ("dtype", "features", "capability"),
    [(torch.float32, 8, (9, 0)), (torch.bfloat16, 6, (9, 0)), (torch.bfloat16, 8, (8, 0))],
    ids=["float32", "rows that are not aligned", "an older device"],
)
def test_other_calls_wait_for_the_device(dtype, features, capability):
    operands = normal(20, 16).to(dtype), normal(3, 16, features, seed=1).to(dtype), torch.tensor([4, 4, 15])
    with pretend_cuda(capability=capability):
        given = [operand.cuda() for operand in operands]
        found = grouped_product(*given).cpu()
        with (
            pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            grouped_product(*given)
    assert torch.equal(found, grouped_product_reference(*operands))


def test_gradients():
    input, weight = (item.double().requires_grad_() for item in (normal(7, 4), normal(3, 4, 6, seed=1)))
    assert torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, torch.tensor([2, 2, 5])), (input, weight))


def test_operator_is_well_formed():
    torch.library.opcheck(grouped_product, (normal(7, 4), normal(3, 4, 6), torch.tensor([2, 2, 5])))


def test_other_shapes_are_refused():
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"takes input \[rows, k\], weight \[groups, k, n\]"):
        grouped_product(torch.ones(7, 5), torch.ones(3, 4, 6), torch.ones(3, dtype=torch.int64))
