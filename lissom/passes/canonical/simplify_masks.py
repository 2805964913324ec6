"""Replace attention masks built by indexing with ranges by views of the underlying mask.

    x[arange(n)[:, None], arange(m)]   ->  x                 n, m the sizes of x; any dimensions of size 1 between and around
    arange(n) >= 0                     ->  true
    a & true                           ->  a                 expanded to the size of both

Hugging Face's models compute every attention mask this way, as a function of query and key positions: a dozen operators that
amount to a reshape. Removing them saves time in small models on short texts, and later passes see the mask itself.

A weight that holds 0, 1 … n - 1 counts as `arange(n)`: `fold-constants` makes such weights where a size is constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import AND, EXPANDS, FILLS, ONES, RANGES, RESHAPES
from lissom.compiler.ir.types import Size
from lissom.compiler.ir.view_calls import Index
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_MOST = 1 << 16
"""The most elements of a weight that are compared with a range; no cache or position table has more."""
_VIEWS = (aten.unsqueeze.default, *RESHAPES, *EXPANDS)


@dataclass(frozen=True)
class SimplifyMasks(Rewrite):
    """Simplifies attention masks: replaces indexing by position with a reshape, and removes conditions that always hold."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.index.Tensor, *AND):
            if node.target is aten.index.Tensor:
                _replace_indexing(edit, node)
            else:
                _drop_true(edit, node)


def _replace_indexing(edit: Editor, node: fx.Node) -> None:
    """Replace x indexed by all its positions in order by x with dimensions of size 1 inserted."""
    x, rank = Index(node).x, nodes.tensor_type(node).rank
    x_type = nodes.tensor_type(x)
    counts = [_counted(edit, index, rank) for index in Index(node).indices]
    if None in counts or len(counts) != x_type.rank:
        return
    lengths = [count[0] for count in counts if count is not None]
    axes: list[int] = []
    for _, axis in filter(None, counts):
        # An index with one position may be assigned to any axis of size 1, so to the next.
        axes.append(axis if axis is not None else max(axes, default=-1) + 1)
    same = all(map(partial(fake.same_size, edit.program.fake_mode), lengths, x_type.shape))
    if axes != sorted(set(axes)) or max(axes) >= rank or not same:
        return
    with edit.before(node):
        view = x
        for axis in range(rank):
            if axis not in axes:
                view = edit.call(aten.unsqueeze.default, view, axis)
    # Indexing returns a copy, and the caller may write to an output.
    if view is not x or edit.program.output not in node.users:
        edit.replace(node, view)


def _counted(edit: Editor, index: fx.Node | None, rank: int) -> tuple[Size, int | None] | None:
    """The n and the axis of an index that is 0, 1 … n - 1 along one axis and of size 1 along the others, of `rank` axes.

    The axis is None for n = 1, when all axes are alike.
    """
    if index is None:
        return None
    shape, source = nodes.tensor_type(index).shape, index
    while nodes.is_call(source, aten.unsqueeze.default, *RESHAPES):
        source = nodes.operand(source)
    length = _counted_length(edit, source)
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if length is None or len(wide) > 1 or any(shape[axis] != length for axis in wide):
        return None
    return (length, wide[0] + rank - len(shape)) if wide else (length, None)


def _counted_length(edit: Editor, source: fx.Node) -> Size | None:
    """The n of `arange(n)`, or of a weight with the same values."""
    if nodes.is_call(source, *RANGES):
        tensor_type = nodes.tensor_type(source)
        return tensor_type.shape[0] if tensor_type.rank == 1 and _from_zero(source) else None
    weight = edit.program.constant(source)
    if weight is None or weight.dtype not in (torch.int32, torch.int64) or not 0 < weight.numel() <= _MOST:
        return None
    counts = torch.arange(weight.numel(), dtype=weight.dtype, device=weight.device)
    return weight.numel() if torch.equal(weight.flatten(), counts) else None


def _from_zero(count: fx.Node) -> bool:
    """True for `arange` that starts with 0 and counts by 1."""
    first = 0 if count.target is aten.arange.default else nodes.argument(count, "start")
    step = nodes.argument(count, "step") if count.target is aten.arange.start_step else 1
    return (first, step) == (0, 1) and not nodes.tensor_type(count).dtype.is_floating_point


def _drop_true(edit: Editor, node: fx.Node) -> None:
    """Replace a & true by a, expanded to the size of both."""
    left, right = nodes.operand(node), nodes.operand(node, 1)
    if any(nodes.tensor_type(operand).dtype != torch.bool for operand in (left, right)):
        return
    kept, other = (right, left) if _always_true(left) else (left, right)
    if not _always_true(other) or edit.program.output in node.users:
        return
    view = kept
    if not fake.same_type(edit.program.fake_mode, nodes.node_type(node), nodes.node_type(kept)):
        with edit.before(node):
            view = edit.call(aten.expand.default, kept, _sizes(edit, kept, other))
    edit.replace(node, view)


def _sizes(edit: Editor, kept: fx.Node, other: fx.Node) -> list[fx.Node | int]:
    """The sizes both broadcast to, for `expand` of `kept`: -1 where it has that size."""
    rank = max(nodes.tensor_type(operand).rank for operand in (kept, other))
    sizes: list[fx.Node | int] = []
    for dim in range(-rank, 0):
        own, wanted = (typed.shape[dim] if typed.rank >= -dim else 1 for typed in map(nodes.tensor_type, (kept, other)))
        sizes.append(edit.size(other, dim) if own == 1 and wanted != 1 else -1 if nodes.tensor_type(kept).rank >= -dim else 1)
    return sizes


def _always_true(condition: fx.Node) -> bool:
    """True for a condition that holds everywhere, whatever the inputs."""
    condition = _viewed(condition)
    if nodes.is_call(condition, *AND):
        return all(map(_always_true, condition.all_input_nodes))
    if nodes.is_call(condition, *ONES):
        return True
    if nodes.is_call(condition, *FILLS):
        return nodes.argument(condition, "fill_value") in (True, 1)
    if not nodes.is_call(condition, aten.ge.Scalar):
        return False
    count, least = _viewed(nodes.operand(condition)), nodes.argument(condition, "other")
    return nodes.is_call(count, *RANGES) and _from_zero(count) and isinstance(least, (int, float)) and least <= 0


def _viewed(value: fx.Node) -> fx.Node:
    """The value before reshapes and expands."""
    while nodes.is_call(value, *_VIEWS):
        value = nodes.operand(value)
    return value
