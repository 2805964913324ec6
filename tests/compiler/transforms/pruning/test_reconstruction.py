"""Tests of lissom.compiler.transforms.pruning.reconstruction, with float64 least squares as the oracle."""

from __future__ import annotations

import torch

from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.transforms.pruning.reconstruction import RIDGES, NormalEquations, refit, scale_units, solve
from lissom.compiler.transforms.pruning.units import neuron_sites
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded, tiny_bert


def filled(x: torch.Tensor, y: torch.Tensor, shift: float = 0.0) -> list[NormalEquations]:
    halves = [NormalEquations.empty(torch.full((x.shape[1],), shift), y.shape[1]) for _ in range(2)]
    for index, (some, wanted) in enumerate(zip(x.split(10), y.split(10), strict=True)):
        halves[index % 2].add(some, wanted, torch.ones(len(some)))
    return halves


def test_a_solution_is_ridge_regression_with_the_chosen_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    x, start = torch.randn(60, 5, generator=generator) + 2, torch.randn(3, 5, generator=generator)
    y = x @ torch.randn(5, 3, generator=generator) + torch.randn(60, 3, generator=generator)
    weight, bias = solve(filled(x, y, shift=1.5), start, with_bias=True)
    centred, wanted = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    gram = centred.T @ centred
    found = []
    for ridge in RIDGES:
        # The scale is that of half the data, centred by its own mean.
        for scale in [float(gram.diagonal().mean()) / 2]:
            damped = gram + ridge * scale * torch.eye(5)
            found.append(start.double() + torch.linalg.solve(damped, centred.T @ wanted - gram @ start.double().T).T)
    assert min(float((weight - item).abs().max()) for item in found) < 0.02
    torch.testing.assert_close(bias, y.mean(0) - weight @ x.mean(0), rtol=1e-4, atol=1e-4)


def test_ridge_is_large_for_noise_and_small_for_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    x, start = torch.randn(60, 20, generator=generator), torch.randn(2, 20, generator=generator)
    noise, _ = solve(filled(x, x @ start.T + 5 * torch.randn(60, 2, generator=generator)), start, with_bias=False)
    right = torch.randn(2, 20, generator=generator)
    signal, _ = solve(filled(x, x @ right.T), start, with_bias=False)
    assert float((noise - start).norm()) < 0.6 * float(start.norm())
    assert float((signal - right).norm()) < 0.05 * float(right.norm())


def test_sums_too_rough_for_any_ridge_leave_the_weight() -> None:
    start = torch.ones(2, 3)
    halves = filled(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 2))
    for half in halves:
        half.read.gram.fill_diagonal_(-1.0)
    weight, _ = solve(halves, start, with_bias=False)
    torch.testing.assert_close(weight, start)


def test_a_token_of_weight_two_counts_as_two_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)
    once, twice = (NormalEquations.empty(torch.full((3,), 0.5), 2) for _ in range(2))
    once.add(x, y, torch.tensor([1.0, 2.0] * 4))
    twice.add(torch.cat([x, x[1::2]]), torch.cat([y, y[1::2]]), torch.ones(12))
    for with_bias in (False, True):
        for one, two in zip(once.centred(with_bias=with_bias), twice.centred(with_bias=with_bias), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def pruned(keep: int) -> tuple[Editor, Program, list[Sample]]:
    """A feed-forward whose last neurons are zeroed, and what it was."""
    program = captures.optimize(seeded(FeedForward), normal(2, 5, 8)).program
    data = [[torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed))] for seed in range(4)]
    edit = Editor(program.copy(), "prune")
    site = neuron_sites(edit)[0]
    weight = site.matrix(edit.program)
    weight[:, keep:] = 0
    site.columns.write_matrix(edit, weight)
    return edit, program, data


def error(left: Program, right: Program, data: list[Sample]) -> float:
    with torch.no_grad():
        return sum(float((left.run(one)[0] - right.run(one)[0]).square().sum()) for one in data)  # pyright: ignore


def test_refitting_is_least_squares_and_leaves_zeros() -> None:
    edit, program, data = pruned(8)
    before = error(edit.program, program, data)
    steps: list[tuple[int, int]] = []
    refit(edit, program, data, lambda *step: steps.append(step))
    site = neuron_sites(edit)[0]
    assert bool((site.matrix(edit.program)[:, 8:] == 0).all())
    assert steps == [(1, 1)]
    rows, wanted = [], []
    with torch.no_grad():
        for sample in data:
            program.run(
                sample,
                lambda node, value: {
                    torch.ops.aten.gelu.default: rows,
                    torch.ops.aten.linear.default: wanted,
                }.get(node.target, []).append(value.flatten(0, 1)),
            )
    x = torch.cat(rows).double()[:, :8]
    y = torch.cat(wanted[1::2]).double()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = float((ones @ torch.linalg.lstsq(ones, y).solution - y).square().sum())
    after = error(edit.program, program, data)
    assert best <= after * 1.0001 < 1.1 * best < before


def test_later_layers_correct_errors_of_earlier_ones() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    example = program.signature.flatten((), case.kwargs)
    sizes = dict.fromkeys(program.signature.dimensions, 12)
    data = [program.signature.resize(example, sizes, seed) for seed in range(6)]
    edit = Editor(program.copy(), "prune")
    site = neuron_sites(edit)[0]
    weight = site.matrix(edit.program)
    weight[:, ::2] = 0
    site.columns.write_matrix(edit, weight)
    before = error(edit.program, program, data)
    refit(edit, program, data)
    assert error(edit.program, program, data) < 0.5 * before


def test_layer_reference_does_not_know_is_left_alone() -> None:
    edit, _, data = pruned(8)
    other = captures.optimize(seeded(lambda: FeedForward(8, 20)), normal(2, 5, 8)).program
    other.nodes(torch.ops.aten.linear.default)[1].name = "elsewhere"
    text = edit.program.text()
    refit(edit, other, data)
    assert edit.program.text() == text
    assert [item.reason for item in edit.skipped] == [
        "its weights are not refitted: the program before pruning has no such layer"
    ]


def test_units_are_scaled_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    program = captures.optimize(seeded(FeedForward), normal(2, 5, 8)).program
    site = neuron_sites(Editor(program, "test"))[0]
    x = torch.randn(200, 12, generator=generator) + 0.5
    moments = Moments.empty(12)
    moments.add(x)
    gone = torch.tensor([1, 4, 7])
    found = scale_units(program, site, moments, gone)
    weight = site.matrix(program)
    stay = [index for index in range(12) if index not in gone.tolist()]
    parts = torch.stack([torch.outer(x[:, index], weight[:, index]).flatten() for index in stay], 1).double()
    factors = torch.linalg.lstsq(parts, (x @ weight.T).flatten().double()).solution
    assert bool((found[:, gone] == 0).all())
    # The factors are pulled a hundredth towards one.
    torch.testing.assert_close(found[:, stay], weight[:, stay] * factors.float(), rtol=0.1, atol=0.02)
