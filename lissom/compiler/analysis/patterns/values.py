"""Evaluates a program's operators symbolically, as counts and conditions of positions.

`arange(n)` is a count, and so are sums, differences and remainders of counts; comparisons of counts are conditions. For
constants see `constants.py`. Values that depend on data are neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import fx

from lissom.compiler.analysis.patterns import facts
from lissom.compiler.analysis.patterns.constants import value_of_constant
from lissom.compiler.analysis.patterns.facts import ALWAYS, NEVER, Count, Seen, Table, between, both, difference, either
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import Where
from lissom.compiler.ir.dimension_map import dim_of, places
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import ScalarType
from lissom.compiler.ir.view_calls import Index, IndexSelect, Slice

aten = torch.ops.aten
Value = Count | Seen | None
"""An integer tensor as a function of positions, or a boolean tensor as a condition on them; None when unknown."""
Kind = TypeVar("Kind", Count, Seen)

_INTEGERS = (torch.int32, torch.int64)
_END = float("inf")
_TO = (*ops.CONVERSIONS, *ops.IDENTITIES)
_VIEWS = {*ops.EXPANDS, *ops.SAME_VALUES, *_TO}
_BOUNDS: Mapping[object, tuple[float, float]] = {
    aten.le: (-_END, 0),
    aten.lt: (-_END, -1),
    aten.ge: (0, _END),
    aten.gt: (1, _END),
}
"""The bounds of left - right for left <= right, left < right and so on."""
_STEPS: Mapping[object, str] = {
    aten.mul: "mul",
    aten.floor_divide: "div",
    aten.remainder: "mod",
    **dict.fromkeys((aten.clamp_max, aten.minimum), "min"),
    **dict.fromkeys((aten.clamp_min, aten.maximum), "max"),
}
"""The step of a `Count` for each operator."""


class PositionValues:
    """The values of one program's nodes as counts and conditions, each computed once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[fx.Node, Value] = {}

    def count(self, argument: object) -> Count | None:
        """A tensor or a number as a count; None when it is none."""
        if isinstance(argument, (bool, float)):
            return None
        if isinstance(argument, int):
            return Count(offset=argument)
        if not isinstance(argument, fx.Node) or not nodes.has_value(argument):
            return None
        value_type = nodes.node_type(argument)
        if isinstance(value_type, ScalarType):
            return Count(offset=value_type.value) if isinstance(value_type.value, int) else None
        value = self._value(argument)
        return value if isinstance(value, Count) else None

    def seen(self, argument: object) -> Seen | None:
        """A boolean or a boolean tensor as a condition; None when it is none."""
        if isinstance(argument, bool):
            return ALWAYS if argument else NEVER
        if not nodes.is_tensor(argument) or nodes.tensor_type(argument).dtype != torch.bool:
            return None
        value = self._value(argument)
        return None if isinstance(value, Count) else value

    def _value(self, node: fx.Node) -> Value:
        if node not in self._known:
            self._known[node] = None
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> Value:
        if not nodes.is_tensor(node):
            return None
        dtype = nodes.tensor_type(node).dtype
        if node.op == "get_attr":
            constant = str(node.target) not in self._program.state
            return value_of_constant(self._program.weight(str(node.target))) if constant else None
        if node.op != "call_function" or dtype not in (torch.bool, *_INTEGERS):
            return None
        return self._condition(node) if dtype == torch.bool else self._counted(node)

    def _condition(self, node: fx.Node) -> Seen | None:
        args, called = node.args, ops.packet_of(node)
        if node.target in ops.AND:
            return both(self.seen(args[0]), self.seen(args[1]))
        if node.target in ops.OR:
            return either(self.seen(args[0]), self.seen(args[1]))
        if node.target in ops.NOT:
            return facts.opposite(self.seen(args[0]))
        if called in _BOUNDS or called in (aten.eq, aten.ne):
            return self._compared(called, self.count(args[0]), self.count(args[1]))
        if node.target in (aten.tril.default, aten.triu.default):
            return self._triangle(node)
        if node.target in (aten.index_select.default, aten.index.Tensor):
            return self._looked_up(node)
        if (where := Where.of(node)) is not None:
            chosen = self.seen(where.condition)
            return either(both(chosen, self.seen(where.chosen)), both(facts.opposite(chosen), self.seen(where.other)))
        return self._moved_or_filled(node, self.seen)

    def _counted(self, node: fx.Node) -> Count | None:
        args, alone, called = node.args, not node.kwargs, ops.packet_of(node)
        if node.target in ops.RANGES:
            return self._arange(node)
        left = self.count(args[0]) if args else None
        right = self.count(args[1]) if len(args) > 1 else None
        if called in (aten.add, aten.sub, aten.rsub) and alone and left is not None and right is not None:
            if called is aten.add:
                right = right.then("mul", -1)
            left, right = (right, left) if called is aten.rsub else (left, right)
            return difference(left, right) if left is not None and right is not None else None
        if called is aten.neg and left is not None:
            return left.then("mul", -1)
        if called is aten.abs and left is not None:
            return left.then("abs")
        if called in _STEPS and alone:
            return _by_number(_STEPS[called], left, right)
        if called is aten.div and node.kwargs.get("rounding_mode") == "floor":
            return _by_number("div", left, right)
        if called is aten.clamp:
            for step, name in (("max", "min"), ("min", "max")):
                if (bound := nodes.argument(node, name)) is not None:
                    left = _by_number(step, left, self.count(bound))
            return left
        if called is aten.diff:
            return self._steps(node, left)
        if called is aten.cumsum:
            summed = self.seen(nodes.operand(node)) == NEVER or (left is not None and left.constant == 0)
            return Count() if summed else None
        return self._moved_or_filled(node, self.count)

    def _arange(self, node: fx.Node) -> Count | None:
        start = Count() if node.target is aten.arange.default else self.count(nodes.argument(node, "start"))
        step = nodes.argument(node, "step") if node.target is aten.arange.start_step else 1
        first = None if start is None else start.constant
        if first is None or not isinstance(step, int) or step == 0:
            return None
        long = nodes.tensor_type(node).shape[0] != 1
        return Count((((-1, 1), step),) if long else (), first)

    def _steps(self, node: fx.Node, x: Count | None) -> Count | None:
        """`diff(x)` of evenly increasing values with a fitting `prepend`; transformers detects packed sequences with it."""
        rank = nodes.tensor_type(node).rank
        axis = dim_of(node, rank) - rank
        front, behind = (nodes.argument(node, name) for name in ("prepend", "append"))
        before = self.count(front)
        if x is None or before is None or x.steps or nodes.argument(node, "n") != 1 or behind is not None:
            return None
        slope = sum(factor for (term_axis, _), factor in x.terms if term_axis == axis)
        even = all(unit == 1 for (term_axis, unit), _ in x.terms if term_axis == axis)
        first = difference(x.at(axis, 0), before)
        return Count(offset=slope) if even and first is not None and first.constant == slope else None

    def _compared(self, comparison: object, left: Count | None, right: Count | None) -> Seen | None:
        if left is None or right is None:
            return None
        if comparison in (aten.eq, aten.ne):
            equal = facts.equal(left, right)
            return facts.opposite(equal) if comparison is aten.ne else equal
        low, high = _BOUNDS[comparison]
        if (apart := difference(left, right)) is not None:
            return between(apart, low, high)
        apart = difference(right, left)
        return None if apart is None else between(apart, -high, -low)

    def _triangle(self, node: fx.Node) -> Seen | None:
        diagonal = nodes.argument(node, "diagonal")
        if not isinstance(diagonal, int):
            return None
        # A dimension of size 1 has one position, even if it is expanded or broadcast later.
        wide = [dim for dim in (-2, -1) if nodes.tensor_type(node).shape[dim] != 1]
        apart = Count(tuple(((dim, 1), -1 if dim == -2 else 1) for dim in wide))
        lower = node.target is aten.tril.default
        part = between(apart, -_END, diagonal) if lower else between(apart, diagonal, _END)
        return both(self.seen(nodes.operand(node)), part)

    def _looked_up(self, node: fx.Node) -> Seen | None:
        """Blocks looked up in a constant table by the blocks of query and key."""
        lookup = _table_and_indices(node)
        if lookup is None:
            return None
        weight, rows, columns = lookup
        table = self._program.weight(str(weight.target)).detach()
        rank = nodes.tensor_type(node).rank
        if str(weight.target) in self._program.state or table.dtype != torch.bool or table.dim() not in (2, 3):
            return None
        selected = node.target is aten.index_select.default
        places: list[tuple[int, int]] = []
        for index, size, axis in ((rows, table.shape[-2], -2), (columns, table.shape[-1], -1)):
            place = _block_of(self.count(index), size)
            if place is None:
                return None
            places.append((axis, place[1]) if selected else place)
        (row, block), (column, column_block) = places
        if block != column_block:
            return None
        heads = -rank if table.dim() == 3 else 0
        return ((Table(table if table.dim() == 3 else table[None], table.data_ptr(), (heads, row, column), block),),)

    def _moved_or_filled(self, node: fx.Node, value_of: Callable[[object], Kind | None]) -> Kind | None:
        """Views of known values, and constants."""
        if node.target in (*ops.ZEROS, *ops.ONES, *ops.FILLS):
            fill = nodes.argument(node, "fill_value") if node.target in ops.FILLS else int(node.target in ops.ONES)
            whole = nodes.tensor_type(node).dtype != torch.bool
            return value_of(fill if whole else bool(fill)) if isinstance(fill, (bool, int)) else None
        source = node.args[0] if node.args else None
        if not nodes.is_tensor(source):
            return None
        x = value_of(source)
        if node.target in _TO:
            from_integers = nodes.tensor_type(source).dtype in _INTEGERS
            return x if from_integers == (nodes.tensor_type(node).dtype in _INTEGERS) else None
        if x is None:
            return None
        if node.target is aten.slice.Tensor:
            return _sliced(node, x)
        axes = axes_of_view(node)
        if axes is None:
            return None
        if isinstance(x, Count):
            return x.moved(axes)
        return facts.moved(x, axes)


