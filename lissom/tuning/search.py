"""The search: solve, build, measure, correct the tables, and solve again until the time is nearly over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from lissom.passes import RECIPES
from lissom.tuning.build import Variant
from lissom.tuning.candidates import Candidate
from lissom.tuning.corrections import USUAL, Factors, Features, PowerLaw, Ratios, fit_parts
from lissom.tuning.costs import CostTable
from lissom.tuning.losses import LossTable
from lissom.tuning.sites import BLOCKS, LOW_RANK, PLAIN, TABLE, UNTIED, Group, Option
from lissom.tuning.solve import Item, solve
from lissom.tuning.spelling import read_options
from lissom.tuning.trials import Trials

_LOSSES = (1.0, 0.7, 1.4, 0.5, 2.0, 0.35, 2.8, 0.25, 4.0, 0.18, 5.6, 0.1)
"""The bounds on the loss that are solved for, as multiples of the one that the corrected tables give."""
_COSTS = (1.0, 0.97, 1.03, 0.94, 1.06, 0.9, 1.1, 0.86, 1.15, 0.8, 1.2, 0.75)
"""The bounds on the cost, for a target, as multiples of what the corrected tables give; costs are predicted more closely."""
_SPREAD = (0.3, 0.6, 0.8)
"""The parts of the greatest saving that the first candidates have, while no drop is known."""
_MOST_UNIFORM = 4
_MUCH = 0.25
"""The part of what a solution saves from which its tables are measured by themselves."""
_FAR = 3.0
"""The predicted drop, in bounds, of a uniform scheme that is not tried."""
Choice = Sequence[Item]


@dataclass
class Search:
    """The state of a search.

    Attributes:
        bases: the variants with the measured program that has no further passes.
        tables: the options of each group, for each of them.
        usual: the factors on kinds of losses before programs were measured.
        factors: the present ones.
        law: from these sums to the drop.
        ratios: of costs to summed ones.
    """

    trials: Trials
    groups: Sequence[Group]
    linears: Sequence[str]
    bases: dict[Variant, Candidate]
    tables: dict[Variant, list[list[Item]]] = field(default_factory=dict[Variant, "list[list[Item]]"])
    usual: Factors = USUAL
    factors: Factors = USUAL
    law: PowerLaw = field(default_factory=PowerLaw)
    ratios: Ratios = field(default_factory=Ratios)

    def add_table(self, variant: Variant, losses: LossTable, costs: CostTable, schemes: Sequence[str]) -> None:
        """The options of every group; those without a known loss or cost are left out."""
        base, table = self.base_cost(variant), list[list[Item]]()
        for at, group in enumerate(self.groups):
            items = [
                Item(
                    option,
                    losses.loss(at, option),
                    costs.cost(group, option) * base,
                    losses.of_amounts(at, option),
                    losses.of_tables(at, option),
                )
                for option in group.options(schemes)
            ]
            table.append([item for item in items if math.isfinite(item.loss + item.cost)])
        self.tables[variant] = table

    def run(self, until: float) -> None:
        """Verify candidates until a fraction of the time has passed, or no new ones are found."""
        self.correct()
        # One by one, since each that is verified corrects what is predicted of the next.
        worth = (solution for solution in self._uniform() if self.has_time(until) and not self._far_over(*solution))
        for solution in islice(worth, _MOST_UNIFORM):
            self.verify(*solution)
        if self.has_time(until) and (alone := self._tables_alone()) is not None:
            self.verify(*alone)
        while self.has_time(until) and (solution := next(self._fresh(), None)) is not None:
            self.verify(*solution)

    def has_time(self, until: float) -> bool:
        """True if there is time for one more candidate."""
        return self.trials.clock.until(until) > self.trials.pace

    def _uniform(self) -> list[tuple[Variant, Choice]]:
        """One scheme of `quantize` everywhere, where that is cheaper than the variant: the one with the least loss, which
        shows how far the drop is from the table's losses, then the cheapest first."""
        uniform: list[tuple[float, float, Variant, Choice]] = []
        for variant, table in self.tables.items():
            for scheme in dict.fromkeys(item.option.scheme for items in table for item in items):
                choice = [_with_scheme(group, items, scheme) for group, items in zip(self.groups, table, strict=True)]
                saving = sum(item.cost for item in choice)
                if scheme not in (PLAIN, LOW_RANK) and not scheme.startswith((BLOCKS, UNTIED)) and saving < 0:
                    loss = sum(item.loss for item in choice) + self.base_loss(variant)
                    uniform.append((saving + self.base_cost(variant), loss, variant, choice))
        least = min((entry[1] for entry in uniform), default=0.0)
        return [entry[2:] for entry in sorted(uniform, key=lambda entry: (entry[1] > least, entry[0]))]

    def _tables_alone(self) -> tuple[Variant, Choice] | None:
        """The embedding tables and LM heads of the first solution by themselves, if they save much of its time or bytes.

        They are few and lose much each, and uniform schemes do not tell their losses from those of the layers.
        """
        variant, choice = next(self._fresh(), (None, ()))
        if variant is None:
            return None
        table = self.tables[variant]
        alone = [
            item if group.kind == TABLE else items[0] for group, items, item in zip(self.groups, table, choice, strict=True)
        ]
        much = sum(item.cost for item in alone) < _MUCH * sum(item.cost for item in choice) < 0
        return (variant, alone) if much else None

    def _far_over(self, variant: Variant, choice: Choice) -> bool:
        """True if measured candidates show that a choice is far over the bound on the drop."""
        aim, predicted = self.trials.aim, self.candidate(variant, choice).predicted_drop
        return aim.target is None and bool(self.trials.fitting()) and (predicted or 0.0) > _FAR * aim.max_drop

    def _fresh(self) -> Iterator[tuple[Variant, Choice]]:
        """Solutions that were not built yet, those nearest to the bound first; for each bound that of the best variant."""
        bounds = [self._bounds(variant) for variant in self.tables]
        for turn in zip(*bounds, strict=True):
            solution = self.best_of(dict(zip(self.tables, turn, strict=True)))
            if solution is not None and self.trials.known(self.candidate(*solution)) is None:
                yield solution

    def best_of(self, bounds: Mapping[Variant, tuple[float, float]]) -> tuple[Variant, Choice] | None:
        """The solution of the variant that is best under its bounds on loss and cost."""
        solutions: list[tuple[float, Variant, Choice]] = []
        for variant, (loss, cost) in bounds.items():
            choice = self.solve(variant, loss, cost)
            if choice is not None:
                candidate = self.candidate(variant, choice)
                rank = candidate.table_cost if math.isinf(cost) else candidate.predicted_drop
                solutions.append((rank or 0.0, variant, choice))
        return min(solutions, key=lambda entry: entry[0])[1:] if solutions else None

    def solve(self, variant: Variant, loss: float, cost: float) -> Choice | None:
        """The best choice whose whole program has at most this weighted loss or this cost; the other bound is infinite."""
        loss, cost = loss - self.base_loss(variant), cost - self.base_cost(variant)
        if loss < 0:
            return None
        table = self.tables[variant]
        weighted = [[item.weighted(self.factors) for item in items] for items in table]
        solution = solve(weighted, [group.kind for group in self.groups], loss=loss, cost=cost)
        if solution is None:
            return None
        return [next(same for same in items if same.option == item.option) for items, item in zip(table, solution, strict=True)]

    def _bounds(self, variant: Variant) -> list[tuple[float, float]]:
        """The bounds on loss and cost to solve for."""
        aim = self.trials.aim
        if aim.target is not None:
            target = self.ratios.inverse(aim.target)
            return [(math.inf, factor * target) for factor in _COSTS]
        allowed = self.law.inverse(aim.max_drop)
        losses = [(factor * allowed, math.inf) for factor in _LOSSES]
        if self.trials.fitting() or self.trials.quality.metric is None:
            return losses
        saving = -sum(self._savings(variant))
        return [*((math.inf, self.base_cost(variant) + part * saving) for part in _SPREAD), *losses]

    def base_cost(self, variant: Variant) -> float:
        """The cost of a variant without further passes."""
        return self.bases[variant].cost(self.trials.aim.memory)

    def base_loss(self, variant: Variant) -> float:
        """Its divergence."""
        return self.bases[variant].error ** 2

    def candidate(self, variant: Variant, choice: Choice, steps: int = 0) -> Candidate:
        """The candidate of a choice, with what the tables predict.

        Args:
            steps: of distillation.
        """
        loss = sum(item.loss for item in choice) + self.base_loss(variant)
        amounts, tables = sum(item.amounts for item in choice), sum(item.tables for item in choice)
        cost = max(sum(item.cost for item in choice) + self.base_cost(variant), 0.0)
        options = [item.option for item in choice]
        pipeline = variant.passes(self.groups, options, self.linears, steps=steps)
        return Candidate(
            pipeline,
            variant.backend,
            predicted_cost=cost * self.ratios(_features(variant, options)),
            predicted_drop=None if steps else self.law(self.factors(loss, amounts, tables)),
            table_cost=cost,
            table_loss=None if steps else loss,
            table_amounts=amounts,
            table_tables=tables,
        )

    def verify(self, variant: Variant, choice: Choice, steps: int = 0) -> Candidate:
        """Build, time and evaluate a choice, and correct the tables."""
        measured = self.trials.measure(self.candidate(variant, choice, steps))
        self.correct()
        return measured

    def correct(self) -> None:
        """Fit the corrections of both tables to the candidates that were measured."""
        aim, fitting = self.trials.aim, self.trials.fitting()
        floor = aim.max_drop / 100 or 1e-6
        start = PowerLaw(1.0, 0.5 if self.trials.quality.metric is None else 1.0)
        points = [
            (candidate.table_loss or 0.0, candidate.table_amounts, candidate.table_tables, max(candidate.drop, floor))
            for candidate in fitting
        ]
        self.factors, self.law = fit_parts(start, points, aim.max_drop, self.usual)
        points = [
            (self._read(candidate), candidate.table_cost, candidate.cost(aim.memory))
            for candidate in fitting
            if candidate.table_cost
        ]
        self.ratios = Ratios(points, [max(spans) for spans in zip(*map(self._savings, self.tables), strict=True)])

    def _savings(self, variant: Variant) -> list[float]:
        """The largest saving of each group."""
        return [-min(item.cost for item in items) for items in self.tables[variant]]

    def _read(self, candidate: Candidate) -> Features:
        """The features of a candidate that was measured."""
        variant = Variant(candidate.backend, bf16=RECIPES["mixed-precision"] in candidate.pipeline)
        return _features(variant, read_options(self.groups, candidate.pipeline))


def _features(variant: Variant, options: Sequence[Option]) -> Features:
    """The features that decide on the cost of each group. Layers that are not quantized are in the precision of the variant."""
    return [(variant.backend, option, variant.bf16 and option.scheme == PLAIN) for option in options]


def _with_scheme(group: Group, items: Sequence[Item], scheme: str) -> Item:
    """The option of a whole group with a scheme; where it does not take it, with one of as many bits, or as it is."""
    whole = {item.option.scheme: item for item in items if item.option == Option(group.size, item.option.scheme)}
    bits = scheme.partition("-")[0]
    alike = (item for name, item in whole.items() if name.partition("-")[0] == bits)
    return whole.get(scheme) or next(alike, items[0])
