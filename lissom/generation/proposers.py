"""Proposers of draft tokens: n-grams of the text so far, and a smaller decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lissom.generation.choice import Choice
from lissom.generation.decoder import Decoder

PROMPT_LOOKUP = "prompt-lookup"
"""The draft that proposes from n-grams of the text."""
_LONGEST = 4
_SHORTEST = 2
"""Lengths of the n-grams that are looked up. A single token repeats too often to say what follows it."""


@dataclass(frozen=True)
class Proposal:
    """Draft tokens.

    Attributes:
        tokens: in order; none where there is nothing to propose.
        probabilities: those that each token was sampled from, [1, vocabulary]; none where tokens are not sampled.
    """

    tokens: Sequence[int] = ()
    probabilities: Sequence[torch.Tensor] = ()


class Proposer(Protocol):
    """Proposes the next tokens of one text."""

    def start(self) -> None:
        """Forget the text."""
        ...

    def observe(self, text: Sequence[int]) -> None:
        """Take in the text so far, which continues the text of the last call by accepted tokens."""
        ...

    def propose(self, count: int, choice: Choice) -> Proposal:
        """At most `count` tokens that may follow the text."""
        ...


class PromptLookup:
    """Proposes what followed the last earlier occurrence of the text's last n tokens, n from 4 down to 2.

    If too few tokens follow it, they are repeated.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def observe(self, text: Sequence[int]) -> None:
        self._text.extend(text[len(self._text) :])
        # Without the n-grams at the end of the text, which nothing follows yet.
        for end in range(self._indexed + 1, len(self._text)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(self._text[end - size : end])] = end
        self._indexed = max(self._indexed, len(self._text) - 1)

    def propose(self, count: int, choice: Choice) -> Proposal:
        text = self._text
        for size in range(min(_LONGEST, len(text)), _SHORTEST - 1, -1):
            end = self._ends.get(tuple(text[-size:]))
            if end is not None:
                following = text[end:]
                return Proposal([following[index % len(following)] for index in range(count)])
        return Proposal()


class DraftDecoder:
    """Proposes the tokens of a smaller decoder, with its own KV cache.

    Attributes:
        decoder: of the same vocabulary, with room for the text.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.start()

    def start(self) -> None:
        self.decoder.reset()
        self._cached: list[int] = []
        """The tokens in the KV cache, and the last drafted token, which is not read."""
        self._text: Sequence[int] = ()
        self._checked = 0

    def observe(self, text: Sequence[int]) -> None:
        """Drop rejected tokens from the KV cache, and read all but the last tokens that it lacks."""
        decoder = self.decoder
        most = min(decoder.length, len(text) - 1)
        kept = min(self._checked, most)
        while kept < most and self._cached[kept] == text[kept]:
            kept += 1
        decoder.crop(kept)
        self._text = text
        if len(text) - kept > 2:  # the last two tokens are read with the first draft, in one call
            self._read(text[kept:-1])
        self._cached, self._checked = list(text), len(text) - 1

    def propose(self, count: int, choice: Choice) -> Proposal:
        tokens: list[int] = []
        probabilities: list[torch.Tensor] = []
        unread = self._text[self.decoder.length :]
        for _ in range(count):
            token, distribution = choice.pick_draft(self._read(unread))
            tokens.append(token)
            probabilities += [] if distribution is None else [distribution]
            unread = [token]
        self._cached += tokens
        return Proposal(tokens, probabilities)

    def _read(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits of the next token, [1, vocabulary], after these."""
        return self.decoder.step_all(torch.tensor([tokens], device=self.decoder.device))[:, -1]
