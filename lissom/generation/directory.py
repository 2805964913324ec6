"""The directory of a saved decoder: recognising and writing it, without importing transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lissom.artifacts.directory import is_artifact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lissom.generation.model import GenerationModel

CONFIG, GENERATION = "config.json", "generation_config.json"
"""The files that only the artifact of a decoder has."""
_FORMER = "program"
"""The folder of the program in the former format, which had no hashes of the decoder's files."""


def save(decoder: GenerationModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the decoder, completely or not at all. All ranks of a group must call it.

    Raises: ArtifactError, UnsupportedError, RankError.
    """

    def write_more(folder: Path) -> None:
        decoder.config.to_json_file(folder / CONFIG, use_diff=False)
        decoder.generation_config.to_json_file(folder / GENERATION)
        if tokenizer is not None:
            # Chat templates stay in the tokenizer's own file: an artifact has no folders.
            tokenizer.save_pretrained(folder, save_jinja_files=False)

    decoder.compiled.save_with(directory, write_more)


def is_saved(directory: str | Path) -> bool:
    """True for a directory that `save` wrote; its content is not checked."""
    return _has_config(Path(directory)) and is_artifact(directory)


def is_former(directory: Path) -> bool:
    """True for a directory in the former format, without hashes."""
    return _has_config(directory) and not is_artifact(directory) and is_artifact(directory / _FORMER)


def _has_config(directory: Path) -> bool:
    try:
        return (directory / CONFIG).is_file()
    # A name that is too long, or a folder without permission.
    except OSError:
        return False
