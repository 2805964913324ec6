"""Placement rules of quantizers and of writes to state, such as the KV cache; see `table.py`."""

from __future__ import annotations

from typing import cast

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.placement import REPLICATED, Span, Spans, sharded
from lissom.compiler.parallel.rules.base import Outcome, Reading, replicated, settled, tensors
from lissom.ops.quantization import GROUP


def quantized_row(node: fx.Node, read: Reading) -> Outcome:
    """Dynamic quantization: the range of a row, or a tensor, of which ranks hold parts is all-reduced; groups stay whole."""
    (x,) = tensors(node)
    placed, features = read.of(x), shape_of(node)[-1]
    granularity, last = nodes.argument(node, "granularity"), len(shape_of(node)) - 1
    if placed.partial or (granularity == "tensor" and any(dim != last for dim, _ in placed.dims)):
        return replicated(node, read)
    if granularity == "group" and _narrowed(placed.spans(last), features, cast(int, features) // GROUP) is None:
        return replicated(node, read)
    return Outcome(placed)


def turned_back(node: fx.Node, read: Reading) -> Outcome:
    """Dequantization, and quantization with a known scale: scales and zero points are sharded as their blocks are."""
    q, *grid = [tensor for tensor in node.args if nodes.is_tensor(tensor)]
    placed, shape = read.of(q), shape_of(node)
    if placed.partial:
        return replicated(node, read)
    packed = {len(shape) - 1: 2} if shape_of(q)[-1] != shape[-1] else {}
    dims = {
        dim: tuple(span.shaped(span.outer, span.size, span.inner * packed.get(dim, 1)) for span in spans)
        for dim, spans in placed.dims
    }
    wants = {}
    for tensor in grid:
        sizes = shape_of(tensor)
        wanted = [(dim, _narrowed(spans, shape[dim], sizes[dim])) for dim, spans in dims.items() if sizes and sizes[dim] != 1]
        if any(spans is None for _, spans in wanted):
            return Outcome(REPLICATED, replicated(node, read).wants, "a block of equal scale would be sharded in two")
        wants[tensor] = sharded(*cast("list[tuple[int, Spans]]", wanted))
    return settled(node, read, sharded(*dims.items()), wants)


def _narrowed(spans: Spans, size: object, blocks: object) -> Spans | None:
    """The sharding of a dimension of blocks, given that of their elements; None if a block would be divided."""
    if size == blocks:
        return spans
    each = cast(int, size) // cast(int, blocks)
    narrowed: list[Span] = []
    for span in spans:
        outer, inner = cast(int, span.outer), cast(int, span.inner)
        if inner % each == 0:
            narrowed.append(span.shaped(outer, span.size, inner // each))
        elif each % inner == 0 and outer == 1 and cast(int, span.block) % (each // inner) == 0 and not span.is_padded:
            narrowed.append(span.shaped(outer, cast(int, span.size) * inner // each, 1))
        else:
            return None
    return tuple(narrowed)


def written(node: fx.Node, read: Reading) -> Outcome:
    """A write to state: the values need the placement of the state."""
    state, value = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    return settled(node, read, read.of(state), {value: read.of(state)})


def rows_exchanged(node: fx.Node, read: Reading) -> Outcome:
    """index_copy: writes rows along a dimension that is not sharded; the state gives the placement of the others."""
    state, dim, index, source = cast("tuple[fx.Node, int, fx.Node, fx.Node]", node.args[:4])
    placed, along = read.of(state), dim % (len(shape_of(state)) or 1)
    if placed.partial or placed.spans(along) or read.of(source).spans(along):
        return replicated(node, read)
    if placed.is_replicated and read.of(source).is_sharded:
        placed = read.of(source)
    return settled(node, read, placed, {state: placed, index: REPLICATED, source: placed})
