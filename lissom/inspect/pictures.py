"""Figures of matplotlib written to files, completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lissom.errors import UnsupportedError
from lissom.files import writing_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends in.

    Raises: UnsupportedError for a format that matplotlib does not write; ArtifactError if the file cannot be written.
    """
    form = path.suffix.removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise UnsupportedError(f"'{path.name}' ends in no format of a picture; give one of {', '.join(sorted(known))}")
    with writing_whole(path) as file:
        figure.savefig(file, format=form)
