"""A decoder's directory: what it holds, told without transformers, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lissom.artifacts.directory import is_artifact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lissom.generation.model import GenerationModel

CONFIG, GENERATION = "config.json", "generation_config.json"
"""The files of an artifact that make it a decoder's."""
_FORMER = "program"
"""The folder of the program, in directories written before the decoder's files had hashes."""


def save(decoder: GenerationModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the decoder, whole or not at all. Ranks of a group save at the same point.

    Raises: ArtifactError, UnsupportedError, RankError.
    """

    def write_more(folder: Path) -> None:
        decoder.config.to_json_file(folder / CONFIG, use_diff=False)
        decoder.generation_config.to_json_file(folder / GENERATION)
        if tokenizer is not None:
            # Templates stay in the tokenizer's own file: an artifact has no folders.
            tokenizer.save_pretrained(folder, save_jinja_files=False)

    decoder.compiled.save_with(directory, write_more)


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
