"""Causal language models of transformers with their KV cache as the program's state: one program for prefill and decode.

    logits = decoder(input_ids, attention_mask, position_ids, start)

input_ids: [batch, tokens], written to the cache slots start, start + 1, … attention_mask: [batch, max_length], 0 for cache
slots that hold padding; the causal mask hides slots that are not filled yet. position_ids: [batch, tokens]. start: [1], the
number of filled slots. logits: [batch, 1, vocabulary] of the last token, or of the last few, [batch, min(tokens, n),
vocabulary], or [batch, tokens, vocabulary] of all.

The state of the layers is described in `decoder_state`. Layers with a sliding window keep all slots too: their mask hides
tokens outside the window.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim

from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.export import Capture, capture, check_model, evaluating
from lissom.frontends.capture.isolation import isolated, with_own_modules
from lissom.frontends.capture.layers_alike import compare_alike
from lissom.frontends.capture.recurrences import recurrences_as_operators
from lissom.frontends.capture.untouched import untouched
from lissom.frontends.generation.decoder_state import State, buffers, cache_of, call, layer_states, masks_of_new_tokens
from lissom.frontends.generation.whole_text import TEXT, check_causal, forward_over_text, last_tokens, run_whole, text_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids", "start")
"""The inputs of a decoder's program, in order."""
CACHE = "cache"
"""The name of the module with the state: `cache.0.keys` and `cache.0.values` belong to the first layer."""
SHORTEST = 8
"""The smallest number of slots of a KV cache."""
PREFILL = 128
"""The most tokens of a prefill that is timed."""


def capture_decoder(
    model: nn.Module,
    *,
    max_length: int,
    batch: int = 1,
    all_logits: bool = False,
    last_logits: int = 1,
    device: torch.device | None = None,
) -> Capture:
    """The model as a program whose state is its KV cache, and that of recurrent layers.

    The model is not modified, and the program shares its weights. A causal model whose cache cannot be captured, or that has
    none, becomes a program that keeps the text and computes all of it at every call; a note and a warning say so.

    Args:
        max_length: the capacity of the cache in tokens, prompt included.
        batch: the fixed number of sequences.
        all_logits: return the logits of every token of a call, [batch, tokens, vocabulary], not only of the last.
        last_logits: without all_logits, the number of last tokens of a call whose logits are returned.

    Raises:
        UnsupportedError: if the model is not a causal language model of transformers, or its layers keep anything but keys and
            values, convolutions and recurrences.
        InputError: if max_length or batch do not fit it.
        CaptureError: naming the line that cannot be captured.
    """
    known = check_generating(model, max_length, batch)
    if known.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model; this takes a causal language model, such as LlamaForCausalLM"
        )
    kept = None if all_logits else last_logits
    with isolated(device_of(known)):
        own = with_own_modules(known)
        try:
            return _capture(own, layer_states(own), max_length, batch, kept, device)
        except (CaptureError, UnsupportedError) as error:
            refusal = error
        try:
            check_causal(own, example_tokens(own, max_length, batch)[0])
            captured = _capture(own, [text_state(own, batch)], max_length, batch, kept, device)
        # The model's own code may raise anything; what is wrong with its cache is told in any case.
        except Exception as error:
            raise refusal from error
    why = str(refusal).partition(";")[0]
    note = f"compiled without a KV cache, so that every token costs a forward over all {max_length} tokens: {why}"
    warnings.warn(note, stacklevel=2)
    return replace(captured, notes=(*captured.notes, note))


def _capture(
    model: PreTrainedModel,
    states: Sequence[State],
    max_length: int,
    batch: int,
    kept: int | None,
    device: torch.device | None,
) -> Capture:
    """`capture_decoder` for a model that was checked.

    Args:
        states: of its layers, or the text.
        kept: the number of last tokens whose logits are returned; None for all.
    """
    example = example_tokens(model, max_length, batch)
    sequence = Dim("sequence", max=max_length)
    dynamic: dict[str, dict[int, Dim | str]] = {"input_ids": {1: sequence}, "position_ids": {1: sequence}}
    stateful = with_state(model, states, max_length, batch)
    whole = any(TEXT in state for state in states)
    stateful.forward = forward_over_text(stateful, f"{CACHE}.0.{TEXT}", kept) if whole else _forward(stateful, kept)
    with masks_of_new_tokens(model):
        captured = capture(stateful, (), dict(zip(INPUTS, example, strict=True)), dynamic=dynamic, device=device)
    check_state(model, captured.program)
    with recurrences_as_operators(model, device):
        compare_alike(model, captured.program, lambda: _confirm(captured.program, model, captured.example))
    step = step_inputs(captured.example, max_length)
    checked = (*check_samples(captured.program.signature, captured.example), step)
    notes = (*captured.notes, describe_cache(captured.program))
    return replace(captured, example=step, samples=checked, notes=notes, timed=(prefill_inputs(captured.example, max_length),))


