"""Causal language models of transformers over a pool of cache slots: one program for sequences of unlike length.

    logits = decoder(input_ids, position_ids, slots, key_positions, own)

A call has tokens of any sequences, in any order. input_ids and position_ids: [1, tokens], each position within its own
sequence. slots: [tokens], where their keys and values are written. key_positions: [slots], the position of the token in each
slot. own: [tokens, slots], true for the slots of a token's sequence, those of this call among them. logits: of the last tokens
of the call, [1, at most `sequences`, vocabulary].

A token attends to its own slots, where the model's mask, computed from positions, lets it: causal, a sliding window, chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim

from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.errors import UnsupportedError
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.export import Capture, capture, evaluating
from lissom.frontends.capture.isolation import exchanged, isolated, with_own_modules
from lissom.frontends.capture.layers_alike import compare_alike
from lissom.frontends.capture.untouched import untouched
from lissom.frontends.generation.decoder import (
    CACHE,
    PREFILL,
    check_generating,
    check_state,
    logits_of,
    refuse_different,
    repeated,
    state_bytes,
    with_state,
)
from lissom.frontends.generation.decoder_state import cache_of, layer_states
from lissom.frontends.generation.state_names import is_kv_cache
from lissom.frontends.generation.whole_text import run_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "position_ids", "slots", "key_positions", "own")
"""The inputs of a pool's program, in order."""
PAGE = 16
"""The slots of a page; the slots of a sequence begin with one."""


def capture_pool(
    model: nn.Module, *, max_length: int, sequences: int, slots: int, device: torch.device | None = None
) -> Capture:
    """The model as a program whose state is a pool of slots for keys and values.

    Args:
        max_length: the most tokens of one sequence.
        sequences: the most sequences in one call.
        slots: of the pool.

    Raises:
        UnsupportedError: for a model whose layers keep anything but keys and values.
        CaptureError: naming the line that cannot be captured, or for a model whose mask is not computed from positions.
        LissomError: as `capture_decoder`.
    """
    known = check_generating(model, max_length, sequences)
    name = type(model).__name__
    if known.config.is_encoder_decoder:
        raise UnsupportedError(f"sequences= takes a causal language model, and {name} is an encoder-decoder; use batch=")
    with isolated(device_of(known)):
        own = with_own_modules(known)
        states = layer_states(own)
        if not all(is_kv_cache(state) for layer in states for state in layer):
            raise UnsupportedError(
                f"sequences= keeps keys and values in a pool, and layers of {name} keep a recurrent state; use batch="
            )
        stateful = with_state(own, states, slots, 1)
        stateful.forward = _forward(stateful, sequences)
        example = _example(own, slots)
        tokens = Dim("tokens", max=slots)
        dynamic: dict[str, dict[int, Dim | str]] = {"input_ids": {1: tokens}, "position_ids": {1: tokens}}
        dynamic |= {"slots": {0: tokens}, "own": {0: tokens}}
        captured = capture(stateful, (), dict(zip(INPUTS, example, strict=True)), dynamic=dynamic, device=device)
        check_state(own, captured.program)
        _check_single_tokens(name, captured.program)
        compare_alike(own, captured.program, lambda: _confirm(captured.program, own, captured.example))
    step = decode_inputs(captured.example, sequences)
    checked = (*check_samples(captured.program.signature, captured.example), step)
    size = state_bytes(captured.program) / 1e6
    notes = (*captured.notes, f"the pool holds {slots} tokens of up to {sequences} sequences in {size:.3g} MB")
    timed = (prefill_inputs(captured.example, max_length),)
    return replace(captured, example=step, samples=checked, notes=notes, timed=timed)


def text_inputs(ids: torch.Tensor, slots: int) -> Sample:
    """The inputs of one text, [1, tokens], in an empty pool."""
    tokens = ids.shape[1]
    places = torch.arange(slots, device=ids.device)
    own = (places < tokens).expand(tokens, slots).contiguous()
    return [ids, places[None, :tokens].clone(), places[:tokens].clone(), places, own]


def prefill_inputs(example: Sample, max_length: int) -> Sample:
    """The inputs of a prefill of one text."""
    return text_inputs(repeated(example[0], min(PREFILL, max_length)), example[3].shape[0])


