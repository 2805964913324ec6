"""The search: solve, build, measure, correct the tables, and solve again until the time is nearly over."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from lissom.driver.compile import optimize_model
from lissom.driver.options import Settings
from lissom.errors import InputError, LissomError
from lissom.runtime.compiled_model import CompiledModel
from lissom.tuning.build import Quality, Timed, Variant, Workshop
from lissom.tuning.candidates import EXACT, Aim, Candidate, read_candidate
from lissom.tuning.clock import Clock
from lissom.tuning.costs import CostTable
from lissom.tuning.losses import LossTable
from lissom.tuning.sites import PLAIN, Group, Option
from lissom.tuning.solve import Item, Line, PowerLaw, solve
from lissom.tuning.spelling import pipeline_of
from lissom.tuning.store import Store

_FACTORS = (1.0, 0.7, 1.4, 0.5, 2.0, 0.35, 2.8, 0.25, 4.0, 0.18, 5.6, 0.1)
"""The bounds that are solved for, as multiples of the one that the corrected tables give."""
_COSTS = (1.0, 0.95, 1.05, 0.9, 1.1, 0.85)
"""The same for a target of the cost, which is predicted more closely."""
_SPREAD = (0.85, 0.6, 0.4, 0.2)
"""Budgets of the cost between the least and the exact program's, for the first candidates."""
_FINALISTS = 3
_LEAST_STEPS = 8
_PROBE_STEPS = 4
_FIRST_FACTOR = 3.0
"""How much more loss a program may have before distillation than without."""
Choice = Sequence[Item]


