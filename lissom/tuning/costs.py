"""The cost table: the time or the bytes that each option of a group takes, relative to the group as it is.

All groups of one form get the option at once, in a program whose heads and neurons are chosen by magnitude, since values do not
change the time. The program is timed side by side with the exact one, and each group has an equal part of the difference. So
fusion and threads are part of the figure, on every backend. Two amounts are measured for each scheme, the others lie on the
line between them; whole programs correct the sums later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lissom.errors import LissomError
from lissom.tuning.build import Variant, Workshop
from lissom.tuning.clock import Clock
from lissom.tuning.sites import Group, Option
from lissom.tuning.store import Store, number


@dataclass
class CostTable:
    """Costs of options by the form of a group, as fractions of the exact program's; negative where they are cheaper."""

    known: dict[tuple[object, Option], float] = field(default_factory=dict[tuple[object, Option], float])
    failed: list[str] = field(default_factory=list[str])

    def cost(self, group: Group, option: Option) -> float:
        """The cost of an option; infinite where nothing is known of it."""
        if option == group.whole:
            return 0.0
        cost = self.known.get((group.likeness, option))
        if cost is not None:
            return cost
        least, full = smallest(group), Option(group.size, option.scheme)
        if option.pooled:
            end, along = Option(group.size, option.scheme, group.pools[-1]), group.key_value_heads - option.pooled
            along /= group.key_value_heads - group.pools[-1]
        elif not option.left or least == group.size:
            return math.inf
        else:
            end, along = Option(least, option.scheme), (group.size - option.left) / (group.size - least)
        ends = [0.0 if bound == group.whole else self.known.get((group.likeness, bound), math.inf) for bound in (full, end)]
        return ends[0] + along * (ends[1] - ends[0]) if math.isfinite(sum(ends)) else math.inf


def smallest(group: Group) -> int:
    """The smallest number of units that may stay, other than none."""
    return min(left for left in group.lefts() if left)


@dataclass(frozen=True)
class CostMeter:
    """Measures the costs of one variant.

    Attributes:
        memory: bytes in place of time.
        key: of the store.
    """

    workshop: Workshop
    groups: Sequence[Group]
    linears: Sequence[str]
    variant: Variant
    memory: bool
    store: Store
    key: str
    clock: Clock

    def measure(self, schemes: Sequence[str], until: float) -> CostTable:
        """The table for these schemes; stops at a fraction of the time."""
        table = CostTable()
        forms = {group.likeness: group for group in self.groups}
        tasks = [(form, option) for form, group in forms.items() for option in self._options(group, schemes)]
        # What shows which schemes pay comes first.
        tasks.sort(key=lambda task: task[1].left != forms[task[0]].size or task[1].pooled > 0)
        for done, (form, option) in enumerate(tasks):
            members = [at for at, group in enumerate(self.groups) if group.likeness == form]
            # A program keeps one attention and one feed-forward.
            members = members[: len(members) - (option.left == 0)]
            options = [option if at in members else group.whole for at, group in enumerate(self.groups)]
            passes = self.variant.passes(self.groups, options, self.linears, fitted=False)
            if not members or passes == self.variant.pipeline:
                continue
            record = self.store.get("cost", self.key, f"{self.variant.backend} {passes}")
            share = None if record is None else number(record, "share")
            if share is None:
                if not self.clock.within(until):
                    continue
                units = option.pooled or option.left
                self.clock.show(f"costs, {done} of {len(tasks)}: {forms[form].kind} {units} {option.scheme}")
                share = self._share(table, passes)
            if share is not None:
                table.known[form, option] = share / len(members)
        return table

    @staticmethod
    def _options(group: Group, schemes: Sequence[str]) -> Iterator[Option]:
        for scheme in schemes:
            if scheme in group.schemes:
                yield from (Option(left, scheme) for left in dict.fromkeys([group.size, smallest(group)]))
                yield from (Option(group.size, scheme, pooled) for pooled in group.pools[-1:])
        if group.layer:
            yield Option(0)

    def _share(self, table: CostTable, passes: str) -> float | None:
        """The cost of the whole program relative to the exact one, minus 1; None if it cannot be built."""
        exact = self.workshop.base(self.variant)
        try:
            compiled = self.workshop.build(passes, self.variant.backend, checks="off")
        except LissomError as error:
            table.failed.append(f"{passes}: {error}")
            return None
        if self.memory:
            share = self.workshop.size(compiled) / max(self.workshop.size(exact), 1) - 1
        else:
            share = self.workshop.time(compiled, exact).ratio - 1
        self.store.add("cost", self.key, f"{self.variant.backend} {passes}", share=share)
        return share


def worthwhile(table: CostTable, groups: Sequence[Group], schemes: Sequence[str]) -> set[str]:
    """The schemes that make some form of group cheaper."""
    return {
        scheme
        for group in groups
        for scheme in group.schemes
        if scheme in schemes and table.cost(group, Option(group.size, scheme)) < 0
    }
