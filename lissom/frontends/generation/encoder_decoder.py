"""Encoder-decoder models of transformers as two programs: the encoder, run once for a text, and the decoder with its KV cache.

    last_hidden_state, mask, *cross = encoder(input_ids, attention_mask)
    logits = decoder(input_ids, attention_mask, position_ids, start, source_mask, cross)

The encoder's program also computes the keys and values of the decoder's cross-attention, since they depend on the encoder's
output alone: `cross_keys_N` and `cross_values_N` of layer N, [batch, key_heads, source, head_dim]. `encoder_attention_mask`,
[batch, source], is 0 where the encoder's output is padding. The decoder's program takes them as they are; its other inputs are
those of `decoder`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim

from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.errors import InputError, LissomError, UnsupportedError
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.export import Capture, capture, evaluating
from lissom.frontends.capture.failures import first_line
from lissom.frontends.capture.isolation import exchanged, isolated, with_own_modules
from lissom.frontends.capture.untouched import untouched
from lissom.frontends.generation.decoder import (
    CACHE,
    INPUTS,
    check_state,
    describe_cache,
    example_tokens,
    prefill_inputs,
    refuse_different,
    step_inputs,
    with_state,
)
from lissom.frontends.generation.decoder_state import State, cache_of, call, layer_tensors, unsupported_state
from lissom.frontends.models.huggingface_inputs import make_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]
HIDDEN, MASK = "last_hidden_state", "encoder_attention_mask"
"""The outputs of the encoder's program besides the keys and values of cross-attention."""
SOURCE_MASK, CROSS = "source_mask", "cross"
"""The inputs of the decoder's program after those of `decoder`."""
_PADDING = "attention_mask"
_DECODER = "decoder_"


@dataclass
class _Seen:
    """Values that a model passed to its decoder.

    Attributes:
        mask: the mask of the encoder's output, if its decoder takes one.
    """

    mask: torch.Tensor | None = None
    states: list[State] = field(default_factory=list)


def is_encoder_decoder(model: nn.Module) -> bool:
    """True if it is a model of transformers with an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_example(model: PreTrainedModel, given: Mapping[str, object] | None) -> Inputs:
    """Inputs of the encoder, the main one first, with an attention mask if the model reads one; its last row ends in padding.

    Args:
        given: the caller's; None makes two rows from the configuration.

    Raises:
        UnsupportedError: if none can be made.
        InputError: if the caller's are no tensors, or lack the mask.
    """
    made = dict(given) if given is not None else _made(model)
    made = {name: value for name, value in made.items() if not name.startswith(_DECODER) and name != "use_cache"}
    tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    wrong = next((name for name in made if name not in tensors), None)
    if wrong is not None or not made:
        kind = "empty" if wrong is None else f"a {type(made[wrong]).__name__} at '{wrong}'"
        raise InputError(f"encoder_inputs= is {kind}; give the tensors that the encoder reads, by name")
    kept = {name: widened(value).to(device_of(model)) for name, value in tensors.items()}
    main = model.main_input_name if model.main_input_name in kept else next(iter(kept))
    kept = {main: kept[main], **kept}
    if given is not None and _PADDING in kept:
        return kept
    kept |= {_PADDING: torch.ones(kept[main].shape[:2], dtype=torch.int64, device=kept[main].device)}
    padded = kept[_PADDING].clone()
    padded[-1, -max(2, padded.shape[1] // 4) :] = 0
    if _reads_padding(model, kept, padded):
        if given is not None:
            raise InputError(f"encoder_inputs= has no {_PADDING}, and {type(model).__name__} reads one; give it too")
        return kept | {_PADDING: padded}
    return {name: tensor for name, tensor in kept.items() if name != _PADDING}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Token ids and masks as int64: feature extractors give int32 and booleans."""
    return tensor.to(torch.int64) if tensor.dtype in (torch.bool, torch.int32) else tensor


def _made(model: PreTrainedModel) -> dict[str, object]:
    """Inputs made from the configuration. Raises UnsupportedError."""
    try:
        return make_inputs(model, None, Path(str(model.config._name_or_path)))[0]
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{str(error).rpartition(';')[0]}; give encoder_inputs=, the tensors its encoder reads"
        ) from error


