"""`lissom::block_sparse_attention` in PyTorch's operators: blocks of queries against the key blocks visible to them, gathered.

Tokens are padded to whole blocks; the key blocks of each query block are gathered, scores are one batched matrix product, and
the mask inside is computed from positions. No tensor has the size queries × keys; time and memory are linear in the length
where the number of visible keys per query is bounded. Differentiable, on any device.

Where a pattern has no such blocks, or they cover nearly all keys, the reference with its dense mask runs instead.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import lru_cache

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_false
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from lissom.ops.attention import attention_reference
from lissom.ops.checks import require
from lissom.ops.fused_attention import check_attention, fused_attention_reference, with_bias
from lissom.ops.key_blocks import KeyBlocks, key_blocks
from lissom.ops.pattern import UNBOUNDED, Pattern

_WORTH = 0.5
"""Above this fraction of all scores gathering costs as much as it saves."""

_MOST = 256
"""The cache size for key blocks of patterns and lengths."""
_OF_LAYOUTS: MutableMapping[torch.Tensor, tuple[int, dict[object, KeyBlocks | str]]] = WeakIdKeyDictionary()
"""For each layout its version, and the key blocks of a pattern, or of a pattern at some lengths."""


def check_pattern(q: torch.Tensor, layout: torch.Tensor | None, pattern: Sequence[int], block: int) -> Pattern:
    """The pattern of an operator's argument; raises unless it and its layout fit the queries."""
    require(1 <= block <= UNBOUNDED, "a pattern's block is {} tokens, and must be from 1 to {}", block, UNBOUNDED)
    try:
        decoded = Pattern.decode(pattern, block)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    require(layout is not None or not decoded.asks_layout, "this pattern needs a layout, and none was given")
    if layout is not None:
        message = "a layout is boolean, [heads or 1, query blocks, key blocks], not {} with the sizes {}"
        fits = layout.dim() == 3 and layout.dtype == torch.bool
        require(fits, message, layout.dtype, layout.shape)
        require(layout.numel() > 0, message, layout.dtype, layout.shape)
        if statically_known_false(layout.shape[0] == 1):
            require(layout.shape[0] == q.shape[1], message, layout.dtype, layout.shape)
    return decoded


def block_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: torch.Tensor | None = None,
    *,
    pattern: Sequence[int],
    block: int,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference implementation, with a dense mask."""
    seen = with_bias(Pattern.decode(pattern, block).mask(q.shape[2], k.shape[2], layout).to(q.device), bias)
    return fused_attention_reference(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks)


def blocked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: torch.Tensor | None = None,
    *,
    pattern: Sequence[int],
    block: int,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator by key blocks where that is less work than the reference; else the reference."""
    check_attention(q, k, v, bias, sinks)
    said = check_pattern(q, layout, pattern, block)
    blocks = _blocks_of(said, layout, q.shape[2], k.shape[2])
    by_head = sinks is None or (sinks.dim() == 4 and sinks.shape[2] == 1)
    # A block longer than all keys saves nothing, and memory is allocated for all of it.
    fits = blocks if isinstance(blocks, KeyBlocks) and blocks.block <= k.shape[2] else None
    if by_head and fits is not None and fits.pairs(q.shape[2], k.shape[2]) < _WORTH * q.shape[2] * k.shape[2]:
        return attend_by_blocks(q, k, v, bias, layout, said, fits, scale=scale, softcap=softcap, sinks=sinks)
    return block_sparse_attention_reference(
        q, k, v, bias, layout, pattern=pattern, block=block, scale=scale, softcap=softcap, sinks=sinks
    )


