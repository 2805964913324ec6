"""`lissom::sparse_linear`: a linear layer with a 2:4 sparse weight: at most two of every four neighbours are non-zero.

y = x Wᵀ + b

W [features, inputs] is stored as two values of every four, [features, inputs / 2], and their indices in the layout of CUTLASS,
two bits each, [features, inputs / 16] of int16. Both are ordinary tensors, so they can be saved, moved and unpacked. On CUDA
sparse tensor cores skip the zeros; elsewhere the weight is unpacked at every call, which is slow.
 https://docs.pytorch.org/docs/stable/sparse.html#sparse-semi-structured-tensors
"""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import LIBRARY, define

DTYPES = (torch.bfloat16, torch.float16)
ROWS, COLUMNS = 32, 64
"""The numbers of which the sizes of a weight must be multiples."""
_TOGETHER = 8
"""The number of which the rows of a product on CUDA must be a multiple."""


def is_two_in_four(weight: torch.Tensor) -> bool:
    """True for a matrix that is 2:4 sparse along its rows, with at most half of all elements non-zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    # Of a dense weight one row is read.
    return all(bool(((rows != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()) for rows in (weight[:1], weight))


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of a weight [features, inputs] of one of DTYPES whose sizes are multiples of ROWS and COLUMNS."""
    values, places = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return values, places


def unpack(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The weight that `pack` was given."""
    return sparse_semi_structured_to_dense_cutlass(values, places)


def sparse_linear_reference(
    x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference implementation."""
    return functional.linear(x, unpack(values, places), bias)


def _sparse_linear_cuda(
    x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    padded = functional.pad(rows, (0, 0, 0, -rows.shape[0] % _TOGETHER)).t()
    if bias is None:
        result = torch.ops.aten._sparse_semi_structured_mm(values, places, padded)
    else:
        result = torch.ops.aten._sparse_semi_structured_addmm(bias, values, places, padded)
    return result.t()[: rows.shape[0]].reshape(*x.shape[:-1], values.shape[0])


def _shape_of(x: torch.Tensor, values: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


sparse_linear = define(
    "sparse_linear(Tensor x, Tensor values, Tensor places, Tensor? bias=None) -> Tensor",
    sparse_linear_reference,
    _shape_of,
    dimensions=Dimensions("... k, n half, _ -> ... n : ... n half"),
)
"""The operator. x: [..., inputs], of a dtype in DTYPES; values, places: packed; bias: [features]. Returns [..., features]."""
LIBRARY.impl("sparse_linear", _sparse_linear_cuda, "CUDA")
