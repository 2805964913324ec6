"""Separates the position pattern of an attention's mask from the rest of the mask.

A mask is split at every `&`, or `+` of additive masks, through views. `values.py` evaluates each part as a function of
positions; the rest, padding and learned biases, stays as it is. The pattern is exact: with the rest it equals the mask.

A finite mask value, such as the lowest of float32, equals -∞ only when every query has a visible key; a fully masked row is
else a mean over all keys. Such masks are therefore read only when no other part can mask keys that the pattern shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import fx

from lissom.compiler.analysis.patterns.facts import ALWAYS, Count, Seen, between, both, moved, opposite, pattern_of
from lissom.compiler.analysis.patterns.values import PositionValues
from lissom.compiler.analysis.structure.masks import HIDDEN
from lissom.compiler.analysis.structure.operands import is_causal, mask_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Binary, Logical, MaskedFill, Where
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import computed_from, number
from lissom.compiler.ir.operators import AND, CASTS, FILLS, NOT, OR, ZEROS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import Size
from lissom.compiler.ir.view_calls import Unsqueeze
from lissom.ops.pattern import Condition, Pattern

aten = torch.ops.aten

CAUSAL = Condition(1, -1, 0)
"""No key after the query is visible."""


@dataclass(frozen=True)
class Part:
    """A part of a mask that is no pattern: a condition that must hold, or an additive mask.

    Attributes:
        negated: whether the condition must not hold.
        views: the dimensions of size 1 to insert, in order.
    """

    node: fx.Node
    negated: bool = False
    views: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The pattern and the other parts of a mask.

    Attributes:
        pattern: the position pattern; None when there is none that a kernel can use.
        reason: why there is no pattern; None if the mask does not depend on positions.
        layout: boolean, [heads or 1, query blocks, key blocks], when the pattern needs one.
        rest: the other parts of the mask.
    """

    pattern: Pattern | None
    layout: torch.Tensor | None = None
    rest: tuple[Part, ...] = ()
    reason: str | None = None

    @property
    def causal(self) -> bool:
        """True if the pattern is exactly the causal mask."""
        return self.pattern is not None and self.pattern.alternatives == ((CAUSAL,),)


def read_pattern(program: Program, attention: fx.Node) -> Reading:
    """The pattern in the mask of an attention, `scaled_dot_product_attention` or `lissom::attention`."""
    known = program.fact(_readings)
    key = mask_of(attention), is_causal(attention)
    if key not in known:
        known[key] = _read(program, *key)
    return known[key]


def _readings(program: Program) -> dict[tuple[fx.Node | None, bool], Reading]:
    return {}


def _read(program: Program, mask: fx.Node | None, causal: bool) -> Reading:
    reader = _Reader(program)
    if causal:
        reader.restrict(between(Count((((-2, 1), -1), ((-1, 1), 1))), -math.inf, 0))
    if mask is not None:
        reader.split(mask)
    rest = tuple(reader.rest)
    matched = pattern_of(reader.seen)
    if reader.seen == ALWAYS:
        return Reading(None, rest=rest, reason=_why(program, rest))
    if matched is None:
        return Reading(None, rest=rest, reason="its mask is no pattern of blocks and distances")
    pattern, layout = matched
    square = mask is not None and len(set(nodes.tensor_type(mask).shape[-2:])) == 1
    if reader.finite and not (square and _sees_itself(pattern)):
        return Reading(None, rest=rest, reason="its mask has finite mask values, and may mask all keys of a row")
    if reader.finite and rest:
        reason = "its mask has finite mask values: a fully masked row is a mean over all keys, and padding may cause one"
        return Reading(None, rest=rest, reason=reason)
    return Reading(pattern, layout, rest)


