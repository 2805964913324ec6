"""Figures of the benchmarks: the same numbers give the same file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure, and its axes as `pyplot.subplots` returns them."""
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, layout="constrained", **options)


def save(figure: Figure, file: Path) -> None:
    """Write a figure without its date and random names, and close it."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "lissom"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
