"""The two programs of an encoder-decoder: captured, compiled, and given calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from lissom.artifacts.pruned_tokenizer import configs_of
from lissom.backends.distributed.backend import Distributed
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Pass, Training
from lissom.compiler.training.vocabulary import IGNORED
from lissom.driver.compile import compile_captured, with_facts
from lissom.driver.options import Inputs, check_settings, resolve_passes
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.capture.device import check_device, device_of
from lissom.frontends.generation.decoder import check_generating
from lissom.frontends.generation.encoder_decoder import (
    capture_encoder,
    capture_source_decoder,
    decoder_inputs,
    encoder_example,
    widened,
)
from lissom.generation.decoder import row_groups, unpadded
from lissom.generation.encoder_decoder import ATTENTION_MASK, Encoder, EncoderDecoderModel, refuse_own_generate
from lissom.generation.options import GenerationSettings
from lissom.generation.source_scoring import SourceScorer
from lissom.runtime.compiled_model import CompiledModel


def compile_encoder_decoder(
    model: nn.Module,
    settings: GenerationSettings,
    with_recipe: Callable[..., list[Pass]],
) -> EncoderDecoderModel:
    """The encoder compiled, then the decoder; arguments and errors as for `compile_generation`.

    Args:
        with_recipe: puts the recipe `generation` before the passes of the decoder.
    """
    max_length, batch = settings.max_length, settings.batch
    known = check_generating(model, max_length, batch)
    refuse_own_generate(known)
    _check_settings(known, settings)
    place = check_device(settings.device)
    device, batches = place or device_of(known), list(settings.data)
    example = encoder_example(known, settings.encoder_inputs)
    sizes = {"max_length": max_length, "batch": batch}
    inputs = [_encoder_inputs(batch_inputs, example) for batch_inputs in batches]
    tokens = [
        _decoder_tokens(known, batch_inputs, next(iter(given.values())))
        for batch_inputs, given in zip(batches, inputs, strict=True)
    ]
    captured = capture_source_decoder(known, example, **sizes, all_logits=settings.all_logits, device=place)
    own = replace(settings, data=inputs)
    if settings.metric is not None:
        own = replace(own, metric=SourceScorer(settings.metric, batch, max_length, decoder=captured.program.copy()))
    take_encoder = with_facts(partial(capture_encoder, known, example, place), known)
    encoder = compile_captured(take_encoder, device, own, title="compile the encoder")
    sources = [_readable(encoder.program, batch_inputs) for batch_inputs in inputs]
    prompts = _decoder_prompts(Encoder(encoder), zip(sources, tokens, strict=True), **sizes)
    own = replace(
        settings, passes=with_recipe(settings.passes, scored=bool(prompts)), data=prompts, max_drop=_rest(settings, encoder)
    )
    if settings.metric is not None:
        if encoder.program.takes_new_ids:
            raise UnsupportedError(
                f"metric= reads original token ids, and the encoder of {encoder.program.name} takes new ones after "
                f"prune-vocabulary{{ids=tokenizer}}; leave metric= out, or use ids=graph"
            )
        own = replace(own, metric=SourceScorer(settings.metric, batch, max_length, encoder=encoder))
    decoder = compile_captured(with_facts(lambda: captured, known), device, own, title="compile the decoder")
    _check_one_tokenizer(encoder.program, decoder.program)
    return EncoderDecoderModel(decoder, encoder, *configs_of(known, decoder.program))


def _check_one_tokenizer(encoder: Program, decoder: Program) -> None:
    """Refuse programs whose new ids are not those of one tokenizer. Raises UnsupportedError."""
    two = [program.vocabulary for program in (encoder, decoder) if program.vocabulary is not None]
    if any(vocabulary.ids == "tokenizer" for vocabulary in two) and len({tuple(each.kept.tolist()) for each in two}) > 1:
        raise UnsupportedError(
            f"encoder and decoder of {decoder.name} have one tokenizer, and keep other token ids, as their data differs; "
            f"name the ids with prune-vocabulary{{tokens=FILE}} or {{scripts=}}, or use ids=graph"
        )


def _readable(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Calibration inputs with token ids that the encoder takes, after `prune-vocabulary` dropped some."""
    vocabulary = program.vocabulary
    if vocabulary is None:
        return inputs
    ids = vocabulary.renumbered if vocabulary.ids == "tokenizer" else vocabulary.readable
    return {name: ids(value) if name.endswith("input_ids") else value for name, value in inputs.items()}


