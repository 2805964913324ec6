"""Placement rules of views, concatenations and splits; see `table.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import fx

from lissom.compiler.analysis.axes.axis import quotient
from lissom.compiler.analysis.axes.views import every_nth, slice_bounds
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import dim_of, shape_of
from lissom.compiler.ir.placement import REPLICATED, Span, Spans, sharded
from lissom.compiler.ir.types import Size, TensorType
from lissom.compiler.parallel.rules.base import Outcome, Reading, alike, is_only_reader, moved, replicated


def same(node: fx.Node, read: Reading) -> Outcome:
    """The result has the placement of the argument, pending sums included."""
    return moved(node, read)


def getitem(node: fx.Node, read: Reading) -> Outcome:
    """One of several results."""
    placed = read.known[cast(fx.Node, node.args[0])]
    return Outcome(placed[cast(int, node.args[1])] if isinstance(placed, tuple) else REPLICATED)


def several(node: fx.Node, read: Reading) -> Outcome:
    """unbind, split: pieces of, or along, a dimension that is not sharded."""
    propagated = moved(node, read)
    if isinstance(propagated.result, tuple):
        return propagated
    count = len(cast("tuple[object, ...]", nodes.node_type(node)))
    return Outcome((propagated.result,) * count, propagated.wants)


def expand(node: fx.Node, read: Reading) -> Outcome:
    """Expands dimensions of size 1; a dimension that the plan shards is expanded to the size of a rank's shard."""
    x = cast(fx.Node, node.args[0])
    old, new = shape_of(x), shape_of(node)
    added, placed = len(new) - len(old), read.of(x)
    if placed.partial:
        return replicated(node, read)
    dims = {dim + added: spans for dim, spans in placed.dims}
    for dim, size in enumerate(new):
        grows = dim < added or old[dim - added] != size
        if grows and (spans := read.planned(node, dim)) and _apart(spans, dims, read):
            dims[dim] = spans
    return Outcome(sharded(*dims.items()))


def _apart(spans: Spans, dims: dict[int, Spans], read: Reading) -> bool:
    """True when the expanded dimension is sharded over all ranks, or over those that share one key/value group."""
    if len(spans) != 1 or any(len(other) != 1 or other[0].block != 1 for other in dims.values()):
        return False
    return spans[0].parts * math.prod(other[0].parts for other in dims.values()) == read.world_size


def repeat_interleave(node: fx.Node, read: Reading) -> Outcome:
    """Repeats each index several times in a row: each block of a sharded dimension becomes a longer block."""
    x, times = cast("tuple[fx.Node, int]", node.args[:2])
    if nodes.argument(node, "dim") is None:
        return replicated(node, read)
    dim, placed = dim_of(node, len(shape_of(x))), read.of(x)
    if placed.partial:
        return replicated(node, read)
    if not placed.spans(dim) and (spans := read.planned(node, dim)) and placed.is_replicated and shape_of(x)[dim] == 1:
        return Outcome(sharded((dim, spans)))
    if any(span.parts != placed.spans(dim)[0].parts for span in placed.spans(dim)):
        return replicated(node, read)
    wide = tuple(span.shaped(span.outer, span.size, span.inner * times) for span in placed.spans(dim))
    return Outcome(sharded(*((at, wide if at == dim else spans) for at, spans in placed.dims)))


def reshape(node: fx.Node, read: Reading) -> Outcome:
    """Merges and splits dimensions: a sharded one stays sharded when it is merged with, or split from, whole dimensions."""
    x = cast(fx.Node, node.args[0])
    placed = read.of(x)
    if placed.partial:
        return moved(node, read, {}) if is_only_reader(node, x) else replicated(node, read)
    if placed.is_replicated:
        return Outcome(REPLICATED)
    dims: list[tuple[int, Spans]] = []
    for before, after in _groups(shape_of(x), shape_of(node)):
        split = [dim for dim in before if placed.spans(dim)]
        reshaped = _reshaped(shape_of(x), shape_of(node), before, after, {dim: placed.spans(dim) for dim in split})
        if reshaped is None:
            return replicated(node, read)
        dims += reshaped
    return Outcome(sharded(*dims))


