"""Maps each dimension of a view's result to the dimension of its argument with the same indices.

    transpose(x, 1, 2), x: [batch, tokens, heads, size]  ->  (0, 2, 1, 3)
    x[:, 0]                                              ->  (0, 2, 3)
    unsqueeze(x, 1)                                      ->  (0, None, 1, 2, 3)

A dimension that the call creates, resizes or reorders is None. Operators that are no views but work along some dimensions only
have maps too: reductions, softmax, sorting.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import cast

import sympy
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.operators import aten
from lissom.compiler.ir.types import Size, TensorType

DimensionMap = tuple[int | None, ...]
"""For each dimension of the result, the matching dimension of the argument, counted from the front, or None."""
_Rule = Callable[[fx.Node], DimensionMap]


def dimension_map(node: fx.Node) -> DimensionMap | None:
    """The map from the dimensions of a call's result to those of its first argument; None for an operator without a map.

    For a call that returns several tensors, the map holds for each of them. For `cat` and `stack` it holds for each input
    tensor, except the empty tensors of another rank that `cat` allows.
    """
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node)


def places(node: fx.Node) -> dict[int, int] | None:
    """The inverse map: for each dimension of the argument that is kept, its place in the result; None without a map."""
    sources = dimension_map(node)
    return None if sources is None else {source: dim for dim, source in enumerate(sources) if source is not None}


def shape_of(node: object) -> tuple[Size, ...]:
    """The sizes of a tensor, or of the first of several."""
    value_type = nodes.node_type(cast(fx.Node, node))
    return cast(TensorType, value_type[0] if isinstance(value_type, tuple) else value_type).shape


def product_of(sizes: Sequence[Size]) -> Size:
    """The product of sizes, expanded so that equal products compare equal."""
    if all(isinstance(size, int) for size in sizes):
        return math.prod(cast("Sequence[int]", sizes))
    return cast(sympy.Expr, sympy.expand(sympy.Mul(*sizes)))


def named_dims(node: fx.Node, name: str, rank: int) -> set[int]:
    """The dimensions in the argument `name` of a call, counted from the front; empty when it is not given."""
    given = nodes.argument(node, name)
    items = cast("Sequence[int]", given if isinstance(given, (list, tuple)) else [] if given is None else [given])
    return {dim % (rank or 1) for dim in items}


def dim_of(node: fx.Node, rank: int) -> int:
    """The single dimension in the argument `dim` of a call, counted from the front."""
    (dim,) = named_dims(node, "dim", rank)
    return dim


def channel_dim(node: fx.Node) -> int:
    """The dimension of channels in the input and the result of a convolution: 1, or 0 without a batch."""
    return len(shape_of(node)) - len(shape_of(node.args[1])) + 1


def _rank_of(node: object) -> int:
    return len(shape_of(node))


def _unchanged(node: fx.Node) -> DimensionMap:
    return tuple(range(_rank_of(node)))


def _all_but(name: str) -> _Rule:
    """The map of an operator that works along the dimensions in its argument `name` and keeps the rank."""

    def rule(node: fx.Node) -> DimensionMap:
        rank = _rank_of(node)
        along = named_dims(node, name, rank)
        return tuple(None if dim in along else dim for dim in range(rank))

    return rule


def _all_or_flat(name: str) -> _Rule:
    """The map of `_all_but`, for an operator that flattens the tensor when no dimension is given."""
    return lambda node: _all_but(name)(node) if named_dims(node, name, 1) else (None,) * _rank_of(node)


def _permute(node: fx.Node) -> DimensionMap:
    order = cast("Sequence[int]", node.args[1])
    return tuple(dim % len(order) for dim in order)


def _transpose(node: fx.Node) -> DimensionMap:
    order = list(range(_rank_of(node)))
    if node.target is aten.numpy_T.default:
        return tuple(reversed(order))
    if len(order) > 1:
        a, b = (-2, -1) if node.target in ops.MATRIX_TRANSPOSES else cast("Sequence[int]", node.args[1:3])
        order[a], order[b] = order[b], order[a]
    return tuple(order)


def _inserted(node: fx.Node) -> DimensionMap:
    """For `unsqueeze` and `stack`, which insert a dimension."""
    rank = _rank_of(node)
    new = dim_of(node, rank)
    return tuple(None if dim == new else dim - (dim > new) for dim in range(rank))


def _squeeze(node: fx.Node) -> DimensionMap:
    shape = shape_of(node.args[0])
    named = range(len(shape)) if node.target is aten.squeeze.default else named_dims(node, "dim", len(shape))
    return tuple(dim for dim, size in enumerate(shape) if dim not in named or size != 1)


def name_squeezed_dims(node: fx.Node, shape: Sequence[Size]) -> None:
    """Let a `squeeze` of this shape name the dimensions that it removes, so that it keeps others whose size becomes 1."""
    named = range(len(shape)) if node.target is aten.squeeze.default else named_dims(node, "dim", len(shape))
    gone = [dim for dim in named if shape[dim : dim + 1] == (1,)]
    node.target, node.args, node.kwargs = aten.squeeze.dims, (node.args[0], gone), {}


def _without_dim(node: fx.Node) -> DimensionMap:
    """For `select` and `unbind`, which remove a dimension."""
    rank = _rank_of(node.args[0])
    gone = named_dims(node, "dim", rank)
    return tuple(dim for dim in range(rank) if dim not in gone)


def _expand(node: fx.Node) -> DimensionMap:
    old, new = shape_of(node.args[0]), shape_of(node)
    added = len(new) - len(old)
    return tuple(dim - added if dim >= added and old[dim - added] == size else None for dim, size in enumerate(new))


def _repeat(node: fx.Node) -> DimensionMap:
    counts = cast("Sequence[object]", node.args[1])
    added = len(counts) - _rank_of(node.args[0])
    return tuple(dim - added if dim >= added and count == 1 else None for dim, count in enumerate(counts))


def _reshape(node: fx.Node) -> DimensionMap:
    """A dimension is kept when its size and the products of the sizes before and after it stay the same."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if before == after:
        return _unchanged(node)
    frames, wanted = (
        [(size, product_of(shape[:dim]), product_of(shape[dim + 1 :])) for dim, size in enumerate(shape)]
        for shape in (before, after)
    )
    return tuple(frames.index(frame) if frame in frames else None for frame in wanted)


