"""Figures of matplotlib in one style, written to files completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lissom.errors import UnsupportedError
from lissom.io.files import writing_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN, MARKED, QUIET, FAINT = "#1f77b4", "#d62728", "#888888", "#bbbbbb"
"""The colors of what a picture is about, of what it marks, of bounds, and of the rest."""


def new_figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other. Raises UnsupportedError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("drawing a plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6.4, 4.2 if rows == 1 else 3.2 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, 1, number) for number in range(1, rows + 1)]
    for axes in panels:
        axes.grid(color="#e4e7ec", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends in.

    Raises:
        UnsupportedError: for a format that matplotlib does not write.
        ArtifactError: if the file cannot be written.
    """
    with writing_whole(path) as file:
        figure.savefig(file, format=_format_of(figure, path))


def check_picture(path: Path) -> None:
    """Refuse what `new_figure` and `save_figure` would, before the work whose result is drawn. Raises UnsupportedError."""
    _format_of(new_figure()[0], path)


def _format_of(figure: Figure, path: Path) -> str:
    """The format that a file's name ends in. Raises UnsupportedError."""
    form = path.suffix.removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise UnsupportedError(f"'{path.name}' ends in no format of a picture; give one of {', '.join(sorted(known))}")
    return form
