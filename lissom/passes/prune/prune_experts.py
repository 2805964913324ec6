"""Prune the experts of mixtures: those that add least to the outputs are not chosen any more.

A mixture computes Σ_j g_j(x) f_j(x) over the experts j that its router chooses for a token x, with the router's weights g. The
saliency of an expert is the mean over the calibration tokens X_j that are routed to it:

    S_j = 1/|X_j| Σ_{x ∈ X_j} g_j(x) ‖f_j(x)‖₂

The experts with the lowest saliency get scores of -inf, so that the router distributes their tokens among the others.
`eliminate-dead`, which runs right after it, removes their rows of the router and their matrices. Experts that no token reaches
go first. Lasby et al. 2025, REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, §4.
https://arxiv.org/abs/2510.13999 As there, the same fraction is removed from every mixture, and nothing is refitted. Padding is
not counted.

With grouped routing, as in DeepSeek-V3, every group loses the same number of experts. A mixture keeps all experts if they are
no grouped products of rows sorted by expert, as in Switch Transformers, or if the program returns the router's scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.amounts import Amounts, AmountSite, amounts_text, is_count, site_names
from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.routed_experts import RoutedExperts, routed_experts
from lissom.compiler.calibration.statistics import Progress, check_finite
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.transforms.experts import mask_experts
from lissom.errors import RequirementError, UnsupportedError


@dataclass(frozen=True)
class PruneExperts(Approximation):
    """Removes the experts of mixtures that add least to the outputs on calibration data.

    Attributes:
        keep: fraction of the experts that stays in each mixture, above 0 and at most 1; of those that `amounts` does not name.
        amounts: experts that stay in single mixtures, a number or a fraction by the module path of the router, with `*` and
            `?`: `"*.layers.0=8,*.layers.1=0.5"`. Without `keep`, other mixtures stay as they are.
        criterion: how experts are ranked: `reap` by their weighted outputs, `frequency` by the tokens that are routed to them.
        protect: module paths of mixtures that keep all experts, with `*` and `?`, separated by commas.
    """

    keep: float | None = None
    criterion: Literal["reap", "frequency"] = "reap"
    protect: str = ""
    amounts: str = ""
    leaves_dead = True
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if self.keep is None and not self._amounts():
            raise UnsupportedError(
                "prune-experts takes keep=, the fraction of experts that stays in each mixture, or amounts=, those left in "
                "single mixtures, and was given neither: write for example prune-experts{keep=0.75}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UnsupportedError(f"prune-experts takes keep= above 0 and up to 1, and was given {self.keep:g}")

    def _amounts(self) -> Amounts:
        return Amounts.parse(self.amounts, "prune-experts{amounts=}", is_count)

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        return _amount_sites([site for _, site in program.fact(routed_experts) if isinstance(site, RoutedExperts)])

    def run(self, edit: Editor) -> None:
        if not edit.data:
            raise RequirementError("prune-experts needs calibration data, whose tokens it routes to the experts: pass data=")
        mixtures = list(_mixtures(edit))
        if not mixtures and not edit.skipped:
            edit.note("the program has no mixtures of experts")
        left = self._left(mixtures)
        pruned = [site for site, count in zip(mixtures, left, strict=True) if count < site.experts]
        scores = _scores(edit.program, edit.data, pruned, self.criterion, partial(edit.report, "rank")) if pruned else {}
        for site, count in zip(mixtures, left, strict=True):
            if site.router in scores:
                mask_experts(edit, site, lowest(scores[site.router].view(site.groups, -1), count // site.groups).flatten())
            elif self._rounds_to_all(site):
                edit.skip(
                    site.router,
                    f"all experts stay: keep={self.keep:g} of {site.per_group}{_of_each(site)} rounds to {site.per_group}; "
                    f"give keep={(site.per_group - 1) / site.per_group:.3g} or less",
                )
        text = amounts_text(_amount_sites(mixtures), left)
        edit.per_site = format_pass(replace(self, keep=None, protect="", amounts=text)) if mixtures else ""

    def _left(self, mixtures: Sequence[RoutedExperts]) -> list[int]:
        """The number of experts that each mixture keeps.

        Raises:
            UnsupportedError: when an amount cannot be met.
        """
        given = self._amounts().counts(_amount_sites(mixtures), "mixtures of experts")
        return [
            site.experts if is_path_protected(site.path, self.protect) else self._count(site) if amount is None else amount
            for site, amount in zip(mixtures, given, strict=True)
        ]

    def _rounds_to_all(self, site: RoutedExperts) -> bool:
        """True for a mixture that has too few experts for a `keep` below 1 to remove one."""
        is_asked = self.keep is not None and self.keep < 1 and not is_path_protected(site.path, self.protect)
        return is_asked and round((self.keep or 0) * site.per_group) == site.per_group

    def _count(self, site: RoutedExperts) -> int:
        """The number of experts that `keep` leaves of a mixture, the nearest that its groups can share equally."""
        if self.keep is None:
            return site.experts
        count = round(self.keep * site.per_group)
        if count < site.least:
            raise UnsupportedError(
                f"prune-experts{{keep={self.keep:g}}} leaves '{site.path}' {count} of {site.per_group} experts"
                f"{_of_each(site)}, and its router needs {site.least}; give keep={site.least / site.per_group:.3g} or more, "
                "or protect it"
            )
        return count * site.groups


def _of_each(site: RoutedExperts) -> str:
    return f" in each of {site.groups} groups" if site.groups > 1 else ""


def _mixtures(edit: Editor) -> Iterator[RoutedExperts]:
    """The mixtures whose experts can be removed; the others are reported as skipped."""
    for router, site in edit.program.fact(routed_experts):
        if isinstance(site, RoutedExperts):
            yield site
        else:
            edit.skip(router, f"all experts stay: {site}")


def _amount_sites(mixtures: Sequence[RoutedExperts]) -> list[AmountSite]:
    """The mixtures as amounts name them."""
    names = site_names([site.path for site in mixtures], [site.router.name for site in mixtures])
    takes = [{"prune-experts": range(site.least * site.groups, site.experts + 1, site.groups)} for site in mixtures]
    return [
        AmountSite("experts", (name,), site.experts, legal) for name, site, legal in zip(names, mixtures, takes, strict=True)
    ]


def _scores(
    program: Program, data: Sequence[Sample], mixtures: Sequence[RoutedExperts], criterion: str, progress: Progress
) -> Mapping[fx.Node, torch.Tensor]:
    """The score of every expert by the routers of the mixtures, each [experts]."""
    at = {node: site for site in mixtures for node in (site.ids, site.order, site.weighted) if node is not None}
    sums = {site.router: torch.zeros(2, site.experts, dtype=torch.float64) for site in mixtures}

    def collect(sample: Sample, values: dict[fx.Node, torch.Tensor], site: RoutedExperts) -> None:
        assert site.ids is not None and site.order is not None and site.weighted is not None
        ids, order, outputs = (values.pop(node) for node in (site.ids, site.order, site.weighted))
        check_finite(program, site.weighted, outputs)
        real = token_mask(program, sample, site.router)
        rows = slice(None) if real is None else real.flatten()[order // site.top_k]
        sums[site.router] += sums_by_expert(ids[rows], outputs[rows], site.experts)

    with torch.no_grad(), kept_state(program):
        for finished, sample in enumerate(data):
            values: dict[fx.Node, torch.Tensor] = {}

            def look(
                node: fx.Node, value: object, sample: Sample = sample, values: dict[fx.Node, torch.Tensor] = values
            ) -> None:
                if node in at and isinstance(value, torch.Tensor):
                    values[node] = value
                    if node is at[node].weighted:
                        collect(sample, values, at[node])

            program.run(sample, look)
            progress(finished + 1, len(data))
    return {router: both[1] if criterion == "frequency" else both[0] / both[1].clamp_min(1) for router, both in sums.items()}


def sums_by_expert(ids: torch.Tensor, outputs: torch.Tensor, experts: int) -> torch.Tensor:
    """The sum of the outputs' norms and the number of rows of every expert, [2, experts].

    Args:
        ids: the expert of each row, [rows].
        outputs: g_j(x) f_j(x), [rows, features].
    """
    ids, norms = ids.cpu(), torch.linalg.vector_norm(outputs.double(), dim=-1).cpu()
    sums = torch.zeros(2, experts, dtype=torch.float64)
    return sums.index_add_(1, ids, torch.stack([norms, torch.ones_like(norms)]))


def lowest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The experts of each group with the lowest scores, all but `kept`, booleans [groups, experts per group].

    Of equal scores the later one is lower.

    Args:
        scores: [groups, experts per group].
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, order[:, :kept], False)
