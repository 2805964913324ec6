"""Tests of the bases: orthogonal, of the sizes that models have, and the balanced ones optimal."""

from __future__ import annotations

import pytest
import torch

from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize
from lissom.passes.quantize.quantize_cache import quantize_rows
from lissom.passes.quantize.rotate.bases import balanced, hadamard, nested_components, principal_components, random_basis
from tests.support.models import normal


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 64, 72, 80, 96, 112, 128, 256, 384, 640, 768])
def test_hadamard_matrices_have_signs_and_are_orthogonal(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5), rtol=0, atol=1e-15)
    # Products of float64 with up to 768 terms.
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [3, 6, 10, 92, 172])
def test_other_sizes_have_none(size: int) -> None:
    assert hadamard(size) is None


def test_random_bases_are_orthogonal_and_reproducible() -> None:
    found = random_basis(7, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found, random_basis(7, 3)) and not torch.equal(found, random_basis(7, 4))


def test_principal_components_without_weights() -> None:
    x = normal(100, 5).double() * torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    found = principal_components(x.T @ x, torch.eye(5, dtype=torch.float64))
    wanted = torch.linalg.svd(x).Vh
    torch.testing.assert_close((wanted @ found).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_principal_components_predict_the_layers_best() -> None:
    """Against regressions of W x on each set of channels, and on those of SliceGPT."""
    x, weight = normal(300, 6).double() @ normal(6, 6, seed=1).double(), normal(4, 6, seed=2).double() * torch.arange(1, 7)

    def loss(basis: torch.Tensor, count: int) -> float:
        kept, goal = x @ basis[:, :count], x @ weight.T
        return float((goal - kept @ torch.linalg.lstsq(kept, goal).solution).square().sum())

    plain = principal_components(x.T @ x, torch.eye(6, dtype=torch.float64))
    found = principal_components(x.T @ x, weight.T @ weight)
    torch.testing.assert_close(found @ found.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    for count in range(1, 4):
        # The best fit of that rank; a thousandth of the mean variance is added to the Gram matrix.
        bound = float(torch.linalg.svdvals(x @ weight.T)[count:].square().sum())
        assert bound * (1 - 1e-9) <= loss(found, count) < 1.05 * bound
        assert loss(found, count) < loss(plain, count)


def test_balanced_bases_are_inverse_and_reach_the_bound() -> None:
    root_keys, root_queries = normal(40, 6).double() * 3, normal(40, 6, seed=1).double() * torch.arange(1, 7)
    keys, queries = root_keys.T @ root_keys / 40, root_queries.T @ root_queries / 40
    a, b = balanced(keys, queries, random_basis(6, 0))
    torch.testing.assert_close(a @ b.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)

    def loss(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((left.T @ keys @ left).trace() * (right.T @ queries @ right).trace())

    bound = float(torch.linalg.matrix_norm(torch.linalg.cholesky(keys).T @ torch.linalg.cholesky(queries), "nuc")) ** 2
    assert bound <= loss(a, b) * (1 + 1e-9)
    # A hundredth of the mean variance is added to all directions.
    assert loss(a, b) < 1.02 * bound
    plain = torch.eye(6, dtype=torch.float64)
    assert bound < 0.9 * loss(plain, plain)


def test_quantized_keys_change_the_scores_least_in_a_balanced_basis() -> None:
    """Keys with two large channels, which queries hardly use."""
    sizes = torch.ones(64, dtype=torch.float64)
    sizes[:2] = 20
    keys, queries = normal(200, 64).double() * sizes, normal(200, 64, seed=1).double() / sizes
    basis = hadamard(64)
    assert basis is not None
    bases = {
        "none": (torch.eye(64, dtype=torch.float64),) * 2,
        "hadamard": (basis, basis),
        "balanced": balanced(keys.T @ keys / 200, queries.T @ queries / 200, basis),
    }
    errors: dict[str, float] = {}
    for name, (of_keys, of_queries) in bases.items():
        whole, scale = quantize_rows(keys @ of_keys, FORMATS["int4"])
        stored = dequantize(whole, scale, format="int4", dtype=torch.float64)
        errors[name] = float((queries @ of_queries @ stored.T - queries @ keys.T).norm())
    assert errors["balanced"] < 0.5 * errors["hadamard"] < 0.5 * errors["none"]


def test_nested_components_serve_layers_of_their_own_moments() -> None:
    """Two layers, each of which reads four directions that the other does not: better than from the mean of both moments."""
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    for seed in range(3):
        x, weight = normal(400, 16, seed=seed).double() @ normal(16, 16, seed=seed + 5).double(), normal(3, 16, seed=seed + 9)
        gram = x.T @ x / len(x)
        own = weight.double().T @ weight.double()
        layers.append((gram, own / (own * gram).sum()))

    def lost(basis: torch.Tensor, kept: int) -> float:
        u = basis[:, :kept]
        return sum(float((b * (c - c @ u @ torch.linalg.inv(u.T @ c @ u) @ u.T @ c)).sum()) for c, b in layers)

    start = principal_components(torch.stack([c for c, _ in layers]).mean(0), torch.stack([b for _, b in layers]).sum(0))
    found = nested_components(start, layers)
    torch.testing.assert_close(found.T @ found, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert sum(lost(found, kept) for kept in (8, 10, 12)) < 0.9 * sum(lost(start, kept) for kept in (8, 10, 12))
