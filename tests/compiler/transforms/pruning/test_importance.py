"""Tests of lissom.compiler.transforms.pruning.importance, with hand loops and float64 as oracles."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.transforms.pruning import importance
from lissom.compiler.transforms.pruning.importance import GateMoments, damped_inverse, gate_moments, rearranged, removal_path
from lissom.compiler.transforms.pruning.units import UnitSite, head_sites, neuron_sites
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded, tiny_bert


def feed_forward() -> tuple[Program, list[Sample], list[UnitSite]]:
    program = captures.optimize(seeded(FeedForward), normal(2, 5, 8)).program
    data = [[torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(seed))] for seed in range(3)]
    return program, data, neuron_sites(Editor(program, "test"))


def activations(program: Program, data: list[Sample]) -> torch.Tensor:
    rows: list[torch.Tensor] = []

    def see(node: torch.fx.Node, value: object) -> None:
        if node.target is torch.ops.aten.gelu.default:
            rows.append(value.flatten(0, 1))  # pyright: ignore[reportAttributeAccessIssue]

    with torch.no_grad():
        for sample in data:
            program.run(sample, see)
    return torch.cat(rows)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude_is_the_norm_of_a_units_columns(norm: str) -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    for site, found in zip(
        sites := head_sites(Editor(program, "test")), importance.magnitude(program, sites, norm), strict=True
    ):
        weight = program.weight(str(site.columns.weight.target)).detach()
        wanted = [float(weight[:, columns].flatten().norm(1 if norm == "l1" else 2)) for columns in site.units]
        assert found.order.tolist() == sorted(range(site.count), key=wanted.__getitem__)


def test_wanda_is_weights_times_norms() -> None:
    program, data, sites = feed_forward()
    norms = activations(program, data).double().norm(dim=0)
    weight = sites[0].matrix(program).double()
    wanted = [sum(abs(float(weight[i, j])) * float(norms[j]) for i in range(8)) for j in range(12)]
    found = importance.wanda(program, sites, data)[0]
    assert found.order.tolist() == sorted(range(12), key=wanted.__getitem__)


@pytest.mark.slow
def test_squared_gradient_of_gates_is_gauss_newton_diagonal() -> None:
    """For y = x + W·a a gate on a_j moves y by W[:, j]·a_j, so E g² = ‖W[:, j]‖² a_j² / mean y²."""
    program, data, sites = feed_forward()
    sample = [data[0][0][:1, :1]]
    found = gate_moments(program, sites, [sample] * 3000)[0]
    rows, weight = activations(program, [sample])[0], sites[0].matrix(program)
    with torch.no_grad():
        scale = torch.as_tensor(program.run(sample)[0]).square().mean()
    # 3,000 draws: a standard error of √(2 / 3000) = 2.6 %.
    torch.testing.assert_close(found.gram.diagonal() / 3000, weight.square().sum(0) * rows.square() / scale, rtol=0.15, atol=0)
    assert found.count == 3000


def test_second_order_criterion_starts_with_best_single_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    x -= x.mean(0)
    weight = torch.randn(4, 6, generator=generator)
    units = torch.arange(6).view(3, 2)
    found = removal_path(weight, x.T @ x / 500, torch.eye(4), units)
    losses = []
    for unit in range(3):
        kept = [index for index in range(6) if index not in units[unit].tolist()]
        target = (x @ weight.T).double()
        fitted = torch.linalg.lstsq(x[:, kept].double(), target).solution
        losses.append(float((x[:, kept].double() @ fitted - target).square().sum() / 500))
    assert int(found.order[0]) == losses.index(min(losses))
    # The damping is a thousandth of the variance.
    assert float(found.cost[0]) == pytest.approx(min(losses), rel=0.05)


def test_the_second_order_path_weighs_what_the_metric_weighs() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = removal_path(weight, torch.eye(2), torch.diag(torch.tensor([1.0, 9.0])), torch.tensor([[0], [1]]))
    assert found.order.tolist() == [0, 1]
    torch.testing.assert_close(found.cost, torch.tensor([1.0, 9.0]), rtol=1e-2, atol=0)


def test_the_metric_weighs_the_outputs_of_each_expert() -> None:
    """A weight of three experts has their outputs below each other; their gradients are observed together."""
    weight, inputs, gradients = normal(12, 6), normal(40, 6, seed=1), normal(30, 4, seed=2)
    metric, units = gradients.T @ gradients, torch.arange(6)[:, None]
    found = removal_path(weight, inputs.T @ inputs, metric, units)
    wanted = removal_path(weight, inputs.T @ inputs, torch.block_diag(*[metric] * 3), units)
    assert torch.equal(found.order, wanted.order)
    torch.testing.assert_close(found.cost, wanted.cost)


def test_dead_units_go_first_and_cost_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 8, generator=generator)
    weight[:, [2, 5]] = 0
    x = torch.randn(50, 8, generator=generator)
    found = removal_path(weight, x.T @ x / 50, torch.eye(3), torch.arange(8)[:, None])
    assert set(found.order[:2].tolist()) == {2, 5}
    assert float(found.cost[:2].max()) < 1e-6 < float(found.cost[2])


def test_rearranged_mask_costs_no_more_and_breaks_up_twins() -> None:
    # Units 0 and 1 do the same, so that closing both costs four times as much as closing one; the diagonal does not show it.
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.5, 9.0]))
    gram[0, 1] = gram[1, 0] = 1.0
    assert rearranged(gram, torch.tensor([0, 1])).tolist() == [0, 2]
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    start = (root @ root.T).diagonal().argsort()[:4]
    found = rearranged(root @ root.T, start)
    assert len(found) == 4
    assert float(root[found].sum(0).square().sum()) <= float(root[start].sum(0).square().sum())


def test_an_inverse_is_damped() -> None:
    assert bool(torch.isfinite(damped_inverse(torch.zeros(3, 3))).all())
    torch.testing.assert_close(damped_inverse(torch.eye(3)), torch.eye(3) / 1.001)


def test_gates_of_heads_are_summed_over_their_features() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    data = [program.signature.flatten((), case.kwargs)]
    sites = head_sites(Editor(program, "test"))
    found: list[GateMoments] = gate_moments(program, sites, data)
    for site, item in zip(sites, found, strict=True):
        assert item.absolute.shape == (site.count,)
        assert bool((item.gram.diagonal() > 0).all())
