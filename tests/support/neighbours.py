"""Parameters of which a few run with every change, and the others with `--slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def all_but_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters of a test; those that are not quick are marked slow. Tuples are of several parameters."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[] if value in quick else pytest.mark.slow)
        for value in values
    ]
