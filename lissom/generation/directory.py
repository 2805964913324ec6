"""The directory of a saved decoder: recognising and writing it, without importing transformers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lissom.artifacts.directory import is_artifact
from lissom.artifacts.model_files import CONFIG, Saveable, check_tokenizer, saved_config, write_processors
from lissom.artifacts.packed import pack
from lissom.artifacts.pruned_tokenizer import saved_tokenizer
from lissom.frontends.generation.decoder import INPUTS

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from lissom.runtime.compiled_model import CompiledModel

GENERATION = "generation_config.json"
"""The file that only the artifact of a decoder has."""
_FORMER = "program"
"""The folder of the program in the former format, which had no hashes of the decoder's files."""


ENCODER = "encoder.lissom"
"""The file of an encoder-decoder that holds the artifact of its encoder."""
DRAFT = "draft.lissom"
"""The file that holds the artifact of a draft decoder."""
POOL = "pool.json"
"""The file with the sizes of a decoder for several texts, which only such a decoder has."""
PROPOSER = "draft.json"
"""The file with the name of a proposer that is no decoder, as `{"draft": "prompt-lookup"}`."""


@dataclass(frozen=True)
class PoolSizes:
    """What the program of a `PooledDecoder` does not say of it."""

    max_length: int
    sequences: int


@dataclass(frozen=True)
class Parts:
    """The contents of a decoder's directory, without tokenizer and processor.

    Attributes:
        encoder: None for a model without one.
        draft: the program of a draft decoder, or the name of another proposer; None without a draft.
        pool: the sizes of a decoder for several texts; None for others.
    """

    compiled: CompiledModel
    config: PreTrainedConfig
    generation_config: GenerationConfig
    encoder: CompiledModel | None = None
    draft: CompiledModel | str | None = None
    pool: PoolSizes | None = None


def save(parts: Parts, directory: Path, tokenizer: PreTrainedTokenizerBase | None, processor: Saveable | None = None) -> None:
    """Write a decoder, completely or not at all, with the encoder it reads from. All ranks of a group must call it.

    Raises:
        ArtifactError: as `GenerationModel.save`.
        UnsupportedError: likewise.
        InputError: as `check_tokenizer`.
        RankError: if a rank ended or does not answer.
    """
    if tokenizer is not None:
        check_tokenizer(parts.compiled.program, INPUTS[0], tokenizer)
    tokenizer = saved_tokenizer(parts.compiled.program, tokenizer, str(parts.config._name_or_path) or None)

    def write_more(folder: Path) -> None:
        saved_config(json.loads(parts.config.to_json_string(use_diff=False)), folder)
        parts.generation_config.to_json_file(folder / GENERATION)
        if parts.encoder is not None:
            pack(parts.encoder.save, folder / ENCODER)
        if parts.pool is not None:
            (folder / POOL).write_text(json.dumps(asdict(parts.pool)), encoding="utf-8")
        if isinstance(parts.draft, str):
            (folder / PROPOSER).write_text(json.dumps({"draft": parts.draft}), encoding="utf-8")
        elif parts.draft is not None:
            pack(parts.draft.save, folder / DRAFT)
        write_processors(
            folder, str(parts.config._name_or_path) or None, None if tokenizer is None else _Flat(tokenizer), processor
        )

    parts.compiled.save_with(directory, write_more)


class _Flat:
    """A tokenizer whose chat templates stay in its own file: an artifact has no folders."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def save_pretrained(self, save_directory: str, /) -> object:
        return self._tokenizer.save_pretrained(save_directory, save_jinja_files=False)


def is_saved(directory: str | Path) -> bool:
    """True for a directory that `save` wrote; its content is not checked."""
    return _has(Path(directory), GENERATION) and is_artifact(directory)


def is_former(directory: Path) -> bool:
    """True for a directory in the former format, without hashes."""
    return _has(directory, CONFIG) and not is_artifact(directory) and is_artifact(directory / _FORMER)


def _has(directory: Path, name: str) -> bool:
    try:
        return (directory / name).is_file()
    # A name that is too long, or a folder without permission.
    except OSError:
        return False
