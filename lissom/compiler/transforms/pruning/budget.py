"""The units to remove from each site: rankings of the units, and the allocation of a ratio among the sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from lissom.errors import UnsupportedError


@dataclass(frozen=True)
class Ranking:
    """The units of one site in the order of removal.

    Attributes:
        order: their indices, the first to be removed first, [units].
        cost: the cost of each, once those before it are removed, [units]; comparable between sites.
    """

    order: torch.Tensor
    cost: torch.Tensor

    @staticmethod
    def of(scores: torch.Tensor) -> Ranking:
        """The ranking of units by independent scores; the lowest is removed first."""
        scores = scores.cpu()
        order = torch.argsort(scores, stable=True)
        return Ranking(order, scores[order])


@dataclass(frozen=True)
class Amount:
    """The ratio of units to keep, and its allocation among sites.

    Attributes:
        keep: the fraction of units, above 0 and at most 1.
        scope: `global` allocates the removal among sites by cost, `layer` takes the same fraction of every site.
        round_to: the number of units left in a site is a multiple of this.
    """

    keep: float
    scope: str
    round_to: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UnsupportedError(f"keep is {self.keep:g}; give a fraction above 0 and up to 1")
        if self.round_to < 1:
            raise UnsupportedError(f"round_to is {self.round_to}; give 1 or more")

    def left_of(self, units: int) -> int:
        """The number of units left of `units`, before rounding to multiples."""
        return round(self.keep * units)


@dataclass(frozen=True)
class Choice:
    """One site from which units may be removed.

    Attributes:
        path: its name in error messages.
        units: the number of units.
        protected: whether all units stay.
        left: the number of units to leave, where the site has an amount of its own.
    """

    path: str
    units: int
    protected: bool
    left: int | None = None


def check_amount(amount: Amount, choices: Sequence[Choice], what: str) -> None:
    """Check that an amount can be met at the sites without one of their own.

    Args:
        what: the units' name, `heads`.

    Raises:
        UnsupportedError: naming the site, the reason, and what is possible.
    """
    choices = [choice for choice in choices if choice.left is None]
    free = [choice for choice in choices if not choice.protected]
    if amount.keep == 1:
        return
    for choice in free:
        if choice.units < amount.round_to:
            raise UnsupportedError(
                f"'{choice.path}' has {choice.units} {what}, which leaves no multiple of round_to={amount.round_to}; "
                f"give round_to={choice.units} or less, or protect it"
            )
        if amount.scope == "layer" and amount.left_of(choice.units) < amount.round_to:
            raise UnsupportedError(
                f"keep={amount.keep:g} leaves '{choice.path}' {amount.left_of(choice.units)} of its {choice.units} {what}, and "
                f"at least {amount.round_to} must stay; give keep={_up(amount.round_to / choice.units)} or more, or protect it"
            )
    total = sum(choice.units for choice in choices)
    least = sum(choice.units if choice.protected else amount.round_to for choice in choices)
    if amount.scope == "global" and amount.left_of(total) < least:
        protected = sum(choice.units for choice in choices if choice.protected)
        reason = f"{protected} are protected and " if protected else ""
        first = f" ('{free[0].path}' is the first)" if free else ""
        raise UnsupportedError(
            f"keep={amount.keep:g} leaves {amount.left_of(total)} of {total} {what}, but {reason}every other site{first} keeps "
            f"at least {amount.round_to}; give keep={_up(least / total)} or more"
        )


def allocate(amount: Amount | None, choices: Sequence[Choice], rankings: Sequence[Ranking]) -> list[torch.Tensor]:
    """The indices of the units removed from each site, in the order of removal.

    Args:
        amount: of the sites without one of their own; None leaves these as they are.
    """
    open_choices = [choice for choice in choices if choice.left is None]
    open_rankings = [ranking for choice, ranking in zip(choices, rankings, strict=True) if choice.left is None]
    gone = iter([0 for _ in open_choices] if amount is None else _allocate(amount, open_choices, open_rankings))
    counts = [next(gone) if choice.left is None else choice.units - choice.left for choice in choices]
    return [ranking.order[:count] for ranking, count in zip(rankings, counts, strict=True)]


def _allocate(amount: Amount, choices: Sequence[Choice], rankings: Sequence[Ranking]) -> list[int]:
    """The number of units to remove from each site.

    With global scope the site whose next units cost least loses them, until the amount is met; when round_to does not divide
    it, a few more units are kept.
    """
    steps = [_steps(amount, choice) for choice in choices]
    if amount.scope == "layer":
        most = [choice.units - amount.left_of(choice.units) for choice in choices]
        return [max((step for step in counts if step <= limit), default=0) for counts, limit in zip(steps, most, strict=True)]
    return _allocate_globally(amount, choices, rankings, steps)


def _steps(amount: Amount, choice: Choice) -> list[int]:
    """The numbers of units that may be removed from a site, leaving a multiple of `round_to` above 0; ascending."""
    if choice.protected:
        return []
    return [count for count in range(1, choice.units) if (choice.units - count) % amount.round_to == 0]


def _allocate_globally(
    amount: Amount, choices: Sequence[Choice], rankings: Sequence[Ranking], steps: Sequence[list[int]]
) -> list[int]:
    """The number of units to remove from each site."""
    total, gone = sum(choice.units for choice in choices), [0 for _ in choices]
    budget = total - amount.left_of(total)
    offers: dict[int, tuple[float, int]] = {}

    def offer(index: int) -> None:
        count = next((count for count in steps[index] if count > gone[index]), None)
        if count is not None:
            offers[index] = float(rankings[index].cost[gone[index] : count].mean()), count

    for index in range(len(choices)):
        offer(index)
    while offers:
        index = min(offers, key=lambda at: offers[at][0])
        _, count = offers.pop(index)
        if sum(gone) - gone[index] + count <= budget:
            gone[index] = count
            offer(index)
    return gone


def _up(share: float) -> str:
    """A fraction as text, rounded up so that it suffices."""
    return f"{ceil(share * 1000) / 1000:g}"
