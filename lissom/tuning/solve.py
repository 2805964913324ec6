"""The integer program: one option for each group, with the least cost under a bound on the loss, or the other way round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lissom.errors import UnsupportedError
from lissom.tuning.sites import Option

_SECONDS = 10.0
_SLACK = 1e-9


@dataclass(frozen=True)
class Item:
    """An option of a group with its loss and its cost, relative to the exact program."""

    option: Option
    loss: float
    cost: float


Table = Sequence[Sequence[Item]]
"""For each group its options; the first is the group as it is."""


def solve(table: Table, parts: Sequence[str], *, loss: float = math.inf, cost: float = math.inf) -> list[Item] | None:
    """The choice with the least cost and at most this loss, or with the least loss and at most this cost.

    parts: the kind of each group; one group of each kind keeps some units. Give one of the two bounds.

    Returns None where no choice meets the bound. Raises: UnsupportedError without scipy.
    """
    optimize, sparse = _scipy()
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
    found = optimize.milp(
        least / (float(np.abs(least).max()) or 1.0),
        constraints=optimize.LinearConstraint(sparse.csr_array(np.stack(rows)), np.array(low), np.array(high)),
        integrality=np.ones(len(items)),
        bounds=optimize.Bounds(0, 1),
        options={"time_limit": _SECONDS},
    )
    if found.x is None:
        return None
    chosen = {at: item for (at, item), taken in zip(items, found.x, strict=True) if taken > 0.5}
    return [chosen[at] for at in range(len(table))]


def _scipy():  # noqa: ANN202
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise UnsupportedError("tune solves an integer program with scipy: pip install 'lissom[tune]'") from error
    return optimize, sparse


@dataclass
class PowerLaw:
    """y = scale · x^exponent, fitted in logarithms; both positive."""

    scale: float = 1.0
    exponent: float = 1.0

    def __call__(self, x: float) -> float:
        return self.scale * x**self.exponent if x > 0 else 0.0

    def inverse(self, y: float) -> float:
        """The x that gives y."""
        return (y / self.scale) ** (1 / self.exponent) if y > 0 else 0.0

    def fit(self, points: Sequence[tuple[float, float]], near: float) -> PowerLaw:
        """The law through measured points, those with y close to `near` weighted most; one point sets the scale alone."""
        known = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0 and math.isfinite(x + y)]
        if not known:
            return self
        weights = [1 / (1 + abs(y - math.log(near)) ** 2) if near > 0 else 1.0 for _, y in known]
        total = sum(weights)
        mean_x, mean_y = (
            sum(weight * point[at] for weight, point in zip(weights, known, strict=True)) / total for at in range(2)
        )
        spread = sum(weight * (x - mean_x) ** 2 for weight, (x, _) in zip(weights, known, strict=True))
        along = sum(weight * (x - mean_x) * (y - mean_y) for weight, (x, y) in zip(weights, known, strict=True))
        exponent = min(max(along / spread, 0.25), 2.0) if len(known) > 2 and spread > 0.01 else self.exponent
        return PowerLaw(math.exp(mean_y - exponent * mean_x), exponent)


@dataclass
class Line:
    """y = offset + scale · x, fitted by least squares; the identity without points."""

    offset: float = 0.0
    scale: float = 1.0

    def __call__(self, x: float) -> float:
        return self.offset + self.scale * x

    def inverse(self, y: float) -> float:
        return (y - self.offset) / self.scale

    def fit(self, points: Sequence[tuple[float, float]]) -> Line:
        """The line through measured points; with too little spread, the scale alone."""
        if not points:
            return Line()
        x, y = (np.array(values) for values in zip(*points, strict=True))
        if len(points) < 3 or np.ptp(x) < 0.05 * float(np.abs(x).max()):
            return Line(0.0, float(np.median(y / x)))
        scale, offset = np.polyfit(x, y, 1)
        return Line(float(offset), float(scale)) if 0.3 < scale < 3 else Line(0.0, float(np.median(y / x)))
