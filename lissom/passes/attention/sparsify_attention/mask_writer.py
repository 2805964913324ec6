"""Writes a sparse pattern as a mask of ordinary operators, which `pattern_reading` recognizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.ops.pattern import UNBOUNDED, Condition, Pattern

aten = torch.ops.aten


def write_pattern(edit: Editor, pattern: Pattern, layout: torch.Tensor | None, q: fx.Node, k: fx.Node, name: str) -> fx.Node:
    """The visible keys, boolean, [1, heads or 1, queries, keys], from aranges, comparisons and look-ups; use in `before`.

    Args:
        layout: boolean, [heads or 1, query blocks, key blocks]; it becomes a weight of that name.
        q: [.., tokens, head_dim].
        k: [.., tokens, head_dim].
    """
    return _Writer(edit, pattern, layout, q, k, name).write()


class _Writer:
    """Writes one pattern, with each position and each condition computed once."""

    def __init__(self, edit: Editor, pattern: Pattern, layout: torch.Tensor | None, q: fx.Node, k: fx.Node, name: str) -> None:
        self._edit = edit
        self._pattern = pattern
        self._layout = layout
        self._tokens = {"query": q, "key": k}
        self._name = name
        self._known: dict[object, fx.Node] = {}

    def write(self) -> fx.Node:
        alternatives = [self._all(list(map(self._condition, alternative))) for alternative in self._pattern.alternatives]
        seen = reduce(lambda left, right: self._edit.call(aten.__or__.Tensor, left, right), alternatives)
        while nodes.tensor_type(seen).rank < 4:
            seen = self._edit.call(aten.unsqueeze.default, seen, 0)
        return seen

    def _all(self, conditions: list[fx.Node]) -> fx.Node:
        return reduce(lambda left, right: self._edit.call(aten.__and__.Tensor, left, right), conditions)

    def _once(self, key: object, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _positions(self, of: str) -> fx.Node:
        """The positions 0, 1, … of the queries or the keys, [tokens]."""
        tokens = self._tokens[of]
        device = nodes.tensor_type(tokens).device
        return self._once(of, lambda: self._edit.call(aten.arange.default, self._edit.size(tokens, -2), device=device))

    def _blocks(self, of: str, unit: int) -> fx.Node:
        if unit == 1:
            return self._positions(of)
        return self._once((of, unit), lambda: self._edit.call(aten.floor_divide.default, self._positions(of), unit))

    def _spread(self, of: str, unit: int) -> fx.Node:
        """⌊position / unit⌋ of the queries, [queries, 1], or of the keys, [1, keys]."""
        dim = 1 if of == "query" else 0
        return self._once((of, unit, dim), lambda: self._edit.call(aten.unsqueeze.default, self._blocks(of, unit), dim))

    def _condition(self, condition: Condition) -> fx.Node:
        return self._once(condition, lambda: self._look_up() if condition.asks_layout else self._compare(condition))

    def _sum(self, condition: Condition) -> fx.Node:
        signs = {"query": condition.query, "key": condition.key}
        parts = sorted(((of, sign) for of, sign in signs.items() if sign), key=operator.itemgetter(1), reverse=True)
        (first, sign), *others = parts
        value = self._spread(first, condition.unit)
        if sign < 0:
            value = self._edit.call(aten.neg.default, value)
        for of, other in others:
            target = aten.add.Tensor if other > 0 else aten.sub.Tensor
            value = self._edit.call(target, value, self._spread(of, condition.unit))
        return self._edit.call(aten.remainder.Scalar, value, condition.modulus) if condition.modulus else value

    def _compare(self, condition: Condition) -> fx.Node:
        value = self._once((condition.query, condition.key, condition.unit, condition.modulus), lambda: self._sum(condition))
        if condition.low == condition.high:
            return self._edit.call(aten.eq.Scalar, value, condition.low)
        bounds: list[fx.Node] = []
        if condition.low > -UNBOUNDED:
            bounds.append(self._edit.call(aten.ge.Scalar, value, condition.low))
        if condition.high < UNBOUNDED or not bounds:
            bounds.append(self._edit.call(aten.le.Scalar, value, condition.high))
        return self._all(bounds)

    def _look_up(self) -> fx.Node:
        """The layout at the blocks of queries and keys, [heads or 1, queries, keys]; later blocks use its last one."""
        assert self._layout is not None
        table = self._edit.weight(self._name, self._layout.to(nodes.tensor_type(self._tokens["query"]).device))
        for dim, of in ((1, "query"), (2, "key")):
            blocks = self._blocks(of, self._pattern.block)
            index = self._edit.call(aten.clamp_max.default, blocks, self._layout.shape[dim] - 1)
            table = self._edit.call(aten.index_select.default, table, dim, index)
        return table
