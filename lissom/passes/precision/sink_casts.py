"""Move casts past views and copies, so that these operators move values of the smaller dtype.

move(widen(x)) = widen(move(x)) and narrow(move(x)) = move(narrow(x)), because a cast is element-wise. A widening cast moves
after its reader, a narrowing cast before its producer. Two casts that become neighbours are removed by `fold-casts`. A cast
never processes more values than before:

- a widening cast moves after reshapes, permutations, slices and splits, and after a concatenation whose inputs are all
  widened; not after operators that repeat values.
- a narrowing cast moves before reshapes, permutations and expansions, before a split whose pieces are all narrowed, and before
  a concatenation with some widened inputs; not before slices.

A cast stays where its output, or the moved value, has other readers, and where the program relies on it being a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.casts import cast_from, dtype_of, holds, rests_on_copy
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import (
    CASTS,
    COPIES,
    EXPANDS,
    JOINS,
    PARTS,
    REORDERED,
    REPEATS,
    SAME_VALUES,
    SEVERAL,
)
from lissom.compiler.ir.view_calls import Cat, Item, Stack
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_SAME_SIZE = {*SAME_VALUES, *COPIES, *REORDERED}
_GROW = {*EXPANDS, *REPEATS}


@dataclass(frozen=True)
class SinkCasts(Rewrite):
    """Moves casts past views and copies, so that fewer bytes are moved."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(*_SAME_SIZE, *PARTS, *SEVERAL, *JOINS):
            if node.target in JOINS:
                _widen_behind_join(edit, node)
            elif node.target in SEVERAL:
                _widen_behind_split(edit, node)
            else:
                _widen_behind(edit, node)
        # From the last to the first, as casts move that way.
        for node in reversed(list(edit.nodes(*CASTS, *SEVERAL))):
            if node._erased:
                continue
            edit.current = node
            if node.target in SEVERAL:
                _narrow_before_split(edit, node)
            elif _narrows(node):
                _narrow_before(edit, node)


def _is_widened(value: object) -> bool:
    """True for a lossless cast with one reader."""
    source = cast_from(value)
    if source is None or not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    wide, narrow = dtype_of(value), dtype_of(source)
    return holds(wide, narrow) and wide.itemsize > narrow.itemsize


def _narrows(node: fx.Node) -> bool:
    source = cast_from(node)
    return source is not None and dtype_of(node).itemsize < dtype_of(source).itemsize


def _cast(edit: Editor, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value in that dtype: the input of a lossless cast from that dtype where it is one, else a new cast."""
    source = cast_from(value)
    if source is not None and dtype_of(source) == dtype and holds(dtype_of(value), dtype):
        return source
    return edit.call(aten.to.dtype, value, dtype)


def _widen_behind(edit: Editor, move: fx.Node) -> None:
    widened = nodes.operand(move)
    if not _is_widened(widened) or not edit.may_change(move, rests_on_copy(edit.program, move, move)):
        return
    with edit.before(move):
        replaced = edit.call(aten.to.dtype, edit.again(move, nodes.operand(widened)), dtype_of(move))
    edit.replace(move, replaced)


def _widen_behind_split(edit: Editor, split: fx.Node) -> None:
    widened = nodes.operand(split)
    pieces = list(split.users)
    if not _is_widened(widened) or not _only_pieces(pieces):
        return
    dtype = dtype_of(widened)
    with edit.before(split):
        parts = edit.again(split, nodes.operand(widened))
    for piece in pieces:
        with edit.before(piece):
            replaced = edit.call(aten.to.dtype, edit.item(parts, Item(piece).index), dtype)
        edit.replace(piece, replaced)


def _only_pieces(pieces: list[fx.Node]) -> bool:
    return bool(pieces) and all(nodes.is_call(piece, operator.getitem) for piece in pieces)


def _widen_behind_join(edit: Editor, join: fx.Node) -> None:
    parts = list(join.all_input_nodes)
    if not all(map(_is_widened, parts)) or len({dtype_of(cast_from(part)) for part in parts}) > 1:
        return
    if len(set(map(dtype_of, parts))) > 1:
        return
    with edit.before(join):
        joined = _joined(edit, join, nodes.operand)
        replaced = edit.call(aten.to.dtype, joined, dtype_of(join))
    edit.replace(join, replaced)


def _joined(edit: Editor, join: fx.Node, value_of: Callable[[fx.Node], fx.Node]) -> fx.Node:
    parts = (Cat.of(join) or Stack(join)).parts
    return edit.again(join, [value_of(part) for part in parts])


def _narrow_before(edit: Editor, cast: fx.Node) -> None:
    """Move a narrowing cast before all the views and copies whose only reader is the next of them."""
    dtype, value = dtype_of(cast), nodes.operand(cast)
    moves: list[fx.Node] = []
    while nodes.is_call(value, *_SAME_SIZE, *_GROW) and len(value.users) == 1:
        moves.append(value)
        value = nodes.operand(value)
    joins = nodes.is_call(value, *JOINS) and len(value.users) == 1 and _has_widened(value, dtype)
    if not (moves or joins) or not edit.may_change(cast, rests_on_copy(edit.program, cast, value)):
        return
    with edit.before(cast, like=[*reversed(moves), cast]):
        narrow = _joined(edit, value, partial(_cast, edit, dtype=dtype)) if joins else _cast(edit, value, dtype)
        for move in reversed(moves):
            narrow = edit.again(move, narrow)
    edit.replace(cast, narrow)


def _has_widened(join: fx.Node, dtype: torch.dtype) -> bool:
    """True where an input of a concatenation was widened from that dtype, and all inputs are floating-point."""
    sources = [cast_from(part) for part in join.all_input_nodes]
    widened = [source is not None and dtype_of(source) == dtype for source in sources]
    return any(widened) and len({dtype_of(part) for part in join.all_input_nodes}) == 1


def _narrow_before_split(edit: Editor, split: fx.Node) -> None:
    pieces, results = list(split.users), nodes.node_type(split)
    if not _only_pieces(pieces) or not isinstance(results, tuple) or len(pieces) < len(results):
        return
    casts = [user for piece in pieces for user in piece.users]
    if len(casts) != len(pieces) or not all(map(_narrows, casts)) or len(set(map(dtype_of, casts))) > 1:
        return
    with edit.before(split):
        parts = edit.again(split, _cast(edit, nodes.operand(split), dtype_of(casts[0])))
    for cast in casts:
        with edit.before(cast):
            replaced = edit.item(parts, Item(nodes.operand(cast)).index)
        edit.replace(cast, replaced)
