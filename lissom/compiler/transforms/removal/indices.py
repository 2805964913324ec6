"""Remove indices of an axis everywhere it occurs: weights, biases, norms, and the sizes written into operators."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from functools import reduce

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis, quotient
from lissom.compiler.analysis.axes.base import Value, of
from lissom.compiler.analysis.axes.views import slice_bounds
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention, Convolution
from lissom.compiler.ir.dimension_map import channel_dim, name_squeezed_dims, shape_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import CONVOLUTIONS, LAYER_NORMS, SIZES_AT, SPLITS, SQUEEZES
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.types import Size, fixed, format_size
from lissom.compiler.ir.view_calls import Repeat, RepeatInterleave, Sized, Slice, Split, Unflatten
from lissom.compiler.transforms.removal.norms import follow_norm, normed_axes
from lissom.errors import LissomError, UnsupportedError

aten = torch.ops.aten


def remove_indices(
    edit: Editor, removed: Mapping[Axis, Collection[int]], program_axes: Axes | None = None, *, zero: bool = False
) -> None:
    """Remove indices of atomic axes from the program: from every weight that has the axis, and from every literal size.

    The outputs are unchanged when the removed indices contribute nothing: zero rows where the axis is contracted.

    The program is unchanged after an error.

    Args:
        found: the axes that these belong to, if weights were changed since; by default the axes of the program.
        zero: whether removed values are exactly zero wherever a norm reads them; norms are then corrected for the old size.

    Raises:
        UnsupportedError: naming the obstacle: a pinned axis, one read as a whole, or the removal of all its indices.
    """
    program_axes = program_axes or edit.program.fact(axes)
    keep = {axis.find(): _kept(edit, program_axes, axis.find(), set(indices), zero) for axis, indices in removed.items()}
    with _all_or_nothing(edit):
        _remove(edit, program_axes, keep)


@contextmanager
def _all_or_nothing(edit: Editor) -> Generator[None]:
    """Restore every call and weight when an edit inside fails."""
    calls = [(node, node.target, node.args, node.kwargs) for node in edit.program.nodes()]
    weights, rewritten = edit.program.weights(), edit.rewritten
    reads = [node for node in edit.program.graph.nodes if node.op == "get_attr"]
    try:
        yield
    except LissomError:
        for node, target, args, kwargs in calls:
            node.target, node.args, node.kwargs = target, args, kwargs
        for node in reads:
            if edit.program.weight(str(node.target)) is not weights[str(node.target)]:
                edit.set_weight(node, weights[str(node.target)], retype=False)
        edit.retype()
        edit.rewritten = rewritten
        raise


def _remove(edit: Editor, program_axes: Axes, keep: Mapping[Axis, torch.Tensor]) -> None:
    def is_touched(node: fx.Node) -> bool:
        return any(not keep.keys().isdisjoint(axis.atoms()) for axis in _axes_of(program_axes.of.get(node, ())))

    for node in program_axes.of:
        if node.op == "call_function" and any(map(is_touched, (node, *node.all_input_nodes))):
            _follow(edit, node, program_axes, keep)
    for node in [node for node in program_axes.of if node.op == "get_attr" and is_touched(node)]:
        cut = _cut(edit.tensor(node), of(node, program_axes.of), keep)
        edit.set_weight(node, cut, retype=False)
        edit.rewritten += 1
    edit.retype()


def mask(axis: Axis, keep: Mapping[Axis, torch.Tensor]) -> torch.Tensor:
    """True for the indices of an axis that stay, [size].

    Args:
        keep: these booleans for its atoms.
    """
    axis = axis.find()
    if axis.form == "atom":
        return keep[axis] if axis in keep else torch.ones(fixed(axis.size), dtype=torch.bool)
    parts = [mask(part, keep) for part in axis.parts]
    if axis.form == "sum":
        return torch.cat(parts)
    return reduce(lambda major, minor: (major[:, None] & minor[None, :]).flatten(), parts)


def _kept(edit: Editor, program_axes: Axes, axis: Axis, indices: set[int], zero: bool) -> torch.Tensor:
    obstacle = "it is made of several axes" if axis.form != "atom" else program_axes.obstacle(axis, zero=zero)
    if obstacle:
        size = format_size(axis.size, edit.program.signature.name_of)
        raise UnsupportedError(f"indices of this axis of size {size} cannot be removed: {obstacle}")
    kept = torch.ones(fixed(axis.size), dtype=torch.bool)
    outside = [index for index in indices if not 0 <= index < len(kept)]
    if outside:
        raise UnsupportedError(f"index {outside[0]} is outside this axis, which has 0 to {len(kept) - 1}")
    kept[list(indices)] = False
    if not kept.any():
        raise UnsupportedError(f"all {len(kept)} indices of this axis would go; leave one, or remove what reads it")
    return kept


def _axes_of(value: Value) -> list[Axis]:
    return [axis for part in value for axis in ([part] if isinstance(part, Axis) else part)]


def _size(axis: Axis, keep: Mapping[Axis, torch.Tensor]) -> Size:
    """The size of the axis after the removal; symbolic where one of its factors is."""
    axis = axis.find()
    if keep.keys().isdisjoint(axis.atoms()):
        return axis.size
    if axis.form == "atom":
        return int(keep[axis].sum())
    sizes = [_size(part, keep) for part in axis.parts]
    return sum(sizes, start=0) if axis.form == "sum" else math.prod(sizes, start=1)


def _cut(weight: torch.Tensor, dims: tuple[Axis, ...], keep: Mapping[Axis, torch.Tensor]) -> torch.Tensor:
    """The weight without the removed indices."""
    for dim, axis in enumerate(dims):
        if not keep.keys().isdisjoint(axis.atoms()):
            weight = weight.index_select(dim, mask(axis, keep).nonzero().flatten().to(weight.device))
    return weight


def _follow(edit: Editor, node: fx.Node, program_axes: Axes, keep: Mapping[Axis, torch.Tensor]) -> None:
    """Correct the literal sizes and positions of a call whose axes lose indices."""
    target = node.target
    if target in LAYER_NORMS and any(not keep.keys().isdisjoint(axis.atoms()) for axis in normed_axes(node, program_axes)):
        follow_norm(edit, node, program_axes, lambda axis: mask(axis, keep))
    elif target in SIZES_AT:
        nodes.set_operand(node, SIZES_AT[target], _new_sizes(edit, node, program_axes, keep))
    elif target in SPLITS:
        dim = Split(node).dim
        pieces = [piece for piece in program_axes.of[node] if not isinstance(piece, Axis)]
        if all(keep.keys().isdisjoint(piece[dim].atoms()) for piece in pieces):
            return
        sizes = [_size(piece[dim], keep) for piece in pieces]
        node.target = aten.split_with_sizes.default
        nodes.set_arguments(node, nodes.operand(node), sizes, dim)
    elif target in SQUEEZES:
        name_squeezed_dims(node, shape_of(nodes.operand(node)))
    elif target is aten.slice.Tensor:
        _follow_slice(node, program_axes, keep)
    elif target is aten.scaled_dot_product_attention.default and nodes.argument(node, "scale") is None:
        # Without a scale it is 1/√head_dim, of the original head_dim.
        head_dim = fixed(program_axes.axis(Attention(node).q, -1).size)
        nodes.set_argument(node, "scale", head_dim**-0.5)
    elif target in CONVOLUTIONS and nodes.argument(node, "groups") != 1:
        channels = program_axes.axis(Convolution(node).x, channel_dim(node))
        if nodes.argument(node, "groups") == channels.size:
            nodes.set_argument(node, "groups", _size(channels, keep))
    elif (repeated := RepeatInterleave.of(node)) is not None:
        nodes.set_argument(node, "repeats", _copies(node, repeated.repeats, repeated.dim or 0, program_axes, keep))
    elif (copied := Repeat.of(node)) is not None:
        counts = [_copies(node, count, dim, program_axes, keep) for dim, count in enumerate(copied.counts)]
        nodes.set_argument(node, "repeats", counts)


def _new_sizes(edit: Editor, node: fx.Node, program_axes: Axes, keep: Mapping[Axis, torch.Tensor]) -> list[object]:
    """The list of sizes of a call with corrected literals; -1 and sizes read at run time stay."""
    old, dims = Sized(node).sizes, of(node, program_axes.of)
    if (unflattened := Unflatten.of(node)) is not None:
        first = unflattened.dim % (len(dims) - len(old) + 1)
        dims = dims[first : first + len(old)]
    return [_new_size(edit, node, size, axis, keep) for size, axis in zip(old, dims, strict=True)]


def _new_size(edit: Editor, node: fx.Node, size: object, axis: Axis, keep: Mapping[Axis, torch.Tensor]) -> object:
    """A corrected literal size; a size computed from one (batch · heads) is scaled by the remaining fraction."""
    if size == -1 or keep.keys().isdisjoint(axis.atoms()):
        return size
    if isinstance(size, int):
        return _size(axis, keep)
    factors = axis.factors()
    if not isinstance(size, fx.Node) or any(factor.find().form != "atom" for factor in factors):
        raise UnsupportedError(f"{target_text(node.target)} ('{node.name}') has a computed size in it that no rule corrects")
    kept = math.prod(fixed(_size(factor, keep)) for factor in factors if factor in keep)
    whole = math.prod(fixed(factor.size) for factor in factors if factor in keep)
    with edit.before(node):
        return edit.compute_size(operator.floordiv, edit.compute_size(operator.mul, size, kept), whole)


def _follow_slice(node: fx.Node, program_axes: Axes, keep: Mapping[Axis, torch.Tensor]) -> None:
    """The new bounds of a slice are the numbers of remaining indices before the old ones."""
    part = Slice(node)
    axis = program_axes.axis(part.x, part.dim)
    if keep.keys().isdisjoint(axis.atoms()):
        return
    bounds = slice_bounds(node, axis.size)
    assert bounds is not None, "an axis cut at varying positions is pinned"
    kept = mask(axis, keep)
    nodes.set_arguments(node, part.x, part.dim, int(kept[: bounds[0]].sum()), int(kept[: bounds[1]].sum()))


def _copies(node: fx.Node, count: int | fx.Node, dim: int, program_axes: Axes, keep: Mapping[Axis, torch.Tensor]) -> object:
    """The repeat count of a dimension after the removal: the new size divided by the new size of its source."""
    source, result = (of(value, program_axes.of) for value in (nodes.operand(node), node))
    axis, added = result[dim], len(result) - len(source)
    if keep.keys().isdisjoint(axis.atoms()) or not isinstance(count, int):
        return count
    copies = quotient(_size(axis, keep), _size(source[dim - added], keep) if dim >= added else 1)
    if copies is None:
        raise UnsupportedError(f"{target_text(node.target)} ('{node.name}') repeats a dimension whose copies cannot be counted")
    return copies
