"""Corrections of the tables by whole programs: a power law from summed losses to the drop, and a line for costs.

In the sum, losses of amounts have a factor. The table has them on other batches than those that passes calibrate on; without a
metric, whole programs are compared on the batches that they calibrate on, where the error that is left is smaller. Losses of
formats need no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Points = Sequence[tuple[float, float]]
_FACTORS = tuple(2 ** (step / 2) for step in range(-6, 7))
"""The factors on losses of amounts that are tried, relative to the usual one."""
_CHARGE = 0.01
"""On the squared logarithm of that factor over the usual one."""
_LEAST_POINTS = 4


@dataclass
class PowerLaw:
    """y = scale · x^exponent, fitted in logarithms; both positive."""

    scale: float = 1.0
    exponent: float = 1.0

    def __call__(self, x: float) -> float:
        return self.scale * x**self.exponent if x > 0 else 0.0

    def inverse(self, y: float) -> float:
        """The x that gives y."""
        try:
            return (y / self.scale) ** (1 / self.exponent) if y > 0 else 0.0
        except OverflowError:
            return math.inf

    def fit(self, points: Points, near: float) -> PowerLaw:
        """The law through measured points, those with y close to `near` weighted most; one point sets the scale alone."""
        known, weights = _weighted(points, near)
        if not known:
            return self
        total = sum(weights)
        mean_x, mean_y = (
            sum(weight * point[at] for weight, point in zip(weights, known, strict=True)) / total for at in range(2)
        )
        spread = sum(weight * (x - mean_x) ** 2 for weight, (x, _) in zip(weights, known, strict=True))
        along = sum(weight * (x - mean_x) * (y - mean_y) for weight, (x, y) in zip(weights, known, strict=True))
        exponent = min(max(along / spread, 0.25), 2.0) if len(known) > 2 and spread > 0.01 else self.exponent
        return PowerLaw(math.exp(mean_y - exponent * mean_x), exponent)

    def error(self, points: Points, near: float) -> float:
        """The weighted sum of squared errors in logarithms."""
        known, weights = _weighted(points, near)
        return sum(weight * (math.log(self(math.exp(x))) - y) ** 2 for weight, (x, y) in zip(weights, known, strict=True))


def _weighted(points: Points, near: float) -> tuple[list[tuple[float, float]], list[float]]:
    """The logarithms of positive points, and their weights, which are largest where y is close to `near`."""
    known = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0 and math.isfinite(x + y)]
    return known, [1 / (1 + abs(y - math.log(near)) ** 2) if near > 0 else 1.0 for _, y in known]


def fit_parts(
    start: PowerLaw, points: Sequence[tuple[float, float, float]], near: float, usual: float = 1.0
) -> tuple[float, PowerLaw]:
    """The factor w and the law of y = law(a + w·b) through points (a, b, y) with the least error in logarithms.

    usual: the factor with fewer than four points; others are charged for their distance from it. near: as in `PowerLaw.fit`.
    """
    found: list[tuple[float, float, PowerLaw]] = []
    for step in _FACTORS if len(points) >= _LEAST_POINTS else (1.0,):
        factor = step * usual
        sums = [(first + factor * second, y) for first, second, y in points]
        law = start.fit(sums, near)
        found.append((law.error(sums, near) + _CHARGE * math.log(step) ** 2, factor, law))
    _, factor, law = min(found, key=lambda item: item[0])
    return factor, law


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
