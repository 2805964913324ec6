"""Causal language models without a cache that can be captured: the text is kept, and every call computes all of it.

The program has the inputs of `decoder`. Its state `cache.0.text`, [batch, 1, max_length, 1], holds the token ids, and a call
costs a forward over max_length tokens, however few it adds. Some models of transformers have no cache at all, and their own
`generate` does the same; others have one of a kind of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lissom.compiler.verify.divergence import TOLERANCE, relative_error
from lissom.errors import UnsupportedError
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.export import evaluating
from lissom.frontends.capture.untouched import untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STEPS = 2
TEXT = "text"
"""The state of the one layer that these programs have."""


def text_state(model: PreTrainedModel, batch: int) -> dict[str, torch.Tensor]:
    """The state of such a program, with one slot."""
    return {TEXT: torch.zeros(batch, 1, 1, 1, dtype=torch.int64, device=device_of(model))}


def forward_over_text(stateful: PreTrainedModel, buffer: str, kept: int | None) -> Callable[..., torch.Tensor]:
    """The forward of a decoder that computes all tokens.

    Args:
        buffer: the name of the text, [batch, 1, max_length, 1], in it.
        kept: the number of last tokens whose logits are returned; None for all.
    """

    def forward(
        input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        text, places = stateful.get_buffer(buffer), torch.arange(input_ids.shape[1], device=input_ids.device) + start
        text.copy_(text.index_copy(2, places, input_ids[:, None, :, None]))
        seen = attention_mask * (torch.arange(text.shape[2], device=input_ids.device) < start + input_ids.shape[1])
        # A copy, since the model's input must not be what the next call writes into.
        logits = run_whole(stateful, _padded(text[:, 0, :, 0].clone(), seen))
        return logits.index_select(1, places if kept is None else places[last_tokens(input_ids.shape[1], kept)])

    return forward


def last_tokens(tokens: int, count: int) -> slice:
    """The index of the last `count` tokens of a call, or of all where it has fewer."""
    # A program's number of tokens is symbolic, so that it cannot be compared with `count` here.
    return slice(-1, None) if count == 1 else slice(tokens - torch.sym_min(tokens, count), None)


def _padded(input_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A model's inputs for texts with padding on the left, with the positions that transformers' `generate` gives them."""
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def run_whole(model: PreTrainedModel, inputs: Mapping[str, object]) -> torch.Tensor:
    """The model's logits without a cache, of those inputs that it reads."""
    parameters = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {name: value for name, value in inputs.items() if name in parameters}
    if "use_cache" in parameters:
        given["use_cache"] = False
    return type(model).forward(model, **given).logits


def check_causal(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Refuse a model whose logits depend on later tokens, or whose `generate` computes others.

    Args:
        input_ids: [batch, tokens].

    Raises:
        UnsupportedError: if its logits do, or its `generate` does.
    """
    ids = input_ids.to(device_of(model))
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    options = {"max_new_tokens": _STEPS, "min_new_tokens": _STEPS, "do_sample": False, "num_beams": 1}
    with untouched(model), evaluating(model), torch.no_grad():
        whole, shorter = (run_whole(model, _padded(ids[:, :end], mask[:, :end])) for end in (ids.shape[1], -1))
        generating: Any = model
        steps = generating.generate(
            input_ids=ids, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True
        )
        longer = run_whole(model, _padded(steps.sequences[:, :-1], torch.cat([mask, mask[:, -1:]], 1)))
    pairs = zip((whole[:, -2], *steps.logits), (shorter[:, -1], longer[:, -2], longer[:, -1]), strict=True)
    if any(not relative_error(wanted, actual) <= TOLERANCE.get(wanted.dtype, 0.0) for wanted, actual in pairs):
        raise UnsupportedError(
            f"the logits of {type(model).__name__} depend on later tokens, or its generate computes others than its forward"
        )
