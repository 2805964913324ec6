"""Along which dimensions a call works position by position: index i of its result depends on index i of its operands alone.

This is what lets a choice of positions move in front of a call, f(x)[i] = f(x[i]), and lets a call run on some positions only.
It is a finer question than `axes` answers, where a dimension that is reduced or mixed is still the same dimension.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard, cast

import sympy
import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.match import register
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import Size, TensorType

aten = torch.ops.aten

Slot = int | str | tuple[int, int]
"""Where in a call an operand stands: a position, a keyword, or a position and an index in the list there."""
Sources = dict[Slot, int]
Rule = Callable[[fx.Node, int], "Sources | None"]


def position_sources(node: fx.Node, dim: int) -> Sources | None:
    """For dimension `dim` of what a call yields, the operands it comes from and which of their dimensions it is.

    Operands that are missing are the same for every position. None where a position depends on several, or on none.
    Of a call that yields several tensors, `dim` counts the dimensions of one piece.
    """
    rule = RULES.get(str(node.target))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    found = None if rule is None else rule(node, dim)
    return found or None


def operands(node: fx.Node) -> dict[Slot, fx.Node]:
    """The tensors a call reads, by where they stand."""
    found: dict[Slot, fx.Node] = {}
    for index, item in enumerate(node.args):
        if isinstance(item, (list, tuple)):
            found |= {(index, place): part for place, part in enumerate(item) if _is_value(part)}
        elif _is_value(item):
            found[index] = item
    return found | {key: item for key, item in node.kwargs.items() if _is_value(item)}


def with_operands(node: fx.Node, changed: Mapping[Slot, object]) -> tuple[list[object], dict[str, object]]:
    """The call's arguments with some operands exchanged."""
    args: list[object] = [list(item) if isinstance(item, (list, tuple)) else item for item in node.args]
    kwargs: dict[str, object] = dict(node.kwargs)
    for slot, item in changed.items():
        if isinstance(slot, str):
            kwargs[slot] = item
        elif isinstance(slot, int):
            args[slot] = item
        else:
            cast("list[object]", args[slot[0]])[slot[1]] = item
    return args, kwargs


def row_position(program: Program, node: fx.Node) -> fx.Node | None:
    """The positions `p` of `x[arange(batch), p]`; None when the node is no such call."""
    indices = cast(Sequence[object], node.args[1])
    if len(indices) != 2 or not all(map(nodes.is_tensor, indices)):
        return None
    rows, position = (cast(fx.Node, item) for item in indices)
    batch = shape_of(node.args[0])[0]
    if nodes.tensor_type(position).rank != 1 or nodes.tensor_type(position).dtype == torch.bool:
        return None
    if shape_of(rows) != (batch,) or shape_of(position) != (batch,):
        return None
    if rows.op == "get_attr":
        return position if torch.equal(program.weight(str(rows.target)), torch.arange(cast(int, batch))) else None
    return position if nodes.is_call(rows, aten.arange.default) else None


def shape_of(item: object) -> tuple[Size, ...]:
    """The sizes of a tensor, or of the first of several."""
    found = nodes.node_type(cast(fx.Node, item))
    return cast(TensorType, found[0] if isinstance(found, tuple) else found).shape


def product_of(sizes: Sequence[Size]) -> sympy.Expr:
    """The product of sizes, in a form in which equal products are equal."""
    return cast(sympy.Expr, sympy.expand(sympy.Mul(*sizes)))


def _is_value(item: object) -> TypeGuard[fx.Node]:
    return isinstance(item, fx.Node) and (nodes.is_tensor(item) or isinstance(nodes.node_type(item), tuple))


def _dim(node: fx.Node, name: str, rank: int) -> int:
    return cast(int, nodes.argument(node, name)) % rank


