"""The integer program: one option for each group, with the least cost under a bound on the loss, or the other way round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from lissom.errors import UnsupportedError
from lissom.tuning.corrections import Factors
from lissom.tuning.sites import Option

_SECONDS = 10.0
_SLACK = 1e-9


@dataclass(frozen=True)
class Item:
    """An option of a group with its loss and its cost, relative to the exact program.

    The rest is that of other formats and of removed parts.

    Attributes:
        amounts: the part of the loss that fewer heads or neurons have.
        tables: that of formats of embedding tables and LM heads.
    """

    option: Option
    loss: float
    cost: float
    amounts: float = 0.0
    tables: float = 0.0

    def weighted(self, factors: Factors) -> Item:
        """The item with factors on these parts of the loss."""
        return replace(self, loss=factors(self.loss, self.amounts, self.tables))


Table = Sequence[Sequence[Item]]
"""For each group its options; the first is the group as it is."""


def solve(table: Table, parts: Sequence[str], *, loss: float = math.inf, cost: float = math.inf) -> list[Item] | None:
    """The choice with the least cost and at most this loss, or with the least loss and at most this cost.

    Returns None where no choice meets the bound.

    Args:
        parts: the kind of each group; one group of each kind keeps some units. Give one of the two bounds.

    Raises:
        UnsupportedError: without scipy.
    """
    optimize, sparse = require_scipy()
    if not table:
        return [] if min(loss, cost) >= 0 else None
    items = [(at, item) for at, options in enumerate(table) for item in options if math.isfinite(item.loss + item.cost)]
    losses, costs = (np.array([getattr(item, name) for _, item in items]) for name in ("loss", "cost"))
    least, bounded, bound = (costs, losses, loss) if math.isinf(cost) else (losses, costs, cost)
    scale = float(np.abs(bounded).max()) or 1.0
    rows = [bounded / scale, *(np.array([float(at == group) for at, _ in items]) for group in range(len(table)))]
    low, high = [-np.inf, *[1.0] * len(table)], [(bound / scale) + _SLACK, *[1.0] * len(table)]
    for kind in set(parts):
        members = {at for at, part in enumerate(parts) if part == kind}
        rows.append(np.array([float(at in members and item.option.left == 0) for at, item in items]))
        low.append(-np.inf)
        high.append(len(members) - 1.0)
    solution = optimize.milp(
        least / (float(np.abs(least).max()) or 1.0),
        constraints=optimize.LinearConstraint(sparse.csr_array(np.stack(rows)), np.array(low), np.array(high)),
        integrality=np.ones(len(items)),
        bounds=optimize.Bounds(0, 1),
        options={"time_limit": _SECONDS},
    )
    if solution.x is None:
        return None
    chosen = {at: item for (at, item), share in zip(items, solution.x, strict=True) if share > 0.5}
    return [chosen[at] for at in range(len(table))]


def require_scipy() -> tuple[ModuleType, ModuleType]:
    """The modules of scipy that solve. Raises UnsupportedError without scipy."""
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise UnsupportedError("tune solves an integer program with scipy: pip install 'lissom[tune]'") from error
    return optimize, sparse
