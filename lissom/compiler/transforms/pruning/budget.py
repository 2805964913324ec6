"""Which units of which sites go: rankings of the units of each site, and how an amount is shared among the sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from lissom.errors import UnsupportedError


@dataclass(frozen=True)
class Ranking:
    """The units of one site in the order they go.

    order: their numbers, the first to go first, [units].
    cost: what each costs once those before it are gone, [units]; comparable between sites.
    """

    order: torch.Tensor
    cost: torch.Tensor

    @staticmethod
    def of(scores: torch.Tensor) -> Ranking:
        """The ranking of units that each have a score of their own; the least goes first."""
        scores = scores.cpu()
        order = torch.argsort(scores, stable=True)
        return Ranking(order, scores[order])


@dataclass(frozen=True)
class Amount:
    """How much is kept.

    keep: the share of units, over 0 to 1. scope: `global` shares the removal among sites by cost, `layer` takes the same share
    of every site. round_to: what the number of units left in a site is a multiple of.
    """

    keep: float
    scope: str
    round_to: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UnsupportedError(f"keep is {self.keep:g}; give a share over 0 and up to 1")
        if self.round_to < 1:
            raise UnsupportedError(f"round_to is {self.round_to}; give 1 or more")

    def left_of(self, units: int) -> int:
        """How many of so many units the share leaves, before rounding to multiples."""
        return round(self.keep * units)


@dataclass(frozen=True)
class Choice:
    """What an amount is taken from: one site.

    path: its name in refusals. units: how many it has. protected: whether all stay.
    """

    path: str
    units: int
    protected: bool


def check_amount(amount: Amount, choices: Sequence[Choice], what: str) -> None:
    """Refuse an amount that cannot be met. what: the units' name, `heads`.

    Raises: UnsupportedError saying which site, why, and what is possible.
    """
    free = [item for item in choices if not item.protected]
    if amount.keep == 1:
        return
    for item in free:
        if item.units < amount.round_to:
            raise UnsupportedError(
                f"'{item.path}' has {item.units} {what}, which leaves no multiple of round_to={amount.round_to}; "
                f"give round_to={item.units} or less, or protect it"
            )
        if amount.scope == "layer" and amount.left_of(item.units) < amount.round_to:
            raise UnsupportedError(
                f"keep={amount.keep:g} leaves '{item.path}' {amount.left_of(item.units)} of its {item.units} {what}, and at "
                f"least {amount.round_to} must stay; give keep={_up(amount.round_to / item.units)} or more, or protect it"
            )
    total = sum(item.units for item in choices)
    least = sum(item.units if item.protected else amount.round_to for item in choices)
    if amount.scope == "global" and amount.left_of(total) < least:
        protected = sum(item.units for item in choices if item.protected)
        reason = f"{protected} are protected and " if protected else ""
        first = f" ('{free[0].path}' is the first)" if free else ""
        raise UnsupportedError(
            f"keep={amount.keep:g} leaves {amount.left_of(total)} of {total} {what}, but {reason}every other site{first} keeps "
            f"at least {amount.round_to}; give keep={_up(least / total)} or more"
        )


def allocate(amount: Amount, choices: Sequence[Choice], rankings: Sequence[Ranking]) -> list[torch.Tensor]:
    """The numbers of the units that go of each site, in the order they go.

    Globally the site whose next units cost least gives them up, until the amount is met; where round_to does not divide it, a
    few units more are kept.
    """
    gone = [0 for _ in choices]
    steps = [_steps(amount, item) for item in choices]
    if amount.scope == "layer":
        for index, item in enumerate(choices):
            most = 0 if item.protected else item.units - amount.left_of(item.units)
            gone[index] = max((count for count in steps[index] if count <= most), default=0)
    else:
        _share(amount, choices, rankings, steps, gone)
    return [ranking.order[:count] for ranking, count in zip(rankings, gone, strict=True)]


def _steps(amount: Amount, choice: Choice) -> list[int]:
    """The numbers of units that may be gone of a site, so that what is left is a multiple and not nothing; ascending."""
    if choice.protected:
        return []
    return [count for count in range(1, choice.units) if (choice.units - count) % amount.round_to == 0]


def _share(
    amount: Amount, choices: Sequence[Choice], rankings: Sequence[Ranking], steps: Sequence[list[int]], gone: list[int]
) -> None:
    total = sum(item.units for item in choices)
    budget = total - amount.left_of(total)
    offers: dict[int, tuple[float, int]] = {}

    def offer(index: int) -> None:
        count = next((count for count in steps[index] if count > gone[index]), None)
        if count is not None:
            offers[index] = float(rankings[index].cost[gone[index] : count].mean()), count

    for index in range(len(choices)):
        offer(index)
    while offers:
        index = min(offers, key=lambda found: offers[found][0])
        _, count = offers.pop(index)
        if sum(gone) - gone[index] + count <= budget:
            gone[index] = count
            offer(index)


def _up(share: float) -> str:
    """A share as text, rounded up so that it suffices."""
    return f"{ceil(share * 1000) / 1000:g}"
