"""Text token by token, with the time of prefill and decode."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lissom.errors import InputError
from lissom.generation.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"
_COLDEST = 1e-30
"""The lowest temperature: below it the scaled logits overflow and softmax is NaN; here it already picks the likeliest token."""


@dataclass
class Speed:
    """Time of a generated text.

    Attributes:
        prompt: tokens of the prompt.
        answer: tokens of the answer; the first comes from the prefill.
    """

    prompt: int = 0
    prompt_seconds: float = 0.0
    answer: int = 0
    answer_seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"prompt: {self.prompt} tokens in {self.prompt_seconds:.3g} s, {_rate(self.prompt, self.prompt_seconds)}"]
        if self.answer > 1:
            steps = self.answer - 1
            rate = _rate(steps, self.answer_seconds)
            parts.append(f"answer: {self.answer} tokens, {steps} of them in {self.answer_seconds:.3g} s, {rate}")
        return "; ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):.4g} tokens/s"


def read_prompt(text: str, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> torch.Tensor:
    """The tokens of a prompt, [1, tokens].

    Args:
        longest: the most tokens allowed; None for no limit.

    Raises:
        InputError: if there are none, or more than `longest`.
    """
    ids = torch.tensor([tokenizer(text).input_ids], dtype=torch.int64)
    count = ids.shape[1]
    if count == 0:
        raise InputError("the prompt has no tokens; give a text to continue")
    if longest is not None and count > longest:
        raise InputError(f"the prompt is {count} tokens, and {longest} can be read at most; shorten it")
    return ids


def end_tokens(eos_token_id: object) -> tuple[int, ...]:
    """The token ids in `eos_token_id` of a generation configuration, which is None, one id, or several.

    Raises:
        InputError: if it is anything else.
    """
    several = isinstance(eos_token_id, (list, tuple))
    ids = () if eos_token_id is None else tuple(eos_token_id) if several else (eos_token_id,)
    tokens = tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool))
    if len(tokens) < len(ids):
        raise InputError(
            f"eos_token_id of the generation configuration is {eos_token_id!r:.80}; write a token id or a list of them"
        )
    return tokens


def stream_tokens(
    decoder: Decoder,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop: Collection[int] = (),
    seed: int = 0,
    speed: Speed | None = None,
) -> Iterator[int]:
    """The tokens that follow a prompt, [1, tokens], one by one; the KV cache is emptied first.

    Args:
        temperature: 0 takes the likeliest token; above 0 tokens are sampled from softmax(logits / temperature).
        stop: tokens that end the text; they are not yielded.
        speed: updated with every token.

    Raises:
        InputError: if the decoder's batch is not 1, or a number is out of range.
    """
    if decoder.batch != 1:
        raise InputError(
            f"the decoder reads {decoder.batch} sequences at once, and streaming needs one; compile it with batch=1"
        )
    if not 0 <= temperature < math.inf or max_new_tokens < 1:
        raise InputError(f"temperature is {temperature:g} and max_new_tokens {max_new_tokens}; give 0 or more, and 1 or more")
    if not -(1 << 63) <= seed < 1 << 64:
        raise InputError(f"seed is {seed}; give a whole number of 64 bits")
    speed = speed or Speed()
    draw = torch.Generator(decoder.device).manual_seed(seed)
    started = time.perf_counter()
    logits = decoder.prefill(input_ids)
    token = _choose(logits, temperature, draw)
    speed.prompt, speed.prompt_seconds = input_ids.shape[1], time.perf_counter() - started
    started = time.perf_counter()
    spent = 0.0
    for count in range(1, max_new_tokens + 1):
        if int(token) in stop:
            return
        speed.answer, speed.answer_seconds = count, spent + time.perf_counter() - started
        spent = speed.answer_seconds
        yield int(token)
        started = time.perf_counter()  # the consumer's time between tokens does not count
        if count < max_new_tokens:
            token = _choose(decoder.step(token), temperature, draw)


def _choose(logits: torch.Tensor, temperature: float, draw: torch.Generator) -> torch.Tensor:
    """The next token of each row, [batch, 1].

    Args:
        logits: [batch, vocabulary], or [batch, tokens, vocabulary].
    """
    last = logits[:, -1] if logits.dim() == 3 else logits
    if temperature == 0:
        return last.argmax(-1, keepdim=True)
    return torch.multinomial(torch.softmax(last.float() / max(temperature, _COLDEST), -1), 1, generator=draw)


def stream_text(tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of the tokens, piece by piece; a character of several bytes is yielded when it is complete."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = str(tokenizer.decode(seen, skip_special_tokens=True))
        if not text.endswith(_UNFINISHED):
            yield text[len(shown) :]
            shown = text
    yield str(tokenizer.decode(seen, skip_special_tokens=True))[len(shown) :]
