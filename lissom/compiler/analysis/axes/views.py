"""Axis rules of views, and of operators that concatenate, split or look up values without computing with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes.axis import Axis, concatenation, cut, divide, pin, product, unify
from lissom.compiler.analysis.axes.base import Dims, Known, Value, broadcast, fresh, of, unknown
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import dim_of, dimension_map, shape_of
from lissom.compiler.ir.match import lookup_indices
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.types import Size, TensorType


def moved(node: fx.Node, known: Known) -> Value:
    """The axes of the argument moved by the call's dimension map; a dimension the call creates is a new axis."""
    dims, sizes = of(node.args[0], known), shape_of(node)
    sources = dimension_map(node)
    assert sources is not None, f"{target_text(node.target)} has no dimension map"
    return tuple(Axis(size) if source is None else dims[source] for source, size in zip(sources, sizes, strict=True))


def reshape(node: fx.Node, known: Known) -> Value:
    """Take factors from the front until their product is each size of the result, dividing a factor that is too large."""
    source = of(node.args[0], known)
    factors = [factor for axis in source for factor in axis.factors()]
    axes: list[Axis] = []
    for size in nodes.tensor_type(node).shape:
        merged = take(factors, size)
        if merged is None:
            reason = f"{target_text(node.target)} mixes it with other dimensions"
            for axis in (*source, *axes):
                pin(axis, reason)
            return fresh(nodes.node_type(node), reason)
        axes.append(merged)
    return tuple(axes)


def reshape_as(node: fx.Node, known: Known) -> Value:
    """Reshape to the sizes of another tensor, whose axes are those of the result."""
    axes = cast(Dims, reshape(node, known))
    for axis, other in zip(axes, of(node.args[1], known), strict=True):
        unify(axis, other, f"the sizes of {target_text(node.target)}")
    return axes


def take(factors: list[Axis], size: Size) -> Axis | None:
    """Remove factors with product `size` from the front of the list; None when there are no such factors."""
    if size == 1:
        return Axis(1)
    pieces = divide(product(factors), size) if factors else None
    if pieces is None:
        return None
    factors[:] = pieces[1].factors()
    return pieces[0]


def repeat(node: fx.Node, known: Known) -> Value:
    """Copies of an axis: the product of the copies and the axis."""
    dims, sizes = of(node.args[0], known), nodes.tensor_type(node).shape
    padded = (*(Axis(1) for _ in range(len(sizes) - len(dims))), *dims)
    repeated: list[Axis] = []
    for axis, size, count in zip(padded, sizes, cast("list[object]", node.args[1]), strict=True):
        copies = Axis(nodes.node_type(count).value if isinstance(count, fx.Node) else cast(int, count))  # pyright: ignore
        repeated.append(axis if count == 1 else product([copies, axis]) if axis.size != 1 else Axis(size))
    return tuple(repeated)


def repeat_interleave(node: fx.Node, known: Known) -> Value:
    """Each index several times in a row: the product of the axis and the copies."""
    if nodes.argument(node, "dim") is None:
        return unknown(node, known)
    dims = list(of(node.args[0], known))
    index = dim_of(node, len(dims))
    dims[index] = product([dims[index], Axis(cast(int, node.args[1]))])
    return tuple(dims)


def cat(node: fx.Node, known: Known) -> Value:
    """Concatenated axes along one dimension; the others are unified."""
    items = [of(tensor, known) for tensor in cast("list[fx.Node]", node.args[0])]
    # `cat` accepts an empty tensor of rank 1 beside any others.
    parts = [dims for dims in items if len(dims) == max(map(len, items))]
    index = dim_of(node, len(parts[0]))
    return _unified(parts, index, concatenation([dims[index] for dims in parts]), "cat")


def _unified(parts: Sequence[Dims], index: int, along: Axis, reason: str) -> Dims:
    """The axes of these parts, unified but for one dimension, whose axis in the result is `along`."""
    others = [(*dims[:index], Axis(1), *dims[index + 1 :]) for dims in parts]
    axes = broadcast(others, len(parts[0]), reason)
    return (*axes[:index], along, *axes[index + 1 :])


