"""A decoder for a prompt, loaded or compiled, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lissom.compiler.pipeline.options import Goal, check_options
from lissom.driver.options import resolve_passes
from lissom.errors import UnsupportedError
from lissom.frontends.decoder import SHORTEST, longest_text
from lissom.frontends.huggingface import tokenizer_of
from lissom.frontends.sources import Source, load
from lissom.generation import compile_generation, load_generation
from lissom.generation.stream import read_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lissom.generation.model import GenerationModel

    Prompted = tuple[GenerationModel, PreTrainedTokenizerBase, torch.Tensor]


def load_prompted(model: str, prompt: str, device: str | None, *, allow_native: bool = False) -> Prompted:
    """A saved decoder, its tokenizer, and the prompt's tokens."""
    decoder = load_generation(model, device, allow_native=allow_native)
    # Loading the decoder checked the tokenizer's files too.
    tokenizer = tokenizer_of(Path(model))
    return decoder, tokenizer, read_prompt(prompt, tokenizer, decoder.max_length)


def compile_prompted(
    model: str,
    prompt: str,
    max_new_tokens: int,
    passes: str,
    backend: str,
    device: str | None,
    checks: str,
    goal: Goal | None,
    read_data: Callable[[Source], Sequence[Mapping[str, object]]],
) -> Prompted:
    """A model compiled with a KV cache for prompt and answer, its tokenizer, and the prompt's tokens.

    read_data: the calibration batches for a loaded model.
    """
    check_options(checks)  # pyright: ignore[reportArgumentType]
    pipeline, source = resolve_passes(passes), load(model)
    tokenizer = source.checkpoint.tokenizer if source.checkpoint else None
    if tokenizer is None:
        raise UnsupportedError(f"{model} has no tokenizer, and a prompt is text; use lissom.compile_generation")
    longest = longest_text(source.model)
    ids = read_prompt(prompt, tokenizer, longest)
    wanted = max(SHORTEST, ids.shape[1] + max_new_tokens)
    decoder = compile_generation(
        source.model,
        max_length=wanted if longest is None else min(wanted, longest),
        passes=pipeline,
        backend=backend,
        device=device,
        checks=checks,  # pyright: ignore[reportArgumentType]
        data=read_data(source),
        goal=goal,
    )
    return decoder, tokenizer, ids