def attend_by_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    layout: torch.Tensor | None,
    pattern: Pattern,
    reads: KeyBlocks,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator by these key blocks."""
    batch, heads, queries, depth = q.shape
    keys, size = k.shape[2], reads.block
    rows = -(-queries // size)
    j, mine = _read(reads, rows, keys, q.device)  # [heads or 1, rows, read]
    i = torch.arange(rows * size, device=q.device).view(rows, size, 1)
    seen = pattern.seen(i, j[:, :, None], layout) & mine[:, :, None]
    # Heads with key blocks of their own are not merged.
    groups = k.shape[1] if reads.heads == 1 else heads
    k_read, v_read = (_gathered(operand, j, reads, groups) for operand in (k, v))
    blocks = functional.pad(q, (0, 0, 0, rows * size - queries)).view(batch, groups, heads // groups, rows, size, depth)
    blocks = blocks.transpose(2, 3).flatten(3, 4)
    mask = with_bias(seen[None, :, :, None], _bias_read(bias, j, rows, size, groups))
    mask = mask.expand(*mask.shape[:3], heads // groups, size, mask.shape[-1]).flatten(3, 4)
    last = None
    if sinks is not None:
        last = sinks.expand(-1, heads, -1, -1).reshape(-1, groups, 1, heads // groups, 1, 1)
        last = last.expand(-1, -1, -1, -1, size, -1).flatten(3, 4)
    output = attention_reference(blocks, k_read, v_read, mask, scale=scale, softcap=softcap, sinks=last)
    output = output.unflatten(3, (-1, size)).transpose(2, 3).reshape(batch, heads, rows * size, v.shape[-1])
    dense = [row for row in reads.dense_rows if row < rows]
    dense += range(reads.dense_end, rows) if reads.dense_end is not None else ()
    if dense:
        places = (torch.tensor(dense, device=q.device)[:, None] * size + torch.arange(size, device=q.device)).flatten()
        places = places[places < queries]
        everything = pattern.seen(places[:, None], torch.arange(keys, device=q.device)[None, None], layout)
        some = bias[..., places, :] if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1 else bias
        whole = fused_attention_reference(
            q[:, :, places], k, v, with_bias(everything, some), scale=scale, softcap=softcap, sinks=sinks
        )
        output = output.index_copy(2, places, whole)
    return output[:, :, :queries].transpose(1, 2).contiguous().transpose(1, 2)


@lru_cache(_MOST)
def _without_layout(pattern: Pattern, *lengths: int) -> KeyBlocks | str:
    return key_blocks(pattern, None, *lengths)


def _blocks_of(pattern: Pattern, layout: torch.Tensor | None, queries: int, keys: int) -> KeyBlocks | str:
    """The key blocks of a pattern; cached per layout, as long as it lives and is not written to."""

    def find(*lengths: int) -> KeyBlocks | str:
        if layout is None or not pattern.asks_layout:
            return _without_layout(pattern, *lengths)
        # Inference tensors have no version counter.
        if layout.is_inference():
            return key_blocks(pattern, layout, *lengths)
        version, known = _OF_LAYOUTS.get(layout, (-1, {}))
        if version != layout._version or len(known) > _MOST:
            known: dict[object, KeyBlocks | str] = {}
            _OF_LAYOUTS[layout] = layout._version, known
        if (pattern, *lengths) not in known:
            known[pattern, *lengths] = key_blocks(pattern, layout, *lengths)
        return known[pattern, *lengths]

    blocks = find()
    return find(queries, keys) if isinstance(blocks, str) else blocks


def _read(reads: KeyBlocks, rows: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The key positions each query block reads, and which of them are valid; int64 and boolean, [heads or 1, rows, read].

    Invalid ones, which do not exist or are duplicates, have an arbitrary position.
    """
    row = torch.arange(rows, device=device)
    column = (row[:, None] + torch.tensor(reads.offsets, dtype=torch.int64, device=device)).expand(reads.heads, -1, -1)
    count = column >= 0
    if reads.table is not None:
        table = reads.table.to(device)[:, row.clamp(max=reads.table.shape[1] - 1)]
        fresh = table >= 0
        for first, last in reads.runs():
            apart = table - row[:, None]
            fresh = fresh & ~((apart >= first) & (apart <= last))
        column, count = torch.cat([column, table], -1), torch.cat([count, fresh], -1)
    inside = torch.arange(reads.block, device=device)
    j = (column.clamp(min=0)[..., None] * reads.block + inside).flatten(-2)
    alone, once = _alone(reads, keys, device)
    count = count.repeat_interleave(reads.block, -1) & (j < keys) & ~_is_alone(reads, j)
    j = torch.cat([j.clamp(max=keys - 1), alone.expand(*j.shape[:2], -1)], -1)
    return j, torch.cat([count, once.expand(*count.shape[:2], -1)], -1)