def _groups(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """The dimensions before and after a reshape, in the shortest groups of equal size."""
    groups: list[tuple[list[int], list[int]]] = []
    left, right = 0, 0
    while left < len(old) or right < len(new):
        before, after = [left] if left < len(old) else [], [right] if right < len(new) else []
        sizes = [_total(old, before), _total(new, after)]
        left, right = left + len(before), right + len(after)
        while sizes[0] != sizes[1] and (left < len(old) or right < len(new)):
            # The side whose size divides the other's is the smaller; where neither does, both take one more.
            takes_left = quotient(sizes[1], sizes[0]) is not None or right >= len(new)
            takes_right = quotient(sizes[0], sizes[1]) is not None or left >= len(old)
            if (takes_left or not takes_right) and left < len(old):
                before.append(left)
                left += 1
            if (takes_right or not takes_left) and right < len(new):
                after.append(right)
                right += 1
            sizes = [_total(old, before), _total(new, after)]
        groups.append((before, after))
    return groups


def _total(sizes: Sequence[Size], dims: Sequence[int]) -> Size:
    return math.prod(sizes[dim] for dim in dims)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _reshaped(
    old: Sequence[Size], new: Sequence[Size], before: list[int], after: list[int], split: dict[int, Spans]
) -> list[tuple[int, Spans]] | None:
    """Output sharding of the dimensions `after`, given the input sharding `split` of `before`; None if not representable."""
    if not split:
        return []
    solid = [dim for dim in after if new[dim] != 1]
    if len(split) == sum(old[dim] != 1 for dim in before) == len(solid) == 1:
        return [(solid[0], next(iter(split.values())))]
    if any(len(spans) != 1 for spans in split.values()):
        return _reshaped_parts(old, new, before, after, split)
    span = _merged(old, before, {dim: spans[0] for dim, spans in split.items()})
    if span is None:
        return None
    passed: Size = 1
    for dim in after:
        outer = quotient(span.outer, passed)
        inside = passed * new[dim]
        inner = quotient(span.inner, _total(new, [later for later in after if later > dim]))
        if outer is not None and inner is not None and outer * span.size * inner == new[dim]:
            return [(dim, (span.shaped(outer, span.size, inner),))]
        passed = inside
    return _parted(new, after, span)


def _reshaped_parts(
    old: Sequence[Size], new: Sequence[Size], before: list[int], after: list[int], split: dict[int, Spans]
) -> list[tuple[int, Spans]] | None:
    """Output sharding for a first dimension of several parts: the others are merged into each part, or split from each."""
    before, after = ([dim for dim in dims if sizes[dim] != 1] for dims, sizes in ((before, old), (after, new)))
    (dim, spans), *more = split.items()
    if more or before[0] != dim or not after:
        return None
    inside, behind = _total(old, before[1:]), _total(new, after[1:])
    reshaped: list[Span] = []
    for span in spans:
        inner = quotient(span.inner * inside, behind)
        size = span.size
        if inner is None and span.parts == 1:
            size, inner = quotient(span.whole * inside, behind) or 0, 1
            span = span.shaped(1, size, 1)
        if inner is None or size == 0:
            return None
        reshaped.append(span.shaped(span.outer, size, inner))
    return [(after[0], tuple(reshaped))]


def _merged(old: Sequence[Size], before: list[int], split: dict[int, Span]) -> Span | None:
    """The span of merged dimensions; two sharded dimensions make one span when each rank has one index of the first."""
    (first, *more) = sorted(split)
    span = split[first]
    lead, tail = _total(old, [dim for dim in before if dim < first]), _total(old, [dim for dim in before if dim > first])
    if not more:
        return span.shaped(lead * span.outer, span.size, span.inner * tail)
    if len(more) > 1 or more[0] != first + 1 or span.block != 1 or span.inner != 1 or split[more[0]].outer != 1:
        return None
    inner = split[more[0]]
    tail = _total(old, [dim for dim in before if dim > more[0]])
    return Span(lead * span.outer, span.size * inner.size, inner.inner * tail, span.parts * inner.parts, inner.every, span.site)


def _parted(new: Sequence[Size], after: list[int], span: Span) -> list[tuple[int, Spans]] | None:
    """A block split into two dimensions: the outer one is sharded, and the inner one too where the outer one is too short."""
    passed: Size = 1
    for dim in after:
        outer, rows = quotient(span.outer, passed), new[dim]
        if outer == 1 and isinstance(rows, int) and isinstance(span.size, int) and span.size % rows == 0:
            times = span.size // rows
            if rows % span.parts == 0 and not span.is_padded:
                return [(dim, (span.shaped(1, rows, 1),))]
            following = [later for later in after if later > dim]
            if rows == 1 or not following or span.parts % rows or new[following[0]] != times or span.is_padded:
                return None
            inside = span.parts // rows
            groups = Span(1, rows, 1, rows, span.every * inside, span.site)
            return [(dim, (groups,)), (following[0], (Span(1, times, 1, inside, span.every, span.site),))]
        passed = passed * rows
    return None


def cat(node: fx.Node, read: Reading) -> Outcome:
    """Concatenation: tensors are sharded alike in the other dimensions; along this one, each in its own way."""
    items = cast("list[fx.Node]", node.args[0])
    rank = len(shape_of(node))
    items = [tensor for tensor in items if len(shape_of(tensor)) == rank]
    dim = dim_of(node, rank)
    if not any(read.of(tensor).spans(dim) for tensor in items):
        return alike(node, read, whole=[dim])
    if any(read.of(tensor).partial or any(at != dim for at, _ in read.of(tensor).dims) for tensor in items):
        return replicated(node, read)
    joined: list[Span] = []
    for tensor in items:
        joined += read.of(tensor).spans(dim) or (Span(1, shape_of(tensor)[dim], 1, 1),)
    return Outcome(sharded((dim, tuple(joined))))


def stack(node: fx.Node, read: Reading) -> Outcome:
    """A new dimension over tensors that are sharded alike."""
    items = cast("list[fx.Node]", node.args[0])
    new, first = dim_of(node, len(shape_of(node))), read.of(items[0])
    if first.partial or any(read.of(tensor) != first for tensor in items):
        return replicated(node, read)
    return Outcome(sharded(*((dim + (dim >= new), spans) for dim, spans in first.dims)))


def split(node: fx.Node, read: Reading) -> Outcome:
    """Splits a dimension: where it is sharded, each piece has whole spans of it. A pending sum is reduced once, before."""
    x = cast(fx.Node, node.args[0])
    rank = len(shape_of(x))
    dim, placed = dim_of(node, rank), read.of(x)
    if placed.partial:
        return replicated(node, read)
    types = cast("tuple[TensorType, ...]", nodes.node_type(node))
    if not placed.spans(dim):
        return several(node, read)
    pieces = pieces_of(placed.spans(dim), [piece_type.shape[dim] for piece_type in types])
    if pieces is None:
        return replicated(node, read)
    others = [(at, spans) for at, spans in placed.dims if at != dim]
    return Outcome(tuple(sharded(*others, (dim, piece)) for piece in pieces))


def pieces_of(spans: Spans, sizes: Sequence[Size]) -> list[Spans] | None:
    """The spans that make up pieces of these sizes; None when a piece ends within a span."""
    left, pieces = list(spans), list[Spans]()
    for size in sizes:
        piece, have = list[Span](), cast(Size, 0)
        while left and have != size:
            piece.append(left.pop(0))
            have = have + piece[-1].whole
        if have != size:
            return None
        pieces.append(tuple(piece))
    return None if left else pieces


def slice_of(node: fx.Node, read: Reading) -> Outcome:
    """A range of a dimension: of a sharded one, whole spans of it."""
    x = cast(fx.Node, node.args[0])
    shape = shape_of(x)
    dim, placed = dim_of(node, len(shape)), read.of(x)
    if not placed.spans(dim):
        return moved(node, read)
    if shape[dim] == shape_of(node)[dim]:
        return Outcome(placed)
    if (step := every_nth(node, shape[dim])) and all(quotient(span.inner, step) is not None for span in placed.spans(dim)):
        kept = tuple(span.shaped(span.outer, span.size, span.inner // step) for span in placed.spans(dim))
        return Outcome(sharded(*((at, kept if at == dim else spans) for at, spans in placed.dims)))
    bounds = slice_bounds(node, shape[dim])
    sizes = [] if bounds is None else [bounds[0], bounds[1] - bounds[0], cast(int, shape[dim]) - bounds[1]]
    pieces = pieces_of(placed.spans(dim), sizes) if sizes else None
    if pieces is None or not pieces[1]:
        return replicated(node, read)
    return Outcome(sharded(*((at, pieces[1] if at == dim else spans) for at, spans in placed.dims)))


def pad(node: fx.Node, read: Reading) -> Outcome:
    """Pads dimensions that are not sharded; a pending sum is reduced before."""
    return replicated(node, read) if read.of(node.args[0]).partial else moved(node, read)
