"""The timer: wall-clock time of calls, in milliseconds where its name says nothing else."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


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
GAIN = 0.97
"""What is rewritten to be faster must take less than this fraction of the original's time, so that noise does not decide."""
_LEAST_MS = 50.0
"""The least time of all runs together after which two calls are `apart`."""
_SURE = 10
"""The runs from which on a difference of `GAIN` is none by chance."""
_SECONDS = 0.05
"""The measuring time of `median_seconds`."""


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    least: int = 5,
    most: float = math.inf,
    enough: Callable[[Sequence[Sequence[float]]], bool] | None = None,
) -> dict[str, Timing]:
    """Time several calls in turn, A B A B …, so that changes of the machine's speed affect all of them.

    Args:
        seconds: measuring time for each, after two warm-up calls.
        least: the minimum number of runs, two or more; if it is below five, there is one warm-up call.
        most: the maximum number of runs.
        enough: ends the timing after two runs or more, given the times of all runs of each call.
    """
    runs = time_runs(calls, seconds, least=least, most=most, warm_ups=1 if least < 5 else 2, enough=enough)
    quartiles = {name: statistics.quantiles(taken, n=4, method="inclusive") for name, taken in runs.items()}
    return {name: Timing(median, low, high, len(runs[name])) for name, (low, median, high) in quartiles.items()}


def apart(times: Sequence[Sequence[float]]) -> bool:
    """True if all runs of one of two calls were faster than all runs of the other, by more the fewer they are."""
    fast, slow = sorted(times, key=statistics.median)
    gain = GAIN ** max(1.0, _SURE / len(fast))
    return sum(fast) + sum(slow) >= _LEAST_MS and max(fast) < gain * min(slow)


def time_runs(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int = 1,
    most: float = math.inf,
    warm_ups: int = 0,
    enough: Callable[[Sequence[Sequence[float]]], bool] | None = None,
) -> dict[str, list[float]]:
    """The times of all runs of each call, timed in turn as by `time_calls`."""
    for call in calls.values():
        for _ in range(warm_ups):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for run in itertools.count():
        if run >= least and (run >= most or time.perf_counter() - started >= seconds * len(calls)):
            break
        if run >= 2 and enough is not None and enough([*times.values()]):
            break
        for name, call in calls.items():
            times[name].append(time_once(call)[0])
    return times


def time_once(call: Callable[[], T]) -> tuple[float, T]:
    """The time of one run, and its output; work of the current CUDA device is waited for."""
    _synchronize()
    started = time.perf_counter()
    output = call()
    _synchronize()
    return (time.perf_counter() - started) * 1e3, output


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], threads: int = 1) -> float:
    """The median time of a short call in seconds, without gradients, on that many threads."""
    # It imports what compiles C++, which takes a fifth of a second.
    from torch.utils.benchmark import Timer

    with torch.inference_mode():
        return Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange(min_run_time=_SECONDS).median


def _three_digits(value: float) -> str:
    """At least three significant digits without exponent: `0.428`, `52.6`, `1085`."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
