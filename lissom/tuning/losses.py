"""The loss table: the divergence that each option of each group causes by itself.

The pass with this one amount runs on the exact program, calibrated on a small part of the data, and the divergence of the
outputs is measured on other batches. Schemes and amounts are measured apart: the loss of a group with both is their sum. What
there is no time to measure is interpolated: between amounts by a power law in the removed fraction, and where a group has no
amount or scheme of a kind measured, from the largest loss of groups of the same form.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.memory import free_dropped_programs
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import LissomError
from lissom.passes import known_passes
from lissom.tuning.clock import Clock
from lissom.tuning.divergence import Divergence
from lissom.tuning.sites import PLAIN, TABLE, Group, Option
from lissom.tuning.spelling import pipeline_of
from lissom.tuning.store import Store, number

_EXPONENT = 2.0
"""Of the loss in the removed fraction, where only one amount was measured."""
_LEAST = 1e-12


@dataclass
class LossTable:
    """Losses of options, by the index of the group.

    Attributes:
        lefts: of amounts, pools: of numbers of key/value heads, schemes: of schemes; infinite where the pass failed.
        wanted: how many were to be measured.
    """

    groups: Sequence[Group]
    lefts: list[dict[int, float]] = field(default_factory=list[dict[int, float]])
    pools: list[dict[int, float]] = field(default_factory=list[dict[int, float]])
    schemes: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    wanted: int = 0
    failed: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.lefts = [{group.size: 0.0} for group in self.groups]
        self.pools = [{group.key_value_heads: 0.0} for group in self.groups]
        self.schemes = [{PLAIN: 0.0} for _ in self.groups]

    @property
    def measured(self) -> int:
        tables = (self.lefts, self.pools, self.schemes)
        return sum(len(known) - 1 for table in tables for known in table)

    def loss(self, index: int, option: Option) -> float:
        """The loss of an option; infinite where nothing is known of it."""
        return self._of_units(index, option) + (self._of_scheme(index, option.scheme) if option.left else 0.0)

    def of_amounts(self, index: int, option: Option) -> float:
        """The part of the loss that passes which fit weights to data cause: fewer units, not the removal of all."""
        return self._of_units(index, option) if option.left else 0.0

    def of_tables(self, index: int, option: Option) -> float:
        """The part of the loss that formats of embedding tables and LM heads cause."""
        return self._of_scheme(index, option.scheme) if self.groups[index].kind == TABLE else 0.0

    def _of_units(self, index: int, option: Option) -> float:
        pooled = self._of_count(self.pools, index, self.groups[index].key_value_heads, option.pooled) if option.pooled else 0.0
        return self._of_count(self.lefts, index, self.groups[index].size, option.left) + pooled

    def _like(self, index: int) -> Iterator[int]:
        likeness = self.groups[index].likeness
        return (at for at, group in enumerate(self.groups) if group.likeness == likeness)

    def _of_scheme(self, index: int, scheme: str) -> float:
        if scheme in self.schemes[index]:
            return self.schemes[index][scheme]
        return max((self.schemes[at][scheme] for at in self._like(index) if scheme in self.schemes[at]), default=math.inf)

    def _of_count(self, table: Sequence[dict[int, float]], index: int, size: int, left: int) -> float:
        known = table[index]
        if left in known:
            return known[left]
        if left == 0 or len([amount for amount in known if amount]) == 1:
            others = (at for at in self._like(index) if at != index and len(table[at]) > 1)
            return max((self._interpolated(table[at], size, left) for at in others), default=math.inf)
        return self._interpolated(known, size, left)

    @staticmethod
    def _interpolated(known: dict[int, float], size: int, left: int) -> float:
        """By a power law through the two nearest amounts; removal of the whole part is never interpolated."""
        if left in known or left == 0:
            return known.get(left, math.inf)
        points = sorted((math.log(size - at), math.log(max(loss, _LEAST))) for at, loss in known.items() if 0 < at < size)
        if not points or any(map(math.isinf, (value for _, value in points))):
            return math.inf
        x = math.log(size - left)
        after = next((at for at, point in enumerate(points) if point[0] >= x), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[after]
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else _EXPONENT
        return math.exp(y1 + max(slope, 0.0) * (x - x1))


@dataclass(frozen=True)
class LossMeter:
    """Measures the losses.

    Attributes:
        data: for calibration.
        key: of the store, for the program and the data.
    """

    program: Program
    groups: Sequence[Group]
    linears: Sequence[str]
    data: Sequence[Sample]
    divergence: Divergence
    store: Store
    key: str
    clock: Clock

    def measure(self, schemes: Sequence[str], saving: Callable[[int, Option], float], until: float) -> LossTable:
        """The table for these schemes, the most useful options first; stops at a fraction of the time.

        Args:
            saving: what an option of a group saves, as a fraction of the whole cost. Each kind of option is measured for one
                group of each form first: schemes, which need no calibration, then amounts, each time those that save most. The
                others follow, those first that save most for their loss and for the time that such an option took to measure.
        """
        table = LossTable(self.groups)
        tasks = list(self._tasks(schemes))
        table.wanted = len(tasks)
        members = Counter(group.likeness for group in self.groups)
        first = dict[object, tuple[int, Option]]()
        for index, option in tasks:  # of the amounts of a form one is enough: the others are interpolated
            kind = option.scheme, option.pooled > 0, option.left == 0
            first.setdefault((self.groups[index].likeness, kind), (index, option))
        ordered = sorted(
            first.values(), key=lambda task: (task[1].scheme == PLAIN, -saving(*task) * members[self.groups[task[0]].likeness])
        )
        slowest = dict[bool, float]()  # whether it is a scheme: the seconds of the slowest
        for done, task in enumerate(ordered):
            started, scheme = time.monotonic(), task[1].scheme != PLAIN
            self._measure(table, [task], done, until)
            slowest[scheme] = max(slowest.get(scheme, _LEAST), time.monotonic() - started)
        known = set(ordered)

        def worth(task: tuple[int, Option]) -> float:
            return saving(*task) / max(table.loss(*task), _LEAST) / slowest[task[1].scheme != PLAIN]

        rest = sorted((task for task in tasks if task not in known), key=worth, reverse=True)
        self._measure(table, rest, len(ordered), until)
        return table

    def _measure(self, table: LossTable, tasks: Sequence[tuple[int, Option]], before: int, until: float) -> None:
        """Put the losses of options into the table; stops at a fraction of the time."""
        for done, (index, option) in enumerate(tasks, before):
            options = [option if at == index else group.whole for at, group in enumerate(self.groups)]
            loss = self._known(table, options, f"losses, {done} of {table.wanted}: {self.groups[index].name}", until)
            if loss is None:
                continue
            if option.pooled:
                table.pools[index][option.pooled] = loss
            elif option.scheme == PLAIN:
                table.lefts[index][option.left] = loss
            else:
                table.schemes[index][option.scheme] = loss

    def in_sample(self, table: LossTable, divergence: Divergence, data: Sequence[Sample]) -> dict[str, tuple[float, float]]:
        """For each kind of group one amount's loss on the batches that its pass calibrates on, and its loss in the table.

        Args:
            data: the batches that programs calibrate on, and that `divergence` compares.
        """
        meter = replace(self, data=data, divergence=divergence, key=f"{self.key} in sample")
        losses: dict[str, tuple[float, float]] = {}
        for index, group in enumerate(self.groups):
            known = ((left, loss) for left, loss in table.lefts[index].items() if left and 0 < loss < math.inf)
            left, loss = next(known, (0, 0.0))
            if not left or group.kind in losses:
                continue
            options = [Option(left) if at == index else other.whole for at, other in enumerate(self.groups)]
            again = meter._known(table, options, f"losses on the batches of calibration: {group.name}", 1.0)
            if again is not None:
                losses[group.kind] = again, loss
        return losses

    def _known(self, table: LossTable, options: Sequence[Option], what: str, until: float) -> float | None:
        """The loss of these options, from the store or measured; None if that fraction of the time has passed.

        Args:
            what: is shown while it is measured.
        """
        passes = pipeline_of(self.groups, options, self.linears)
        record = self.store.get("loss", self.key, passes)
        loss = None if record is None else number(record, "loss", 0.0)
        if loss is None and self.clock.within(until):
            self.clock.show(what)
            loss = self._loss(table, passes)
        return loss

    def _loss(self, table: LossTable, passes: str) -> float:
        pipeline = Pipeline(parse_pipeline(passes, known_passes()), checks="off", data=self.data)
        try:
            loss = self.divergence.of_program(pipeline.run(self.program)[0])
        except LissomError as error:
            table.failed.append(f"{passes}: {error}")
            return math.inf
        free_dropped_programs(self.program.parameter_bytes)
        if math.isfinite(loss):
            self.store.add("loss", self.key, passes, loss=loss)
        return loss

    def _tasks(self, schemes: Sequence[str]) -> Iterator[tuple[int, Option]]:
        """Every measurement: schemes, removal, the middle amount, the smallest amount, the others."""
        for scheme in schemes:
            for index, group in enumerate(self.groups):
                if scheme != PLAIN and scheme in group.schemes:
                    yield index, Option(group.size, scheme)
        fewer = [[left for left in group.lefts() if 0 < left < group.size] for group in self.groups]
        orders = [dict.fromkeys([0, *counts[1:2], *counts[:1], *counts[-1:], *counts]) for counts in fewer]
        rounds = [
            [*(Option(left) for left in order if left or group.layer), *(Option(group.size, pooled=at) for at in group.pools)]
            for order, group in zip(orders, self.groups, strict=True)
        ]
        for turn in range(max(map(len, rounds), default=0)):
            for index, options in enumerate(rounds):
                if turn < len(options):
                    yield index, options[turn]
