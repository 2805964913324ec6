"""Compile a language model with its KV cache, and load a compiled one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lissom.artifacts.artifact import Trust
from lissom.artifacts.pruned_tokenizer import configs_of
from lissom.artifacts.signature import TrustedKeys, key_files
from lissom.backends.base import Backend
from lissom.backends.distributed.backend import Distributed
from lissom.compiler.ir.program import Program
from lissom.compiler.memory import collector_paused
from lissom.compiler.pipeline.pass_kinds import Pass, Training
from lissom.driver.compile import compile_captured, with_facts
from lissom.driver.keywords import keywords_of
from lissom.driver.options import LABELS, BuildSettings, Inputs, check_choices, check_settings, resolve_passes
from lissom.driver.room import Options, from_disk, with_default_passes
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.capture.device import check_device, device_of
from lissom.frontends.capture.export import Capture
from lissom.frontends.generation.decoder import INPUTS, capture_decoder, check_capacity
from lissom.frontends.generation.encoder_decoder import is_encoder_decoder
from lissom.frontends.models.adapters import with_merged_adapters
from lissom.frontends.models.huggingface import without_torchao_warnings
from lissom.frontends.models.sources import load
from lissom.generation.configured import check_verifies
from lissom.generation.decoder import Decoder, labelled_prompts
from lissom.generation.draft_programs import check_draft, draft_of, draft_to_load
from lissom.generation.options import GenerationSettings
from lissom.generation.scoring import Scorer
from lissom.generation.speculate import VERIFIED
from lissom.io.files import check_path
from lissom.runtime.hosted_model import check_uncompiled

if TYPE_CHECKING:
    from lissom.generation.directory import Parts
    from lissom.generation.model import GenerationModel

Made = TypeVar("Made")


@keywords_of(GenerationSettings)
def compile_generation(model: nn.Module | str | Path, settings: GenerationSettings) -> GenerationModel:
    """Optimize a language model of transformers for generation: one program with the KV cache as its state.

    An encoder-decoder becomes two: the encoder, which also computes the keys and values of cross-attention, and the decoder.

    The model itself is not modified. The result shares its weights until a pass changes one.

    The options not listed are those of `compile`.

    Args:
        model: a module; or a checkpoint's folder, or the name of a packaged model: large ones are compiled from the disk, in
            the memory of the result.
        max_length: the capacity of the KV cache in tokens, prompt and answer together.
        batch: the number of sequences, beams included.
        all_logits: return the logits of every token of a call, which assisted decoding needs.
        draft: proposes tokens that the decoder verifies, several per call; the text is the same up to rounding. One of
            `prompt-lookup`, from n-grams of the text so far; a pipeline text, for a decoder compiled from the same model with
            these passes and the same data; a smaller compiled decoder, or the directory of a saved one; a smaller model of the
            same vocabulary.
        encoder_inputs: example inputs of the encoder of an encoder-decoder, by name; made from the configuration by default.
        passes: as for `compile`; the recipe `generation` always comes first: the canonical form, and a last layer that computes
            only the last token of a prompt, which comes after passes that train.
        data: token ids [rows, tokens], or the output of a tokenizer, for passes that calibrate or train; `finetune` takes the
            `labels` of such a mapping, [rows, tokens], the token ids themselves for a language model. For an encoder-decoder:
            mappings with the encoder's inputs, and labels or decoder_input_ids.
        metric: scores a callable that takes input_ids and attention_mask of `batch` rows and returns the next token's logits,
            [batch, vocabulary], or with all_positions=True those of every token, [batch, tokens, vocabulary]. That of an
            encoder-decoder takes decoder_input_ids and the encoder's inputs; all_positions needs all_logits.

    Raises:
        UnsupportedError: if the model is not a language model of transformers.
        CaptureError: if it is already compiled, or a line of it cannot be captured.
        InputError: if max_length or batch do not fit it.
        LissomError: as `compile`.

    Examples:
        >>> import torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> decoder = lissom.compile_generation(LlamaForCausalLM(config), max_length=32)
        >>> decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 7])
        >>> decoder.reset()
        >>> decoder.step(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 50])
    """
    return with_model(model, settings, _compile)


def with_model(model: nn.Module | str | Path, settings: Options, make: Callable[[nn.Module, Options], Made]) -> Made:
    """What `make` makes of a model. One that is given by its name or folder is loaded, and compiled from the disk if large."""
    if not isinstance(model, (str, Path)):
        return make(model, settings)
    loaded = load(str(model), with_inputs=False).model
    settings = with_default_passes(settings, loaded)
    with from_disk(loaded, settings.passes):
        return make(loaded, settings)


def _compile(model: nn.Module, settings: GenerationSettings) -> GenerationModel:
    if isinstance(model, Program):
        raise InputError(
            "the model is a program, which was captured without a KV cache; pass the model and give passes= and data= here, or "
            "copy the program's weights into the model: model.load_state_dict(program.weights(), strict=False)"
        )
    check_uncompiled(model)
    check_choices(settings)
    check_draft(settings, type(model).__name__)
    max_length, batch = settings.max_length, settings.batch
    check_capacity(max_length, batch)
    place = check_device(settings.device)
    model = with_merged_adapters(model)
    if is_encoder_decoder(model):
        if settings.draft is not None:
            raise UnsupportedError(
                f"draft= takes a causal language model, and {type(model).__name__} is an encoder-decoder; leave it out"
            )
        from lissom.generation.encoder_decoder_programs import compile_encoder_decoder

        return compile_encoder_decoder(model, settings, with_recipe)
    if settings.encoder_inputs is not None:
        raise InputError(f"{type(model).__name__} has no encoder, and encoder_inputs= was given; leave it out")
    settings = replace(settings, data=list(settings.data))  # a draft reads it too
    texts = named_prompts(settings.data, batch, max_length)
    last = 1 if settings.draft is None else min(VERIFIED, max_length // 2)
    sizes = {"max_length": max_length, "batch": batch, "last_logits": last}
    take = with_facts(partial(capture_decoder, model, **sizes, all_logits=settings.all_logits, device=place), model)
    score = None if settings.metric is None else Scorer(settings.metric, batch, max_length)
    asked = replace(settings, passes=with_recipe(settings.passes, scored=bool(texts)), data=texts, metric=score)
    if score is not None:
        take, asked = _scored(take, score, asked, settings.passes)
    compiled = compile_captured(take, place or device_of(model), asked)
    from lissom.generation.model import GenerationModel

    decoder = GenerationModel(compiled, *configs_of(model, compiled.program))
    if settings.draft is not None:
        check_verifies(decoder)
        decoder.use_draft(draft_of(model, settings, _compile))
    return decoder


def load_generation(
    directory: str | Path,
    device: str | torch.device | None = None,
    *,
    backend: str | Backend | None = None,
    allow_native: bool = False,
    trusted_keys: TrustedKeys | None = None,
    map_weights: bool = True,
    draft: str | Decoder | None = None,
) -> GenerationModel:
    """The decoder that `save` wrote, its weights mapped from the file. Nothing is unpickled. Other arguments as for `load`.

    Args:
        draft: `prompt-lookup`, a smaller decoder, or the directory of a saved one, in place of the draft in the directory. The
            decoder must be compiled with draft= or all_logits=True.

    Raises:
        ArtifactError: if the directory holds no decoder, was changed or damaged, or does not run here.
        UnsupportedError: for a missing device or package, or a decoder that cannot verify a draft.
        InputError: for a draft that does not fit.

    Examples:
        >>> import tempfile, torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> folder = tempfile.mkdtemp() + "/decoder"
        >>> lissom.compile_generation(LlamaForCausalLM(config), max_length=32).save(folder)
        >>> lissom.load_generation(folder).step(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 50])
    """
    trust = Trust(allow_native, key_files(trusted_keys), map_weights)
    model = model_of(read_decoder(directory, device, trust, backend))
    if draft is not None:
        model.use_draft(draft_to_load(draft, device, backend, trust))
    return model


def read_decoder(
    directory: str | Path,
    device: str | torch.device | None,
    trust: Trust,
    backend: str | Backend | None = None,
    *,
    pooled: bool = False,
) -> Parts:
    """The parts of the decoder that `save` wrote, one for several texts if `pooled`. Errors as of `load_generation`."""
    try:
        from lissom.generation.saved import read
    except ImportError as error:
        raise UnsupportedError("generation needs transformers: pip install 'lissom[demo]'") from error
    return read(check_path(directory), device, backend, trust, pooled=pooled)


def model_of(parts: Parts) -> GenerationModel:
    """The model of a decoder's parts, with `generate` of transformers, which is imported now."""
    with collector_paused(), without_torchao_warnings():
        from lissom.generation.model import GenerationModel

        if parts.encoder is None:
            return GenerationModel.of(parts)
        from lissom.generation.encoder_decoder import EncoderDecoderModel

    return EncoderDecoderModel.of(parts)