def decode_inputs(example: Sample, sequences: int) -> Sample:
    """The inputs of a decode step of all sequences, each with its share of the slots half full."""
    ids, slots = example[0], example[3].shape[0]
    share = slots // sequences
    places = torch.arange(slots, device=ids.device)
    starts = torch.arange(sequences, device=ids.device) * share
    positions = torch.full((sequences,), share // 2, device=ids.device)
    own = (places >= starts[:, None]) & (places <= (starts + positions)[:, None])
    return [repeated(ids, sequences), positions[None], starts + positions, places % share, own]


def _example(model: PreTrainedModel, slots: int) -> Sample:
    """Inputs that expose a wrong program: two sequences of unlike length, whose slots are not in the order of the call."""
    table: Any = model.get_input_embeddings()
    device = device_of(model)
    ids = torch.randint(0, int(table.weight.shape[0]), (1, 5), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 0, 1, 2, 1]])
    starts = torch.tensor([slots // 2, 1, 1, 1, slots // 2])
    places = starts + positions[0]
    key_positions = torch.zeros(slots, dtype=torch.int64).index_copy(0, places, positions[0])
    own = (torch.arange(slots) >= starts[:, None]) & (
        torch.arange(slots) < starts[:, None] + torch.tensor([2, 3, 3, 3, 2])[:, None]
    )
    return [tensor.to(device) for tensor in (ids, positions, places, key_positions, own)]


def _check_single_tokens(name: str, program: Program) -> None:
    """Refuse a program that cannot read one token alone. Raises UnsupportedError."""
    (tokens,) = program.signature.dimensions.values()
    if tokens.minimum > 1:
        raise UnsupportedError(
            f"the code of {name} takes {tokens.minimum} tokens or more with a pool of slots; use compile_generation"
        )


def _confirm(program: Program, model: PreTrainedModel, example: Sample) -> None:
    """Compare two sequences of a pool, read in two calls, with the model's call on each alone.

    Raises:
        CaptureError: if they differ.
    """
    ids, positions, places, key_positions, own = example
    with torch.no_grad(), kept_state(program), untouched(model), evaluating(model):
        program.run([ids[:, :3], positions[:, :3], places[:3], key_positions, own[:3]])
        (logits,) = program.run([ids[:, 3:], positions[:, 3:], places[3:], key_positions, own[3:]])
        assert isinstance(logits, torch.Tensor)
        for row, chosen in enumerate(([1, 2, 3], [0, 4])):
            text = {"input_ids": ids[:, chosen], "attention_mask": torch.ones_like(ids[:, chosen])}
            wanted = run_whole(model, text | {"position_ids": positions[:, chosen]})
            refuse_different(model, program, wanted[:, -1].to(logits.device), logits[:, row : row + 1])


def _forward(stateful: PreTrainedModel, sequences: int) -> Callable[..., torch.Tensor]:
    """The forward of the module with the pool; its logits are those of the last `sequences` tokens."""

    def forward(
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        slots: torch.Tensor,
        key_positions: torch.Tensor,
        own: torch.Tensor,
    ) -> torch.Tensor:
        cache = cache_of(stateful.get_submodule(CACHE), slots[:1], slots)
        with _masks_of(position_ids[0], key_positions, own):
            return logits_of(stateful, cache, {"input_ids": input_ids, "position_ids": position_ids}, sequences)

    return forward


def _masks_of(positions: torch.Tensor, key_positions: torch.Tensor, own: torch.Tensor) -> AbstractContextManager[None]:
    """Let transformers compute masks from positions rather than from slots, and hide the slots of others.

    Args:
        positions: of a call's tokens, [tokens].
        key_positions: of the tokens in the slots, [slots].
        own: [tokens, slots].
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    def visible(
        batch_size: int, *sizes: object, mask_function: Callable[..., Any] = causal_mask_function, **others: Any
    ) -> Any:
        first = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=own.device)
        seen = mask_function(first, first, positions[None, None, :, None], key_positions[None, None, None])
        return seen & own[None, None]

    def added(*sizes: Any, dtype: torch.dtype = torch.float32, **others: Any) -> torch.Tensor:
        seen = visible(*sizes, **others)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    functions = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping | {"sdpa": visible, "eager": added}
    return exchanged(ALL_MASK_ATTENTION_FUNCTIONS, "_local_mapping", functions)
