"""Prune heads or neurons: rank them by a criterion, allocate the ratio among sites, zero the removed units, refit the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch

from lissom.compiler.analysis.amounts import Amounts, AmountSite, amounts_text, is_count
from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.calibration.statistics import Moments, moments
from lissom.compiler.ir.editor import Editor
from lissom.compiler.memory import give_back_memory
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.transforms.pruning import importance
from lissom.compiler.transforms.pruning.budget import Amount, Choice, Ranking, allocate, check_amount
from lissom.compiler.transforms.pruning.reconstruction import refit, scale_units
from lissom.compiler.transforms.pruning.units import UnitSite, amount_sites
from lissom.errors import RequirementError, UnsupportedError

_UNREADABLE = "its layer does not read one feature per column"
Criterion = Literal["auto", "magnitude", "gradient", "taylor", "wanda", "reconstruction", "second-order"]


@dataclass(frozen=True)
class UnitPruning(Approximation):
    """The common part of `prune-heads` and `prune-neurons`: their options, and how units are chosen and zeroed.

    Attributes:
        units: the name of what is pruned, `heads` or `neurons`.
        keep: fraction of the units that stays, above 0 and at most 1; of the sites that `amounts` does not name.
        amounts: units that stay at single sites, a number or a fraction by module path, with `*` and `?`:
            `"encoder.layer.0=8,encoder.layer.3=0.5"`. Without `keep`, other sites stay as they are.
        criterion: how units are ranked; all but `magnitude` need calibration data. `auto` is `second-order` with data.
        scope: `global` ranks the units of all layers together, `layer` removes the same fraction of each layer.
        round_to: the number of units left in a layer is a multiple of this.
        protect: module paths that keep all units, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        norm: the norm of weights that `magnitude` takes.
    """

    units: ClassVar[str]
    leaves_dead = True
    requires = (FLOATING_POINT_WEIGHTS,)

    keep: float | None = None
    criterion: Criterion = "auto"
    scope: Literal["global", "layer"] = "global"
    round_to: int = 1
    protect: str = ""
    norm: Literal["l1", "l2"] = "l2"
    amounts: str = ""

    def __post_init__(self) -> None:
        if self.keep is None and not self._amounts():
            raise UnsupportedError(
                f"{self.name()} takes keep=, a fraction of all {self.units}, or amounts=, those left at single sites, and was "
                f"given neither: write for example {self.name()}{{keep=0.75}}"
            )
        self._amount()

    def _amount(self) -> Amount | None:
        return None if self.keep is None else Amount(self.keep, self.scope, self.round_to)

    def _amounts(self) -> Amounts:
        return Amounts.parse(self.amounts, f"{self.name()}{{amounts=}}", is_count)

    def prune(self, edit: Editor, sites: Sequence[UnitSite]) -> None:
        """Zero the columns of the removed units, and refit the rest if the criterion does.

        Raises:
            RequirementError: when the criterion needs calibration data and there is none.
            UnsupportedError: when the amount cannot be met.
        """
        criterion = self._criterion(edit)
        if not sites and not edit.skipped:
            edit.note(f"the program has no {self.units} that can be removed")
        if criterion != "magnitude":
            reasons = [None if site.is_readable(edit.program) else _UNREADABLE for site in sites]
            readable = zip(sites, reasons, strict=True)
            sites = [site for site, reason in readable if edit.may_change(site.columns.layer, reason)]
        choices = self._choices(sites)
        if (self.keep == 1 and not self.amounts) or not sites:
            return
        if self.keep is None:
            # Ranking takes most of the time, and a site that keeps all its units needs none.
            fewer = [
                (site, choice)
                for site, choice in zip(sites, choices, strict=True)
                if (choice.left or choice.units) < choice.units
            ]
            sites, choices = [site for site, _ in fewer], [choice for _, choice in fewer]
            if not sites:
                return
        reference = edit.reference or edit.program.copy()
        if criterion == "reconstruction":
            self._search_masks(edit, sites, choices)
            return
        ranked = self._rank(edit, sites, criterion)
        removed = allocate(self._amount(), choices, ranked)
        self._tell(edit, sites, removed)
        for site, gone in zip(sites, removed, strict=True):
            weight = site.matrix(edit.program)
            weight[:, site.units[gone].flatten()] = 0
            self._set(edit, site, weight, gone)
        give_back_memory()
        if criterion == "second-order":
            # Refitting the feed-forwards for lost heads too gains little (MiniLM at 0.75: cosine 0.9932 for 0.9925), takes
            # more than twice the time, and is worth less than nothing where their neurons are pruned next.
            refit(edit, reference, edit.data, partial(edit.report, "refit"), feed_forward=self.units != "heads")

    def _choices(self, sites: Sequence[UnitSite]) -> list[Choice]:
        """The sites with what is left of each, where `amounts` names it or it is protected.

        Raises:
            UnsupportedError: when an amount cannot be met.
        """
        given = self._amounts().counts(self._amount_sites(sites), f"sites with {self.units}", round_to=self.round_to)
        protected = [is_path_protected(site.path, self.protect) for site in sites]
        choices = [
            Choice(site.path, site.count, stays, None if stays else left)
            for site, stays, left in zip(sites, protected, given, strict=True)
        ]
        if (amount := self._amount()) is not None:
            check_amount(amount, choices, self.units)
        return choices

    @classmethod
    def _amount_sites(cls, sites: Sequence[UnitSite]) -> list[AmountSite]:
        return amount_sites(sites, cls.units, cls.name(), shared=cls.units == "neurons")

    def _tell(self, edit: Editor, sites: Sequence[UnitSite], removed: Sequence[torch.Tensor]) -> None:
        """Record the pass with the amounts that were chosen."""
        left = [site.count - len(gone) for site, gone in zip(sites, removed, strict=True)]
        text = amounts_text(self._amount_sites(sites), left)
        edit.per_site = format_pass(replace(self, keep=None, amounts=text, scope="global", round_to=1, protect=""))

    def _criterion(self, edit: Editor) -> Criterion:
        """The criterion to use; `auto` depends on whether there is calibration data."""
        if self.criterion == "auto":
            return "second-order" if edit.data else "magnitude"
        if self.criterion != "magnitude" and not edit.data:
            raise RequirementError(
                f"{edit.pass_name}{{criterion={self.criterion}}} needs calibration data: "
                f"pass data=, or choose criterion=magnitude"
            )
        return self.criterion

    def _rank(self, edit: Editor, sites: Sequence[UnitSite], criterion: Criterion) -> list[Ranking]:
        if criterion == "magnitude":
            return importance.magnitude(edit.program, sites, self.norm)
        by_data: dict[str, Callable[..., list[Ranking]]] = {
            "gradient": importance.gradient,
            "taylor": importance.taylor,
            "wanda": importance.wanda,
            "second-order": importance.second_order,
        }
        return by_data[criterion](edit.program, sites, edit.data, partial(edit.report, "rank"))

    def _search_masks(self, edit: Editor, sites: Sequence[UnitSite], choices: Sequence[Choice]) -> None:
        """Kwon et al. 2022: a mask by the Fisher diagonal, rearranged by its blocks, then scales by least squares."""
        gates = importance.gate_moments(edit.program, sites, edit.data, partial(edit.report, "rank"))
        ranked = [Ranking.of(gate.gram.diagonal()) for gate in gates]
        inputs = {node for site in sites for node in importance.inputs_of(site)}
        read = moments(edit.program, edit.data, inputs, partial(edit.report, "fit"))
        removed = allocate(self._amount(), choices, ranked)
        self._tell(edit, sites, removed)
        for site, gate, gone in zip(sites, gates, removed, strict=True):
            gone = importance.rearranged(gate.gram, gone)
            total = Moments.sum([read[node] for node in importance.inputs_of(site)])
            self._set(edit, site, scale_units(edit.program, site, total, gone), gone)

    def _set(self, edit: Editor, site: UnitSite, weight: torch.Tensor, gone: torch.Tensor) -> None:
        if len(gone):
            site.columns.write_matrix(edit, weight)
            edit.rewritten += len(gone)