def _reads_padding(model: PreTrainedModel, whole: Inputs, padded: torch.Tensor) -> bool:
    """True if the mask of the encoder's input changes the inputs of the decoder: models such as Whisper ignore it."""
    if _PADDING not in inspect.signature(type(model).forward).parameters:
        return False
    with isolated(device_of(model)), torch.no_grad():
        own = with_own_modules(model)
        one, other = (_run_source(own, whole | {_PADDING: mask}, _Seen()) for mask in (whole[_PADDING], padded))
    return any(not torch.equal(one[name], other[name]) for name in one)


def capture_encoder(model: PreTrainedModel, example: Inputs, device: torch.device | None = None) -> Capture:
    """The encoder, with the keys and values of the decoder's cross-attention. The model is not modified.

    Args:
        example: from `encoder_example`.

    Raises:
        UnsupportedError: if the decoder keeps anything but keys and values.
        CaptureError: naming the line that cannot be captured.
    """
    with isolated(device_of(model)):
        own = with_own_modules(model)
        encoder = copy.copy(own)

        def forward(**inputs: torch.Tensor) -> Inputs:
            return _source(own, inputs, _Seen())

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in example])
        encoder.forward = forward
        return capture(encoder, (), example, device=device)


def capture_source_decoder(
    model: PreTrainedModel,
    example: Inputs,
    *,
    max_length: int,
    batch: int = 1,
    all_logits: bool = False,
    device: torch.device | None = None,
) -> Capture:
    """The decoder, with its KV cache as state; arguments and errors as for `capture_decoder`.

    Args:
        example: of the encoder.
    """
    with isolated(device_of(model)):
        own = with_own_modules(model)
        seen, rows = _Seen(), torch.arange(batch) % len(next(iter(example.values())))
        tiled = {name: tensor[rows.to(tensor.device)] for name, tensor in example.items()}
        source = _run_source(own, tiled, seen)
        stateful = with_state(own, seen.states, max_length, batch)
        stateful.forward = _forward(stateful, own, source, seen, all_logits)
        tokens = example_tokens(own, max_length, batch)
        given = dict(zip(INPUTS, tokens, strict=True)) | decoder_inputs(source)
        sequence, length = Dim("sequence", max=max_length), Dim("source", min=1)
        dynamic: dict[str, dict[int, Dim | str]] = {name: {1: sequence} for name in ("input_ids", "position_ids")}
        dynamic |= {SOURCE_MASK: {1: length}, CROSS: {2: length}}
        captured = capture(stateful, (), given, dynamic=dynamic, device=device)
        check_state(own, captured.program)
        _confirm(captured.program, own, tiled, captured.example)
    others = captured.example[len(INPUTS) :]
    step = [*step_inputs(captured.example[: len(INPUTS)], max_length), *others]
    prefill = [*prefill_inputs(captured.example[: len(INPUTS)], max_length), *others]
    checked = (*check_samples(captured.program.signature, captured.example), step)
    notes = (*captured.notes, describe_cache(captured.program))
    return replace(captured, example=step, samples=checked, notes=notes, timed=(prefill,))


def decoder_inputs(source: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The inputs of the decoder's program from the outputs of the encoder's."""
    cross = [tensor for name, tensor in source.items() if name.startswith(f"{CROSS}_")]
    return {SOURCE_MASK: source[MASK], CROSS: cross}


def _source(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], seen: _Seen) -> Inputs:
    """The outputs of the encoder's program: the decoder is run on one token, for the keys and values of its cross-attention."""
    from transformers import Cache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    own, cross = (Cache(layer_class_to_replicate=DynamicLayer) for _ in range(2))
    first = next(iter(inputs.values()))
    token = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)

    def watch(given: dict[str, Any]) -> None:
        seen.mask = given.get(MASK)

    # Some encoders refuse the decoder's use_cache, which the model passes on.
    with _watching(model.get_decoder(), watch), _watching(model.get_encoder(), lambda given: given.pop("use_cache", None)):
        outputs = call(model, EncoderDecoderCache(own, cross), **inputs, decoder_input_ids=token)
    hidden = outputs.encoder_last_hidden_state
    if hidden.dim() != 3:
        raise UnsupportedError(
            f"the encoder of {type(model).__name__} returns {list(hidden.shape)}; generation takes models whose encoder "
            f"returns [batch, source, width]"
        )
    seen.states.extend(map(layer_tensors, own.layers))
    mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64) if seen.mask is None else seen.mask.to(torch.int64)
    source = {HIDDEN: hidden, MASK: mask}
    for index, layer in enumerate(cross.layers):
        kept = layer_tensors(layer)
        if not kept or any(tensor.dim() != 4 for tensor in (*kept.values(), *seen.states[index].values())):
            raise unsupported_state(model)
        source |= {f"{CROSS}_{name}_{index}": tensor for name, tensor in kept.items()}
    if len(source) == 2 or mask.shape != hidden.shape[:2]:
        raise unsupported_state(model)
    return source


