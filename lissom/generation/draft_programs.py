"""Drafts as `compile_generation` and `load_generation` take them: names, passes, decoders, models and saved decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lissom.artifacts.artifact import Trust
from lissom.backends.base import Backend
from lissom.backends.distributed.backend import Distributed
from lissom.driver.options import check_settings, resolve_passes
from lissom.errors import InputError, PipelineTextError, UnsupportedError
from lissom.generation.configured import ConfiguredDecoder
from lissom.generation.decoder import Decoder
from lissom.generation.directory import is_saved
from lissom.generation.options import GenerationSettings
from lissom.generation.proposers import PROMPT_LOOKUP

_KINDS = f"'{PROMPT_LOOKUP}', the text of a pipeline, a compiled decoder, or a model"


def check_draft(settings: GenerationSettings, name: str) -> None:
    """Refuse what no draft goes with, before anything is compiled.

    Args:
        name: of the model.

    Raises:
        InputError: for a wrong draft.
        UnsupportedError: for settings without drafts.
    """
    draft = settings.draft
    if draft is None:
        return
    if not isinstance(draft, (str, nn.Module)):
        raise InputError(f"draft= is a {type(draft).__name__}; give {_KINDS}")
    if settings.batch != 1:
        raise UnsupportedError(f"draft= takes one sequence, and batch is {settings.batch}; compile {name} with batch=1")
    _, backends = check_settings(settings)
    if isinstance(backends[0], Distributed):
        raise UnsupportedError(f"draft= takes a decoder in one process; leave it out for {name} on several ranks")
    if isinstance(draft, str) and draft != PROMPT_LOOKUP and not is_saved(draft):
        try:
            resolve_passes(draft)
        except PipelineTextError as error:
            raise InputError(f"draft={draft!r:.80} is not known; give {_KINDS} ({str(error).splitlines()[0]})") from error


def draft_of(
    model: nn.Module, settings: GenerationSettings, compile: Callable[[nn.Module, GenerationSettings], ConfiguredDecoder]
) -> str | Decoder:
    """The draft of the settings, compiled where it is not yet.

    Args:
        compile: a model for generation.
    """
    draft = settings.draft
    assert draft is not None
    alone = replace(settings, draft=None, all_logits=False, metric=None, max_drop=None)
    match draft:
        case Decoder() | "prompt-lookup":
            return draft
        case nn.Module():
            return compile(draft, replace(alone, passes="exact", data=()))
        case str() if is_saved(draft):
            return _saved(draft, settings.device, None, Trust())
        case _:
            return compile(model, replace(alone, passes=draft))


def draft_to_load(
    draft: str | Decoder, device: str | torch.device | None, backend: str | Backend | None, trust: Trust
) -> str | Decoder:
    """The draft for a saved decoder; a directory is loaded. Raises ArtifactError."""
    return _saved(draft, device, backend, trust) if isinstance(draft, str) and is_saved(draft) else draft


def _saved(directory: str, device: str | torch.device | None, backend: str | Backend | None, trust: Trust) -> Decoder:
    from lissom.generation.saved import read  # imports transformers

    return Decoder(read(Path(directory), device, backend, trust).compiled)