def stack(node: fx.Node, known: Known) -> Value:
    """A new dimension over tensors of the same axes."""
    parts = [of(tensor, known) for tensor in cast("list[fx.Node]", node.args[0])]
    axes = list(broadcast(parts, len(parts[0]), "stack"))
    axes.insert(dim_of(node, len(axes) + 1), Axis(len(parts), pinned="stacked tensors"))
    return tuple(axes)


def pieces_of(axis: Axis, sizes: Sequence[Size]) -> list[Axis] | None:
    """The axis split into pieces of these sizes; None when it cannot be split there."""
    pieces: list[Axis] = []
    for size in sizes[:-1]:
        halves = cut(axis, size)
        if halves is None:
            return None
        pieces.append(halves[0])
        axis = halves[1]
    return [*pieces, axis]


def split(node: fx.Node, known: Known) -> Value:
    """Pieces of one dimension; when its axis cannot be split there, it and the pieces are pinned."""
    dims = of(node.args[0], known)
    index = dim_of(node, len(dims))
    types = cast("tuple[TensorType, ...]", nodes.node_type(node))
    pieces = pieces_of(dims[index], [piece_type.shape[index] for piece_type in types])
    if pieces is None:
        pin(dims[index], f"{target_text(node.target)} cuts their axis in pieces that are no whole parts of it")
        pieces = [Axis(piece_type.shape[index], pinned="a piece of another axis") for piece_type in types]
    return tuple((*dims[:index], piece, *dims[index + 1 :]) for piece in pieces)


def unbind(node: fx.Node, known: Known) -> Value:
    """One tensor per index of a dimension, which is pinned; each has the other dimensions."""
    dims = of(node.args[0], known)
    pin(dims[dim_of(node, len(dims))], "its indices are separated by unbind")
    rest = cast(Dims, moved(node, known))
    return tuple(rest for _ in cast("tuple[object, ...]", nodes.node_type(node)))


def select(node: fx.Node, known: Known) -> Value:
    """One index of a dimension, which is pinned; the result has the other dimensions."""
    dims = of(node.args[0], known)
    pin(dims[dim_of(node, len(dims))], "one index of it is selected")
    return moved(node, known)


def slice_bounds(node: fx.Node, size: Size) -> tuple[int, int] | None:
    """Start and end of a slice of an axis of known size; None when they vary or skip."""
    start, end, step = (nodes.argument(node, name) for name in ("start", "end", "step"))
    start = 0 if start is None else start
    end = size if end is None else end
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(size, int)) or step != 1:
        return None
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    return max(0, min(start, size)), max(0, min(end, size))


