"""The mask of an attention pattern, computed by ONNX nodes from the lengths of a call.

Lengths are read from the model's inputs where possible, so that layers with the same pattern share the computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.rewriting import Number, Writer, shape_of
from lissom.ops.key_blocks import KeyBlocks
from lissom.ops.pattern import UNBOUNDED, Condition, Pattern


@dataclass(frozen=True)
class Read:
    """The keys that query blocks read.

    Attributes:
        rows: the number of query blocks, [1].
        blocks: the number of key blocks, [1].
        alone: positions that all query blocks read, as further key blocks, [count]; None for none.
        all_blocks: the number of key blocks with these, [1].
        column: key blocks, [heads or 1, rows, slots].
        j: their positions, [heads or 1, rows, read].
        counts: which of them are valid and no duplicates.
        read: their number, [1].
    """

    rows: ir.Value
    blocks: ir.Value
    all_blocks: ir.Value
    column: ir.Value
    alone: ir.Value | None
    j: ir.Value
    counts: ir.Value
    read: ir.Value


def read_positions(write: Writer, reads: KeyBlocks, queries: ir.Value, keys: ir.Value) -> Read:
    """The positions that each query block reads.

    Args:
        queries: their number, [1].
        keys: their number, [1].
    """
    call, size, heads = write.call, reads.block, reads.heads
    rows, blocks = (call("Div", call("Add", length, size - 1), size) for length in (queries, keys))
    row = call("Unsqueeze", write.counted(0, rows), 1)
    column = call("Add", row, write.constant(np.array([reads.offsets], np.int64)))
    column = write.expanded(column, heads, 1, 1)
    counts = call("GreaterOrEqual", column, 0)
    if reads.table is not None:
        last = reads.table.shape[1] - 1
        table = call("Gather", write.constant(reads.table.numpy()), write.call("Min", write.counted(0, rows), last), axis=1)
        fresh = [call("GreaterOrEqual", table, 0)]
        for start, end in reads.runs():
            apart = call("Sub", table, row)
            fresh.append(call("Not", write.every(call("GreaterOrEqual", apart, start), call("LessOrEqual", apart, end))))
        counts = call("Concat", counts, write.every(*fresh), axis=-1)
        column = call("Concat", column, table, axis=-1)
    inside = write.constant(np.arange(size, dtype=np.int64))
    column = call("Max", column, 0)
    j = call("Add", call("Unsqueeze", call("Mul", column, size), -1), inside)
    there = write.every(call("Unsqueeze", counts, -1), call("Less", j, keys))
    others = _is_alone(write, reads, j, reads.tail)
    there = there if others is None else write.every(there, call("Not", others))
    width = reads.slots * size
    end = call("Sub", keys, 1)
    j, there = write.shaped(call("Min", j, end), heads, -1, width), write.shaped(there, heads, -1, width)
    column = call("Min", column, call("Sub", blocks, 1))
    alone = _alone(write, reads, keys)
    if alone is None:
        return Read(rows, blocks, blocks, column, None, j, there, write.integers(width))
    places, once = alone
    count = call("Shape", places, start=0, end=1)
    spare = call("Mod", call("Neg", count), size)
    places = call("Pad", places, call("Concat", 0, spare, axis=0))
    once = call("Concat", once, call("Less", write.counted(0, spare), 0), axis=0)
    behind = call("Add", blocks, call("Div", call("Add", count, spare), size))
    sizes = heads, rows, 1
    column = call("Concat", column, write.expanded(write.counted(blocks, behind), *sizes), axis=-1)
    j = call("Concat", j, write.expanded(places, *sizes), axis=-1)
    there = call("Concat", there, write.expanded(once, *sizes), axis=-1)
    return Read(rows, blocks, behind, column, places, j, there, call("Shape", j, start=-1))


def row_places(write: Writer, reads: KeyBlocks, rows: ir.Value, end: ir.Value) -> ir.Value:
    """The index of each query block's output; those of query blocks that read all keys start at `end`, after all others."""
    call, row = write.call, write.counted(0, rows)
    place = row
    if reads.dense_rows:
        numbers = [-1] * (reads.dense_rows[-1] + 2)
        for number, dense in enumerate(reads.dense_rows):
            numbers[dense] = number
        known = call("Gather", write.integers(*numbers), call("Min", row, len(numbers) - 1), axis=0)
        place = call("Where", call("GreaterOrEqual", known, 0), call("Add", known, end), place)
    if reads.dense_end is not None:
        behind = call("Add", row, call("Add", end, len(reads.dense_rows) - reads.dense_end))
        place = call("Where", call("GreaterOrEqual", row, reads.dense_end), behind, place)
    return place


