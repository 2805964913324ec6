"""Compile a causal language model for several texts of unlike length in one program, and load a compiled one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lissom.artifacts.artifact import Trust
from lissom.artifacts.pruned_tokenizer import configs_of
from lissom.artifacts.signature import TrustedKeys, key_files
from lissom.backends.base import Backend
from lissom.backends.distributed.backend import Distributed
from lissom.driver.compile import compile_captured, with_facts
from lissom.driver.keywords import keywords_of
from lissom.driver.options import BuildSettings, Inputs, check_choices, check_settings
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.capture.device import check_device, device_of
from lissom.frontends.generation.decoder import check_capacity
from lissom.frontends.generation.pool import INPUTS, PAGE, capture_pool, text_inputs
from lissom.frontends.models.adapters import with_merged_adapters
from lissom.generation.compile import read_decoder, with_model, with_recipe
from lissom.generation.decoder import rows_of
from lissom.generation.directory import PoolSizes
from lissom.runtime.hosted_model import check_uncompiled

if TYPE_CHECKING:
    from lissom.generation.pool import PooledDecoder


@dataclass(frozen=True, kw_only=True)
class PoolSettings(BuildSettings):
    """The keywords of `lissom.compile_pool`."""

    max_length: int
    sequences: int = 8
    slots: int | None = None
    data: Iterable[torch.Tensor | Mapping[str, object]] = ()


@keywords_of(PoolSettings)
def compile_pool(model: nn.Module | str | Path, settings: PoolSettings) -> PooledDecoder:
    """Optimize a causal language model of transformers for many texts at once, which join and leave between calls.

    The program has one pool of slots for keys and values. Each call reads tokens of several texts, of any lengths, without
    padding, and weights are read once for all of them.

    The model itself is not modified. The result shares its weights until a pass changes one.

    The options not listed are those of `compile`.

    Args:
        model: a module; or a checkpoint's folder, or the name of a packaged model.
        max_length: the most tokens of one text, prompt and answer together.
        sequences: the most texts in one call; more wait.
        slots: the tokens that the pool holds; by default `sequences` texts of max_length. With fewer, texts wait for room.
        passes: as for `compile_generation`.
        data: as for `compile_generation`, for passes that calibrate.

    Raises:
        UnsupportedError: for a model whose layers keep anything but keys and values, for ranks, and for a metric.
        CaptureError: for a model whose attention mask is not computed from positions, or a line that cannot be captured.
        InputError: if a number does not fit.
        LissomError: as `compile`.

    Examples:
        >>> import torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     eos_token_id=None,
        ... )
        >>> decoder = lissom.compile_pool(LlamaForCausalLM(config), max_length=32, sequences=2)
        >>> [len(answer) for answer in decoder.generate([[1, 2, 3], [4, 5]], max_new_tokens=4)]
        [4, 4]
    """
    return with_model(model, settings, _compile)


def load_pool(
    directory: str | Path,
    device: str | torch.device | None = None,
    *,
    backend: str | Backend | None = None,
    allow_native: bool = False,
    trusted_keys: TrustedKeys | None = None,
    map_weights: bool = True,
) -> PooledDecoder:
    """The decoder that `PooledDecoder.save` wrote, its weights mapped from the file. Arguments as for `load`.

    Raises:
        ArtifactError: if the directory holds no decoder for several texts, was changed or damaged, or does not run here.
        UnsupportedError: for a missing device or package.

    Examples:
        >>> import tempfile, torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> folder = tempfile.mkdtemp() + "/pool"
        >>> lissom.compile_pool(LlamaForCausalLM(config), max_length=32, sequences=2).save(folder)
        >>> len(lissom.load_pool(folder).generate([[1, 2, 3], [4, 5]], max_new_tokens=4))
        2
    """
    trust = Trust(allow_native, key_files(trusted_keys), map_weights)
    parts = read_decoder(directory, device, trust, backend, pooled=True)
    from lissom.generation.pool import PooledDecoder

    return PooledDecoder.of(parts)


def _compile(model: nn.Module, settings: PoolSettings) -> PooledDecoder:
    check_uncompiled(model)
    check_choices(settings)
    max_length, sequences = settings.max_length, settings.sequences
    check_capacity(max_length, sequences)
    whole = -(-max_length // PAGE) * PAGE
    slots = sequences * whole if settings.slots is None else settings.slots
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < whole:
        raise InputError(
            f"slots is {slots!r:.80}, and one text of max_length={max_length} takes {whole}; give that many or more"
        )
    if settings.metric is not None:
        raise UnsupportedError("compile_pool takes no metric=; choose passes with compile_generation, and give them here")
    if isinstance(check_settings(settings)[1][0], Distributed):
        raise UnsupportedError("compile_pool makes a program for one process; choose a backend other than 'distributed'")
    place = check_device(settings.device)
    model = with_merged_adapters(model)
    sizes = {"max_length": max_length, "sequences": sequences, "slots": slots}
    take = with_facts(partial(capture_pool, model, **sizes, device=place), model)
    texts = _texts(list(settings.data), max_length, slots)
    compiled = compile_captured(
        take, place or device_of(model), replace(settings, passes=with_recipe(settings.passes, scored=bool(texts)), data=texts)
    )
    from lissom.generation.pool import PooledDecoder

    return PooledDecoder(compiled, *configs_of(model, compiled.program), PoolSizes(max_length, sequences))


def _texts(batches: Sequence[torch.Tensor | Mapping[str, object]], max_length: int, slots: int) -> list[Inputs]:
    """Calibration texts as inputs of the program, one by one. Raises InputError."""
    rows = (ids[None] for ids, _ in rows_of(batches, max_length))
    return [dict(zip(INPUTS, text_inputs(row, slots), strict=True)) for row in rows]
