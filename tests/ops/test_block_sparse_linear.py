"""Tests of linear layers that skip zero blocks: against dense ones with the same weight, on every path of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lissom.ops import block_sparse_linear, block_sparse_quantized_linear, packed_linear, quantized_linear
from lissom.ops.block_sparse_linear import (
    BLOCK,
    block_sparse_linear_reference,
    nonzero_blocks,
    pack_nonzero_blocks,
    unpack_blocks,
)
from lissom.ops.epilogue import PANEL
from lissom.ops.native import load_kernels
from lissom.ops.packed_linear import pack
from lissom.ops.quantized_linear import fill_panels, pack_bytes
from tests.support.models import normal

needs_kernels = pytest.mark.skipif(bool(load_kernels()), reason=str(load_kernels()))
SIZES = [(45, 40), (96, 256), (100, 1024), (7, 4), (64, 12), (0, 8)]
DTYPES = [torch.float32, torch.bfloat16]


def with_zero_blocks(features: int, inputs: int, keep: float, seed: int = 0) -> torch.Tensor:
    """A matrix of which that fraction of the blocks is not zero."""
    kept = torch.rand(-(-features // PANEL), inputs // BLOCK, generator=torch.Generator().manual_seed(seed)) < keep
    kept = kept.repeat_interleave(PANEL, 0)[:features].repeat_interleave(BLOCK, 1)
    return (normal(features, inputs, seed=seed) / 8).masked_fill(~kept, 0)


@pytest.fixture(params=["by tiles", "by vectors"])
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways in which the kernels multiply; tiles are emulated where the processor has none."""
    before = torch.ops.lissom.use_amx()
    torch.ops.lissom.use_amx(request.param == "by tiles")
    yield
    torch.ops.lissom.use_amx(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("features", "inputs"), SIZES)
def test_packing_loses_nothing(features: int, inputs: int, dtype: torch.dtype) -> None:
    weight = with_zero_blocks(features, inputs, 0.3)
    packed = pack_bytes((weight * 100).to(torch.int8)) if dtype == torch.int8 else pack(weight.to(dtype))
    stored, places, ends = pack_nonzero_blocks(packed)
    assert len(stored) == len(places) == int(nonzero_blocks(packed).sum())
    assert ends.tolist() == nonzero_blocks(packed).sum(1).cumsum(0).tolist()
    assert torch.equal(unpack_blocks(stored, places, ends, inputs), packed)


@needs_kernels
@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 16, 33, 200])
@pytest.mark.parametrize(("features", "inputs"), SIZES)
def test_it_equals_the_dense_layer(features: int, inputs: int, rows: int, keep: float) -> None:
    weight, bias = with_zero_blocks(features, inputs, keep), normal(features, seed=2)
    for dtype in DTYPES:
        x, packed = normal(rows, inputs, seed=3).to(dtype), pack(weight.to(dtype))
        found = block_sparse_linear(x, *pack_nonzero_blocks(packed), bias, features=features, activation="gelu")
        wanted = packed_linear(x, packed, bias, features=features, activation="gelu")
        # The same products, summed in another order: 1e-5 of sums of up to 256 terms; bfloat16 rounds the result to 8 bits.
        torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=2e-5)


@needs_kernels
@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize(("features", "inputs"), SIZES)
def test_in_int8_it_equals_the_dense_layer_to_the_bit(features: int, inputs: int, rows: int, granularity: str) -> None:
    """Sums of integers do not depend on their order."""
    q, x = (
        (with_zero_blocks(features, inputs, 0.25) * 200).round().clamp(-127, 127).to(torch.int8),
        normal(rows, inputs, seed=3),
    )
    grid = fill_panels(torch.linspace(0.01, 0.02, features), features), fill_panels(q.sum(1, dtype=torch.int32), features)
    known = torch.rand(rows, 1) / 50, torch.full((rows, 1), 117.0)
    for scales in ((), (torch.tensor(0.02), torch.tensor(128.0)), known):
        options = {"features": features, "granularity": granularity}
        found = block_sparse_quantized_linear(x, *pack_nonzero_blocks(pack_bytes(q)), *grid, *scales, **options)
        assert torch.equal(found, quantized_linear(x, pack_bytes(q), *grid, *scales, **options))


@needs_kernels
@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_is_not_read_where_a_block_is_zero(dtype: torch.dtype) -> None:
    weight = with_zero_blocks(32, 24, 1.0)
    weight[:, 8:12] = 0
    x = normal(40, 24, seed=1).to(dtype)
    x[3, 9], x[5, 0] = torch.nan, torch.inf
    found = block_sparse_linear(x, *pack_nonzero_blocks(pack(weight.to(dtype))), features=32)
    assert [row for row in range(40) if not found[row].isfinite().all()] == [5]


@pytest.mark.parametrize(
    ("places", "ends", "said"),
    [
        ([0, 1, 2], [2, 3], "the places of blocks must be from 0 to 1"),
        ([-1, 1, 1], [2, 3], "the places of blocks must be from 0 to 1"),
        ([0, 1, 1], [2, 2], "the ends of panels must not fall, and the last must be 3"),
        ([0, 1, 1], [2, 4], "the ends of panels must not fall, and the last must be 3"),
        ([0, 1, 1], [4, 3], "the ends of panels must not fall, and the last must be 3"),
        ([0, 1, 1], [-1, 3], "the ends of panels must not fall, and the last must be 3"),
    ],
)
def test_blocks_that_are_not_there_are_not_read(places: list[int], ends: list[int], said: str) -> None:
    stored = torch.ones(3, BLOCK, PANEL), torch.tensor(places, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)
    for call in (block_sparse_linear, block_sparse_linear_reference):
        with pytest.raises(RuntimeError, match=said):
            call(torch.ones(5, 8), *stored, features=40)
