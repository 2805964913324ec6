"""Tests of pooling heads, with sums over single heads, and singular values, as the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from lissom.passes.attention.pool_heads.pooling import Products, arranged, with_readers

SIZES = [(4, 1, 3, 7, 9), (4, 2, 3, 5, 4), (6, 1, 4, 20, 8)]


def products(
    shared: int, readers: int, features: int, inputs: int, outputs: int, fitted: bool
) -> tuple[torch.Tensor, Products]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(shared * readers, features, outputs, dtype=torch.float64, generator=generator)
    right = torch.randn(shared, features, inputs, dtype=torch.float64, generator=generator)
    x = torch.randn(50, inputs, dtype=torch.float64, generator=generator)
    return left, Products(left @ left.mT, right, x.T @ x / 50, fitted)


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_numbers(sizes: tuple[int, ...], fitted: bool) -> None:
    left, found = products(*sizes, fitted)
    assert found.moment is not None
    root, readers = torch.linalg.cholesky(found.moment), sizes[1]
    pooled, chosen = found.pooled([1, 3]), with_readers(torch.tensor([1, 3]), readers).tolist()
    whole = [left[head].T @ found.right[head // readers] @ root for head in chosen]
    errors = [left[head].T @ pooled.mix[place] @ pooled.right @ root - whole[place] for place, head in enumerate(chosen)]
    # Sums in float64, in another order.
    assert pooled.error == pytest.approx(float(sum(error.square().sum() for error in errors)), rel=1e-9)
    assert float(found.pair_errors()[1, 3]) == pytest.approx(pooled.error, rel=1e-9)
    if fitted:
        lost = torch.linalg.svdvals(torch.cat(whole))[sizes[2] :]
        assert pooled.error == pytest.approx(float(lost.square().sum()), rel=1e-9)
    else:
        torch.testing.assert_close(pooled.right, found.right[[1, 3]].mean(0))


def test_heads_of_zeros_are_pooled() -> None:
    _, found = products(*SIZES[0], True)
    empty = Products(found.left * 0, found.right * 0, found.moment, fitted=True)
    pooled = empty.pooled([0, 1])
    assert pooled.error == 0 and bool(pooled.right.isfinite().all()) and bool(pooled.mix.isfinite().all())


@pytest.mark.parametrize("fitted", [True, False])
def test_the_order_puts_heads_together_that_lose_least(fitted: bool) -> None:
    """Every way to pair six heads is tried."""
    _, found = products(*SIZES[2], fitted)
    costs = found.pair_errors()

    def total(order: tuple[int, ...]) -> float:
        return float(sum(costs[order[place], order[place + 1]] for place in (0, 2, 4)))

    best = min(map(total, itertools.permutations(range(6))))
    # No exchange of two heads saves anything, which is not always the least there is.
    assert best <= total(tuple(arranged([found], 2).tolist())) <= 1.1 * best
    assert sorted(arranged([found, found], 3).tolist()) == list(range(6))
