"""How the tokens of one text are chosen, and where it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lissom.errors import InputError
from lissom.generation.choice import Choice

if TYPE_CHECKING:
    from transformers import GenerationConfig

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From a text, [1, tokens], and the logits of its next token, [1, vocabulary], to scores."""

_COLDEST = 1e-30
"""The lowest temperature: below it the scaled logits overflow and softmax is NaN; here it already picks the likeliest token."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 tokens are sampled from softmax(logits / temperature).
        top_k: samples among so many of the likeliest tokens; 0 for all.
        top_p: samples among the likeliest tokens whose probabilities sum to this.
        stop: tokens that end the text; they are not returned.
        seed: of the samples.
        process: changes the logits first, as a `LogitsProcessorList` of transformers does.

    Examples:
        >>> from lissom.generation.sampling import Sampling
        >>> Sampling(temperature=0.7, top_p=0.9, stop={2}).top_p
        0.9
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: Collection[int] = field(default=())
    seed: int = 0
    process: Process | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError(
                f"temperature is {self.temperature:g}, top_k {self.top_k} and top_p {self.top_p:g}; give 0 or more, 0 or more, "
                f"and above 0 up to 1"
            )
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise InputError(f"seed is {self.seed}; give a whole number of 64 bits")

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampling:
        """The likeliest tokens up to one that ends a text of the model. Raises InputError."""
        return cls(stop=end_tokens(config.eos_token_id))

    def choice(self, device: torch.device) -> Choice:
        """The choice for one text, whose logits are on a device."""
        if self.temperature == 0:
            return Choice(self._processed, samples=False)

        def process(text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return self._warp(self._processed(text, logits))

        return Choice(process, samples=True, warp=self._warp, generator=torch.Generator(device).manual_seed(self.seed))

    def _processed(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.process is None else self.process(text, logits)

    def _warp(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits over the temperature, minus infinity outside of top-k and top-p."""
        scores = logits.float() / max(self.temperature, _COLDEST)
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(before >= self.top_p, -math.inf)
            scores = torch.full_like(scores, -math.inf).scatter(-1, order, ordered)
        return scores


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
