"""A decoder in a directory: its program as an artifact in `program`, and beside it the configuration as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, GenerationConfig

from lissom import api
from lissom.artifacts.rank_files import check_ranks
from lissom.backends.base import Backend
from lissom.compiler.errors import ArtifactError
from lissom.generation.directory import CONFIG, GENERATION, PROGRAM, is_saved
from lissom.generation.model import GenerationModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save(decoder: GenerationModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the decoder beside its place, and put it there when it is whole. Ranks of a group save at the same point.

    Raises: ArtifactError, UnsupportedError, RankError.
    """

    def own(folder: Path) -> None:
        decoder.compiled.save(folder / PROGRAM)

    ranks = decoder.compiled.ranks
    if ranks is None:
        _write(decoder, directory, tokenizer, own)
    else:
        ranks.share_directory(partial(_write, decoder, directory, tokenizer), own, decoder.program.name)


def _write(
    decoder: GenerationModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    write_program: Callable[[Path], None],
) -> None:
    target = directory.absolute()
    if not target.parent.is_dir():
        raise ArtifactError(f"'{target}' cannot be written: there is no directory '{target.parent}'; make it first")
    if target.exists() and not is_saved(target) and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"'{target}' exists and is no saved decoder, so it is not replaced; choose another directory")
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        write_program(fresh)
        decoder.config.to_json_file(fresh / CONFIG, use_diff=False)
        decoder.generation_config.to_json_file(fresh / GENERATION)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except OSError as error:
        raise ArtifactError(f"'{target}' cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(directory: Path, device: str | torch.device | None, backend: str | Backend | None) -> GenerationModel:
    """The decoder in the directory. Raises: ArtifactError, UnsupportedError."""
    if not is_saved(directory):
        raise ArtifactError(f"'{directory}' holds no saved decoder; name a directory that its save wrote")
    check_ranks(directory / PROGRAM, f"generate {directory} PROMPT")
    compiled = api.load(directory / PROGRAM, device, backend=backend)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        generation = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ArtifactError(f"'{directory}' holds a configuration transformers cannot read: {first}") from error
    return GenerationModel(compiled, config, generation)
