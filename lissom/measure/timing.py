"""Wall-clock time of a call: the median of many runs, with quartiles."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and the lower and upper quartiles."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    def __str__(self) -> str:
        return f"{_three_digits(self.median_ms)} ({_three_digits(self.low_ms)} to {_three_digits(self.high_ms)})"


ENOUGH = 300
"""The number of runs that suffices for a decision; a call of a tenth of a millisecond would have thousands."""


def time_calls(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 5, most: float = math.inf
) -> dict[str, Timing]:
    """Time several calls in turn, A B A B …, so that changes of the machine's speed affect all of them.

    Args:
        seconds: measuring time for each, after two warm-up calls.
        least: the minimum number of runs, two or more; if it is below five, there is one warm-up call.
        most: the maximum number of runs.
    """
    for call in calls.values():
        for _ in range(1 if least < 5 else 2):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for run in itertools.count():
        if run >= least and (run >= most or time.perf_counter() - started >= seconds * len(calls)):
            break
        for name, call in calls.items():
            times[name].append(_time_once(call))
    return {name: _summary(runs) for name, runs in times.items()}


def _time_once(call: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - started) * 1e3


def synchronize() -> None:
    """Wait for the work of a CUDA device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(runs: list[float]) -> Timing:
    low, median, high = statistics.quantiles(runs, n=4, method="inclusive")
    return Timing(median, low, high, len(runs))


def _three_digits(value: float) -> str:
    """At least three significant digits without exponent: `0.428`, `52.6`, `1085`."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
