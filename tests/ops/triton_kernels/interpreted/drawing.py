"""What the tests draw: the number of cases, sizes around those of tiles, and matrices of unlike strides."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lissom.ops.epilogue import ACTIVATIONS

CASES = int(os.environ.get("TRITON_CASES", "12"))
drawn: Callable[[Any], Any] = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
ROWS = st.sampled_from([0, 1, 2, 3, 16, 17, 33, 65, 130])
FEATURES = st.sampled_from([0, 1, 3, 5, 31, 64, 65, 129])
INPUTS = st.sampled_from([0, 1, 2, 7, 31, 64, 65, 127, 128, 130, 257])
SEEDS = st.integers(0, 2**16)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "sliced", "broadcast"])
ENDS = st.fixed_dictionaries({"activation": st.sampled_from(list(ACTIVATIONS)), "combine": st.sampled_from(["add", "mul"])})


def laid(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The matrix with other strides; with `broadcast` every row is the first."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "sliced":
        return torch.nn.functional.pad(matrix, (1, 2))[:, 1 : 1 + matrix.shape[1]]
    return matrix[:1].expand(matrix.shape) if layout == "broadcast" and len(matrix) else matrix


def normal(*sizes: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values of a seed."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(low: int, high: int, *sizes: int, seed: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Integers below `high` of a seed."""
    return torch.randint(low, high, sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)