@dataclass
class Search:
    """The state of a search.

    variants: the cheapest base first. tables: the options of each group with losses and costs, for each variant.
    candidates: the exact program first. best: the compiled program of the best candidate, where it is in memory.
    """

    workshop: Workshop
    quality: Quality
    aim: Aim
    groups: Sequence[Group]
    linears: Sequence[str]
    store: Store
    key: str
    clock: Clock
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    bases: dict[Variant, Candidate] = field(default_factory=dict[Variant, Candidate])
    tables: dict[Variant, list[list[Item]]] = field(default_factory=dict[Variant, "list[list[Item]]"])
    best: tuple[str, CompiledModel] | None = None
    law: PowerLaw = field(default_factory=lambda: PowerLaw(1.0, 0.5))
    line: Line = field(default_factory=Line)
    _slowest: float = 0.0

    def recall(self) -> None:
        """Take the candidates of earlier calls from the store."""
        seen = {item.pipeline + item.backend for item in self.candidates}
        for record in self.store.all("candidate", self.key):
            found = read_candidate(record)
            if found is not None and found.pipeline + found.backend not in seen:
                self.candidates.append(found)
        self._corrected()

    def add_tables(self, variant: Variant, losses: LossTable, costs: CostTable, schemes: Sequence[str]) -> None:
        """The options of every group, those without a known loss or cost left out."""
        base, extra = self.bases[variant].cost(self.aim.memory), costs.cost
        self.tables[variant] = [
            [
                item
                for option in group.options(schemes)
                if math.isfinite((item := Item(option, losses.loss(at, option), extra(group, option) * base)).loss + item.cost)
            ]
            for at, group in enumerate(self.groups)
        ]

    def run(self, until: float, *, distill: bool, whole: float) -> None:
        """Verify candidates until a fraction of the time has passed; then distill finalists, until the fraction `whole`."""
        for variant in self.tables:
            for choice in self._uniform(variant):
                if self._has_time(until):
                    self.verify(variant, choice)
        while self._has_time(until) and (found := next(self._fresh(), None)) is not None:
            self.verify(*found)
        if distill:
            self._distil(whole)

    def _has_time(self, until: float) -> bool:
        return self.clock.within(until) and self.clock.left > 1.2 * self._slowest

    def _uniform(self, variant: Variant) -> Iterator[Choice]:
        """The same scheme everywhere, the programs that one pass gives."""
        table = self.tables[variant]
        for scheme in dict.fromkeys(item.option.scheme for items in table for item in items):
            if scheme != PLAIN:
                yield [
                    next((item for item in items if item.option == Option(group.size, scheme)), items[0])
                    for group, items in zip(self.groups, table, strict=True)
                ]

    def _fresh(self) -> Iterator[tuple[Variant, Choice]]:
        """Solutions that were not built yet, those nearest to the bound first."""
        seen = {(item.pipeline, item.backend) for item in self.candidates}
        for bounds in self._bounds():
            for variant, table in self.tables.items():
                found = solve(table, [group.kind for group in self.groups], **bounds(variant))
                if found is not None and (self.pipeline(variant, found), variant.backend) not in seen:
                    yield variant, found

    def _bounds(self):  # noqa: ANN202
        """Functions that give the bounds of `solve` for a variant."""
        if self.aim.target is not None:
            for factor in _COSTS:
                yield lambda variant, by=factor: {"cost": by * self.line.inverse(self.aim.target or 0.0) - self._base(variant)}
            return
        if not any(item.table_loss and not item.failed for item in self.candidates) and self.quality.metric is not None:
            for budget in _SPREAD:
                yield lambda variant, at=budget: {"cost": (1 - at) * self._least(variant)}
        for factor in _FACTORS:
            yield lambda variant, by=factor: {"loss": by * self.law.inverse(self.aim.max_drop) - self._lost(variant)}

    def _base(self, variant: Variant) -> float:
        return self.bases[variant].cost(self.aim.memory)

    def _lost(self, variant: Variant) -> float:
        """The divergence of the variant itself."""
        return self.bases[variant].error ** 2

    def _least(self, variant: Variant) -> float:
        """The cost of the cheapest option of every group."""
        return sum(min(item.cost for item in items) for items in self.tables[variant])

    def pipeline(self, variant: Variant, choice: Choice, steps: int = 0) -> str:
        passes = pipeline_of(self.groups, [item.option for item in choice], self.linears, steps=steps)
        return variant.pipeline(passes)

    def verify(self, variant: Variant, choice: Choice, steps: int = 0) -> Candidate:
        """Build, time and evaluate a choice, and correct the tables; a known one is not built again."""
        loss = sum(item.loss for item in choice) + self._lost(variant)
        cost = max(sum(item.cost for item in choice) + self._base(variant), 0.0)
        found = Candidate(
            self.pipeline(variant, choice, steps),
            variant.backend,
            predicted_cost=max(self.line(cost), 0.0),
            predicted_drop=None if steps else self.law(loss),
            table_cost=cost,
            table_loss=None if steps else loss,
        )
        found = self.measured(found)
        self._corrected()
        return found

    def measured(self, candidate: Candidate) -> Candidate:
        """The candidate with its figures, built and measured unless it is known; a failure is recorded with its reason."""
        known = next((item for item in self.candidates if self._same(item, candidate)), None)
        if known is not None:
            return known
        started = time.monotonic()
        self.clock.show(f"candidate {len(self.candidates)}: {candidate.pipeline:.40}")
        try:
            found, compiled = self._build(candidate)
        except InputError:
            # The caller's metric failed, which it would with the next candidate too.
            raise
        except LissomError as error:
            found, compiled = replace(candidate, failed=f"{type(error).__name__}: {error}".partition("\n")[0]), None
        self._slowest = max(self._slowest, time.monotonic() - started)
        self.candidates.append(found)
        if found.pipeline != EXACT or found.backend != self.candidates[0].backend:
            self.store.add("candidate", self.key, f"{found.backend} {found.pipeline}", **asdict(found))
        if compiled is not None and self.aim.choose(self.candidates) is found:
            self.best = (found.pipeline + found.backend, compiled)
            self.clock.best = self._words(found)
        return found

    @staticmethod
    def _same(item: Candidate, other: Candidate) -> bool:
        return (item.pipeline, item.backend) == (other.pipeline, other.backend)

    def _build(self, candidate: Candidate) -> tuple[Candidate, CompiledModel]:
        compiled = self.workshop.build(candidate.pipeline, candidate.backend)
        first = self.candidates[0]
        found = self.workshop.time(compiled, self.workshop.base(Variant(first.backend)), careful=True)
        drop, squared = self.quality.drop(compiled)
        if not math.isfinite(drop):
            return replace(candidate, failed="its outputs are not finite"), compiled
        return self._with(candidate, compiled, found, first.milliseconds, drop, squared), compiled

    def _with(
        self, candidate: Candidate, compiled: CompiledModel, found: Timed, base: float, drop: float, squared: float
    ) -> Candidate:
        return replace(
            candidate,
            milliseconds=found.ratio * base,
            low=found.low * base,
            high=found.high * base,
            bytes=self.workshop.size(compiled),
            drop=drop,
            error=squared**0.5,
        )

    def _words(self, found: Candidate) -> str:
        first = self.candidates[0]
        ratio = first.cost(self.aim.memory) / max(found.cost(self.aim.memory), 1e-9)
        return f"{ratio:.2f} x {'smaller' if self.aim.memory else 'faster'}, drop {found.drop:.2g}"

    def _corrected(self) -> None:
        """Fit the corrections of both tables to the candidates that were measured."""
        fitting = [item for item in self.candidates if not item.failed and item.table_loss is not None and not item.distilled]
        floor = self.aim.max_drop / 100 or 1e-6
        points = [(item.table_loss or 0.0, max(item.drop, floor)) for item in fitting]
        start = PowerLaw(1.0, 0.5 if self.quality.metric is None else 1.0)
        self.law = start.fit(points, self.aim.max_drop)
        costs = [(item.table_cost, item.cost(self.aim.memory)) for item in fitting if item.table_cost]
        base = self.candidates[0].cost(self.aim.memory) if self.candidates else 0.0
        self.line = Line().fit([*costs, (base, base)] if costs else [])

    def _distil(self, until: float) -> None:
        """Distill finalists: programs with more loss than allowed, or the best that meet a target."""
        factor = _FIRST_FACTOR
        tried: list[str] = []
        for turn in range(sum(item.distilled for item in self.candidates), _FINALISTS):
            found = self._finalist(factor)
            if found is None or self.pipeline(*found) in tried:
                return
            variant, choice = found
            tried.append(self.pipeline(variant, choice))
            seconds = self.clock.until(until) / (_FINALISTS - turn) - self._slowest
            pace = self._seconds_a_step(variant, choice) if seconds > 0 else 0.0
            steps = int(seconds / pace) if pace > 0 else 0
            if steps < _LEAST_STEPS:
                return
            known = self._slowest
            candidate = self.verify(variant, choice, steps)
            self._slowest = known
            factor = factor * 1.8 if self.aim.meets(candidate) else factor / 1.6

    def _finalist(self, factor: float) -> tuple[Variant, Choice] | None:
        """The solution with `factor` times the loss that is allowed without distillation, on the cheapest variant."""
        kinds = [group.kind for group in self.groups]
        found: list[tuple[float, Variant, Choice]] = []
        for variant, table in self.tables.items():
            if self.aim.target is not None:
                bounds = {"cost": (1 - 0.05 * (factor / _FIRST_FACTOR - 1)) * self.line.inverse(self.aim.target) - self._base(variant)}
            else:
                bounds = {"loss": factor * self.law.inverse(self.aim.max_drop) - self._lost(variant)}
            choice = solve(table, kinds, **bounds)
            if choice is not None and any(item.option != group.whole for item, group in zip(choice, self.groups, strict=True)):
                found.append((sum(item.cost for item in choice) + self._base(variant), variant, choice))
        if not found:
            return None
        return min(found, key=lambda item: item[0])[1:]

    def _seconds_a_step(self, variant: Variant, choice: Choice) -> float:
        """The time of one training step, from a few of them; 0 if the program cannot be trained."""
        self.clock.show("time of a distillation step")
        settings = Settings(
            passes=self.pipeline(variant, choice, _PROBE_STEPS),
            checks="off",
            data=self.workshop.data,
            progress=lambda *_: None,
        )
        try:
            _, history = optimize_model(self.workshop.program, self.workshop.example, settings)
        except LissomError as error:
            self.candidates.append(Candidate(str(settings.passes), variant.backend, failed=f"{type(error).__name__}: {error}"))
            return 0.0
        curve = next((step.curve for step in history.steps if step.curve), ())
        return curve[-1].seconds / max(curve[-1].step, 1) if curve else 0.0