def _alone(write: Writer, reads: KeyBlocks, keys: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The positions that all queries read, and which of them exist and are no duplicates; None for none."""
    call, end = write.call, write.call("Sub", keys, 1)
    places: list[ir.Value] = []
    fresh: list[ir.Value] = []
    if reads.prefix:
        front = write.constant(np.arange(reads.prefix, dtype=np.int64))
        places.append(call("Min", front, end))
        fresh.append(call("Less", front, keys))
    for number, (first, last, period) in enumerate(reads.strides):
        starts = call("Unsqueeze", write.counted(0, keys, period), 1)
        positions = write.shaped(call("Add", starts, write.constant(np.arange(first, last + 1, dtype=np.int64))), -1)
        new = [call("Less", positions, keys), call("GreaterOrEqual", positions, reads.prefix)]
        new += [call("Not", _in_stride(write, other, positions)) for other in reads.strides[:number]]
        places.append(call("Min", positions, end))
        fresh.append(write.every(*new))
    if reads.tail is not None:
        positions = write.counted(write.call("Min", keys, reads.tail), keys)
        others = _is_alone(write, reads, positions, None)
        places.append(positions)
        fresh.append(call("GreaterOrEqual", positions, 0) if others is None else call("Not", others))
    if not places:
        return None
    return (places[0], fresh[0]) if len(places) == 1 else (call("Concat", *places, axis=0), call("Concat", *fresh, axis=0))


def _is_alone(write: Writer, reads: KeyBlocks, j: ir.Value, tail: int | None) -> ir.Value | None:
    """True where all queries read a position; None if there are no such positions."""
    conditions = [write.call("Less", j, reads.prefix)] if reads.prefix else []
    conditions += [_in_stride(write, stride, j) for stride in reads.strides]
    conditions += [write.call("GreaterOrEqual", j, tail)] if tail is not None else []
    return write.some(*conditions) if conditions else None


def _in_stride(write: Writer, stride: tuple[int, int, int], j: ir.Value) -> ir.Value:
    first, last, period = stride
    place = write.call("Mod", j, period)
    return write.every(write.call("GreaterOrEqual", place, first), write.call("LessOrEqual", place, last))


def seen(
    write: Writer, pattern: Pattern, i: ir.Value, j: ir.Value, row: ir.Value, layout: ir.Value | None, rank: int
) -> ir.Value:
    """The pattern's mask for queries i and keys j, which broadcast.

    Args:
        row: positions with the blocks of i.
        rank: the number of dimensions of j, the first of which is that of the layout's heads, or 1.
    """
    alternatives: list[ir.Value] = []
    for conditions in pattern.alternatives:
        comparisons = [
            _laid_out(write, pattern, row, j, layout, rank) if condition.asks_layout else _holds(write, condition, i, j)
            for condition in conditions
        ]
        always = [write.call("GreaterOrEqual", j, 0)]
        alternatives.append(
            write.every(*(comparison for part in comparisons for comparison in part), *([] if any(comparisons) else always))
        )
    mask = write.some(*alternatives) if alternatives else write.call("Less", j, 0)
    conditions = [condition for alternative in pattern.alternatives for condition in alternative]
    # A condition on keys alone, or on queries alone, broadcasts.
    for named, positions in ((any(one.query for one in conditions), i), (any(one.key for one in conditions), j)):
        mask = mask if named else write.every(mask, write.call("GreaterOrEqual", positions, 0))
    return mask


def _holds(write: Writer, condition: Condition, i: ir.Value, j: ir.Value) -> list[ir.Value]:
    """The comparisons whose conjunction the condition is."""
    call = write.call
    parts: list[tuple[int, ir.Value]] = []
    for factor, value in ((condition.key, j), (condition.query, i)):
        if factor:
            parts.append((factor, value if condition.unit == 1 else call("Div", value, condition.unit)))
    low, high = condition.low, condition.high
    if condition.modulus or len(parts) == 1 or condition.key == condition.query:
        signed = [value if factor == 1 else call("Neg", value) for factor, value in parts]
        value = signed[0] if len(signed) == 1 else call("Add", *signed)
        value = call("Mod", value, condition.modulus) if condition.modulus else value
        least, most = low, high
        bounds: tuple[Number, Number] = low, high
    else:
        # Bounds of j - i: comparing j with i + bound needs no tensor of differences.
        (factor, value), (_, other) = parts
        least, most = (low, high) if factor == 1 else (-high, -low)
        bounds = call("Add", other, least), call("Add", other, most)
    comparisons: list[ir.Value] = []
    if least > -UNBOUNDED:
        comparisons.append(call("GreaterOrEqual", value, bounds[0]))
    if most < UNBOUNDED:
        comparisons.append(call("LessOrEqual", value, bounds[1]))
    return comparisons


def _laid_out(
    write: Writer, pattern: Pattern, row: ir.Value, j: ir.Value, layout: ir.Value | None, rank: int
) -> list[ir.Value]:
    """The layout at the blocks of queries and keys."""
    if layout is None:
        raise ValueError("this pattern needs a layout, and none was given")
    call = write.call
    heads, rows, columns = (write.length(layout, axis) for axis in range(3))
    ends = [call("Sub", count, 1) for count in (rows, columns)]
    row, column = (
        call("Min", call("Div", positions, pattern.block), end) for positions, end in zip((row, j), ends, strict=True)
    )
    place = call("Add", call("Mul", row, columns), column)
    if shape_of(layout)[0] != 1:
        head = write.shaped(write.counted(0, heads), -1, *[1] * (rank - 1))
        place = call("Add", place, call("Mul", head, call("Mul", rows, columns)))
    return [call("Gather", write.shaped(layout, -1), place, axis=0)]
