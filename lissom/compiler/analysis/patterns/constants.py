"""Recognizes constants that are functions of positions: a band, a block mask, or evenly increasing numbers."""

from __future__ import annotations

import math

import torch

from lissom.compiler.analysis.patterns.facts import ALWAYS, NEVER, Count, Seen, Table, between, both, either

_INTEGERS = (torch.int32, torch.int64)
_MOST = 1 << 24
"""The most elements of a weight that is examined: a mask of 4,096 × 4,096 tokens."""
_BLOCKS = (128, 64, 32, 16)
_RUNS = 4
"""The most bands of a constant mask."""


def value_of_constant(weight: torch.Tensor) -> Count | Seen | None:
    """An integer or boolean constant as a function of positions; None when it is not a simple one."""
    weight = weight.detach()
    if not 0 < weight.numel() <= _MOST:
        return None
    if weight.dtype == torch.bool:
        return _of_table(weight.cpu(), weight.data_ptr())
    return _of_numbers(weight.cpu()) if weight.dtype in _INTEGERS else None


def _of_numbers(numbers: torch.Tensor) -> Count | None:
    """Integers that increase evenly along each dimension, or by one after every `unit` indices of one dimension."""
    offset = int(numbers.flatten()[0])
    axes = [axis for axis in range(-numbers.dim(), 0) if numbers.shape[axis] > 1]
    slopes = [(axis, int(numbers.select(axis, 1).flatten()[0]) - offset) for axis in axes]
    even = torch.full_like(numbers, offset)
    for axis, slope in slopes:
        even += (slope * torch.arange(numbers.shape[axis], dtype=numbers.dtype)).reshape(-1, *[1] * (-axis - 1))
    if torch.equal(even, numbers):
        return Count(tuple(((axis, 1), slope) for axis, slope in slopes if slope), offset)
    if len(axes) != 1 or offset:
        return None
    flat = numbers.flatten()
    unit = int((flat != 0).nonzero()[0])
    steps = torch.arange(len(flat), dtype=flat.dtype) // unit
    return Count((((axes[0], unit), 1),)) if torch.equal(flat, steps) else None


def _of_table(table: torch.Tensor, identity: int) -> Seen | None:
    """A constant condition: on one dimension, a band, or a block mask."""
    axes = [axis for axis in range(-table.dim(), 0) if table.shape[axis] > 1]
    if bool(table.all()) or not bool(table.any()):
        return ALWAYS if bool(table.all()) else NEVER
    if len(axes) == 1:
        return _runs(table.flatten(), Count((((axes[0], 1), 1),)))
    if len(axes) == 2:
        square = table.reshape(table.shape[axes[0]], table.shape[axes[1]])
        if torch.equal(square[1:, 1:], square[:-1, :-1]):
            # A band: visibility by key - query, from 1 - rows to columns - 1.
            band = torch.cat([square[:, 0].flip(0), square[0, 1:]])
            return _runs(band, Count((((axes[0], 1), -1), ((axes[1], 1), 1)), table.shape[axes[0]] - 1))
    if len(axes) not in (2, 3) or axes[-2:] != [-2, -1]:
        return None
    squares = table.reshape(-1, *table.shape[-2:])
    heads = axes[0] if len(axes) == 3 else 0
    for block in _BLOCKS:
        blocks = torch.nn.functional.max_pool2d(squares.float(), block, ceil_mode=True).bool()
        spread = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : table.shape[-2], : table.shape[-1]]
        seen: Seen = ((Table(blocks, identity, (heads, -2, -1), block),),)
        if torch.equal(spread, squares):
            return seen
        if torch.equal(spread.tril(), squares):
            return both(seen, between(Count((((-2, 1), -1), ((-1, 1), 1))), -math.inf, 0))
    return None


def _runs(line: torch.Tensor, count: Count) -> Seen | None:
    """The intervals of a count where a line of booleans holds; the values at its ends extend without bounds."""
    changes = (line[1:] != line[:-1]).nonzero().flatten().tolist()
    starts = [-1, *changes]
    ends = [*changes, len(line) - 1]
    seen: Seen | None = NEVER
    if len(ends) > 2 * _RUNS:
        return None
    for start, end in zip(starts, ends, strict=True):
        if bool(line[end]):
            low = -math.inf if start < 0 else start + 1
            high = math.inf if end == len(line) - 1 else end
            seen = either(seen, between(count, low, high))
    return seen
