"""The options of a pipeline besides its passes: checks, a metric and its budget, a progress callback."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, get_args

import torch

from lissom.errors import InputError, UnsupportedError

Checks = Literal["numeric", "each", "structural", "off"]
NUMERIC = ("numeric", "each")
"""The checks that compare outputs."""
Goal = Literal["latency", "memory"]
Metric = Callable[[Any], float]
"""A number for a program, or for a compiled model, by which both are judged: the higher, the better."""
Progress = Callable[[str, int, int], None]


def check_options(checks: object, metric: object = None, max_drop: float | None = None) -> Checks:
    """Check the options of a pipeline; returns `checks`.

    Raises:
        UnsupportedError: when one is invalid.
    """
    chosen = next((known for known in get_args(Checks) if isinstance(checks, str) and known == checks), None)
    if chosen is None:
        raise UnsupportedError(f"checks={checks!r:.80} is not known; choose {', '.join(get_args(Checks))}")
    if metric is not None and not callable(metric):
        raise UnsupportedError(f"metric= is {metric!r:.80}; give a callable that takes a model and returns a number")
    if max_drop is not None and (isinstance(max_drop, bool) or not isinstance(max_drop, Real) or not max_drop >= 0):
        raise UnsupportedError(f"max_drop= is {max_drop!r:.80}; give a number, 0 or more")
    if max_drop is not None and metric is None:
        raise UnsupportedError("max_drop needs a metric to measure the drop of: pass metric=")
    return chosen


def check_goal(goal: object) -> Goal | None:
    """Check what lossy passes must gain, and return it. Raises UnsupportedError."""
    chosen = next((known for known in get_args(Goal) if isinstance(goal, str) and known == goal), None)
    if chosen is None and goal is not None:
        raise UnsupportedError(
            f"goal={goal!r:.80} is not known; choose {', '.join(get_args(Goal))}, or None to keep every pass"
        )
    return chosen


def check_progress(progress: object) -> None:
    """Check a progress callback. Raises UnsupportedError when it is not callable."""
    if progress is not None and not callable(progress):
        raise UnsupportedError(f"progress= is {progress!r:.80}; give a callable that takes a text and two numbers")


def read_score(score: object, *, original: bool) -> float:
    """The number a metric returned.

    Args:
        original: whether the score is the captured model's, with which others are compared.

    Raises:
        InputError: when it is no number, or the original's is NaN.
    """
    if isinstance(score, torch.Tensor) and score.numel() == 1 and not score.is_complex():
        score = score.item()
    if not isinstance(score, Real):
        shape = f" of shape {list(shape)}" if (shape := getattr(score, "shape", None)) is not None else ""
        raise InputError(f"metric returned a {type(score).__name__}{shape}; it returns one number, higher is better")
    if original and math.isnan(score):
        raise InputError("metric returned nan for the model as it is; nothing can be compared with that: return a number")
    return float(score)
