"""The options of a search, and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

from lissom.backends import find_backend
from lissom.backends.base import Backend
from lissom.compiler.pipeline.options import Metric
from lissom.driver.options import Inputs, check_data
from lissom.errors import InputError, UnsupportedError
from lissom.tuning.sites import SERVERS

GOALS = ("latency", "throughput", "memory")
_ABSOLUTE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|MB|GB|x|×)\s*")
_UNITS = {"ms": 1.0, "s": 1e3, "MB": 1e6, "GB": 1e9}
_MOST_MINUTES = 60 * 24 * 30


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The options of every search."""

    max_drop: float = 0.01
    target: float | str | None = None
    minutes: float = 20
    backends: Sequence[str | Backend] = ("eager",)
    distill: bool = True
    store: str | Path | None = None
    for_server: Literal["vllm"] | None = None


@dataclass(frozen=True)
class Request:
    """The checked options of a search.

    Attributes:
        target: as given; see `target_cost`.
    """

    data: Sequence[Inputs]
    metric: Metric | None
    max_drop: float
    goal: str
    target: float | str | None
    minutes: float
    backends: Mapping[str, str | Backend]
    distill: bool
    for_server: str | None

    @property
    def memory(self) -> bool:
        return self.goal == "memory"

    def target_cost(self, exact: float) -> float | None:
        """The target in milliseconds or bytes.

        Args:
            exact: the exact program's.
        """
        if self.target is None:
            return None
        amount, unit = _read_target(self.target, memory=self.memory)
        return exact / amount if unit in ("x", "×") else amount * _UNITS[unit]


def check_request(data: Iterable[Inputs], metric: Metric | None, goal: str, settings: SearchSettings) -> Request:
    """The options, checked before any work is done.

    Raises:
        UnsupportedError: for an option of a wrong value.
        InputError: for data without batches.
    """
    max_drop, minutes, target, distill = settings.max_drop, settings.minutes, settings.target, settings.distill
    check_data(data)
    batches = list(data)
    if not batches:
        raise InputError("data= holds no batch; tune calibrates passes and measures outputs on it: give a list of batches")
    if metric is not None and not callable(metric):
        raise UnsupportedError(f"metric= is {metric!r:.80}; give a callable that takes a model and returns a number")
    if not _is_number(max_drop) or not 0 <= max_drop < math.inf:
        raise UnsupportedError(f"max_drop= is {max_drop!r:.80}; give a number, 0 or more")
    if goal not in GOALS:
        raise UnsupportedError(f"goal={goal!r:.80} is not known; choose {', '.join(GOALS)}")
    if not _is_number(minutes) or not 0 < minutes <= _MOST_MINUTES:
        raise UnsupportedError(f"minutes= is {minutes!r:.80}; give a number above 0, at most {_MOST_MINUTES}")
    if target is not None:
        _read_target(target, memory=goal == "memory")
    if not isinstance(distill, bool):
        raise UnsupportedError(f"distill= is {distill!r:.80}; give True or False")
    if settings.for_server not in (None, *SERVERS):
        raise UnsupportedError(f"for_server= is {settings.for_server!r:.80}; choose {', '.join(SERVERS)}, or leave it out")
    return Request(
        batches,
        metric,
        float(max_drop),
        goal,
        target,
        float(minutes),
        _named(settings.backends),
        distill,
        settings.for_server,
    )


def _named(backends: Sequence[str | Backend]) -> dict[str, str | Backend]:
    if isinstance(backends, (str, Backend)):
        backends = (backends,)
    if not isinstance(backends, Sequence):
        raise UnsupportedError(f"backends= is {backends!r:.80}; give one or more, for example ('eager',)")
    named: dict[str, str | Backend] = {}
    for given in backends:
        backend = find_backend(given)
        if backend.runs_ranks:
            raise UnsupportedError(f"backends= holds '{backend.name}', and tune searches programs that run in one process")
        if backend.name in named:
            raise UnsupportedError(f"backends= holds '{backend.name}' twice; give each backend once")
        named[backend.name] = backend
    if not named:
        raise UnsupportedError("backends= is empty; give one or more, for example ('eager',)")
    return named


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_target(target: object, *, memory: bool) -> tuple[float, str]:
    """The amount and the unit of a target, `x` for a factor. Raises UnsupportedError."""
    units = ("MB", "GB") if memory else ("ms", "s")
    example = "a size such as '20 MB'" if memory else "a time such as '5 ms'"
    wrong = UnsupportedError(f"target= is {target!r:.80}; give a factor above 1, such as 2.0, or {example}")
    if isinstance(target, str):
        match = _ABSOLUTE.fullmatch(target)
        if match is None or match[2] not in (*units, "x", "×"):
            raise wrong
        amount, unit = float(match[1]), match[2]
    elif _is_number(target):
        amount, unit = float(target), "x"
    else:
        raise wrong
    if not (amount > 1 if unit in ("x", "×") else amount > 0) or math.isinf(amount):
        raise wrong
    return amount, unit
