"""Attention patterns: the keys visible to a query as a formula of positions, which a sparse kernel computes instead of a mask.

A pattern is a disjunction of alternatives, and each a conjunction of conditions. A condition on query i and key j is

    low <= query · ⌊i / unit⌋ + key · ⌊j / unit⌋ <= high          the sum taken modulo `modulus` first, where there is one

or reads a `layout`, a table of visible blocks. So a causal window is one alternative, -∞ < j - i <= 0 and i - j < window; a
strided pattern (Child et al. 2019, Sparse Transformer, arXiv 1904.10509) is two: the last tokens, and every s-th block. The
bounds of each sum tell which blocks may hold visible pairs, without testing single tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

UNBOUNDED = 2**31 - 1
"""Stands for infinity in `low` and `high`."""
MOST_MODULUS = 2**30
"""The largest modulus; the sum of two remainders then fits in int32."""


@dataclass(frozen=True)
class Condition:
    """low <= query · ⌊i / unit⌋ + key · ⌊j / unit⌋ <= high, the sum modulo `modulus` (from 0 to modulus - 1) unless that is 0.

    Attributes:
        query: -1, 0 or 1; both 0 reads the layout instead.
        key: -1, 0 or 1.
        unit: tokens, at least 1.
    """

    query: int
    key: int
    low: int = -UNBOUNDED
    high: int = UNBOUNDED
    unit: int = 1
    modulus: int = 0

    @property
    def asks_layout(self) -> bool:
        return self.query == 0 and self.key == 0

    def check(self) -> None:
        """Raise ValueError when a field is out of range."""
        fits = {self.query, self.key} <= {-1, 0, 1} and 1 <= self.unit <= UNBOUNDED and 0 <= self.modulus <= MOST_MODULUS
        if not (fits and -UNBOUNDED <= self.low <= UNBOUNDED and -UNBOUNDED <= self.high <= UNBOUNDED):
            raise ValueError(
                f"{self} is out of range: query and key are -1, 0 or 1, unit is from 1 to {UNBOUNDED}, low and high are from "
                f"-{UNBOUNDED} to {UNBOUNDED}, and modulus is from 0 to {MOST_MODULUS}"
            )

    def holds(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """True where the condition holds for queries i and keys j, which broadcast; it must not read the layout."""
        value = self.query * (i // self.unit) + self.key * (j // self.unit)
        if self.modulus:
            # A difference of positions may be negative, and on some devices the remainder then is too.
            value = (value % self.modulus + self.modulus) % self.modulus
        return (value >= self.low) & (value <= self.high)


LAYOUT = Condition(0, 0)
"""The condition that the block of the query and the key is visible in the layout."""
_FIELDS = len(astuple(LAYOUT))
_NO_LAYOUT = "this pattern needs a layout, and none was given"


@dataclass(frozen=True)
class Pattern:
    """The visible keys of each query.

    Attributes:
        alternatives: each a conjunction of conditions; without any, no key is visible.
        block: tokens per block of the layout, [heads or 1, query blocks, key blocks], boolean. Tokens past its last block
            belong to the last one.
    """

    alternatives: tuple[tuple[Condition, ...], ...]
    block: int = 64

    def encode(self) -> list[int]:
        """The alternatives as an operator's argument: for each condition the number of its alternative and its six fields."""
        return [
            value
            for number, conditions in enumerate(self.alternatives)
            for condition in conditions
            for value in (number, *astuple(condition))
        ]

    @staticmethod
    def decode(values: Sequence[int], block: int) -> Pattern:
        """The pattern of an operator's argument.

        Raises:
            ValueError: when it is not a pattern, or one that kernels cannot compute in int32.
        """
        if len(values) % (_FIELDS + 1):
            raise ValueError(f"a pattern has {len(values)} numbers, and must have seven a condition")
        if any(after < before for before, after in itertools.pairwise(values[:: _FIELDS + 1])):
            raise ValueError("a pattern's alternatives must be numbered in order")
        alternatives: dict[int, list[Condition]] = {}
        for start in range(0, len(values), _FIELDS + 1):
            number, *fields = values[start : start + _FIELDS + 1]
            condition = Condition(*fields)
            condition.check()
            alternatives.setdefault(number, []).append(condition)
        return Pattern(tuple(map(tuple, alternatives.values())), block)

    @property
    def asks_layout(self) -> bool:
        return any(condition.asks_layout for conditions in self.alternatives for condition in conditions)

    @property
    def band(self) -> tuple[int, int] | None:
        """The bounds of j - i where they alone decide whether query i sees key j, as in a sliding window; None elsewhere."""
        if len(self.alternatives) != 1:
            return None
        low, high = -UNBOUNDED, UNBOUNDED
        for condition in self.alternatives[0]:
            if condition.key == 0 or condition.query != -condition.key or condition.unit != 1 or condition.modulus != 0:
                return None
            bounds = sorted((condition.key * condition.low, condition.key * condition.high))
            low, high = max(low, bounds[0]), min(high, bounds[1])
        return low, high

    def mask(self, queries: int, keys: int, layout: torch.Tensor | None = None) -> torch.Tensor:
        """The dense mask: boolean, [heads or 1, queries, keys], on the layout's device."""
        device = None if layout is None else layout.device
        i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, None]
        return self.seen(i, j, layout).contiguous()

    def seen(self, i: torch.Tensor, j: torch.Tensor, layout: torch.Tensor | None = None) -> torch.Tensor:
        """The mask of pairs of positions, [heads or 1, .., queries, keys].

        Args:
            i: [.., queries, 1].
            j: [heads or 1, .., 1, keys]. Where i is [rows, queries, 1], the queries of a row are in one block.

        Raises:
            ValueError: when the pattern reads a layout and there is none.
        """
        visible = torch.zeros((), dtype=torch.bool, device=j.device)
        for conditions in self.alternatives:
            both = torch.ones((), dtype=torch.bool, device=j.device)
            for condition in conditions:
                both = both & (self._laid_out(i, j, layout) if condition.asks_layout else condition.holds(i, j))
            visible = visible | both
        return visible.expand(torch.broadcast_shapes(visible.shape, i.shape, j.shape))

    def _laid_out(self, i: torch.Tensor, j: torch.Tensor, layout: torch.Tensor | None) -> torch.Tensor:
        if layout is None:
            raise ValueError(_NO_LAYOUT)
        row, column = (
            (positions // self.block).clamp(max=size - 1) for positions, size in zip((i, j), layout.shape[1:], strict=True)
        )
        row = row[:, :1] if row.dim() == 3 else row
        head = torch.arange(layout.shape[0], device=j.device).view(-1, *[1] * (j.dim() - 1))
        return layout.to(j.device)[head, row, column]

    def blocks(
        self, queries: int, keys: int, block: int, layout: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of `block` tokens that may hold visible pairs, and blocks that are fully visible.

        Both boolean, [heads or 1, query blocks, key blocks], and conservative: the first may contain a block without visible
        pairs, and the second may miss a fully visible one.
        """
        heads = layout.shape[0] if layout is not None else 1
        rows, columns = -(-queries // block), -(-keys // block)
        some = torch.zeros(heads, rows, columns, dtype=torch.bool)
        whole = torch.zeros(heads, rows, columns, dtype=torch.bool)
        i, j = (_bounds(count, block, length) for count, length in ((rows, queries), (columns, keys)))
        for conditions in self.alternatives:
            may, must = torch.ones_like(some), torch.ones_like(whole)
            for condition in conditions:
                if condition.asks_layout:
                    first, every = _layout_blocks(layout, i, j, self.block)
                else:
                    first, every = _reached(condition, i, j)
                may, must = may & first, must & every
            some, whole = some | may, whole | must
        return some, whole


def _bounds(count: int, block: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last token of each block."""
    first = torch.arange(count) * block
    return first, (first + block - 1).clamp(max=length - 1)


def _reached(
    condition: Condition, i: tuple[torch.Tensor, torch.Tensor], j: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """True where the condition may hold for some pair of positions of two blocks, and where for all; [rows, columns]."""
    low = high = torch.zeros(len(i[0]), len(j[0]), dtype=torch.int64)
    for factor, (first, last), axis in ((condition.query, i, 1), (condition.key, j, 0)):
        ends = [factor * (end // condition.unit).unsqueeze(axis) for end in (first, last)]
        low, high = low + torch.minimum(*ends), high + torch.maximum(*ends)
    if not condition.modulus:
        return (high >= condition.low) & (low <= condition.high), (low >= condition.low) & (high <= condition.high)
    m, least, most = condition.modulus, max(condition.low, 0), min(condition.high, condition.modulus - 1)
    start, length = low % m, high - low
    some = whole = torch.full(start.shape, False)
    for turn in (0, m):  # a run of values past m - 1 wraps around to 0
        some = some | ((start <= most + turn) & (start + length >= least + turn))
        whole = whole | ((start >= least + turn) & (start + length <= most + turn))
    every = length >= m - 1
    return torch.where(every, least <= most, some), torch.where(every, (least, most) == (0, m - 1), whole)


def _layout_blocks(
    layout: torch.Tensor | None, i: tuple[torch.Tensor, torch.Tensor], j: tuple[torch.Tensor, torch.Tensor], block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """True where some, and where all, of the layout's blocks that overlap each pair of blocks are visible."""
    if layout is None:
        raise ValueError(_NO_LAYOUT)
    (top, bottom), (left, right) = (
        [(end // block).clamp(max=size - 1) for end in ends] for ends, size in zip((i, j), layout.shape[1:], strict=True)
    )
    # Only the part that overlaps the blocks, because a layout covers the longest sequence.
    rows, columns = (int(last[-1]) + 1 if len(last) else 0 for last in (bottom, right))
    table = layout[:, :rows, :columns].cpu()
    sums = torch.nn.functional.pad(table.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0, 1, 0))
    strips = sums[:, bottom + 1] - sums[:, top]
    count = strips[:, :, right + 1] - strips[:, :, left]
    return count > 0, count == (bottom + 1 - top)[:, None] * (right + 1 - left)