class _Reader:
    """Splits one mask.

    Attributes:
        seen: the position condition so far.
        finite: whether finite mask values stand for -∞.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._values = program.fact(PositionValues)
        self.seen: Seen = ALWAYS
        self.rest: list[Part] = []
        self.finite = False

    def restrict(self, seen: Seen | None) -> bool:
        """Add a condition; False when it is unknown, or gives too many alternatives."""
        narrowed = both(self.seen, seen)
        if narrowed is not None and pattern_of(narrowed) is not None:
            self.seen = narrowed
            return True
        return False

    def split(self, node: fx.Node, negated: bool = False, inserted: tuple[int, ...] = ()) -> None:
        """Split a mask into parts.

        Args:
            inserted: dimensions of size 1 inserted between it and the attention, outermost first.
        """
        if nodes.tensor_type(node).dtype == torch.bool:
            self._split_condition(node, negated, inserted)
        else:
            self._split_numbers(node, inserted)

    def _split_condition(self, node: fx.Node, negated: bool, inserted: tuple[int, ...]) -> None:
        seen = _inserted(self._values.seen(node), inserted)
        if seen is not None and self.restrict(opposite(seen) if negated else seen):
            return
        if nodes.is_call(node, *(OR if negated else AND)):
            for side in (Logical(node).left, Logical(node).right):
                self._split_condition(side, negated, inserted)
        elif nodes.is_call(node, *NOT):
            self._split_condition(nodes.operand(node), not negated, inserted)
        elif (view := _plain_view(node)) is not None:
            self._split_condition(nodes.operand(node), negated, (*inserted, *view))
        else:
            self.rest.append(Part(node, negated, inserted[::-1]))

    def _split_numbers(self, node: fx.Node, inserted: tuple[int, ...]) -> None:
        if nodes.is_call(node, aten.add.Tensor) and not node.kwargs and nodes.is_tensor(right := Binary(node).right):
            self._split_numbers(Binary(node).left, inserted)
            self._split_numbers(right, inserted)
            return
        chosen = self._hidden(node)
        if chosen is not None:
            condition, negated, fill, kept = chosen
            before = len(self.rest)
            self._split_condition(condition, negated, inserted)
            if len(self.rest) == before or fill == -math.inf:
                self.finite |= fill != -math.inf
                if kept is not None:
                    self._split_numbers(kept, inserted)
                return
            # The rest of the condition would need the same finite mask value.
            del self.rest[before:]
            self.finite = True
            self.rest.append(Part(node, False, inserted[::-1]))
        elif (view := _plain_view(node)) is not None:
            self._split_numbers(nodes.operand(node), (*inserted, *view))
        elif not self._is_zero(node):
            self.rest.append(Part(node, False, inserted[::-1]))

    def _hidden(self, node: fx.Node) -> tuple[fx.Node, bool, float, fx.Node | None] | None:
        """For an additive mask: its condition, whether the condition masks, the mask value, and the other values added."""
        if (filled := MaskedFill.of(node)) is not None:
            value = number(self._program, filled.value)
            if value is not None and value <= HIDDEN:
                return filled.mask, True, value, None if self._is_zero(filled.x) else filled.x
        if (where := Where.of(node)) is not None:
            for fill, kept, negated in ((where.other, where.chosen, False), (where.chosen, where.other, True)):
                value = number(self._program, fill)
                if value is not None and value <= HIDDEN:
                    if self._is_zero(kept):
                        return where.condition, negated, value, None
                    if nodes.is_tensor(kept):
                        return where.condition, negated, value, kept
        return None

    def _is_zero(self, value: object) -> bool:
        while nodes.is_call(value, aten.expand.default, aten.unsqueeze.default, *CASTS):
            value = nodes.operand(value)
        if nodes.is_call(value, *ZEROS):
            return True
        if nodes.is_call(value, *FILLS):
            return nodes.argument(value, "fill_value") == 0
        return number(self._program, value) == 0


def _plain_view(node: fx.Node) -> tuple[int, ...] | None:
    """The dimension of size 1 that a view inserts, counted from the end; empty for `expand`; None for other calls."""
    if nodes.is_call(node, aten.expand.default):
        return ()
    if nodes.is_call(node, aten.unsqueeze.default):
        rank = nodes.tensor_type(node).rank
        return (Unsqueeze(node).dim % rank - rank,)
    return None


def _inserted(seen: Seen | None, inserted: tuple[int, ...]) -> Seen | None:
    """The condition after dimensions of size 1 were inserted."""
    for place in reversed(inserted):
        seen = moved(seen, {axis: axis - 1 if axis <= place else axis for axis in range(-8, 0)})
    return seen


def _sees_itself(pattern: Pattern) -> bool:
    """True if every query sees the key at its own position, for any layout."""

    def holds(condition: Condition) -> bool:
        unbounded = condition == Condition(condition.query, condition.key) and not condition.asks_layout
        return unbounded or (condition.query == -condition.key != 0 and condition.low <= 0 <= condition.high)

    return any(all(map(holds, conditions)) for conditions in pattern.alternatives)


def _why(program: Program, rest: tuple[Part, ...]) -> str | None:
    """The reason a mask has no pattern; None if it does not depend on positions."""
    both_positions = [part.node for part in rest if 1 not in _shape(part)[-2:]]
    if not both_positions:
        return None
    sources = set(computed_from(both_positions, nodes.is_tensor))
    given = [node for node in program.graph.nodes if node in sources and node.op in ("placeholder", "get_attr")]
    data = [node for node in given if node.op == "placeholder" or str(node.target) in program.state]
    if data:
        return f"its mask depends on '{data[0].target}', which is data"
    return "its mask is no recognized function of positions"


def _shape(part: Part) -> tuple[Size, ...]:
    shape = list(nodes.tensor_type(part.node).shape)
    for place in part.views:
        if -place <= len(shape):
            shape.insert(len(shape) + 1 + place, 1)
    return (1, 1, *shape)


def write_rest(edit: Editor, rest: tuple[Part, ...]) -> fx.Node | None:
    """The rest of a mask as one boolean or additive mask; None when nothing is left; use inside `before`."""
    conditions: list[fx.Node] = []
    numbers: list[fx.Node] = []
    for part in rest:
        node = part.node
        for place in part.views:
            # A dimension before the part's own dimensions needs no insertion: broadcasting adds it.
            if -place <= nodes.tensor_type(node).rank:
                node = edit.call(aten.unsqueeze.default, node, place)
        if part.negated:
            node = edit.call(aten.logical_not.default, node)
        (conditions if nodes.tensor_type(node).dtype == torch.bool else numbers).append(node)
    condition = _folded(edit, aten.__and__.Tensor, conditions)
    total = _folded(edit, aten.add.Tensor, numbers)
    if condition is None or total is None:
        return condition if total is None else total
    return edit.call(aten.masked_fill.Scalar, total, edit.call(aten.logical_not.default, condition), -math.inf)


def _folded(edit: Editor, operator: torch._ops.OpOverload, parts: list[fx.Node]) -> fx.Node | None:
    return reduce(partial(edit.call, operator), parts) if parts else None
