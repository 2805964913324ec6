"""The median of several rounds with its quartiles, as benchmarks print it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Quartiles = tuple[float, float, float]
"""The median, and the lower and upper quartile."""


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of two values or more."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def spread(quartiles: Quartiles, digits: int = 1) -> str:
    """`52.6 (51.9 to 53.0)`. digits: after the point."""
    middle, low, high = (f"{value:.{digits}f}" for value in quartiles)
    return f"{middle} ({low} to {high})"