def _run_source(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], seen: _Seen) -> Inputs:
    """`_source` of the model as it is. Raises UnsupportedError if it does not run on such inputs and caches."""
    try:
        with untouched(model), evaluating(model), torch.no_grad():
            return _source(model, inputs, seen)
    except LissomError:
        raise
    # The model's own code may raise anything.
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be run on {', '.join(inputs)} with a cache for self-attention and one for "
            f"cross-attention ({type(error).__name__}: {first_line(error)}); generation takes encoder-decoder models that can; "
            f"encoder_inputs= gives other inputs"
        ) from error


@contextmanager
def _watching(part: Any, watch: Callable[[dict[str, Any]], object]) -> Generator[None]:
    """Let `watch` see, and change, the keyword arguments of the calls of a part of the model until the block ends."""
    called = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        watch(kwargs)
        return called(*args, **kwargs)

    with exchanged(part, "forward", forward):
        yield


def _forward(
    stateful: nn.Module, model: PreTrainedModel, source: Inputs, seen: _Seen, all_logits: bool
) -> Callable[..., torch.Tensor]:
    """The forward of the decoder's program."""
    from transformers.modeling_outputs import BaseModelOutput

    from lissom.frontends.generation.cache_layers import cache_with_source  # imports transformers

    parameters = inspect.signature(type(model).forward).parameters
    batch, _, width = source[HIDDEN].shape
    dtype = None if seen.mask is None else seen.mask.dtype
    positioned = "position_ids" in inspect.signature(type(model.get_decoder()).forward).parameters

    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        start: torch.Tensor,
        source_mask: torch.Tensor,
        cross: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        length = cross[0].shape[2]
        for tensor in cross[1:]:
            torch._check(tensor.shape[2] == length)
        torch._check(source_mask.shape[1] == length)
        cache = cache_with_source(cache_of(stateful.get_submodule(CACHE), start), cross)
        # Only its sizes are read, since the keys and values of cross-attention are given.
        hidden = source[HIDDEN].new_zeros(batch, length, width)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {f"{_DECODER}{name}": tensor for name, tensor in given.items() if f"{_DECODER}{name}" in parameters}

        def exchange(passed: dict[str, Any]) -> None:
            if MASK in passed:
                passed[MASK] = source_mask if dtype is None else source_mask.to(dtype)
            if positioned and passed.get("position_ids") is None:
                # What the decoder computes by itself, some with slices of which the start may be no tensor.
                passed["position_ids"] = (torch.arange(input_ids.shape[1], device=input_ids.device) + start).expand_as(
                    input_ids
                )

        outputs: Any = BaseModelOutput(last_hidden_state=hidden)
        outputs.attention_mask = source_mask  # where models such as Moonshine look for it
        outputs.router_logits = None  # where mixtures of experts look for them
        with _watching(model.get_decoder(), exchange):
            logits = call(model, cache, encoder_outputs=outputs, **given).logits
        return logits if all_logits else logits[:, -1:]

    return forward


def _confirm(program: Program, model: PreTrainedModel, inputs: Inputs, example: Sample) -> None:
    """Compare a prefill in two parts and a decode step with the model's call on all tokens at once.

    Raises:
        CaptureError: if they differ.
    """
    ids, mask, _, start, *others = example
    tokens = ids.shape[1]
    filled = torch.ones_like(mask)
    counted = torch.arange(tokens, device=ids.device).expand_as(ids).contiguous()
    ends = sorted({1, tokens - 1, tokens})
    outputs: list[object] = []
    with torch.no_grad(), kept_state(program), untouched(model), evaluating(model):
        for begin, end in zip([0, *ends], ends, strict=False):
            part = [ids[:, begin:end], filled, counted[:, begin:end], torch.full_like(start, begin), *others]
            outputs = program.run(part)
        wanted = model(**inputs, decoder_input_ids=ids.to(device_of(model)), use_cache=False).logits
    refuse_different(model, program, wanted[:, -1].to(ids.device), outputs[0])