def _scored(
    take: Callable[[], Capture], score: Scorer, settings: BuildSettings, passes: str | Pass | Sequence[Pass] | None
) -> tuple[Callable[[], Capture], BuildSettings]:
    """The capture and the settings for a metric: all passes leave all positions in the program where it reads them.

    The metric is called on the captured program to know. Of several ranks one captures, so they leave them in any case.
    """
    _, backends = check_settings(settings)
    if isinstance(backends[0], Distributed):
        return take, replace(settings, passes=with_recipe(passes, scored=True))
    captured = take()
    score.try_on(captured.program)
    return lambda: captured, replace(settings, passes=with_recipe(passes, scored=score.reads_all or bool(settings.data)))


def with_recipe(passes: str | Pass | Sequence[Pass] | None, *, scored: bool = False) -> list[Pass]:
    """The recipe `generation`, then the requested passes without the canonical form.

    The part of it that drops all tokens but the last comes after the last pass that trains, which learns from all tokens; after
    all passes where they calibrate on texts, or for a metric that scores all tokens.
    """
    wanted, exact, recipe = resolve_passes(passes), resolve_passes("exact"), resolve_passes("generation")
    asked = wanted[len(recipe) if wanted[: len(recipe)] == recipe else len(exact) :]
    trained = max((index + 1 for index, pass_ in enumerate(asked) if scored or isinstance(pass_, Training)), default=0)
    return [*exact, *asked[:trained], *recipe[len(exact) :], *asked[trained:]]


def named_prompts(
    data: Iterable[torch.Tensor | Mapping[str, object]], batch: int, max_length: int, *, fill: bool = True
) -> list[Inputs]:
    """Calibration texts as inputs of the program, with their labels.

    Args:
        fill: as for `labelled_prompts`.
    """
    return [
        dict(zip(INPUTS, sample, strict=True)) | ({} if labels is None else {LABELS: labels})
        for sample, labels in labelled_prompts(list(data), batch, max_length, fill=fill)
    ]
