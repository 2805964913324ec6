"""Tests of matrices of low rank and of ranks within a budget, with SVD and search of all choices as oracles."""

from __future__ import annotations

import itertools

import pytest
import torch

from lissom.passes.lightweight.low_rank.svd import Curve, allot, rank_of, relative_error, spectrum
from tests.support.models import normal


def layer(outputs: int, inputs: int, tokens: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and what it reads, [tokens, features in], whose features hang together, in float64."""
    return normal(outputs, inputs).double(), (normal(tokens, inputs, seed=1) @ normal(inputs, inputs, seed=2)).double()


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 7), (5, 12), (13, 6), (1, 4), (9, 1)])
def test_what_is_lost_are_the_singular_values_left_out(outputs: int, inputs: int) -> None:
    """No matrix of that rank does better: ‖XWᵀ - XW'ᵀ‖² is Σ of the squared singular values of XWᵀ behind the rank."""
    weight, rows = layer(outputs, inputs)
    found = spectrum(weight, rows.T @ rows)
    values = torch.linalg.svdvals(rows @ weight.T)
    # Float64 throughout; energies are eigenvalues, so that values near the smallest keep half the digits.
    torch.testing.assert_close(found.energy, values[: len(found.energy)].square(), rtol=1e-9, atol=1e-8 * float(values[0]))
    for rank in range(1, len(found.energy) + 1):
        u, v = found.truncated(rank)
        assert u.shape == (outputs, rank) and v.shape == (rank, inputs)
        lost = (rows @ (weight - u @ v).T).norm()
        assert float(lost) == pytest.approx(float(values[rank:].norm()), rel=1e-6, abs=1e-6 * float(values[0]))


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 7), (5, 12), (13, 6)])
def test_without_data_it_is_the_truncated_svd(outputs: int, inputs: int) -> None:
    weight, _ = layer(outputs, inputs)
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    for rank in (1, 3, 5):
        found = torch.mm(*spectrum(weight).truncated(rank))
        torch.testing.assert_close(found, U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-9, atol=1e-9)


def test_it_is_the_svd_whitened_by_the_cholesky_factor() -> None:
    """As SVD-LLM writes it: truncate W S, then multiply with S⁻¹, for S Sᵀ = XᵀX."""
    weight, rows = layer(6, 8)
    S = torch.linalg.cholesky(rows.T @ rows)
    left, values, right = torch.linalg.svd(weight @ S, full_matrices=False)
    wanted = left[:, :3] * values[:3] @ right[:3] @ torch.linalg.inv(S)
    found = torch.mm(*spectrum(weight, rows.T @ rows).truncated(3))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_fewer_tokens_than_features_are_enough() -> None:
    """The whitening factor would have no inverse."""
    weight, rows = layer(9, 12, tokens=4)
    u, v = spectrum(weight, rows.T @ rows).truncated(4)
    torch.testing.assert_close(rows @ (u @ v).T, rows @ weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 12), (13, 6)])
def test_features_count_as_often_as_they_are_given(outputs: int, inputs: int) -> None:
    """The oracle gives each feature out so many times, and lets all of them count alike."""
    weight, rows = layer(outputs, inputs)
    counts = torch.arange(outputs) % 3 + 1
    u, v = spectrum(weight, rows.T @ rows, counts.double()).truncated(2)
    repeated = torch.mm(*spectrum(weight.repeat_interleave(counts, 0), rows.T @ rows).truncated(2))
    torch.testing.assert_close((u @ v).repeat_interleave(counts, 0), repeated, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_factors_fit_into_float16_whatever_size_of_counts(size: float) -> None:
    weight, rows = layer(7, 5)
    counts = normal(7).abs().double() + 0.1
    wanted = torch.mm(*spectrum(weight, rows.T @ rows, counts).truncated(3))
    u, v = spectrum(weight, rows.T @ rows, counts * size).truncated(3)
    # Rounded to 11 bits, and sums of three products.
    torch.testing.assert_close(u.half().double() @ v.half().double(), wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))


def test_rank_that_keeps_share_is_least_that_does() -> None:
    weight, rows = layer(8, 8)
    values = torch.linalg.svdvals(rows @ weight.T).square()
    found = spectrum(weight, rows.T @ rows)
    for keep in (0.01, 0.5, 0.9, 0.999):
        rank = rank_of(found.energy, keep)
        assert float(values[:rank].sum()) >= keep * float(values.sum()) > float(values[: rank - 1].sum())
    assert rank_of(found.energy, 1.0) == 8
    assert rank_of(spectrum(torch.zeros(3, 4)).energy, 0.9) == 1


def test_relative_error() -> None:
    weight, rows = layer(5, 7)
    other = weight + 0.1 * normal(5, 7, seed=3)
    wanted = float((rows @ (weight - other).T).norm() / (rows @ weight.T).norm())
    assert relative_error(weight, other, rows.T @ rows) == pytest.approx(wanted, rel=1e-9)
    assert relative_error(weight, other) == pytest.approx(float((weight - other).norm() / weight.norm()), rel=1e-9)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def worth(curve: Curve, steps: int | None) -> tuple[float, int]:
    """The gain and the bytes of one choice for one matrix."""
    if steps is None:
        return float(curve.gains.sum()), curve.whole_bytes
    return float(curve.gains[:steps].sum()), steps * curve.step_bytes


def test_no_choice_within_the_budget_gains_more() -> None:
    """At the bytes that any price of a byte leads to, all choices are tried; between them a last step may not fit."""
    shapes = ((6, 6), (8, 4), (5, 9), (7, 7))
    curves = [
        Curve(spectrum(normal(*shape, seed=seed)).energy / shape[0], sum(shape), shape[0] * shape[1])
        for seed, shape in enumerate(shapes)
    ]
    counts = [(None, *range(1, curve.whole_bytes // curve.step_bytes + 1)) for curve in curves]
    options = [[worth(curve, steps) for steps in found] for curve, found in zip(curves, counts, strict=True)]
    choices = [(sum(gain for gain, _ in found), sum(spent for _, spent in found)) for found in itertools.product(*options)]
    budgets = {max(choices, key=lambda choice: choice[0] - 0.002 * price * choice[1])[1] for price in range(200)}
    assert len(budgets) > 5
    for budget in budgets:
        found = [worth(curve, steps) for curve, steps in zip(curves, allot(curves, budget), strict=True)]
        assert sum(spent for _, spent in found) <= budget
        best = max(gain for gain, spent in choices if spent <= budget)
        assert sum(gain for gain, _ in found) == pytest.approx(best, rel=1e-9)


def test_layer_of_even_energy_stays_whole_and_other_pays() -> None:
    even, steep = torch.full((8,), 1 / 8), 0.5 ** torch.arange(1.0, 9)
    curves = [Curve(even, 16, 64), Curve(steep, 16, 64)]
    assert allot(curves, 96) == [None, 2]
    assert allot(curves, 128) == [None, None]
    assert allot(curves, 32) == [1, 1]


def test_where_first_step_saves_nothing_matrix_stays_whole() -> None:
    assert allot([Curve(torch.ones(1), 5, 4)], 4) == [None]
