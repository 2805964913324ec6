"""Sizes and indices written into a call, replaced with those of one rank."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import fx

from lissom.compiler.analysis.axes.views import every_nth, slice_bounds
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import channel_dim, dim_of, name_squeezed_dims
from lissom.compiler.ir.operators import CONVOLUTIONS, SIZES_AT, SPLITS, SQUEEZES
from lissom.compiler.ir.placement import Placed, Spans, local_size, single
from lissom.compiler.ir.types import Size, fixed
from lissom.compiler.ir.view_calls import RepeatInterleave, Sized, Slice, Unflatten
from lissom.compiler.parallel.partition.state import PartitionState, Placement

aten = torch.ops.aten


def make_local(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    """Replace the sizes and indices in a call by those of one rank; other calls stay as they are."""
    rule = _RULES.get(node.target)
    if rule is not None:
        rule(state, node, placed)


def _sizes(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    sizes, first = [*Sized(node).sizes], 0
    if node.target is aten.view.default and nodes.operand(node).op == "get_attr":
        # A rank's shard of a weight lies in the memory of the whole, where not every view of it exists.
        node.target = aten.reshape.default
    if (unflattened := Unflatten.of(node)) is not None:
        first = unflattened.dim % (state.shape(node).rank - len(sizes) + 1)
    for at, size in enumerate(sizes):
        spans = single(placed).spans(at + first)
        if not spans or size == -1:
            continue
        if isinstance(size, fx.Node):
            # A varying size with a sharded factor, such as batch · heads.
            with state.edit.before(node):
                times = state.edit.compute_size(operator.mul, size, fixed(spans[0].block))
                sizes[at] = state.edit.compute_size(operator.floordiv, times, fixed(spans[0].size))
        else:
            sizes[at] = local_size(spans, size)
    nodes.set_operand(node, SIZES_AT[node.target], sizes)


def _split(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    result_types = state.types[node]
    assert isinstance(result_types, tuple)
    types = [nodes.tensor_type(value_type) for value_type in result_types]
    dim = dim_of(node, types[0].rank)
    parts = placed if isinstance(placed, tuple) else (placed,)
    if any(part.spans(dim) for part in parts):
        sizes = [local_size(part.spans(dim), piece_type.shape[dim]) for part, piece_type in zip(parts, types, strict=True)]
        node.target = aten.split_with_sizes.default
        nodes.set_arguments(node, nodes.operand(node), sizes, dim)


def _groups(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    """Only depthwise convolutions are sharded."""
    at = channel_dim(node)
    if spans := single(placed).spans(at):
        nodes.set_argument(node, "groups", local_size(spans, state.shape(node).shape[at]))


def _slice(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    part = Slice(node)
    have, typed = state.known[part.x], state.shape(part.x)
    dim = dim_of(node, typed.rank)
    spans = have.spans(dim) if isinstance(have, Placed) else ()
    if not spans:
        return
    if every_nth(node, typed.shape[dim]):
        nodes.set_arguments(node, part.x, dim, part.start, None, part.step)
        return
    bounds = slice_bounds(node, typed.shape[dim]) or (0, typed.shape[dim])
    nodes.set_arguments(node, part.x, dim, *(_local_index(spans, bound) for bound in bounds))


def _repeats(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    repeated = RepeatInterleave(node)
    assert repeated.dim is not None, "a flattened dimension is not sharded"
    typed = state.shape(node)
    spans = single(placed).spans(repeated.dim % typed.rank)
    if spans and state.shape(repeated.x).shape[repeated.dim] == 1:
        nodes.set_argument(node, "repeats", local_size(spans, typed.shape[repeated.dim]))


def _local_index(spans: Spans, index: Size) -> Size:
    """The index on a rank of an index into a dimension, at which a span ends."""
    passed: Size = 0
    local: Size = 0
    for span in spans:
        if passed >= index:
            return local
        passed, local = passed + span.whole, local + span.local
    return local


def _squeeze(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    name_squeezed_dims(node, state.shape(nodes.operand(node)).shape)


_RULES: Mapping[object, Callable[[PartitionState, fx.Node, Placement], None]] = {
    **dict.fromkeys(SIZES_AT, _sizes),
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys(CONVOLUTIONS, _groups),
    **dict.fromkeys(SQUEEZES, _squeeze),
    **dict.fromkeys(Slice.targets, _slice),
    **dict.fromkeys(RepeatInterleave.targets, _repeats),
}
"""By operator how its sizes and indices become those of a rank."""
