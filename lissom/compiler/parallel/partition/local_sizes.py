"""Sizes and indices written into a call, replaced with those of one rank."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes.views import every_nth, slice_bounds
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import channel_dim, dim_of, name_squeezed_dims
from lissom.compiler.ir.operators import CONVOLUTIONS, SIZES_AT, SPLITS, SQUEEZES
from lissom.compiler.ir.placement import Placed, Spans, local_size
from lissom.compiler.ir.types import TensorType
from lissom.compiler.parallel.partition.state import PartitionState, Placement

aten = torch.ops.aten


def make_local(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    """Replace the sizes and indices in a call by those of one rank; other calls stay as they are."""
    rule = _RULES.get(node.target)
    if rule is not None:
        rule(state, node, placed)


def _sizes(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    assert isinstance(placed, Placed)
    index = SIZES_AT[node.target]
    sizes = [*cast("list[object]", node.args[index])]
    if node.target is aten.view.default and cast(fx.Node, node.args[0]).op == "get_attr":
        # A rank's shard of a weight lies in the memory of the whole, where not every view of it exists.
        node.target = aten.reshape.default
    first = 0
    if node.target is aten.unflatten.int:
        first = cast(int, node.args[1]) % (state.shape(node).rank - len(sizes) + 1)
    for at, size in enumerate(sizes):
        spans = placed.spans(at + first)
        if not spans or size == -1:
            continue
        if isinstance(size, fx.Node):
            # A varying size with a sharded factor, such as batch · heads.
            with state.edit.before(node):
                times = state.edit.compute_size(operator.mul, size, cast(int, spans[0].block))
                sizes[at] = state.edit.compute_size(operator.floordiv, times, cast(int, spans[0].size))
        else:
            sizes[at] = local_size(spans, cast(int, size))
    node.args = (*node.args[:index], sizes, *node.args[index + 1 :])  # pyright: ignore[reportAttributeAccessIssue]


def _split(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    types = cast("tuple[TensorType, ...]", state.types[node])
    dim = dim_of(node, types[0].rank)
    parts = placed if isinstance(placed, tuple) else (placed,)
    if any(part.spans(dim) for part in parts):
        sizes = [local_size(part.spans(dim), found.shape[dim]) for part, found in zip(parts, types, strict=True)]
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], sizes, dim), {}  # pyright: ignore


def _groups(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    """Only depthwise convolutions are sharded."""
    assert isinstance(placed, Placed)
    at = channel_dim(node)
    if spans := placed.spans(at):
        nodes.set_argument(node, "groups", local_size(spans, state.shape(node).shape[at]))


def _slice(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    item = cast(fx.Node, node.args[0])
    have, typed = state.known[item], state.shape(item)
    dim = dim_of(node, typed.rank)
    spans = have.spans(dim) if isinstance(have, Placed) else ()
    if not spans:
        return
    if every_nth(node, typed.shape[dim]):
        start, step = nodes.argument(node, "start"), nodes.argument(node, "step")
        node.args, node.kwargs = (item, dim, start, None, step), {}  # pyright: ignore[reportAttributeAccessIssue]
        return
    bounds = slice_bounds(node, typed.shape[dim]) or (0, typed.shape[dim])
    places = [_local_index(spans, cast(int, bound)) for bound in bounds]
    node.args, node.kwargs = (item, dim, *places), {}


def _repeats(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    assert isinstance(placed, Placed)
    item, times, *rest = node.args
    dim = cast(int, rest[0]) if rest else cast(int, nodes.argument(node, "dim"))
    spans = placed.spans(dim % state.shape(node).rank)
    if spans and state.shape(cast(fx.Node, item)).shape[dim] == 1:
        node.args = (item, local_size(spans, cast(int, times)), *rest)  # pyright: ignore[reportAttributeAccessIssue]


def _local_index(spans: Spans, index: int) -> int:
    """The index on a rank of an index into a dimension, at which a span ends."""
    passed, local = 0, 0
    for span in spans:
        if passed >= index:
            return local
        passed, local = passed + cast(int, span.whole), local + cast(int, span.local)
    return local


def _squeeze(state: PartitionState, node: fx.Node, placed: Placement) -> None:
    name_squeezed_dims(node, state.shape(cast(fx.Node, node.args[0])).shape)


_RULES: Mapping[object, Callable[[PartitionState, fx.Node, Placement], None]] = {
    **dict.fromkeys(SIZES_AT, _sizes),
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys(CONVOLUTIONS, _groups),
    **dict.fromkeys(SQUEEZES, _squeeze),
    aten.slice.Tensor: _slice,
    aten.repeat_interleave.self_int: _repeats,
}
"""By operator how its sizes and indices become those of a rank."""
