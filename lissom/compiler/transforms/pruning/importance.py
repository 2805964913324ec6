"""Importance criteria for units, heads or neurons. Each returns a ranking of the units of every site.

W: the weight that reads the units, [out_features, in_features]; W_u: its columns of unit u; x_u: their inputs.

- `magnitude`: ‖W_u‖₁ or ‖W_u‖₂. Li et al. 2017, Pruning Filters for Efficient ConvNets, §3.1.
- `wanda`: Σ_{i, j ∈ u} |W_ij| · ‖x_j‖₂, the norm over all tokens. Sun et al. 2024, A Simple and Effective Pruning Approach
  for Large Language Models, eq. 1; summed over a unit's weights, as whole units are removed.
- `gradient`: E|x_uᵀ ∂L/∂x_u|, the gradient of a gate on the unit. Michel et al. 2019, Are Sixteen Heads Really Better than
  One?, eq. 2. L is the likelihood of outputs drawn from the program, as there are no labels.
- `taylor`: E(x_uᵀ ∂L/∂x_u)², the Fisher information of the gate, to which the loss of closing it is proportional in the second
  order. Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, eq. 8.
- `second-order`: tr(G · W_u · (P_uu)⁻¹ · W_uᵀ) with P = H⁻¹, the least change of the likelihood when unit u is removed and the
  others compensate. Hassibi & Stork 1993, Second Order Derivatives for Network Pruning, eq. 5, for whole units as in Kurtic et
  al. 2023, ZipLM, eq. 2. W and P are updated after each removal. H: the covariance of x over all tokens, G: that of the
  gradient ∂L/∂(W·x). Both papers take G = I, which ranks units of one layer; G makes layers comparable.

Scores of `magnitude`, `wanda` and `gradient` are divided by their ℓ2 norm over a site, so that sites compare (Michel et al.).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of, width
from lissom.compiler.calibration import statistics
from lissom.compiler.calibration.statistics import Moments, Progress, real_rows
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, spread
from lissom.compiler.transforms.pruning.budget import Ranking
from lissom.compiler.transforms.pruning.units import UnitSite

DAMPING = 1e-3
"""Added to the diagonal of a covariance before it is inverted, as a fraction of the diagonal's mean."""
_STEPS = 192
"""The most removal steps of the second-order criterion for a site; wide feed-forwards lose several neurons per step."""
_FILLED = 0.9
"""The fraction of remaining columns below which removed ones are deleted; a deletion takes longer than a removal."""
_SELECTION_TOKENS = 8192
"""The number of tokens for gradients and covariances of a ranking; more change the ranking little and cost much."""


def magnitude(program: Program, sites: Sequence[UnitSite], norm: str) -> list[Ranking]:
    """Rankings by the size of the weights.

    Args:
        norm: `l1` or `l2`.
    """

    def scores(site: UnitSite) -> torch.Tensor:
        weight = site.matrix(program)
        return site.by_unit(weight.abs().sum(0)) if norm == "l1" else site.by_unit(weight.square().sum(0)).sqrt()

    return [Ranking.of(_relative(scores(site))) for site in sites]


def wanda(
    program: Program, sites: Sequence[UnitSite], data: Sequence[Sample], progress: Progress | None = None
) -> list[Ranking]:
    """Rankings by the weights times the norms of their input activations."""
    squares = {node: torch.zeros(()) for site in sites for node in inputs_of(site)}

    def add(node: fx.Node, rows: torch.Tensor) -> None:
        squares[node] = squares[node].to(rows.device) + rows.float().square().sum(0)

    statistics.observe(program, data, squares, add, progress)
    rankings: list[Ranking] = []
    for site in sites:
        norms = torch.stack([squares[node] for node in inputs_of(site)]).sum(0).sqrt()
        rankings.append(Ranking.of(_relative(site.by_unit(site.matrix(program).abs().sum(0) * norms))))
    return rankings


def gradient(
    program: Program, sites: Sequence[UnitSite], data: Sequence[Sample], progress: Progress | None = None
) -> list[Ranking]:
    """Rankings by the mean magnitude of a gate's gradient."""
    gates = gate_moments(program, sites, data, progress)
    return [Ranking.of(_relative(gate.absolute / max(gate.count, 1))) for gate in gates]


def taylor(
    program: Program, sites: Sequence[UnitSite], data: Sequence[Sample], progress: Progress | None = None
) -> list[Ranking]:
    """Rankings by the Fisher information of a gate."""
    return [Ranking.of(gate.gram.diagonal() / max(gate.count, 1)) for gate in gate_moments(program, sites, data, progress)]


@dataclass
class GateMoments:
    """Sums over samples of the gradient g of gates on the units of one site, [units].

    Attributes:
        count: samples.
        absolute: Σ |g|.
        gram: Σ g·gᵀ, [units, units].
    """

    count: int
    absolute: torch.Tensor
    gram: torch.Tensor


def gate_moments(
    program: Program, sites: Sequence[UnitSite], data: Sequence[Sample], progress: Progress | None = None
) -> list[GateMoments]:
    """The gradients of gates on every unit, g_u = Σ_tokens x_uᵀ ∂L/∂x_u; each row of a batch is one sample."""
    sums = [GateMoments(0, torch.zeros(site.count), torch.zeros(site.count, site.count)) for site in sites]
    at = {node: (site, moments) for site, moments in zip(sites, sums, strict=True) for node in inputs_of(site)}

    def add(node: fx.Node, value: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor | None) -> None:
        site, moments = at[node]
        product = (value * gradient).float()
        by_sample = product.flatten(1, -2).sum(1) if product.dim() > 2 else product
        gates = by_sample[:, site.units.to(value.device)].sum(-1).cpu()
        moments.count += len(gates)
        moments.absolute += gates.abs().sum(0)
        moments.gram.addmm_(gates.T, gates)

    statistics.observe_gradients(program, data, at, add, progress)
    return sums


