"""Compute only the positions that are read: a selection of positions moves up through all position-wise operators.

    f(x)[:, p]  ->  f(x[:, p])                              linear layers, norms, activations, sums, reshapes to heads and back
    attention(q, k, v, mask)[:, :, p]  ->  attention(q[:, :, p], k, v, mask[:, :, p])       causal: keys 0 to p, as a mask

A classifier reads `[CLS]`, a decoder its last token or its last few, a pooler one computed position per row; the last layer's
queries, its output projection and its feed-forward are then needed at these positions only. Keys and values are still
computed for all.

The demand for every value is inferred from its readers, last to first: the positions that they select, where all select the
same, and all positions otherwise. A value is computed at the selected positions where that makes a matrix product smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.utils._sympy.functions import Min

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.analysis.flops import is_counted
from lissom.compiler.analysis.structure.linear import is_attention, is_linear
from lissom.compiler.analysis.structure.operands import is_causal
from lissom.compiler.analysis.token_positions import operands, position_sources, row_position, with_operands
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.dimension_map import dim_of, shape_of
from lissom.compiler.ir.dimensions import Slot
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.operators import EXPANDS, SIZED_RESHAPES
from lissom.compiler.ir.types import Size
from lissom.compiler.ir.view_calls import Item, Select, Slice
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.unflatten import unflatten_where

aten = torch.ops.aten

_END = 2**63 - 1


@dataclass(frozen=True)
class EliminateDeadTokens(Rewrite):
    """Computes only the token positions that are used later, where that saves matrix products."""

    def run(self, edit: Editor) -> None:
        unflatten_where(edit, lambda trial: bool(_useful(trial, _demands(trial)[0])))
        demands, roots = _demands(edit)
        useful = _useful(edit, demands)
        if useful:
            _Narrower(edit, {node: demands[node] for node in demands if node in useful}).run(roots)


@dataclass(frozen=True)
class _Demand:
    """The positions of one dimension that are read.

    Attributes:
        start: the first of `count` neighbours, from the end where negative; or a value [batch], one position per row. A
            size computed in the program for the last min(n, positions).
    """

    dim: int
    start: int | fx.Node
    count: Size = 1

    @property
    def by_row(self) -> bool:
        """True for one position per row."""
        return isinstance(self.start, fx.Node) and nodes.is_tensor(self.start)


def _demands(edit: Editor) -> tuple[dict[fx.Node, _Demand], dict[fx.Node, _Demand]]:
    """The values whose readers all want the same positions, and the selecting calls with the positions each selects."""
    demands: dict[fx.Node, _Demand] = {}
    roots: dict[fx.Node, _Demand] = {}
    for node in reversed(edit.program.nodes()):
        wanted = {_demand_of(user, slot, demands, roots) for user in node.users for slot in _slots(user, node)}
        (demand,) = wanted if len(wanted) == 1 else (None,)
        if demand is not None and _narrows(node, demand):
            demands[node] = demand
        elif (choice := _choice(edit, node)) is not None:
            roots[node] = choice
    return demands, roots


def _slots(user: fx.Node, node: fx.Node) -> list[Slot]:
    """The argument positions at which a reader reads the value; [-1] stands for readers that are no operator calls."""
    slots = [slot for slot, operand in operands(user).items() if operand is node] if user.op == "call_function" else []
    return slots or [-1]


def _demand_of(
    user: fx.Node, slot: Slot, demands: Mapping[fx.Node, _Demand], roots: Mapping[fx.Node, _Demand]
) -> _Demand | None:
    """The positions that a reader wants of an operand; None for all."""
    if user in roots:
        return roots[user] if slot == 0 else None
    wanted = demands.get(user)
    if wanted is None:
        return None
    dim = (position_sources(user, wanted.dim) or {}).get(slot)
    if dim is None:
        return None
    if wanted.by_row and (position_sources(user, 0) or {}).get(slot) != 0:
        return None
    return _Demand(dim, wanted.start, wanted.count)


def _narrows(node: fx.Node, wanted: _Demand) -> bool:
    """True when the call can be made for these positions only."""
    sources = position_sources(node, wanted.dim)
    if sources is None or (is_attention(node) and set(sources).isdisjoint({0})):
        return False
    if is_causal(node):
        if isinstance(wanted.start, fx.Node) and not wanted.by_row:
            return False
        q, k = shape_of(Attention(node).q), shape_of(Attention(node).k)
        if q[-2] != k[-2] or wanted.dim != len(shape_of(node)) - 2 or nodes.argument(node, "dropout_p"):
            return False
    if not wanted.by_row:
        return True
    # One position per row: the batch stays the first dimension, and operands without one can get it.
    rows = position_sources(node, 0)
    return rows is not None and all(rows.get(slot, 0) == 0 for slot in sources)


def _choice(edit: Editor, node: fx.Node) -> _Demand | None:
    """The positions that a call selects of its operand; None when it selects nothing, or more than half."""
    demand: _Demand | None = None
    selected, part = Select.of(node), Slice.of(node)
    if selected is not None and isinstance(selected.index, int):
        demand = _Demand(selected.dim % len(shape_of(selected.x)), selected.index)
    elif part is not None:
        dim = dim_of(node, len(shape_of(node)))
        start, count = part.start or 0, shape_of(node)[dim]
        if part.step == 1 and (isinstance(count, int) if isinstance(start, int) else _is_last(part, count)):
            demand = _Demand(dim, start, count)
    elif nodes.is_call(node, aten.index.Tensor) and (position := row_position(edit.program, node)) is not None:
        demand = _Demand(1, position)
    # Positions that are computed from a layer's output are known too late.
    if demand is None or any(is_linear(value) or is_attention(value) for value in computed_from([demand.start])):
        return None
    few = not isinstance(demand.count, int) or 2 * demand.count <= example_shape(nodes.operand(node))[demand.dim]
    return demand if few else None


def _is_last(part: Slice, count: Size) -> bool:
    """True for a slice of the last min(n, positions): `x[:, positions - min(n, positions):]`."""
    return isinstance(count, Min) and any(size.is_number for size in count.args) and part.end in (None, _END)


def _useful(edit: Editor, demands: Mapping[fx.Node, _Demand]) -> set[fx.Node]:
    """The values to compute at selected positions: matrix products, and values computed from these."""
    useful: set[fx.Node] = set()
    for node in edit.program.nodes():
        if node in demands:
            sources, slots = position_sources(node, demands[node].dim) or {}, operands(node)
            if is_counted(node) or any(slots[slot] in useful for slot in sources):
                useful.add(node)
    return useful


@dataclass
class _Narrower:
    """Makes calls for selected positions."""

    edit: Editor
    demands: Mapping[fx.Node, _Demand]
    narrowed: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    selections: dict[tuple[fx.Node, _Demand], fx.Node] = field(default_factory=dict["tuple[fx.Node, _Demand]", fx.Node])
    rows: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])

    def run(self, roots: Mapping[fx.Node, _Demand]) -> None:
        edit, first = self.edit, next(iter(sorted(self.demands, key=list(self.edit.program.graph.nodes).index)))
        for start in dict.fromkeys(demand.start for demand in self.demands.values()):
            if isinstance(start, fx.Node):
                edit.move_before(start, first)
        for node in edit.nodes():
            if node in self.demands:
                with edit.before(node):
                    self.narrowed[node] = self._narrow(node, self.demands[node])
            elif node in roots and nodes.operand(node) in self.narrowed:
                narrowed = self.narrowed[nodes.operand(node)]
                if node.target is not aten.slice.Tensor:
                    with edit.before(node):
                        narrowed = edit.call(aten.select.int, narrowed, roots[node].dim, 0)
                edit.replace(node, narrowed)

    def _narrow(self, node: fx.Node, wanted: _Demand) -> fx.Node:
        """The call for the wanted positions only, with the same dimensions."""
        sources = position_sources(node, wanted.dim) or {}
        rank = len(shape_of(node))
        changed: dict[Slot, object] = {}
        for slot, operand in operands(node).items():
            if slot in sources:
                changed[slot] = self.narrowed.get(operand) or self._take(
                    operand, _Demand(sources[slot], wanted.start, wanted.count), rank
                )
        args, kwargs = with_operands(node, changed)
        if node.target in SIZED_RESHAPES or node.target in EXPANDS:
            sizes = args[1]
            assert isinstance(sizes, list)
            sizes[wanted.dim] = self._count(wanted, changed, sources)
        if is_causal(node):
            mask = self._causal_rows(node, wanted)
            kept = {name: nodes.argument(node, name) for name in ("scale", "enable_gqa")}
            args, kwargs = [*args[:3], mask], {key: kept[key] for key in kept if kept[key]}
        if (item := Item.of(node)) is not None:
            source = args[0]
            assert isinstance(source, fx.Node)
            return self.edit.item(source, item.index)
        return self.edit.call(nodes.overload(node), *args, **kwargs)

    def _count(self, wanted: _Demand, changed: Mapping[Slot, object], sources: Mapping[Slot, int]) -> object:
        """The number of selected positions, as an argument."""
        if isinstance(wanted.count, int):
            return wanted.count
        slot = next(iter(sources))
        operand = changed[slot]
        assert isinstance(operand, fx.Node)
        return self.edit.size(operand, sources[slot])

    def _take(self, value: fx.Node, wanted: _Demand, rank: int) -> fx.Node:
        """The selected positions of a value that is computed at all positions; for a call whose result has this rank."""
        if (value, wanted) not in self.selections:
            self.selections[value, wanted] = self._chosen(value, wanted, rank)
        return self.selections[value, wanted]

    def _chosen(self, value: fx.Node, wanted: _Demand, rank: int) -> fx.Node:
        call, dim, start = self.edit.call, wanted.dim, wanted.start
        if isinstance(start, fx.Node) and not wanted.by_row:
            return call(aten.slice.Tensor, value, dim, start, _END)
        if not isinstance(start, fx.Node):
            assert isinstance(wanted.count, int)
            end = start + wanted.count
            return call(aten.slice.Tensor, value, dim, start, _END if start < 0 and end >= 0 else end)
        for _ in range(rank - len(shape_of(value))):
            value, dim = call(aten.unsqueeze.default, value, 0), dim + 1
        if shape_of(value)[0] == 1:
            return call(aten.transpose.int, call(aten.index.Tensor, value, [*[None] * dim, start]), 0, dim)
        if dim != 1:
            value = call(aten.transpose.int, value, 1, dim)
        chosen = call(aten.unsqueeze.default, call(aten.index.Tensor, value, [self._row_numbers(start), start]), 1)
        return call(aten.transpose.int, chosen, 1, dim) if dim != 1 else chosen

    def _row_numbers(self, start: fx.Node) -> fx.Node:
        """0, 1, ... for each row of the batch."""
        if start not in self.rows:
            ones = self.edit.call(aten.ones_like.default, start, dtype=torch.int64)
            self.rows[start] = self.edit.call(aten.sub.Scalar, self.edit.call(aten.cumsum.default, ones, 0), 1)
        return self.rows[start]

    def _causal_rows(self, node: fx.Node, wanted: _Demand) -> fx.Node | None:
        """The visible keys of the selected queries of a causal attention, [.., queries, keys]; None for all."""
        if (wanted.start, wanted.count) == (-1, 1):
            return None
        call, k = self.edit.call, Attention(node).k
        counted = call(aten.arange.default, self.edit.size(k, len(shape_of(k)) - 2), device=nodes.tensor_type(k).device)
        if isinstance(wanted.start, fx.Node):
            position = call(aten.index.Tensor, counted, [wanted.start])
            position = call(aten.reshape.default, position, [-1, *[1] * (len(shape_of(node)) - 1)])
        else:
            position = call(aten.unsqueeze.default, self._chosen(counted, _Demand(0, wanted.start, wanted.count), 1), 1)
        return call(aten.le.Tensor, call(aten.unsqueeze.default, counted, 0), position)
