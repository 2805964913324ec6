"""Text token by token, with the time of prefill and decode."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lissom.errors import InputError
from lissom.generation.choice import Choice
from lissom.generation.configured import ConfiguredDecoder
from lissom.generation.decoder import Decoder
from lissom.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"


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
    """The tokens that follow a prompt, [1, tokens], one by one; the KV cache is emptied first. A decoder's draft is used.

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
    choice = Sampling(temperature, seed=seed).choice(decoder.device)
    speed = speed or Speed()
    started = time.perf_counter()
    with closing(_steps(decoder, input_ids, decoder.prefill(input_ids), choice, max_new_tokens)) as tokens:
        spent = 0.0
        for count, token in enumerate(tokens):
            if count == 0:
                speed.prompt, speed.prompt_seconds = input_ids.shape[1], time.perf_counter() - started
                started = time.perf_counter()
            if token in stop:
                return
            speed.answer, speed.answer_seconds = count + 1, spent + time.perf_counter() - started
            spent = speed.answer_seconds
            yield token
            started = time.perf_counter()  # the consumer's time between tokens does not count


def _steps(decoder: Decoder, input_ids: torch.Tensor, logits: torch.Tensor, choice: Choice, most: int) -> Generator[int]:
    """The tokens that follow a prompt, at most so many.

    Args:
        logits: [1, vocabulary], or [1, tokens, vocabulary].
    """
    last = logits[:, -1] if logits.dim() == 3 else logits
    speculator = decoder.speculator if isinstance(decoder, ConfiguredDecoder) else None
    if speculator is not None:
        with closing(speculator.steps(input_ids, last, choice, most)) as steps:
            yield from (step.token for step in steps)
        return
    for count in range(1, most + 1):
        token = choice.pick(choice.process(input_ids, last))
        yield token
        if count < most:
            last = decoder.step_all(torch.tensor([[token]], device=decoder.device))[:, -1]


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