def _rest(settings: GenerationSettings, encoder: CompiledModel) -> float | None:
    """The part of max_drop that the encoder's passes leave to the decoder."""
    steps = [step.metric for step in encoder.report.history.steps if step.metric is not None]
    if settings.max_drop is None or not steps:
        return settings.max_drop
    return max(0.0, settings.max_drop - max(0.0, steps[0] - steps[-1]))


def _check_settings(model: PreTrainedModel, settings: GenerationSettings) -> None:
    """Refuse what takes one program. Raises UnsupportedError."""
    _, backends = check_settings(settings)
    name = type(model).__name__
    if isinstance(backends[0], Distributed):
        raise UnsupportedError(f"{name} is an encoder-decoder model, which runs in one process; choose backend='eager'")
    trained = next((pass_ for pass_ in resolve_passes(settings.passes) if isinstance(pass_, Training)), None)
    if trained is not None:
        raise UnsupportedError(
            f"{name} becomes two programs, and {trained.name()} trains one; train the model, then compile it for generation"
        )


def _encoder_inputs(batch: Inputs, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A calibration batch as inputs of the encoder's program, the main one first. Raises InputError if that is missing."""
    main = next(iter(example))
    given = dict(batch) if isinstance(batch, Mapping) else {main: batch}
    tensor = given.get(main)
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"data= has no tensor {main}; give what the encoder reads, with labels or decoder_input_ids")
    others = {name: value for name, value in given.items() if name in example and isinstance(value, torch.Tensor)}
    kept = {name: widened(value) for name, value in {main: tensor, **others}.items()}
    if ATTENTION_MASK in example and ATTENTION_MASK not in kept:
        kept[ATTENTION_MASK] = torch.ones(tensor.shape[:2], dtype=torch.int64, device=tensor.device)
    return kept


def _decoder_tokens(model: PreTrainedModel, batch: Inputs, main: torch.Tensor) -> torch.Tensor:
    """The decoder's tokens of a batch, [rows, tokens]: given, or its labels behind the start token.

    Args:
        main: the main input of the encoder, [rows, ...].

    Raises:
        InputError: if it has neither.
    """
    named = batch if isinstance(batch, Mapping) else {}
    ids, labels = (_table(named.get(name), len(main)) for name in ("decoder_input_ids", "labels"))
    if ids is not None:
        return ids
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    if labels is None or not isinstance(start, int):
        raise InputError("data= of an encoder-decoder needs labels or decoder_input_ids, [rows, tokens], for the decoder")
    shifted = labels.roll(1, 1)
    shifted = shifted.masked_fill(shifted == IGNORED, start)
    shifted[:, 0] = start
    return shifted


def _table(value: object, rows: int) -> torch.Tensor | None:
    """The value, if it is a tensor [rows, tokens] of integers."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or len(value) != rows:
        return None
    return None if value.is_floating_point() else value


def _decoder_prompts(
    encoder: Encoder, batches: Iterable[tuple[Mapping[str, torch.Tensor], torch.Tensor]], max_length: int, batch: int
) -> list[Inputs]:
    """Calibration batches as inputs of the decoder's program, `batch` rows at a time, behind an empty KV cache.

    Args:
        batches: the inputs of the encoder, and the tokens of the decoder, [rows, tokens].
    """
    prompts: list[Inputs] = []
    for inputs, tokens in batches:
        source, ids = encoder.read(inputs), tokens[:, :max_length]
        for group in row_groups(len(ids), batch):
            rows = torch.tensor(group, device=ids.device)
            rest = decoder_inputs({name: tensor[rows] for name, tensor in source.items()})
            prompts.append(unpadded(ids[rows], max_length) | rest)
    return prompts
