"""What a saved decoder's directory holds, told without transformers."""

from __future__ import annotations

from pathlib import Path

PROGRAM, CONFIG, GENERATION = "program", "config.json", "generation_config.json"


def is_saved(directory: str | Path) -> bool:
    """True for a directory that `save` of a decoder wrote; whether it can be read is another question."""
    return (Path(directory) / PROGRAM).is_dir() and (Path(directory) / CONFIG).is_file()
