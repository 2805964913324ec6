"""A decoder for a prompt, loaded or compiled, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lissom.artifacts.artifact import NO_TRUST, Trust
from lissom.artifacts.pruned_tokenizer import tokenizer_of_program
from lissom.artifacts.signature import TrustedKeys, key_files
from lissom.backends.distributed.backend import Distributed
from lissom.compiler.memory import collector_paused
from lissom.compiler.pipeline.options import Goal, check_options
from lissom.driver.options import resolve_passes
from lissom.driver.room import default_passes, from_disk
from lissom.errors import ArtifactError, UnsupportedError
from lissom.frontends.generation.decoder import SHORTEST, longest_text
from lissom.frontends.generation.encoder_decoder import is_encoder_decoder
from lissom.frontends.models.huggingface import PACKAGED, find_directory, tokenizer_of
from lissom.frontends.models.sources import Source, load
from lissom.generation import kept
from lissom.generation.compile import compile_generation, model_of, read_decoder
from lissom.generation.configured import ConfiguredDecoder
from lissom.generation.directory import is_saved
from lissom.generation.draft_programs import draft_to_load
from lissom.generation.stream import read_prompt
from lissom.passes.prune.prune_vocabulary.prune_vocabulary import PruneVocabulary
from lissom.passes.quantize.use_stored_weights import UseStoredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lissom.generation.model import GenerationModel

    Prompted = tuple[ConfiguredDecoder, PreTrainedTokenizerBase, torch.Tensor]


def load_prompted(
    model: str,
    prompt: str,
    device: str | None,
    *,
    allow_native: bool = False,
    trusted_keys: TrustedKeys | None = None,
    draft: str | None = None,
) -> Prompted:
    """A saved decoder, its tokenizer, and the prompt's tokens.

    Args:
        draft: as for `load_generation`.
    """
    trust = Trust(allow_native, key_files(trusted_keys))
    decoder = _load(Path(model), device, trust)
    if draft is not None:
        decoder.use_draft(draft_to_load(draft, device, None, trust))
    # Loading the decoder checked the tokenizer's files too.
    tokenizer = tokenizer_of(Path(model))
    longest = longest_text(decoder) if is_encoder_decoder(decoder) else decoder.max_length
    return decoder, tokenizer, read_prompt(prompt, tokenizer, longest)


def _load(directory: Path, device: str | None, trust: Trust) -> ConfiguredDecoder:
    """The decoder in a directory; one without encoder is read by its tokens alone, without `generate` of transformers."""
    with collector_paused():
        parts = read_decoder(directory, device, trust)
    if parts.encoder:
        return model_of(parts)
    decoder = ConfiguredDecoder(parts.compiled, parts.config, parts.generation_config)
    decoder.use_saved_draft(parts.draft)
    return decoder


@dataclass(frozen=True)
class Request:
    """The options for compiling and keeping a decoder.

    Attributes:
        passes: None for `exact`, and for a GGUF file or a quantized checkpoint `use-stored-weights`.
        data: the file of the calibration data.
        keeps: takes a decoder that an earlier call kept, and keeps this one.
        draft: as for `compile_generation`.
    """

    passes: str | None
    backend: str
    device: str | None
    checks: str
    goal: Goal | None
    data: Path | None = None
    keeps: bool = True
    draft: str | None = None


def compile_prompted(
    model: str,
    prompt: str,
    max_new_tokens: int,
    request: Request,
    read_data: Callable[[Source], Sequence[Mapping[str, object]]],
    tell: Callable[[str], None],
    save: Path | None = None,
) -> Prompted:
    """A model compiled with a KV cache for prompt and answer, its tokenizer, and the prompt's tokens.

    Args:
        read_data: the calibration batches for a loaded model.
        tell: takes a sentence about default passes, or kept decoders.
        save: the directory to write the decoder and the tokenizer to.
    """
    checks = check_options(request.checks)
    pipeline = None if request.passes is None else resolve_passes(request.passes)
    pruning = [pass_ for pass_ in pipeline or () if isinstance(pass_, PruneVocabulary)]
    # What the files say that a pass reads may change, and a saved draft.
    reads_files = any(pass_.tokens or pass_.tokenizer for pass_ in pruning) or is_saved(request.draft or "")
    place = None if reads_files else _place(model, request)
    if place is not None:
        prompted = _kept(place, prompt, max_new_tokens, request.device)
        if prompted is not None:
            tell(f"this decoder was compiled before and kept in {place}; --fresh compiles it anew")
            return prompted
    source = load(model, with_inputs=request.data is not None)
    tokenizer = source.checkpoint.tokenizer if source.checkpoint else None
    if tokenizer is None:
        raise UnsupportedError(f"{model} has no tokenizer, and a prompt is text; use lissom.compile_generation")
    longest = longest_text(source.model)
    ids = read_prompt(prompt, tokenizer, longest)
    # A smaller vocabulary writes a text in more tokens, at most one for each byte.
    longer = len(prompt.encode()) if any(pass_.ids == "tokenizer" for pass_ in pruning) else 0
    wanted = max(SHORTEST, _slots(source.model, ids) + longer + max_new_tokens)
    if place is not None:
        wanted = kept.rounded(wanted)
    passes = _default_passes(source, request, tell) if pipeline is None else pipeline
    with from_disk(source.model, passes):
        decoder = compile_generation(
            source.model,
            max_length=wanted if longest is None else min(wanted, longest),
            passes=passes,
            backend=request.backend,
            device=request.device,
            checks=checks,
            data=read_data(source),
            goal=request.goal,
            draft=request.draft,
        )
    if decoder.program.vocabulary is not None and decoder.program.vocabulary.tokenizer is not None:
        tokenizer = tokenizer_of_program(decoder.program, tokenizer, None)
        ids = read_prompt(prompt, tokenizer, longest)
    if save is not None:
        decoder.save(save, tokenizer)
    if place is not None:
        _keep(decoder, tokenizer, place, tell)
    return decoder, tokenizer, ids


def _slots(model: nn.Module, ids: torch.Tensor) -> int:
    """The slots of the KV cache that a prompt takes: the encoder of an encoder-decoder reads it, so the start token alone."""
    return 1 if is_encoder_decoder(model) else ids.shape[1]


def _default_passes(source: Source, request: Request, tell: Callable[[str], None]) -> str:
    """The passes where none are given; what is unusual of them is told."""
    passes = default_passes(source.model, request.backend, request.device)
    if passes == UseStoredWeights.name():
        tell("the weights stay as the file stores them (use-stored-weights); --passes exact computes with float32")
    return passes


def _place(model: str, request: Request) -> Path | None:
    """The folder in which the decoder is kept; None where none is kept: for a model that is no checkpoint, or ranks."""
    directory = Path(model) if Path(model).is_dir() else find_directory(model) if model in PACKAGED else None
    if directory is None or not request.keeps or request.backend == Distributed.name or not kept.count():
        return None
    try:
        return kept.place_of(directory, request.data, asdict(request))
    except OSError:  # no cache can be used, or files went away
        return None


def _kept(place: Path, prompt: str, max_new_tokens: int, device: str | None) -> Prompted | None:
    """The decoder that is kept there, if it has room for prompt and answer."""
    if not kept.use(place):
        return None
    try:
        decoder = _load(place, device, NO_TRUST)
        tokenizer = tokenizer_of(place)
    except ArtifactError:  # damaged; it is compiled and written anew
        return None
    longest = longest_text(decoder)
    ids = read_prompt(prompt, tokenizer, longest)
    wanted = decoder.slots(ids) + max_new_tokens
    fits = decoder.max_length >= (wanted if longest is None else min(wanted, longest))
    return (decoder, tokenizer, ids) if fits else None


def _keep(decoder: GenerationModel, tokenizer: PreTrainedTokenizerBase, place: Path, tell: Callable[[str], None]) -> None:
    try:
        decoder.save(place, tokenizer)
        kept.forget_oldest(place.parent)
    except (ArtifactError, UnsupportedError, OSError) as error:
        tell(f"the decoder is not kept for the next time: {error}")
    else:
        tell(f"the decoder is kept for the next time in {place}")
