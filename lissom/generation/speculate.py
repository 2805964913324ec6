"""Speculative decoding: a proposer drafts tokens, and one call of the decoder verifies them.

The longest right prefix of the draft is accepted, and the KV cache is cropped to it. Greedy tokens are the likeliest by the
decoder's own logits, and sampled tokens have the distribution they have without a draft (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192), up to the rounding of calls of several tokens.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from lissom.generation.choice import Choice
from lissom.generation.decoder import Decoder
from lissom.generation.pace import Pace
from lissom.generation.proposers import Proposal, Proposer

VERIFIED = 16
"""The tokens of a verifying call: the last accepted one, and the drafted ones. A decoder with a draft returns their logits."""


@dataclass
class Drafts:
    """Counts of draft tokens in one text.

    Attributes:
        proposed: draft tokens.
        accepted: those that became part of the text.
        calls: calls of the decoder after the prefill.
        tokens: tokens of the text from these calls.
    """

    proposed: int = 0
    accepted: int = 0
    calls: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted tokens over proposed ones; 0 where none were proposed."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_call(self) -> float:
        """Tokens of the text per call; 1 without drafts."""
        return self.tokens / self.calls if self.calls else 1.0

    def __str__(self) -> str:
        accepted = f"{self.accepted} of {self.proposed} tokens accepted, {self.acceptance:.0%}"
        return f"drafts: {accepted}; {self.tokens_per_call:.3g} tokens per call"


@dataclass(frozen=True)
class Step:
    """One token of a text.

    Attributes:
        token: its id.
        logits: [1, vocabulary], valid until the next step.
        scores: the processed logits, [1, vocabulary].
    """

    token: int
    logits: torch.Tensor
    scores: torch.Tensor


class Speculator:
    """Generates texts with a proposer.

    Attributes:
        decoder: verifies draft tokens; it returns the logits of several tokens.
        proposer: drafts them.
        pace: how many are drafted.
        drafts: counts of the last text.
    """

    def __init__(self, decoder: Decoder, proposer: Proposer) -> None:
        self.decoder = decoder
        self.proposer = proposer
        self.pace = Pace(min(VERIFIED, decoder.last_logits) - 1)
        self.drafts = Drafts()
        self._seen: list[int] = []

    def steps(
        self, text: torch.Tensor, logits: torch.Tensor, choice: Choice, most: int, seen: Sequence[int] | None = None
    ) -> Generator[Step]:
        """The tokens that follow a text, one by one. When the iterator is closed, the KV cache holds all but the last token.

        Args:
            text: [1, tokens], all of them in the KV cache.
            logits: of the next token, [1, vocabulary].
            most: the number of tokens to generate.
            seen: the tokens of the text without padding.
        """
        self._seen = text[0].tolist() if seen is None else list(seen)
        self.proposer.start()
        self.pace.start()
        self.drafts = Drafts()
        held, given = self.decoder.length, 0
        rows, proposal, seconds = logits, Proposal(), None
        try:
            while True:
                accepted = 0
                for index, row in enumerate(rows.split(1)):
                    step, is_accepted = _verified(choice, text, row, proposal, index)
                    text = torch.cat([text, torch.tensor([[step.token]], device=text.device)], 1)
                    self._seen.append(step.token)
                    given, accepted = given + 1, accepted + is_accepted
                    self.drafts.tokens = given - 1
                    self.drafts.accepted += is_accepted
                    yield step
                    if given == most:
                        return
                    if not is_accepted:
                        break
                self.decoder.crop(held + given - 1)
                if seconds is not None:
                    self.pace.observe(len(proposal.tokens), accepted, *seconds)
                proposal, draft_seconds = self._propose(most - given - 1, choice)
                rows, call_seconds = self._verify(proposal)
                seconds = draft_seconds, call_seconds
        finally:
            self.decoder.crop(min(self.decoder.length, held + max(0, given - 1)))

    def _propose(self, most: int, choice: Choice) -> tuple[Proposal, float]:
        """Draft tokens, at most so many, and the time they took."""
        count = min(self.pace.count(), most, self.decoder.max_length - self.decoder.length - 1)
        if count < 1:
            return Proposal(), 0.0
        self.proposer.observe(self._seen)
        started = self._now()
        proposal = self.proposer.propose(count, choice)
        return proposal, self._now() - started

    def _verify(self, proposal: Proposal) -> tuple[torch.Tensor, float]:
        """The logits after the last token and each draft token, [1 + drafted, vocabulary], and the time of the call."""
        ids = torch.tensor([[self._seen[-1], *proposal.tokens]], device=self.decoder.device)
        started = self._now()
        rows = self.decoder.step_all(ids)[0]
        self.drafts.proposed += len(proposal.tokens)
        self.drafts.calls += 1
        return rows, self._now() - started

    def _now(self) -> float:
        """The time, when the device has finished its work."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        return time.perf_counter()


def _verified(choice: Choice, text: torch.Tensor, logits: torch.Tensor, proposal: Proposal, index: int) -> tuple[Step, bool]:
    """The next token of a text, and whether it is the proposed one at `index`, after which the draft goes on.

    Args:
        logits: [1, vocabulary].
    """
    scores = choice.process(text, logits)
    if index >= len(proposal.tokens):
        return Step(choice.pick(scores), logits, scores), False
    drafted = proposal.tokens[index]
    token = choice.verify(scores, drafted, proposal.probabilities[index] if proposal.probabilities else None)
    return Step(token, logits, scores), token == drafted