def _pad(node: fx.Node) -> DimensionMap:
    rank = _rank_of(node)
    padded = {rank - 1 - index // 2 for index, count in enumerate(cast("Sequence[object]", node.args[1])) if count != 0}
    return tuple(None if dim in padded else dim for dim in range(rank))


def _reduce(node: fx.Node) -> DimensionMap:
    rank = _rank_of(node.args[0])
    removed = ops.reduced_dims(node, rank)
    if _rank_of(node) == rank:
        return tuple(None if dim in removed else dim for dim in range(rank))
    return tuple(dim for dim in range(rank) if dim not in removed)


_RULES: dict[object, _Rule] = {
    operator.getitem: _unchanged,
    **dict.fromkeys((*ops.IDENTITIES, *ops.CONVERSIONS), _unchanged),
    aten.permute.default: _permute,
    **dict.fromkeys(ops.TRANSPOSES, _transpose),
    **dict.fromkeys((aten.unsqueeze.default, aten.stack.default), _inserted),
    **dict.fromkeys(ops.SQUEEZES, _squeeze),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _without_dim),
    **dict.fromkeys((*ops.EXPANDS, aten.expand_as.default), _expand),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _all_or_flat("dim"),
    aten.slice.Tensor: lambda node: (_unchanged if shape_of(node) == shape_of(node.args[0]) else _all_but("dim"))(node),
    **dict.fromkeys((*ops.RESHAPES, *ops.RESHAPES_AS), _reshape),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _pad),
    **dict.fromkeys((*ops.SPLITS, *ops.CONCATENATIONS), _all_but("dim")),
    aten.flip.default: _all_but("dims"),
    aten.roll.default: _all_or_flat("dims"),
    **dict.fromkeys((*ops.SOFTMAX, *ops.LOG_SOFTMAX, *ops.CUMULATIVE, *ops.SORTS), _all_but("dim")),
    **dict.fromkeys((*ops.SUMS, *ops.REDUCTIONS, *ops.REDUCTIONS_WITH_INDICES), _reduce),
}
