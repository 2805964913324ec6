"""Corrections of the tables by whole programs: a power law from summed losses to the drop, and ratios of costs.

In the sum, two kinds of losses have a factor. Those of amounts: the table has them on other batches than those that passes
calibrate on; without a metric, whole programs are compared on the batches that they calibrate on, where the error that is left
is smaller. Losses of formats need no data. And those of embedding tables and LM heads: a metric such as perplexity may feel an
error of an LM head, which no layer follows, more than an error of the same size from the layers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

Points = Sequence[tuple[float, float]]
Features = Sequence[Hashable]
"""The features of a program, one for each place where programs may differ."""
_STEPS = tuple(2 ** (step / 2) for step in range(-6, 7))
"""The factors on kinds of losses that are tried, relative to the usual ones."""
_CHARGE = 0.01
"""On the squared logarithm of each factor over the usual one."""
_LEAST_POINTS = 4
_NOISE = 0.05
"""The variance of a measured ratio over that of ratios of unlike programs: about 3 % against 13 %, squared."""


class Factors(NamedTuple):
    """The factors on the losses of amounts, and of embedding tables and LM heads."""

    amounts: float = 1.0
    tables: float = 1.0

    def __call__(self, loss: float, amounts: float, tables: float) -> float:
        """A loss of which these parts are of the two kinds."""
        return loss + (self.amounts - 1) * amounts + (self.tables - 1) * tables


USUAL = Factors()


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
    start: PowerLaw, points: Sequence[tuple[float, float, float, float]], near: float, usual: Factors = USUAL
) -> tuple[Factors, PowerLaw]:
    """The factors and the law of y = law(factors(loss, amounts, tables)) with the least error in logarithms.

    Args:
        points: (loss, amounts, tables, y).
        usual: the factors with fewer than four points; others are charged for their distance from them.
        near: as in `PowerLaw.fit`.
    """
    fits: list[tuple[float, Factors, PowerLaw]] = []
    for steps in product(_STEPS, _STEPS) if len(points) >= _LEAST_POINTS else ((1.0, 1.0),):
        factors = Factors(*(step * before for step, before in zip(steps, usual, strict=True)))
        sums = [(factors(*parts), y) for *parts, y in points]
        law = start.fit(sums, near)
        fits.append((law.error(sums, near) + _CHARGE * sum(math.log(step) ** 2 for step in steps), factors, law))
    _, factors, law = min(fits, key=lambda fit: fit[0])
    return factors, law


@dataclass(frozen=True)
class Ratios:
    """Measured costs over summed ones, by measured programs and how much a new one is like them.

    The logarithm of the ratio is a Gaussian process whose mean is zero and whose covariance is the likeness of two programs.
    Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, (2.25).

    Attributes:
        points: the features of a program, its summed and its measured cost.
        weights: of the features; two programs are alike by the weights of the features that they share, over all weights.
    """

    points: Sequence[tuple[Features, float, float]] = ()
    weights: Sequence[float] = ()

    def __call__(self, features: Features) -> float:
        """The ratio that is expected of a program."""
        if not self.points:
            return 1.0
        return float(np.exp(self._likeness([self._numbers.get(feature, -1) for feature in features]) @ self._fitted))

    @cached_property
    def _numbers(self) -> dict[Hashable, int]:
        """A number for each feature."""
        every = dict.fromkeys(feature for features, *_ in self.points for feature in features)
        return {feature: number for number, feature in enumerate(every)}

    @cached_property
    def _known(self) -> np.ndarray:
        """The features of the points, [points, features]."""
        return np.array([[self._numbers[feature] for feature in features] for features, *_ in self.points])

    def _likeness(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The similarity of each point to a program, [points]."""
        weights = np.array(self.weights)
        return (self._known == numbers) @ weights / (weights.sum() or 1.0)

    @cached_property
    def _fitted(self) -> np.ndarray:
        """The inverse covariance times the logarithms of the measured ratios, [points]."""
        covariance = np.stack([self._likeness(row) for row in self._known]) + _NOISE * np.eye(len(self.points))
        return np.linalg.solve(covariance, [math.log(measured / summed) for _, summed, measured in self.points])

    def inverse(self, cost: float) -> float:
        """The summed cost of a program that takes this cost, by the measured program that comes closest to it."""
        nearest = min(self.points, key=lambda point: abs(point[2] - cost), default=((), 1.0, 1.0))
        return cost * nearest[1] / nearest[2]