def check_state(model: nn.Module, program: Program) -> None:
    """Refuse a program that keeps more than the state of its layers. Raises UnsupportedError."""
    unknown = next((name for name in program.state if not name.startswith(f"{CACHE}.")), None)
    if unknown is not None:
        raise UnsupportedError(
            f"{type(model).__name__} keeps '{unknown}' between calls besides the state of its layers; generation takes models "
            f"whose only state is in transformers' cache"
        )


def example_tokens(model: PreTrainedModel, max_length: int, batch: int) -> Sample:
    """Inputs that expose a wrong program: some slots filled, the first of them padding, and several new tokens."""
    tokens = max(3, min(8, (max_length - 2) // 3))
    start, padding = 2, 1
    table: Any = model.get_input_embeddings()
    device = device_of(model)
    ids = torch.randint(0, int(table.weight.shape[0]), (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, max_length, dtype=torch.int64)
    mask[:, :padding] = 0
    positions = (torch.arange(tokens) + start - padding).expand(batch, tokens).contiguous()
    return [tensor.to(device) for tensor in (ids, mask, positions, torch.tensor([start]))]


def step_inputs(example: Sample, max_length: int) -> Sample:
    """The inputs of a decode step with a half-full cache; programs are timed on them."""
    ids, mask, positions, start = example
    filled = max_length // 2
    return [ids[:, :1], mask, torch.full_like(positions[:, :1], filled - 1), torch.full_like(start, filled)]


def prefill_inputs(example: Sample, max_length: int) -> Sample:
    """The inputs of a prefill of an empty cache; programs are timed on them too."""
    ids, mask, positions, start = example
    tokens = min(PREFILL, max_length)
    counted = torch.arange(tokens, device=positions.device).expand(len(ids), tokens).contiguous()
    return [repeated(ids, tokens), mask, counted, torch.zeros_like(start)]


def repeated(ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many tokens, of ids [batch, some], again and again."""
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]


def _confirm(program: Program, model: PreTrainedModel, example: Sample) -> None:
    """Compare a prefill in two parts and a decode step with the model's call on all tokens at once.

    Raises:
        CaptureError: if they differ: some models count keys from the end of the cache, even if it is not full.
    """
    ids, mask, _, start = (tensor.cpu() for tensor in example)
    device, tokens = example[0].device, ids.shape[1]
    positions = torch.arange(mask.shape[1]).expand_as(mask) - int((mask == 0)[0].sum())
    positions = positions.clamp_min(0)
    ends = sorted({1, tokens - 1, tokens})
    outputs: list[object] = []
    with torch.no_grad(), kept_state(program), untouched(model), evaluating(model):
        for begin, end in zip([0, *ends], ends, strict=False):
            part = [ids[:, begin:end], mask, positions[:, begin:end], torch.full_like(start, begin)]
            outputs = program.run([tensor.to(device) for tensor in part])
        given = {"input_ids": ids, "attention_mask": mask[:, :tokens], "position_ids": positions[:, :tokens]}
        wanted = run_whole(model, {name: tensor.to(device_of(model)) for name, tensor in given.items()})
    refuse_different(model, program, wanted[:, -1].to(device), outputs[0])


def refuse_different(model: nn.Module, program: Program, wanted: torch.Tensor, logits: object) -> None:
    """Refuse logits of a program, [batch, tokens, vocabulary], whose last differ from the model's. Raises CaptureError."""
    assert isinstance(logits, torch.Tensor)
    last = logits[:, -1]
    error = relative_error(wanted, last)
    if error > tolerance_of(program):
        if getattr(model.config, "is_decoder", True) is False and not getattr(model.config, "is_encoder_decoder", False):
            raise CaptureError(
                f"the attention of {type(model).__name__} sees later tokens, since its configuration has is_decoder=False; "
                f"load the model with is_decoder=True"
            )
        raise CaptureError(
            f"{type(model).__name__} with a cache of fixed size differs from {type(model).__name__} without one by {error:.2g} "
            f"relative, allowed {tolerance_of(program):.2g}; its code does not know caches that are longer than what is in them"
        )


def describe_cache(program: Program) -> str:
    """A note on the size of a program's KV cache."""
    (rows, length), size = program.signature.tensors[1].type.shape, state_bytes(program) / 1e6
    return f"the cache holds {length} tokens of {rows} sequence{'s' if rows != 1 else ''} in {size:.3g} MB"


def state_bytes(program: Program) -> int:
    """The size of a program's state."""
    return sum(program.weight(name).nbytes for name in program.state)


def check_generating(model: nn.Module, max_length: int, batch: int) -> PreTrainedModel:
    """The model, if it generates and has positions for the whole cache. Raises UnsupportedError, InputError."""
    try:
        from transformers import Cache, GenerationMixin, PreTrainedModel
    except ImportError as error:
        raise UnsupportedError("generation needs transformers: pip install 'lissom[demo]'") from error
    if not hasattr(Cache, "get_query_offset"):
        raise UnsupportedError("generation needs a transformers that has Cache.get_query_offset: pip install -U transformers")
    check_model(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{name} is not a transformers model; generation takes one, such as LlamaForCausalLM")
    if not isinstance(model, GenerationMixin):
        raise UnsupportedError(
            f"{name} does not generate; generation takes a language model, such as LlamaForCausalLM, or an "
            f"encoder-decoder, such as T5ForConditionalGeneration"
        )
    if "input_ids" not in inspect.signature(type(model).forward).parameters and not model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} reads {model.main_input_name}; generation takes a language model, which reads token ids, or an "
            f"encoder-decoder"
        )
    check_capacity(max_length, batch)
    known = longest_text(model)
    if known is not None and max_length > known:
        raise InputError(f"max_length is {max_length}, and {name} knows positions up to {known}; give {known} or less")
    switch = longrope_switch(model)
    if switch is not None and max_length > switch:
        raise InputError(
            f"max_length is {max_length}, and {name} has other rotary frequencies in texts of more than {switch} tokens "
            f"(longrope), to which the keys in a cache cannot be turned; give {switch} or less"
        )
    return model


def longrope_switch(model: PreTrainedModel) -> int | None:
    """The number of tokens beyond which longrope uses its long frequencies; None for other models."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(parameters for parameters in rope.values() if isinstance(parameters, dict))]
    lengths = [
        parameters["original_max_position_embeddings"] for parameters in kinds if parameters.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


def check_capacity(max_length: int, batch: int) -> None:
    """Refuse a wrong max_length or batch. Raises InputError."""
    for word, number in (("max_length", max_length), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise InputError(f"{word} is {number!r:.80}; give a whole number")
    if max_length < SHORTEST:
        raise InputError(f"max_length is {max_length}; give the tokens of prompt and answer together, {SHORTEST} or more")
    if batch < 1:
        raise InputError(f"batch is {batch}; give how many sequences are generated at once, 1 or more")


def longest_text(model: nn.Module) -> int | None:
    """The number of positions of a transformers model; None if its configuration gives no limit."""
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config(decoder=True)
    known = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    return next((limit for limit in known if isinstance(limit, int) and limit > 0), None)


def with_state(model: PreTrainedModel, states: Sequence[State], max_length: int, batch: int) -> PreTrainedModel:
    """A module with the model's submodules and weights under the same names, and the state of its layers as buffers."""
    stateful = copy.copy(model)
    stateful._modules, stateful._buffers = dict(model._modules), dict(model._buffers)
    if hasattr(model, CACHE):
        raise UnsupportedError(f"{type(model).__name__} already has an attribute '{CACHE}', which its KV cache needs")
    stateful.add_module(CACHE, buffers(states, max_length, batch, device_of(model)))
    return stateful


def _forward(stateful: PreTrainedModel, kept: int | None) -> Callable[..., torch.Tensor]:
    """The forward of the module with the state of its layers.

    Args:
        kept: the number of last tokens whose logits are returned; None for all.
    """
    parameters = inspect.signature(type(stateful).forward).parameters

    def forward(
        input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        cache = cache_of(stateful.get_submodule(CACHE), start)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in given.items() if name in parameters}
        return logits_of(stateful, cache, given, kept)

    return forward


def logits_of(stateful: PreTrainedModel, cache: Any, given: Mapping[str, torch.Tensor], kept: int | None) -> torch.Tensor:
    """The logits of a call, [batch, tokens, vocabulary].

    Args:
        given: inputs by name.
        kept: the number of last tokens whose logits are returned; None for all.
    """
    if kept is None:
        return call(stateful, cache, **given).logits
    by_model = "logits_to_keep" in inspect.signature(type(stateful).forward).parameters
    last = last_tokens(given["input_ids"].shape[1], kept)
    # transformers takes a number, or an index of the tokens.
    keep = {"logits_to_keep": 1 if kept == 1 else last} if by_model else {}
    logits = call(stateful, cache, **given, **keep).logits
    return logits[:, last] if kept == 1 or not by_model else logits
