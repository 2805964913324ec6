"""Pickling and copying of compiled models through their artifact: what is pickled are its files, which are not pickles."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from lissom.artifacts.packed import from_copy

Model = TypeVar("Model")


def files_of(save: Callable[[Path], None]) -> dict[str, bytes]:
    """The files of an artifact by name.

    Args:
        save: writes it into a directory.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded_from(files: Mapping[str, bytes], load: Callable[[Path], Model]) -> Model:
    """The model that `load` reads from these files. They exist as long as the model: backends read theirs again to save it."""
    return from_copy(partial(_write, files), load)


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / Path(name).name).write_bytes(content)