def _by_number(step: str, left: Count | None, right: Count | None) -> Count | None:
    if left is None or right is None:
        return None
    if left.constant is not None and step in ("mul", "min", "max"):
        left, right = right, left
    return left.then(step, right.constant) if right.constant is not None else None


def _block_of(count: Count | None, size: int) -> tuple[int, int] | None:
    """The dimension and the block size in tokens of min(⌊index / block⌋, size - 1)."""
    if count is None or len(count.terms) != 1 or count.offset or count.terms[0][1] != 1:
        return None
    return count.terms[0][0] if count.steps in ((), (("min", size - 1),)) else None


def _table_and_indices(node: fx.Node) -> tuple[fx.Node, object, object] | None:
    """The weight, rows and columns of `index_select(index_select(weight, -2, rows), -1, columns)`, or of its indexing."""
    if node.target is aten.index.Tensor:
        weight, indices = Index(node).x, Index(node).indices
        if weight.op != "get_attr" or len(indices) != nodes.tensor_type(weight).rank:
            return None
        rows, columns = indices[-2:]
        known = rows is not None and columns is not None and not any(indices[:-2])
        return (weight, rows, columns) if known else None
    outer = IndexSelect.of(node)
    inner = None if outer is None else IndexSelect.of(outer.x)
    if outer is None or inner is None:
        return None
    rank = nodes.tensor_type(node).rank
    by_dim = {select.dim % rank - rank: select.indices for select in (inner, outer)}
    return (inner.x, by_dim[-2], by_dim[-1]) if inner.x.op == "get_attr" and by_dim.keys() == {-2, -1} else None


def _sliced(node: fx.Node, x: Kind) -> Kind | None:
    part, rank = Slice(node), nodes.tensor_type(node).rank
    axis, start = part.dim % rank - rank, part.start or 0
    if not isinstance(start, int) or start < 0 or part.step != 1:
        return None
    single = nodes.tensor_type(node).shape[axis] == 1
    if isinstance(x, Count):
        return x.at(axis, start) if single else facts.slide(x, axis, start)
    return facts.shifted(x, axis, start, single)


def axes_of_view(node: fx.Node) -> dict[int, int] | None:
    """For each dimension of a view's argument, its dimension in the view, counted from the end; None for other calls.

    Dimensions of size 1 hold no positions: they may be inserted, removed and expanded.
    """
    if node.target not in _VIEWS:
        return None
    dims, old, new = places(node), nodes.tensor_type(nodes.operand(node)).rank, nodes.tensor_type(node).rank
    return dims and {source - old: dim - new for source, dim in dims.items()}