def _alone(reads: KeyBlocks, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that all queries read, and which of them exist and are no duplicates."""
    positions = [torch.arange(min(reads.prefix, keys), device=device)]
    once = [torch.ones_like(positions[0], dtype=torch.bool)]
    for number, (first, last, period) in enumerate(reads.strides):
        places = torch.arange(0, keys, period, device=device)[:, None] + torch.arange(first, last + 1, device=device)
        places = places.flatten()
        fresh = (places < keys) & (places >= reads.prefix)
        for other in reads.strides[:number]:
            fresh = fresh & ~_in_stride(other, places)
        positions.append(places.clamp(max=keys - 1))
        once.append(fresh)
    if reads.tail is not None:
        places = torch.arange(min(reads.tail, keys), keys, device=device)
        positions.append(places)
        once.append(~_is_alone(reads, places, tail=False))
    return torch.cat(positions), torch.cat(once)


def _is_alone(reads: KeyBlocks, j: torch.Tensor, tail: bool = True) -> torch.Tensor:
    """True where all queries read a position."""
    alone = j < reads.prefix
    for stride in reads.strides:
        alone = alone | _in_stride(stride, j)
    return alone | (j >= reads.tail) if tail and reads.tail is not None else alone


def _in_stride(stride: tuple[int, int, int], j: torch.Tensor) -> torch.Tensor:
    first, last, period = stride
    return (j % period >= first) & (j % period <= last)


def _gathered(x: torch.Tensor, j: torch.Tensor, reads: KeyBlocks, groups: int) -> torch.Tensor:
    """Gathered keys or values, [batch, groups, rows, read, depth]."""
    own, keys = x.shape[1:3]
    spread, size = reads.slots * reads.block, reads.block
    padded = functional.pad(x, (0, 0, 0, -keys % size)).unflatten(2, (-1, size))
    # Blocks that do not exist are clamped to the last one, and masked.
    column = j[..., :spread:size] // size
    if reads.heads == 1:
        gathered = padded[:, :, column[0]]
    else:
        head = torch.arange(groups, device=j.device) // (groups // own)
        gathered = padded[:, head[:, None, None], column]
        x = x[:, head]
    gathered = gathered.flatten(3, 4)
    alone = x[:, :, j[0, 0, spread:]]
    return torch.cat([gathered, alone[:, :, None].expand(-1, -1, gathered.shape[2], -1, -1)], 3) if alone.shape[2] else gathered


def _bias_read(bias: torch.Tensor | None, j: torch.Tensor, rows: int, size: int, groups: int) -> torch.Tensor | None:
    """The bias of gathered keys, [batch or 1, groups or 1, rows, heads of a group or 1, block or 1, read]."""
    if bias is None:
        return None
    bias = bias.reshape(*[1] * (4 - bias.dim()), *bias.shape)
    batch, heads, queries, width = bias.shape
    if queries > 1:
        bias = torch.cat([bias, bias[:, :, -1:].expand(-1, -1, rows * size - queries, -1)], 2)
        bias = bias.view(batch, heads, rows, size, width)
    else:
        bias = bias[:, :, None]
    if width > 1:
        bias = torch.take_along_dim(bias, j[None, :, :, None], -1)
    split = (groups, -1) if bias.shape[1] > 1 else (1, 1)
    return bias.unflatten(1, split).transpose(2, 3)
