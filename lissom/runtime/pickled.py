"""Pickling and copying of compiled models through their artifact: what is pickled are its files, which are not pickles."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

Model = TypeVar("Model")


def files_of(save: Callable[[Path], None]) -> dict[str, bytes]:
    """The files of an artifact by name. save: writes it into a directory."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded_from(files: Mapping[str, bytes], load: Callable[[Path], Model]) -> Model:
    """The model that `load` reads from these files. Weights stay mapped from them, though their names are gone."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        for name, content in files.items():
            (folder / Path(name).name).write_bytes(content)
        return load(folder)
