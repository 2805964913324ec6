"""Choices of token ids: the most frequent ones, up to a number or until they cover a fraction of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

Closure = Callable[[int], Iterable[int]]
"""The ids that must stay for an id to be produced by the tokenizer, itself among them."""


@dataclass
class Choice:
    """A set of ids that is closed: with each id it has those that the tokenizer needs to produce it."""

    close: Closure
    must: Iterable[int]
    kept: set[int] = field(init=False, default_factory=set[int])

    def __post_init__(self) -> None:
        for index in self.must:
            self.kept.update(self.close(index))

    def fill(self, ranked: Iterable[int], most: int) -> None:
        """Add ids in this order, as long as the set has no more than `most`."""
        for index in ranked:
            if len(self.kept) >= most:
                return
            more = {part for part in self.close(index) if part not in self.kept}
            if len(self.kept) + len(more) <= most:
                self.kept |= more


def most_frequent(ids: Iterable[int], counts: torch.Tensor | None) -> list[int]:
    """The ids by falling count; of equals, and without counts, the smallest first, as tokenizers number by frequency.

    Args:
        counts: of each id in the data, [vocabulary].
    """
    ordered = sorted(ids)
    if counts is None:
        return ordered
    known: list[int] = counts.tolist()
    return sorted(ordered, key=lambda index: -known[index])


def cover(choice: Choice, ranked: Iterable[int], counts: torch.Tensor, fraction: float) -> None:
    """Add ids in this order until those of the set make up a fraction of all tokens, or no other id occurs."""
    known = counts.tolist()
    # The fraction as a float is a little off: 0.7 of 10 tokens are 7.
    wanted = math.ceil(fraction * sum(known) - 1e-9 * max(sum(known), 1))
    covered = sum(known[index] for index in choice.kept)
    for index in ranked:
        if covered >= wanted or known[index] == 0:
            return
        more = {part for part in choice.close(index) if part not in choice.kept}
        choice.kept |= more
        covered += sum(known[part] for part in more)
