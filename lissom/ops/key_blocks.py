"""The key blocks that each block of queries reads in blocked attention, as rules that hold at every sequence length.

Each alternative of a pattern becomes one of these, which covers all keys visible by it:

- a band, |i - j| bounded: key blocks at fixed offsets from the query block (`offsets`);
- the first keys, or one of every `period` keys, for all queries: their positions (`prefix`, `strides`);
- the first queries, for all keys: query blocks that read all keys (`dense_rows`);
- a layout: a table of key blocks per query block, without rows that read far more than others (`table`, `dense_rows`).

Others, such as every s-th key before the query, have a table at one length and no rule for all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lissom.ops.pattern import UNBOUNDED, Condition, Pattern

BLOCK = 64
"""Tokens per block without a layout: matrix products of this size are near the fastest, and few hidden keys are read."""
_WIDE, _WIDE_BLOCK = 512, 128
"""Bands this wide use larger blocks, of which fewer are copied."""
_SMALLEST = 16
"""The smallest block; smaller products take more time than the hidden keys they skip."""


@dataclass(frozen=True)
class KeyBlocks:
    """The keys that query blocks read.

    Attributes:
        block: tokens per block.
        offsets: query block r reads key blocks r + offset, where they exist.
        prefix: all query blocks read keys 0 to prefix - 1.
        strides: (first, last, period): and keys with first <= j mod period <= last.
        table: int64, [heads or 1, rows + 1, count]: further key blocks of each query block, -1 for none; the last row is that
            of all query blocks past the others.
        tail: all query blocks read keys from here on; None for none.
        dense_rows: query blocks that read all keys instead.
        dense_end: query blocks from here on do so too; None for none.
    """

    block: int
    offsets: tuple[int, ...] = ()
    prefix: int = 0
    strides: tuple[tuple[int, int, int], ...] = ()
    table: torch.Tensor | None = None
    tail: int | None = None
    dense_rows: tuple[int, ...] = ()
    dense_end: int | None = None

    @property
    def heads(self) -> int:
        """The number of heads in the table; 1 where all heads read the same keys."""
        return 1 if self.table is None else self.table.shape[0]

    @property
    def slots(self) -> int:
        """The number of key blocks that one query block reads."""
        return len(self.offsets) + (0 if self.table is None else self.table.shape[-1])

    def runs(self) -> list[tuple[int, int]]:
        """The offsets as ranges, each its first and last."""
        ranges: list[tuple[int, int]] = []
        for offset in self.offsets:
            if ranges and ranges[-1][1] == offset - 1:
                ranges[-1] = (ranges[-1][0], offset)
            else:
                ranges.append((offset, offset))
        return ranges

    def pairs(self, queries: int, keys: int) -> int:
        """The number of scores per head at a length."""
        rows = -(-queries // self.block)
        strided = sum(-(-keys // period) * (last - first + 1) for first, last, period in self.strides)
        behind = max(keys - self.tail, 0) if self.tail is not None else 0
        dense = sum(row < rows for row in self.dense_rows)
        dense += max(rows - self.dense_end, 0) if self.dense_end is not None else 0
        return self.block * (
            rows * (self.slots * self.block + min(self.prefix, keys) + strided + behind) + min(dense, rows) * keys
        )


def key_blocks(
    pattern: Pattern, layout: torch.Tensor | None, queries: int | None = None, keys: int | None = None
) -> KeyBlocks | str:
    """The key blocks of a pattern at every length; without such a rule, at the lengths given; or a sentence why there are none.

    Args:
        layout: [heads or 1, query blocks, key blocks], with known values.
    """
    asks = [any(condition.asks_layout for condition in conditions) for conditions in pattern.alternatives]
    if any(asks) and pattern.block < _SMALLEST:
        return f"its layout has blocks of {pattern.block} tokens, and products of fewer than {_SMALLEST} gain nothing"
    blocks = _by_rules(pattern, layout, asks)
    if isinstance(blocks, KeyBlocks) or queries is None or keys is None:
        return blocks
    block = pattern.block if any(asks) else BLOCK
    table = pattern.blocks(queries, keys, block, layout)[0]
    return _with_table(KeyBlocks(block), table, table.new_zeros(table.shape[0], 1, table.shape[2]))


def _by_rules(pattern: Pattern, layout: torch.Tensor | None, asks: Sequence[bool]) -> KeyBlocks | str:
    bands: list[tuple[int, int]] = []
    prefix = dense = 0
    strides: list[tuple[int, int, int]] = []
    for conditions, asking in zip(pattern.alternatives, asks, strict=True):
        if asking:
            continue
        low, high = _band(conditions)
        front, stride, rows = _front(conditions, of_keys=True), _stride(conditions), _front(conditions, of_keys=False)
        if high < low or front == 0 or rows == 0:
            continue
        width = high - low + 1
        if front is not None and front <= width:
            prefix = max(prefix, front)
        elif low > -UNBOUNDED and high < UNBOUNDED:
            bands.append((low, high))
        elif stride is not None:
            strides.append(stride)
        elif rows is not None:
            dense = max(dense, rows)
        else:
            return "what a query sees grows with the length, and not as blocks or single keys that all queries share"
    widest = max((high - low + 1 for low, high in bands), default=0)
    block = pattern.block if any(asks) else _WIDE_BLOCK if widest >= _WIDE else BLOCK
    ends = [(-((block - 1 - low) // block), (high + block - 1) // block) for low, high in bands]
    offsets = tuple(sorted({offset for first, last in ends for offset in range(first, last + 1)}))
    blocks = KeyBlocks(block, offsets, prefix, tuple(sorted(set(strides))), dense_rows=tuple(range(-(-dense // block))))
    return blocks if not any(asks) else _with_layout(blocks, pattern, layout, asks)


def _with_layout(blocks: KeyBlocks, pattern: Pattern, layout: torch.Tensor | None, asks: Sequence[bool]) -> KeyBlocks:
    if layout is None:
        raise ValueError("this pattern needs a layout, and none was given")
    layout = layout.cpu()
    _, rows, columns = layout.shape
    asking = tuple(conditions for conditions, asked in zip(pattern.alternatives, asks, strict=True) if asked)
    table = Pattern(asking, pattern.block).blocks(rows * blocks.block, columns * blocks.block, blocks.block, layout)[0]
    apart = torch.arange(columns) - torch.arange(rows)[:, None]
    in_band = torch.isin(apart, torch.tensor(blocks.offsets, dtype=torch.int64))
    # The offsets of the band depend on the row.
    blocks = _with_table(blocks, table & ~in_band, layout[:, -1:])
    return replace(blocks, tail=columns * blocks.block) if bool(layout[:, :, -1].any()) else blocks


def _with_table(blocks: KeyBlocks, table: torch.Tensor, behind: torch.Tensor) -> KeyBlocks:
    """With the blocks of a boolean table, without rows that would make it wide.

    Args:
        behind: the row of all further query blocks.
    """
    table = torch.cat([table, behind], 1)
    rows, columns = table.shape[1] - 1, table.shape[2]
    counts = table.sum(-1).amax(0)
    widths = [int(count) for count in counts.unique()]
    width = min(widths, key=lambda count: rows * count + int((counts > count).sum()) * columns)
    dense = counts > width
    table = table & ~dense[:, None]
    indices = torch.where(table, torch.arange(columns), columns).sort(-1).values[..., :width]
    return replace(
        blocks,
        table=indices.masked_fill(indices == columns, -1),
        dense_rows=tuple(sorted({*blocks.dense_rows, *(int(row) for row in dense[:-1].nonzero())})),
        dense_end=rows if bool(dense[-1]) else None,
    )


def _band(conditions: Sequence[Condition]) -> tuple[int, int]:
    """The bounds of j - i, in tokens."""
    low, high = -UNBOUNDED, UNBOUNDED
    for condition in conditions:
        if condition.modulus or condition.query * condition.key != -1:
            continue
        ends = (condition.low, condition.high) if condition.key == 1 else (-condition.high, -condition.low)
        # ⌊j / unit⌋ - ⌊i / unit⌋ is less than 1 from (j - i) / unit.
        if ends[0] > -UNBOUNDED:
            low = max(low, ends[0] * condition.unit - (condition.unit - 1))
        if ends[1] < UNBOUNDED:
            high = min(high, ends[1] * condition.unit + condition.unit - 1)
    return low, high


def _front(conditions: Sequence[Condition], of_keys: bool) -> int | None:
    """The number of first keys, or queries, that fulfil conditions on them alone; None where it is unbounded."""
    front: int | None = None
    for condition in conditions:
        factor, other = (condition.key, condition.query) if of_keys else (condition.query, condition.key)
        if factor == 0 or other != 0 or condition.modulus:
            continue
        last = condition.high if factor == 1 else -condition.low
        if last < UNBOUNDED:
            end = max(last + 1, 0) * condition.unit
            front = end if front is None else min(front, end)
    return front


def _stride(conditions: Sequence[Condition]) -> tuple[int, int, int] | None:
    """The keys of a periodic condition: (first, last, period); None where there is no such condition."""
    periodic = [condition for condition in conditions if condition.query == 0 and condition.key == 1 and condition.modulus]
    if not periodic:
        return None
    condition = min(periodic, key=lambda candidate: (candidate.high - candidate.low) / candidate.modulus)
    low, high = max(condition.low, 0), min(condition.high, condition.modulus - 1)
    # At half of the keys or more, reading all of them costs about the same.
    if 2 * (high - low + 1) > condition.modulus:
        return None
    return low * condition.unit, (high + 1) * condition.unit - 1, condition.modulus * condition.unit
