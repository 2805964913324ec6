"""What a saved decoder's directory holds, told without transformers."""

from __future__ import annotations

from pathlib import Path

from lissom.artifacts.directory import is_artifact

CONFIG, GENERATION = "config.json", "generation_config.json"
"""The files of an artifact that make it a decoder's."""
_FORMER = "program"
"""The folder of the program, in directories written before the decoder's files had hashes."""


def is_saved(directory: str | Path) -> bool:
    """True for a directory that `save` of a decoder wrote; whether it can be read is another question."""
    return _has_config(Path(directory)) and is_artifact(directory)


def is_former(directory: Path) -> bool:
    """True for a directory that an earlier version wrote, without hashes of its own."""
    return _has_config(directory) and not is_artifact(directory) and is_artifact(directory / _FORMER)


def _has_config(directory: Path) -> bool:
    try:
        return (directory / CONFIG).is_file()
    # A name that is too long, or a folder that may not be entered.
    except OSError:
        return False
