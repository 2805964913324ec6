"""The slots of a pool's KV cache: a region for each sequence, whose first pages may be those of another with the same tokens.

A region is reserved for all tokens that a sequence may have, so that a sequence that was admitted never waits for slots. When
it ends, its tokens stay until the slots are needed, least recently used first, and a later sequence that begins with the same
tokens shares its whole pages.

Shared pages lie before a sequence's own, and slot and position are the same modulo a page, so that sums over keys have one
order wherever a sequence is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from lissom.frontends.generation.pool import PAGE


@dataclass(eq=False)
class Region:
    """The slots of a sequence.

    Attributes:
        begin: the first slot of its own.
        size: the number of its own slots.
        tokens: those whose keys and values are in its slots, in order.
        shared: how many of them are in the slots of `source`.
        source: the region that it shares slots with.
        users: the sequences and regions that read its slots.
        used: a counter's value when it was last used.
        own: [slots of the pool], true for the slots of its tokens; None before the first call.
    """

    begin: int
    size: int
    tokens: list[int] = field(default_factory=list)
    shared: int = 0
    source: Region | None = None
    users: int = 0
    used: int = 0
    own: torch.Tensor | None = None

    def slots(self, begin: int, end: int) -> list[int]:
        """The slots of positions [begin, end)."""
        shared = [] if self.source is None or begin >= self.shared else self.source.slots(begin, min(end, self.shared))
        first = self.begin - self.shared
        return [*shared, *range(first + max(begin, self.shared), first + max(end, self.shared))]

    @property
    def end(self) -> int:
        """One past its last slot."""
        return self.begin + self.size


class Slots:
    """The regions of a pool.

    Attributes:
        count: the slots of the pool.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._regions: list[Region] = []
        self._counter = 0

    @property
    def reserved(self) -> int:
        """Slots of sequences that have not ended, without those they share."""
        readers = Counter(region.source for region in self._regions if region.source is not None)
        return sum(region.size for region in self._regions if region.users > readers[region])

    def take(self, prompt: Sequence[int], most: int) -> Region | None:
        """A region for a sequence of at most `most` tokens that begins with a prompt; None while there is no room.

        Its tokens are those of the prompt that another region holds; at least the last one of the prompt is left to read.
        """
        source, shared = self._longest(prompt)
        region = self._placed(source, shared, most) if source is not None else None
        region = region or self._placed(None, 0, most)
        if region is not None:
            self._counter += 1
            region.users, region.used, region.tokens = 1, self._counter, list(prompt[: region.shared])
            if region.source is not None:
                region.source.users += 1
                region.source.used = self._counter
        return region

    def release(self, region: Region) -> None:
        """End a sequence; what it read stays until its slots are needed."""
        self._counter += 1
        region.users -= 1
        region.used = self._counter

    def _longest(self, prompt: Sequence[int]) -> tuple[Region | None, int]:
        """The region that shares most whole pages with a prompt, and the number of their tokens."""
        best, most = None, 0
        for region in self._regions:
            limit = min(len(region.tokens), len(prompt) - 1)
            same = next((i for i in range(limit) if region.tokens[i] != prompt[i]), limit) // PAGE * PAGE
            if same > most:
                best, most = region, same
        return best, most

    def _placed(self, source: Region | None, shared: int, most: int) -> Region | None:
        """A new region in the first gap that is long enough, after the source's slots; idle regions make room."""
        size = -(-(most - shared) // PAGE) * PAGE
        kept = {source}
        while (begin := self._gap(size, 0 if source is None else source.end)) is None:
            idle = [region for region in self._regions if not region.users and region not in kept]
            if not idle:
                return None
            self._drop(min(idle, key=lambda region: region.used))
        region = Region(begin, size, shared=shared, source=source)
        self._regions.append(region)
        return region

    def _gap(self, size: int, least: int) -> int | None:
        """The first slot of a gap of so many slots, at or after `least`."""
        taken = sorted((region.begin, region.end) for region in self._regions)
        for (_, begin), (end, _) in pairwise([(0, 0), *taken, (self.count // PAGE * PAGE, 0)]):
            if end - max(begin, least) >= size:
                return max(begin, least)
        return None

    def _drop(self, region: Region) -> None:
        self._regions.remove(region)
        if region.source is not None:
            region.source.users -= 1
