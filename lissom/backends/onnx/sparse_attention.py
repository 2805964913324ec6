"""`lissom::block_sparse_attention` in ONNX: by gathered key blocks, or with a dense mask.

By key blocks, each block of queries is a sequence of its own in an attention node that `attention.py` expands, so that it too
may be one operator: blocks of the outputs of projections, [batch, tokens, heads · head_dim], are gathered for a few blocks of
queries at a time. No tensor has the size queries × keys.

ONNX Runtime's own operators for it are not used. On a CPU `com.microsoft.GroupQueryAttention` with `local_window_size` and
`com.microsoft.SparseAttention` compute dense scores and mask them in the softmax. That takes dense memory, and at least twice
the time of key blocks at a window of an eighth of 4,096 tokens. `LongformerAttention` has a kernel for CUDA only, includes the
projections, and has further projections for global tokens, which no pattern describes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from lissom.backends.onnx.attention import Site, projection, skip_joins
from lissom.backends.onnx.positions import Read, read_positions, row_places, seen
from lissom.backends.onnx.rewriting import Writer, constant_of, fixed_size, nodes_of, shape_of
from lissom.backends.onnx.translation import ATTENTION, DOMAIN, SPARSE_ATTENTION
from lissom.ops.key_blocks import KeyBlocks, key_blocks
from lissom.ops.pattern import Pattern

CPU_BYTES, OTHER_BYTES = 2**21, 2**28
"""Bytes of keys and values gathered at a time; scores and transposes take two or three times as much."""
_HEADS_FIRST = (0, 2, 1, 3)
_ROWS, _READ = "query_blocks", "keys_read"
"""Names of sizes: query blocks of all sequences, and keys read per query block."""


def expand_sparse(model: ir.Model, gathered: bool, chunk_bytes: int = CPU_BYTES) -> int:
    """Expand each block-sparse attention by key blocks where possible, else with a dense mask; returns how many by key blocks.

    Args:
        chunk_bytes: of keys and values gathered at a time, at least those of one query block.
    """
    count = 0
    for node in nodes_of(model, DOMAIN, SPARSE_ATTENTION):
        site = Sparse.of_pattern(model, node, chunk_bytes)
        reads = site.reads() if gathered else None
        count += isinstance(reads, KeyBlocks)
        result = _by_blocks(site, reads) if isinstance(reads, KeyBlocks) else _by_mask(site)
        site.write.replace(node, result)
    return count


def ungathered(model: ir.Model) -> str | None:
    """The reason a block-sparse attention cannot be computed by key blocks; None if all can."""
    reads = (Sparse.of_pattern(model, node).reads() for node in nodes_of(model, DOMAIN, SPARSE_ATTENTION))
    return next((reason for reason in reads if isinstance(reason, str)), None)


@dataclass(frozen=True)
class Sparse(Site):
    """One block-sparse attention. mask: the bias, or a further mask, besides the pattern."""

    layout: ir.Value | None
    pattern: Pattern
    chunk_bytes: int

    @classmethod
    def of_pattern(cls, model: ir.Model, node: ir.Node, chunk_bytes: int = CPU_BYTES) -> Sparse:
        q, k, v, bias, layout, sinks = (*node.inputs, None, None, None)[:6]
        assert q is not None and k is not None and v is not None
        given = node.attributes
        pattern = Pattern.decode(given.get_ints("pattern", ()), given.get_int("block", 0))
        return cls(
            q, k, v, bias, sinks,
            scale=given.get_float("scale", 1.0), softcap=given.get_float("softcap", 0.0), causal=False, zeros=sinks is None,
            result=node.outputs[0], write=Writer(model),
            layout=layout if pattern.asks_layout else None, pattern=pattern, chunk_bytes=chunk_bytes,
        )  # fmt: skip

    def reads(self) -> KeyBlocks | str:
        """The key blocks of the pattern, or why it has none."""
        layout = constant_of(self.layout)
        if layout is None and self.layout is not None:
            return "its layout is computed"
        lengths = [shape_of(value)[2] for value in (self.q, self.k)]
        known = [size for size in lengths if isinstance(size, int)]
        table = None if layout is None else torch.tensor(layout)
        blocks = key_blocks(self.pattern, table, *(known if len(known) == 2 else ()))
        return "it reads no blocks" if isinstance(blocks, KeyBlocks) and not blocks.slots else blocks

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, sinks: ir.Value | None, zeros: bool = True
    ) -> ir.Value:
        """An attention node, which `expand_attention` replaces.

        Args:
            zeros: fully masked rows yield zeros.
        """
        options = {"scale": self.scale, "softcap": self.softcap, "causal": 0, "zeros": int(zeros and sinks is None)}
        return self.write.op(ATTENTION, [q, k, v, mask, sinks], options, domain=DOMAIN)

    def joined(self, value: ir.Value) -> ir.Value:
        """[batch, heads, tokens, width] as [batch, tokens, heads · width]."""
        projected = projection(value)
        if projected is not None:
            return projected
        moved = self.write.call("Transpose", value, perm=_HEADS_FIRST)
        return self.write.shaped(moved, 0, 0, _heads(value) * _width(value))

    def biased(self, visible: ir.Value, i: ir.Value, j: ir.Value, rank: int) -> ir.Value:
        """Mask or additive bias for queries i and keys j, [batch or 1, heads or 1, .., queries, keys]."""
        write, call, bias = self.write, self.write.call, self.mask
        visible = call("Unsqueeze", visible, 0)
        if bias is not None:
            sizes = [1] * (4 - len(shape_of(bias))) + list(shape_of(bias))
            place = write.constant(np.zeros([1] * rank, np.int64))
            for axis, positions in ((1, None), (2, i), (3, j)):
                if sizes[axis] == 1:
                    continue
                length = write.length(bias, axis - 4)
                if positions is None:
                    positions = write.shaped(write.counted(0, length), -1, *[1] * (rank - 1))
                place = call("Add", call("Mul", place, length), call("Min", positions, call("Sub", length, 1)))
            flat = write.shaped(bias, *((1, -1) if sizes[0] == 1 else (write.length(bias, 0), -1)))
            gathered = call("Gather", flat, place, axis=1)
            if bias.dtype == ir.DataType.BOOL:
                visible = write.every(visible, gathered)
            else:
                hidden = call("CastLike", write.constant(np.array(-np.inf, np.float32)), bias)
                visible = call("Where", visible, gathered, hidden)
        dtype = ir.DataType.BOOL if bias is None else bias.dtype
        assert dtype is not None
        visible.dtype = dtype
        return visible


def _heads(value: ir.Value) -> int:
    return fixed_size(value, 1)


def _width(value: ir.Value) -> int:
    return fixed_size(value, 3)


def _by_mask(site: Sparse) -> ir.Value:
    write = site.write
    queries, keys = write.length(site.q, 2), write.length(site.k, 2)
    i, j = write.call("Unsqueeze", write.counted(0, queries), 1), write.shaped(write.counted(0, keys), 1, 1, -1)
    mask = site.biased(seen(write, site.pattern, i, j, i, site.layout, 3), i, j, 3)
    _typed(mask, mask.dtype, [_sequences_of_mask(site), _heads_of_mask(site), shape_of(site.q)[2], shape_of(site.k)[2]])
    return site.attention(site.q, site.k, site.v, mask, site.sinks)


def _heads_of_mask(site: Sparse) -> int:
    """The number of heads in the mask, or 1."""
    of_bias = shape_of(site.mask)[-3] if site.mask is not None and len(shape_of(site.mask)) > 2 else 1
    of_layout = shape_of(site.layout)[0] if site.layout is not None else 1
    return 1 if of_bias == 1 and of_layout == 1 else _heads(site.q)


def _sequences_of_mask(site: Sparse) -> int | ir.SymbolicDim:
    """The batch size of the mask, or 1."""
    return shape_of(site.mask)[0] if site.mask is not None and len(shape_of(site.mask)) == 4 else 1


def _typed(value: ir.Value, dtype: ir.DataType | None, sizes: Sequence[int | ir.SymbolicDim | str | None]) -> ir.Value:
    assert dtype is not None
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(sizes)
    return value


def _by_blocks(site: Sparse, reads: KeyBlocks) -> ir.Value:
    write, call, size = site.write, site.write.call, reads.block
    queries, keys = write.length(site.q, 2), write.length(site.k, 2)
    read = read_positions(write, reads, queries, keys)
    padding = call("Sub", call("Mul", read.rows, size), queries)
    i = write.shaped(write.counted(0, call("Mul", read.rows, size)), -1, size, 1)
    first = write.shaped(write.counted(0, call("Mul", read.rows, size), size), -1, 1, 1)
    j = call("Unsqueeze", read.j, 2)
    visible = write.every(seen(write, site.pattern, i, j, first, site.layout, 4), call("Unsqueeze", read.counts, 2))
    # [batch or 1, heads or 1, rows, block, read]; computed once for all layers with the same pattern.
    mask = site.biased(visible, call("Min", i, call("Sub", queries, 1)), j, 4)
    hidden = dataclasses.replace(site, mask=mask)
    bias, some = hidden.bias(), hidden.visible()
    assert bias is not None
    gather = _heads_together if reads.heads == 1 else _heads_apart
    output = gather(site, reads, read, _Hidden(bias, some, _heads_of_mask(site)), padding)
    # [batch, rows or more, block · heads · width] from here on.
    heads, width = _heads(site.q), _width(site.v)
    if reads.dense_rows or reads.dense_end is not None:
        output = _with_dense_rows(site, reads, read, output, padding)
    joined = call("Slice", write.shaped(output, 0, -1, heads * width), 0, queries, 1)
    batch, _, tokens, _ = shape_of(site.q)
    _typed(joined, site.q.dtype, [batch, tokens, heads * width])
    skip_joins(site.result, joined)
    return call("Transpose", write.shaped(joined, 0, 0, heads, width), perm=_HEADS_FIRST)


@dataclass(frozen=True)
class _Hidden:
    """The bias on scores, and which rows have visible keys, both [batch or 1, heads or 1, rows, block, read or 1]."""

    bias: ir.Value
    some: ir.Value | None
    heads: int

    def of_rows(self, site: Sparse, row: ir.Value, apart: bool) -> tuple[ir.Value, ir.Value | None]:
        """The bias and the rows with visible keys of some query blocks, as sequences: [rows, heads or 1, block, read or 1].

        Args:
            apart: each head is a sequence too.
        """
        parts = [self._of_rows(site, value, row, apart) for value in (self.bias, self.some) if value is not None]
        return parts[0], parts[1] if len(parts) > 1 else None

    def _of_rows(self, site: Sparse, value: ir.Value, row: ir.Value, apart: bool) -> ir.Value:
        write, call = site.write, site.write.call
        gathered = call("Gather", value, row, axis=2)
        if shape_of(site.q)[0] != 1:
            gathered = write.expanded(gathered, write.length(site.q, 0), 1, 1, 1, 1)
        if self.heads > 1 and not apart:
            gathered = call("Transpose", gathered, perm=(0, 2, 1, 3, 4))
        sizes = call("Shape", gathered, start=3)
        gathered = call("Reshape", gathered, call("Concat", -1, 1 if apart else self.heads, sizes, axis=0))
        assert site.q.dtype is not None
        gathered.dtype = site.q.dtype
        return gathered


def _in_chunks(site: Sparse, read: Read, heads: int, size: int, part: Callable[[Sparse, ir.Value], ir.Value]) -> ir.Value:
    """Apply `part` to all query blocks in chunks, by a `Loop`: [batch, rows or more, features].

    The memory for gathered keys is then bounded at any length. Chunks that fit a processor's cache are also faster; a GPU gets
    large chunks, since each is a synchronization. All chunks have the same size: the last row is repeated where needed.

    Args:
        heads: whose keys are gathered.
        size: of a block.
        part: from row numbers, [some], to [batch, some, features].
    """
    write, call, dtype, rows = site.write, site.write.call, site.q.dtype, read.rows
    assert dtype is not None
    key_bytes = round(heads * (_width(site.k) + _width(site.v)) * dtype.itemsize)
    row_bytes = call("Mul", call("Mul", read.read, key_bytes), write.length(site.q, 0))
    most = call("Max", call("Div", write.integers(site.chunk_bytes), row_bytes), 1)
    chunks = call("Div", call("Add", rows, call("Sub", most, 1)), most)
    count = call("Div", call("Add", rows, call("Sub", chunks, 1)), chunks)
    last, features = call("Sub", rows, 1), size * _heads(site.q) * _width(site.v)
    number = _typed(ir.Value(name="chunk"), ir.DataType.INT64, [])
    going = _typed(ir.Value(name="going"), ir.DataType.BOOL, [])
    inside = Writer(write.model)
    row = inside.call("Min", inside.call("Add", inside.call("Mul", number, count), inside.counted(0, count)), last)
    goes_on = _typed(inside.call("Identity", going), ir.DataType.BOOL, [])
    output = _typed(part(dataclasses.replace(site, write=inside), row), dtype, [None, None, features])
    body = ir.Graph([number, going], [goes_on, output], nodes=inside.nodes, name="chunk_of_rows")
    stacked = write.op("Loop", [call("Squeeze", chunks), write.constant(np.array(True))], {"body": body})
    # [chunks, batch, count, features]
    return write.shaped(call("Transpose", stacked, perm=(1, 0, 2, 3)), 0, -1, features)


def _heads_together(site: Sparse, reads: KeyBlocks, read: Read, hidden: _Hidden, padding: ir.Value) -> ir.Value:
    """Attention where all heads read the same keys: each query block is a sequence with all heads."""
    write, call, size = site.write, site.write.call, reads.block
    heads, groups, width = _heads(site.q), _heads(site.k), _width(site.v)
    q = write.shaped(write.padded(site.joined(site.q), padding), 0, -1, size * heads * _width(site.q))
    behind = call("Sub", call("Mul", read.blocks, size), write.length(site.k, 2))
    blocks: list[ir.Value] = []
    for operand in (site.k, site.v):
        x = site.joined(operand)
        padded = write.padded(x, behind)
        if read.alone is not None:
            padded = call("Concat", padded, call("Gather", x, read.alone, axis=1), axis=1)
        blocks.append(write.shaped(padded, 0, -1, size * groups * _width(operand)))

    def part(site: Sparse, row: ir.Value) -> ir.Value:
        write, call = site.write, site.write.call
        rows = write.shaped(call("Gather", q, row, axis=1), -1, size, heads * _width(site.q))
        operands = [_by_heads(site, rows, size, heads, _width(site.q))]
        column = write.shaped(call("Gather", read.column, row, axis=1), -1)
        for operand, those in zip((site.k, site.v), blocks, strict=True):
            gathered = write.shaped(call("Gather", those, column, axis=1), -1, read.read, groups * _width(operand))
            operands.append(_by_heads(site, gathered, _read(reads), groups, _width(operand)))
        bias, some = hidden.of_rows(site, row, apart=False)
        _typed(bias, bias.dtype, [_ROWS, hidden.heads, size, _read(reads)])
        output = site.attention(*operands, mask=bias, sinks=site.sinks, zeros=False)
        _typed(output, site.q.dtype, [_ROWS, heads, size, width])
        if some is not None and hidden.heads > 1:
            output = _typed(call("Mul", output, some), site.q.dtype, [_ROWS, heads, size, width])
        together = call("Transpose", output, perm=_HEADS_FIRST)
        flat = _typed(write.shaped(together, 0, 0, heads * width), site.q.dtype, [_ROWS, size, heads * width])
        if some is not None and hidden.heads == 1:
            flat = call("Mul", flat, call("Squeeze", some, 1))
        return write.shaped(flat, write.length(site.q, 0), call("Shape", row), size * heads * width)

    return _in_chunks(site, read, groups, size, part)


def _heads_apart(site: Sparse, reads: KeyBlocks, read: Read, hidden: _Hidden, padding: ir.Value) -> ir.Value:
    """Attention where heads read different keys: each query block of each head is a sequence."""
    write, call, size = site.write, site.write.call, reads.block
    heads, groups, width = _heads(site.q), _heads(site.k), _width(site.v)
    q = write.shaped(write.padded(site.q, padding, axis=2), 0, 0, -1, size * _width(site.q))
    behind = call("Sub", call("Mul", read.blocks, size), write.length(site.k, 2))
    shared = write.constant(torch.arange(heads).div(heads // groups, rounding_mode="floor").numpy())
    place = call("Add", read.column, call("Mul", write.shaped(shared, -1, 1, 1), read.all_blocks))
    blocks: list[ir.Value] = []
    for operand in (site.k, site.v):
        padded = write.padded(operand, behind, axis=2)
        if read.alone is not None:
            padded = call("Concat", padded, call("Gather", operand, read.alone, axis=2), axis=2)
        blocks.append(write.shaped(padded, 0, call("Mul", read.all_blocks, groups), size * _width(operand)))

    def part(site: Sparse, row: ir.Value) -> ir.Value:
        write, call = site.write, site.write.call
        count = call("Shape", row)
        rows = write.shaped(call("Gather", q, row, axis=2), -1, 1, size, _width(site.q))
        operands = [_typed(rows, site.q.dtype, [_ROWS, 1, size, _width(site.q)])]
        column = write.shaped(call("Gather", place, row, axis=1), -1)
        for operand, those in zip((site.k, site.v), blocks, strict=True):
            gathered = write.shaped(call("Gather", those, column, axis=1), -1, 1, read.read, _width(operand))
            operands.append(_typed(gathered, operand.dtype, [_ROWS, 1, _read(reads), _width(operand)]))
        bias, some = hidden.of_rows(site, row, apart=True)
        _typed(bias, bias.dtype, [_ROWS, 1, size, _read(reads)])
        sinks = site.sinks
        if sinks is not None:
            spread = write.expanded(call("Unsqueeze", sinks, 2), write.length(site.q, 0), heads, count, 1, 1)
            sinks = _typed(write.shaped(spread, -1, 1, 1, 1), sinks.dtype, [_ROWS, 1, 1, 1])
        output = site.attention(*operands, mask=bias, sinks=sinks, zeros=False)
        _typed(output, site.q.dtype, [_ROWS, 1, size, width])
        if some is not None:
            output = call("Mul", output, some)
        apart = call("Reshape", output, call("Concat", write.length(site.q, 0), heads, -1, width, axis=0))
        together = call("Transpose", apart, perm=_HEADS_FIRST)
        return write.shaped(together, 0, count, size * heads * width)

    return _in_chunks(site, read, heads, size, part)


def _with_dense_rows(site: Sparse, reads: KeyBlocks, read: Read, output: ir.Value, padding: ir.Value) -> ir.Value:
    """The output, with the query blocks that read all keys scattered into it."""
    write, call, size = site.write, site.write.call, reads.block
    heads, keys = _heads(site.q), write.length(site.k, 2)
    row = write.integers(*reads.dense_rows) if reads.dense_rows else None
    # Blocks that do not exist are computed as the last one, and dropped.
    parts = [call("Min", row, call("Sub", read.rows, 1))] if row is not None else []
    if reads.dense_end is not None:
        parts.append(write.counted(call("Min", read.rows, reads.dense_end), read.rows))
    dense = parts[0] if len(parts) == 1 else call("Concat", *parts, axis=0)
    width = heads * _width(site.q)
    blocks = write.shaped(write.padded(site.joined(site.q), padding), 0, -1, size * width)
    q = write.shaped(call("Gather", blocks, dense, axis=1), 0, -1, width)
    q = _by_heads(site, q, "dense_queries", heads, _width(site.q), batch=shape_of(site.q)[0])
    inside = write.integers(*range(size))
    i = write.shaped(call("Add", call("Unsqueeze", call("Mul", dense, size), 1), inside), -1, 1)
    j = write.shaped(write.counted(0, keys), 1, 1, -1)
    visible = seen(write, site.pattern, i, j, i, site.layout, 3)
    mask = site.biased(visible, call("Min", i, call("Sub", write.length(site.q, 2), 1)), j, 3)
    _typed(mask, mask.dtype, [_sequences_of_mask(site), _heads_of_mask(site), "dense_queries", shape_of(site.k)[2]])
    whole = site.attention(q, site.k, site.v, mask, site.sinks)
    _typed(whole, site.q.dtype, [shape_of(site.q)[0], heads, "dense_queries", _width(site.v)])
    width = heads * _width(site.v)
    joined = write.shaped(call("Transpose", whole, perm=_HEADS_FIRST), 0, 0, width)
    _typed(joined, site.q.dtype, [shape_of(site.q)[0], "dense_queries", width])
    flat = write.shaped(joined, 0, -1, size * width)
    places = row_places(write, reads, read.rows, call("Shape", output, start=1, end=2))
    return call("Gather", call("Concat", output, flat, axis=1), places, axis=1)


def _by_heads(
    site: Sparse, x: ir.Value, tokens: int | str, heads: int, width: int, batch: int | ir.SymbolicDim | str = _ROWS
) -> ir.Value:
    """[batch, tokens, heads · width] as [batch, heads, tokens, width]."""
    _typed(x, site.q.dtype, [batch, tokens, heads * width])
    apart = site.write.shaped(x, 0, 0, heads, width)
    moved = site.write.call("Transpose", apart, perm=_HEADS_FIRST)
    return _typed(moved, site.q.dtype, [batch, heads, tokens, width])


def _read(reads: KeyBlocks) -> int | str:
    """The number of keys that a query block reads."""
    return _READ if reads.prefix or reads.strides or reads.tail is not None else reads.slots * reads.block