def slice_of(node: fx.Node, known: Known) -> Value:
    """A range of one dimension, or every n-th index of it; when its axis cannot be split there, both are pinned."""
    dims = list(of(node.args[0], known))
    index = dim_of(node, len(dims))
    wanted = nodes.tensor_type(node).shape[index]
    axis = dims[index]
    if axis.size == wanted:
        return tuple(dims)
    bounds = slice_bounds(node, axis.size)
    if bounds is not None and bounds[0] >= bounds[1]:
        dims[index] = Axis(0)
        return tuple(dims)
    sizes = [bounds[0], bounds[1] - bounds[0], cast(int, axis.size) - bounds[1]] if bounds else []
    pieces = pieces_of(axis, [size for size in sizes if size > 0]) if sizes else None
    if pieces is None:
        strided = every_nth(node, axis.size)
        pair = divide(axis, cast(int, axis.size) // strided) if strided else None
        reason = "a slice cuts a piece of their axis that is no whole part of it"
        pin(axis, f"a slice takes one index of each {strided} of their axis" if strided else reason)
        dims[index] = pair[0] if pair else Axis(wanted, pinned="a piece of another axis")
    else:
        dims[index] = pieces[1 if sizes[0] > 0 else 0]
    return tuple(dims)


def every_nth(node: fx.Node, size: Size) -> int:
    """n for a slice that takes one index of each n of an axis, to its end, such as x[..., ::2]; 0 for any other."""
    start, end, step = (nodes.argument(node, name) for name in ("start", "end", "step"))
    fixed = isinstance(size, int) and isinstance(step, int) and isinstance(start or 0, int) and isinstance(end or size, int)
    if not fixed:
        return 0
    size, step, start, end = (cast(int, number) for number in (size, step, start or 0, size if end is None else end))
    return step if step > 1 and 0 <= start < step and end >= size and size % step == 0 else 0


def reorder(node: fx.Node, known: Known) -> Value:
    """flip, roll, tril and similar: the order of indices matters, so every axis is pinned."""
    dims = of(node.args[0], known)
    for axis in dims:
        pin(axis, f"its order matters to {target_text(node.target)}")
    return dims


def index_select(node: fx.Node, known: Known) -> Value:
    """Rows looked up along one dimension, which is pinned; in the result it has the axis of the looked-up indices."""
    dims, chosen = list(of(node.args[0], known)), of(node.args[2], known)
    index = dim_of(node, len(dims))
    if dims:
        pin(dims[index], "its indices are looked up")
        dims[index] = chosen[0] if chosen else Axis(1)
    return tuple(dims)


def index_copy(node: fx.Node, known: Known) -> Value:
    """Rows of a tensor are overwritten: their dimension is pinned, and the others are unified with those of the new rows."""
    dims, rows = of(node.args[0], known), of(node.args[3], known)
    if not dims or not rows:
        return dims
    index = dim_of(node, len(dims))
    for axis in (dims[index], rows[index], *of(node.args[2], known)):
        pin(axis, "its indices are looked up")
    return _unified([dims, rows], index, dims[index], "index_copy")


def copy(node: fx.Node, known: Known) -> Value:
    """A tensor is overwritten: its axes are unified with those of the source, except where the source is broadcast."""
    dims = of(node.args[0], known)
    broadcast([dims, of(node.args[1], known)], len(dims), "copy_")
    return dims


def gather(node: fx.Node, known: Known) -> Value:
    """Values looked up along one dimension, which is pinned; the result has the axes of the indices."""
    if nodes.argument(node, "dim") is None:
        return unknown(node, known)
    dims, chosen = of(node.args[0], known), of(lookup_indices(node), known)
    if len(dims) != len(chosen) or not dims:
        return unknown(node, known)
    index = dim_of(node, len(dims))
    pin(dims[index], "its indices are looked up")
    axes = list(chosen)
    for dim, (axis, chosen_axis) in enumerate(zip(dims, chosen, strict=True)):
        if dim == index:
            continue
        if axis.size == chosen_axis.size:
            unify(axis, chosen_axis, "gathered along another dimension")
        elif node.target is torch.ops.aten.take_along_dim.default:
            # It broadcasts a size of 1; `gather` takes the first indices.
            axes[dim] = axis if chosen_axis.size == 1 else chosen_axis
        else:
            pin(axis, "only its first indices are gathered")
            pin(chosen_axis, "gathers the first indices of a longer dimension")
    return tuple(axes)


def index(node: fx.Node, known: Known) -> Value:
    """`x[i, j]`: the indexed dimensions are pinned; the others keep their axes when the indexed ones are adjacent."""
    dims = of(node.args[0], known)
    indices = cast("list[fx.Node | None]", node.args[1])
    used = [dim for dim, tensor in enumerate(indices) if tensor is not None]
    for dim in used:
        pin(dims[dim], "its indices are looked up")
    typed = nodes.tensor_type(node)
    chosen = [of(tensor, known) for tensor in indices if tensor is not None]
    rank = max(len(axes) for axes in chosen)
    plain = all(nodes.tensor_type(tensor).dtype != torch.bool for tensor in indices if tensor is not None)
    if plain and used == list(range(used[0], used[-1] + 1)) and typed.rank == len(dims) - len(used) + rank:
        return (*dims[: used[0]], *broadcast(chosen, rank, "index"), *dims[used[-1] + 1 :])
    for axis in dims:
        pin(axis, "indexed")
    return fresh(typed, "indexed")


def getitem(node: fx.Node, known: Known) -> Value:
    """The axes of one of several results."""
    return cast(Dims, known[cast(fx.Node, node.args[0])][cast(int, node.args[1])])