def _aligned(node: fx.Node, dim: int, slots: Mapping[Slot, fx.Node]) -> Sources:
    """The operands that have the dimension when they are broadcast against each other."""
    shape = shape_of(node)
    back = len(shape) - dim
    found: Sources = {}
    for slot, item in slots.items():
        own = shape_of(item)
        if len(own) >= back and (own[-back] != 1 or shape[dim] == 1):
            found[slot] = len(own) - back
    return found


def _pointwise(node: fx.Node, dim: int) -> Sources | None:
    return _aligned(node, dim, operands(node))


def _all_but_last(node: fx.Node, dim: int) -> Sources | None:
    return _aligned(node, dim, operands(node)) if dim < len(shape_of(node)) - 1 else None


def _first(node: fx.Node, dim: int) -> Sources | None:
    return {0: dim}


def _linear(node: fx.Node, dim: int) -> Sources | None:
    return {0: dim} if dim < len(shape_of(node)) - 1 else None


def _embedding(node: fx.Node, dim: int) -> Sources | None:
    return {1: dim} if dim < len(shape_of(node)) - 1 else None


def _norm(node: fx.Node, dim: int) -> Sources | None:
    return {0: dim} if dim < len(shape_of(node)) - len(cast("list[int]", node.args[1])) else None


def _scan(node: fx.Node, dim: int) -> Sources | None:
    """Softmax, cumulative sums, sorting: along one dimension, every other position apart."""
    return {0: dim} if dim != _dim(node, "dim", len(shape_of(node))) else None


def _flip(node: fx.Node, dim: int) -> Sources | None:
    turned = {item % len(shape_of(node)) for item in cast("list[int]", node.args[1])}
    return None if dim in turned else {0: dim}


def _slice(node: fx.Node, dim: int) -> Sources | None:
    whole = shape_of(node) == shape_of(node.args[0])
    return {0: dim} if whole or dim != _dim(node, "dim", len(shape_of(node))) else None


def _reduce(node: fx.Node, dim: int) -> Sources | None:
    rank = len(shape_of(node.args[0]))
    given = nodes.argument(node, "dim")
    if given is None:
        return None
    reduced = {cast(int, item) % rank for item in (given if isinstance(given, (list, tuple)) else [given])} or set(range(rank))
    left = list(range(rank)) if nodes.argument(node, "keepdim") else [item for item in range(rank) if item not in reduced]
    return {0: left[dim]} if left[dim] not in reduced else None


def _transpose(node: fx.Node, dim: int) -> Sources | None:
    rank = len(shape_of(node))
    first, second = (cast(int, item) % rank for item in node.args[1:3])
    return {0: {first: second, second: first}.get(dim, dim)}


def _permute(node: fx.Node, dim: int) -> Sources | None:
    order = cast("list[int]", node.args[1])
    return {0: order[dim] % len(order)}


def _unsqueeze(node: fx.Node, dim: int) -> Sources | None:
    added = _dim(node, "dim", len(shape_of(node)))
    return None if dim == added else {0: dim - (dim > added)}


def _squeeze(node: fx.Node, dim: int) -> Sources | None:
    before = shape_of(node.args[0])
    removed = _dim(node, "dim", len(before))
    return {0: dim if before[removed] != 1 or dim < removed else dim + 1}


def _reshape(node: fx.Node, dim: int) -> Sources | None:
    """The dimension with the same size and as many values behind each of its positions and in front of it."""
    before, after = shape_of(node.args[0]), shape_of(node)
    ahead, behind = product_of(after[:dim]), product_of(after[dim + 1 :])
    for index, size in enumerate(before):
        if size == after[dim] and product_of(before[:index]) == ahead and product_of(before[index + 1 :]) == behind:
            return {0: index}
    return None


def _expand(node: fx.Node, dim: int) -> Sources | None:
    return _aligned(node, dim, {0: cast(fx.Node, node.args[0])})


def _select(node: fx.Node, dim: int) -> Sources | None:
    chosen = _dim(node, "dim", len(shape_of(node.args[0])))
    return {0: dim + (dim >= chosen)}


