"""How the next token is chosen from logits: the likeliest, or a sample, with and without a draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _unchanged(scores: torch.Tensor) -> torch.Tensor:
    return scores


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen.

    Attributes:
        process: gives scores, [1, vocabulary], for a text, [1, tokens], and the logits of its next token, [1, vocabulary].
        samples: draws from softmax(scores); otherwise the token with the highest score is taken.
        warp: gives the scores of a draft's logits, [1, vocabulary], such as logits / temperature.
        generator: of the samples; None for the global one.
    """

    process: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    samples: bool
    warp: Callable[[torch.Tensor], torch.Tensor] = _unchanged
    generator: torch.Generator | None = None

    def pick(self, scores: torch.Tensor) -> int:
        """The next token."""
        return self.draw(scores.softmax(-1)) if self.samples else int(scores.argmax(-1))

    def pick_draft(self, logits: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        """A token for a draft's logits, [1, vocabulary], and where it is sampled, the probabilities, [1, vocabulary]."""
        if not self.samples:
            return int(logits.argmax(-1)), None
        probabilities = self.warp(logits.float()).softmax(-1)
        return self.draw(probabilities), probabilities

    def verify(self, scores: torch.Tensor, drafted: int, probabilities: torch.Tensor | None) -> int:
        """The next token in place of a drafted one; equal to it if that is accepted.

        A sample has the distribution softmax(scores), whatever was drafted: a drafted token is accepted with probability
        min(1, p / q), and otherwise a token is drawn from max(0, p - q) (Leviathan et al. 2023,
        https://arxiv.org/abs/2211.17192, section 2.3).

        Args:
            probabilities: q, [1, vocabulary], that the drafted token was sampled from; None if it was not sampled.
        """
        if probabilities is None or not self.samples:
            # A draw that is compared with the token accepts it with probability p, as rejection does with q = 1.
            return self.pick(scores)
        p, q = scores.softmax(-1), probabilities.to(scores.device)
        threshold = torch.rand((), generator=self.generator, device=scores.device)
        if threshold * q[0, drafted] < p[0, drafted]:
            return drafted
        rest = (p - q).clamp_min(0)
        # Equal distributions leave no rest but rounding errors.
        return self.draw(rest if bool(rest.sum() > 0) else p)

    def draw(self, probabilities: torch.Tensor) -> int:
        """A sample from probabilities, [1, vocabulary], which need not sum to 1."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