def rearranged(gram: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """As many removed units as in `gone`, swapped one by one for others while that lowers Σ_{i, j gone} F_ij.

    Args:
        gram: F, [units, units]. Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, §4.2: the diagonal
            of F ignores redundancy between units.
    """
    out = torch.zeros(len(gram), dtype=torch.bool)
    out[gone] = True
    for unit in gone.flip(0).tolist():
        out[unit] = False
        cost = gram.diagonal() + 2 * gram[:, out].sum(1)
        out[int(cost.masked_fill(out, torch.inf).argmin())] = True
    return out.nonzero().flatten()


def second_order(
    program: Program, sites: Sequence[UnitSite], data: Sequence[Sample], progress: Progress | None = None
) -> list[Ranking]:
    """Rankings by the loss after the other units compensate for a removed unit."""
    read = {node: index for index, site in enumerate(sites) for node in inputs_of(site)}
    given = {layer: index for index, site in enumerate(sites) for layer in site.layers}
    devices = [nodes.tensor_type(site.columns.layer).device for site in sites]
    moments = [Moments.empty(width(input_of(site.columns.layer)), at) for site, at in zip(sites, devices, strict=True)]
    metrics = [Moments.empty(width(site.columns.layer), at) for site, at in zip(sites, devices, strict=True)]

    def add(node: fx.Node, value: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor | None) -> None:
        if node in read:
            moments[read[node]].add(real_rows(value, mask))
        if node in given:
            metrics[given[node]].add(real_rows(gradient, mask))

    statistics.observe_gradients(program, spread(data, _SELECTION_TOKENS), {**read, **given}, add, progress)
    rankings: list[Ranking] = []
    for index, site in enumerate(sites):
        covariance, metric = moments[index].covariance, metrics[index].gram / max(metrics[index].count, 1)
        rankings.append(removal_path(site.matrix(program).cpu(), covariance.cpu(), metric.cpu(), site.units))
        # Free a matrix as wide as a feed-forward before the next one is inverted.
        moments[index] = Moments.empty(1)
    return rankings


def removal_path(weight: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor, units: torch.Tensor) -> Ranking:
    """The ranking of the second-order criterion: repeatedly remove the unit of least cost and update the others.

    Args:
        weight: [out_features, in_features], those of several experts below each other.
        covariance: of the inputs, [in_features, in_features].
        metric: G, [out_features, out_features].
        units: [units, features], the columns of each unit.
    """
    step = -(-len(units) // _STEPS)
    # tr(G·V·A·Vᵀ) = tr((RV)·A·(RV)ᵀ) for G = RᵀR, so G is applied once; to each expert where a weight holds several.
    values, vectors = torch.linalg.eigh(metric.double())
    root = (vectors * values.clamp_min(0).sqrt()).T
    weight = (root @ weight.double().unflatten(0, (-1, len(metric)))).flatten(0, 1).float()
    inverse = damped_inverse(covariance)
    left = torch.arange(len(units))
    order: list[torch.Tensor] = []
    cost: list[torch.Tensor] = []
    while len(left):
        costs, chosen = _unit_costs(weight, inverse, units[left]).topk(min(step, len(left)), largest=False)
        order.append(left[chosen])
        cost.append(costs)
        _remove(weight, inverse, units[left[chosen]].flatten())
        left = left[~torch.isin(left, left[chosen])]
        if len(left) * units.shape[1] < _FILLED * len(inverse):
            columns = units[left].flatten()
            weight, inverse = weight[:, columns], inverse[columns][:, columns]
            units = units.clone()
            units[left] = torch.arange(len(columns)).view(-1, units.shape[1])
    return Ranking(torch.cat(order), torch.cat(cost).clamp_min(0))


def _unit_costs(weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """tr(W_u · (P_uu)⁻¹ · W_uᵀ) of every unit, [units].

    Args:
        weight: R·W with G = RᵀR.
    """
    if units.shape[1] == 1:
        columns = units[:, 0]
        return weight.square().sum(0)[columns] / inverse.diagonal()[columns]
    blocks = inverse[units[:, :, None], units[:, None, :]]
    parts = weight[:, units].permute(1, 2, 0)
    return (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))


def _remove(weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> None:
    """Remove columns in place: the other columns compensate for them, and these become zero.

    W ← W - W_S (P_SS)⁻¹ P_S,  P ← P - P_Sᵀ (P_SS)⁻¹ P_S
    """
    rows = inverse[columns]
    share = torch.linalg.solve(rows[:, columns], rows)
    weight.addmm_(weight[:, columns], share, alpha=-1)
    inverse.addmm_(rows.T, share, alpha=-1)


def damped_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a covariance with a damped diagonal, in float32."""
    damped = matrix.double()
    damped.diagonal().add_(max(DAMPING * float(damped.diagonal().mean()), 1e-12))
    return torch.linalg.inv(damped).float()


def inputs_of(site: UnitSite) -> list[fx.Node]:
    """The inputs of the layers of a site."""
    return [input_of(layer) for layer in site.layers]


def _relative(scores: torch.Tensor) -> torch.Tensor:
    return scores / scores.norm().clamp_min(1e-12)