def _unbind(node: fx.Node, dim: int) -> Sources | None:
    return _select(node, dim)


def _cat(node: fx.Node, dim: int) -> Sources | None:
    if dim == _dim(node, "dim", len(shape_of(node))):
        return None
    return {slot: dim for slot, item in operands(node).items() if len(shape_of(item)) == len(shape_of(node))}


def _stack(node: fx.Node, dim: int) -> Sources | None:
    added = _dim(node, "dim", len(shape_of(node)))
    return None if dim == added else dict.fromkeys(operands(node), dim - (dim > added))


def _matmul(node: fx.Node, dim: int) -> Sources | None:
    rank, slots = len(shape_of(node)), operands(node)
    ranks = [len(shape_of(item)) for item in slots.values()]
    if min(ranks) < 2:
        return None
    if dim >= rank - 2:
        index = dim - rank + 2
        return {index: ranks[index] - 2 + index}
    return _aligned(node, dim, slots)


def _attention(node: fx.Node, dim: int) -> Sources | None:
    """A query's row needs all keys and values; batches and heads are apart, unless query heads share key heads."""
    rank, slots = len(shape_of(node)), operands(node)
    q, _, v, *rest = slots
    if dim == rank - 1:
        return {v: len(shape_of(slots[v])) - 1}
    if dim == rank - 2:
        return _aligned(node, dim, {q: slots[q], **{slot: slots[slot] for slot in rest}})
    if dim == rank - 3 and node.kwargs.get("enable_gqa"):
        return None
    return _aligned(node, dim, slots)


def _linear_attention(node: fx.Node, dim: int) -> Sources | None:
    """The same, but that a causal row is told by its place among the rows."""
    q, k, _ = (shape_of(item) for item in node.args[:3])
    if (dim == 2 and nodes.argument(node, "causal")) or (dim == 1 and q[1] != k[1]):
        return None
    return _attention(node, dim)


def _index_select(node: fx.Node, dim: int) -> Sources | None:
    return {2: 0} if dim == _dim(node, "dim", len(shape_of(node))) else {0: dim}


def _convolution(node: fx.Node, dim: int) -> Sources | None:
    return {0: 0} if dim == 0 else None


RULES: dict[str, Rule] = {"lissom.attention.default": _attention, "lissom.rotary.default": _all_but_last}
RULES["lissom.linear_attention.default"] = _linear_attention

_register = functools.partial(register, RULES)

_register(_pointwise, "__and__.Tensor", "__or__.Tensor", "type_as", "floor_divide", "floor_divide.Scalar")
_register(_pointwise, "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
_register(_first, "to.dtype", "to.device", "to.dtype_layout", "_to_copy", "dropout", "contiguous", "alias", "detach", "clone")
_register(_linear, "linear")
_register(_embedding, "embedding")
_register(_norm, "layer_norm", "rms_norm")
_register(_scan, "softmax.int", "log_softmax.int", "cumsum", "topk", "sort")
_register(_flip, "flip")
_register(_slice, "slice.Tensor")
_register(_scan, "split.Tensor", "split_with_sizes", "chunk", "repeat_interleave.self_int")
_register(_reduce, "mean.dim", "sum.dim_IntList", "amax", "amin", "argmax", "argmin", "any.dim", "all.dim", "var.correction")
_register(_transpose, "transpose.int")
_register(_permute, "permute")
_register(_unsqueeze, "unsqueeze")
_register(_squeeze, "squeeze.dim")
_register(_reshape, "reshape", "view", "flatten.using_ints", "unflatten.int", "_unsafe_view")
_register(_expand, "expand")
_register(_select, "select.int")
_register(_unbind, "unbind.int")
_register(_cat, "cat")
_register(_stack, "stack")
_register(_matmul, "matmul", "bmm", "mm")
_register(_attention, "scaled_dot_product_attention")
_register(_index_select, "index_select")
_register(_convolution, "conv1d", "conv2d", "conv3d")
RULES[str(operator.getitem)] = _first
