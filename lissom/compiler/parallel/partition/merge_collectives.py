"""Merges consecutive independent collectives into one of their concatenated values.

A message has a latency whatever its size, so small values are sent together:

    a' = all-reduce(a), b' = all-reduce(b)    →    [a', b'] = all-reduce([a, b])

Partial sums that are added need no merging: they stay partial until their total is all-reduced.
"""

from __future__ import annotations

import math
import operator
from functools import partial

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, COLLECTIVES, WAIT
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.fake import hint
from lissom.compiler.ir.match import computed_from, only_user
from lissom.compiler.ir.placement import REPLICATED
from lissom.compiler.ir.types import fixed

aten = torch.ops.aten

LARGEST = 2**18
"""The most elements, at the example, of values that are merged; copying more takes longer than a message's latency."""


def merge_collectives(edit: Editor) -> int:
    """Merge all-reduces, and all-gathers, that are ready together; returns by how many collectives fewer."""
    merged, first = 0, None
    for node in list(edit.program.graph.nodes):
        if node.target not in COLLECTIVES:
            continue
        if first is not None and _fit(first, node) and first not in computed_from([node], partial(operator.lt, first)):
            first = _merge(edit, first, node)
            merged += 1
        else:
            first = node
    return merged


def _fit(first: fx.Node, second: fx.Node) -> bool:
    """True for two of the same kind, reduction and dtype, both of small values."""
    if first.target is not second.target or first.target not in (ALL_REDUCE, ALL_GATHER) or first.args[1:] != second.args[1:]:
        return False
    a, b = (nodes.tensor_value(nodes.operand(node)) for node in (first, second))
    waited = all(nodes.is_call(only_user(node), WAIT) for node in (first, second))
    return waited and a.dtype == b.dtype and all(math.prod(map(hint, x.shape)) <= LARGEST for x in (a, b))


def _merge(edit: Editor, first: fx.Node, second: fx.Node) -> fx.Node:
    """Replace two collectives with one at the position of the first; the second's value is computed before it."""
    values = [nodes.operand(node) for node in (first, second)]
    waits = [next(iter(node.users)) for node in (first, second)]
    edit.move_before(values[1], first)
    call = edit.call
    with edit.before(first, like=[first, second]):
        counts = [_count(edit, value) for value in values]
        shapes = [[edit.size(value, dim) for dim in range(nodes.tensor_type(value).rank)] for value in values]
        together = call(aten.cat.default, [call(aten.reshape.default, value, [1, -1]) for value in values], 1)
        merged = call(nodes.overload(first), together, *first.args[1:])
        pieces = call(aten.split_with_sizes.default, call(WAIT, merged), counts, 1)
        for at, (wait, shape) in enumerate(zip(waits, shapes, strict=True)):
            if first.target is ALL_GATHER:
                ranks, lead = fixed(nodes.argument(first, "group_size")), shape[0]
                shape[0] = lead * ranks if isinstance(lead, int) else edit.compute_size(operator.mul, lead, ranks)
            piece = call(aten.reshape.default, edit.item(pieces, at), shape)
            nodes.set_placed(piece, nodes.placed(wait) or REPLICATED)
            # Typed with sizes told from other values, which are the same.
            nodes.set_value(wait, nodes.value(piece))
            edit.replace(wait, piece)
    edit.erase(first)
    edit.erase(second)
    return merged


def _count(edit: Editor, value: fx.Node) -> fx.Node | int:
    """The number of elements of a value."""
    count: fx.Node | int = math.prod(size for size in nodes.tensor_type(value).shape if isinstance(size, int))
    for dim in range(nodes.tensor_type(value).rank):
        if isinstance(size := edit.size(value, dim), fx.Node):
            count = edit.compute_size(operator.mul, size, count)
    return count
