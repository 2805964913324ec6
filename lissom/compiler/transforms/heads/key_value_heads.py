"""Separate axes for the heads of an attention's queries, keys and values, and the weights that produce each head.

In the axes of a program a key head and the query head that reads it are one axis, so removing one removes the other. With sums
inserted before an attention, the heads of each argument, and of the result, have separate axes: an edit of the key heads then
changes only the layers that produce keys.

    attention(q, k, v)  ->  attention(expand(sum(q)), expand(sum(k)), expand(sum(v)))        sums over heads

The program must not run in this form; the sums are removed when the edit is done.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import of
from lissom.compiler.analysis.axes.columns import WeightUnits, unit_of
from lissom.compiler.analysis.axes.dead_units import summed
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.linear import as_int
from lissom.compiler.analysis.structure.operands import unrepeated
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.types import fixed

aten = torch.ops.aten


@dataclass(frozen=True)
class SeparateHeads:
    """An attention with separate head axes.

    Attributes:
        keys: before heads are repeated for the query heads that share them, [batch, key/value heads, tokens, features].
        values: likewise.
        count: the number of key/value heads.
        queries: the head axis of the queries.
        key: that of the keys.
        value: that of the values.
        output: that of the result.
    """

    site: AttentionSite
    keys: fx.Node
    values: fx.Node
    count: int
    queries: Axis
    key: Axis
    value: Axis
    output: Axis

    @property
    def shared(self) -> tuple[Axis, ...]:
        """The axes of key and value heads; a single axis when both come from one axis of a weight."""
        return tuple(dict.fromkeys((self.key, self.value)))

    @property
    def numbering(self) -> tuple[Axis, ...]:
        """All head axes."""
        return (self.queries, self.key, self.value, self.output)


class Separation:
    """Attentions with separate head axes, until `end`.

    Attributes:
        heads: the attentions.
        axes: the axes of the program in this form.
    """

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._arguments: dict[fx.Node, tuple[Argument, ...]] = {}
        self._queries: dict[fx.Node, fx.Node] = {}
        self._made: list[fx.Node] = []
        grouped: list[tuple[AttentionSite, fx.Node, fx.Node]] = []
        for site in edit.program.fact(structure).attention:
            reason = _obstacle(site)
            if reason is not None:
                edit.skip(site.node, reason)
                continue
            keys, values = unrepeated(Attention(site.node).k), unrepeated(Attention(site.node).v)
            if as_int(nodes.tensor_type(keys).shape[1]) > 1:
                grouped.append((site, keys, values))
        for site, keys, values in grouped:
            self._separate(site, keys, values)
        self.axes = edit.program.fact(axes)
        self._readers = self._contracted()
        self.heads = [
            heads for site, keys, values in grouped if (heads := self._separate_heads(site, keys, values)) is not None
        ]

    def _separate(self, site: AttentionSite, keys: fx.Node, values: fx.Node) -> None:
        node = site.node
        self._arguments[node], self._queries[node] = node.args, Attention(node).q
        with self._edit.before(node):
            apart: list[fx.Node] = []
            for operand in (self._queries[node], keys, values):
                joined = self._edit.call(aten.sum.dim_IntList, operand, [1], True)
                apart.append(self._edit.call(aten.expand.default, joined, [-1, site.heads, -1, -1]))
                self._made += (apart[-1], joined)
        node.args = (*apart, *node.args[3:])

    def _separate_heads(self, site: AttentionSite, keys: fx.Node, values: fx.Node) -> SeparateHeads | None:
        numbered = (self._queries[site.node], keys, values, site.node)
        queries, key, value, output = (self.axes.axis(node, 1) for node in numbered)
        reason = self.obstacle(key) or self.obstacle(value)
        if reason is None and queries in (key, value):
            reason = "one axis of a weight numbers them with the query heads"
        if reason is not None:
            self._edit.skip(site.node, f"its key and value heads stay: {reason}")
            return None
        return SeparateHeads(site, keys, values, fixed(key.size), queries, key, value, output)

    def queries(self, heads: SeparateHeads) -> fx.Node:
        """The queries of an attention in the original program."""
        return self._queries[heads.site.node]

    def is_alone(self, heads: SeparateHeads, *chosen: Axis) -> bool:
        """True when no other attention has heads of these axes."""
        others = {axis for other in self.heads if other is not heads for axis in other.numbering}
        return others.isdisjoint(chosen) and len(set(chosen)) == len(chosen)

    def order_obstacle(self, heads: SeparateHeads) -> str | None:
        """The reason the heads of an attention cannot be reordered; None if they can."""
        for axis in heads.numbering:
            if axis.form != "atom":
                return "they are numbered by several axes"
            if reason := self.axes.obstacle(axis):
                return reason
        return None if self.is_alone(heads, *dict.fromkeys(heads.numbering)) else "other attentions have the same heads"

    def reorder(self, heads: SeparateHeads, order: torch.Tensor) -> None:
        """Reorder the key and value heads of an attention, together with the query heads that read them.

        Args:
            order: [key/value heads], the head for each place. The outputs do not change.
        """
        readers = heads.site.heads // heads.count
        of_queries = (order[:, None] * readers + torch.arange(readers)).flatten()
        for axis in dict.fromkeys(heads.numbering):
            for rows in self.rows(axis):
                rows.write(self._edit, rows.read(self._edit.program)[order if axis in heads.shared else of_queries])

    def obstacle(self, axis: Axis) -> str | None:
        """The reason heads of this axis cannot be changed by editing only the weights that produce them; None if they can."""
        if axis.form != "atom":
            return "they are numbered by several axes"
        if reason := self.axes.obstacle(axis):
            return reason
        return f"'{self._readers[axis].name}' reads them too" if axis in self._readers else None

    def _contracted(self) -> dict[Axis, fx.Node]:
        """The atoms that the program sums over, each with the first such call."""
        contracted: dict[Axis, fx.Node] = {}
        for node in self._edit.program.nodes():
            for place in [place for places in summed(node) for place in places] if node not in self._made else ():
                for atom in self.axes.axis(*place).atoms():
                    contracted.setdefault(atom, node)
        return contracted

    def rows(self, axis: Axis) -> list[WeightUnits]:
        """The indices of weights, and of the program's state, that produce or read heads of this axis."""
        axis, rows = axis.find(), list[WeightUnits]()
        for node in self.axes.of:
            for dim, other in enumerate(of(node, self.axes.of) if node.op == "get_attr" else ()):
                if axis in other.atoms():
                    rows.append(WeightUnits(node, dim, unit_of(other, [axis])))
        return rows

    def share(self, heads: SeparateHeads) -> None:
        """Let an attention's query heads share the remaining key and value heads in the final program."""
        node, operands = heads.site.node, [heads.keys, heads.values]
        if not node.kwargs.get("enable_gqa"):
            with self._edit.before(node):
                operands = [_repeated(self._edit, operand, heads.site.heads) for operand in operands]
        args = self._arguments[node]
        self._arguments[node] = (args[0], *operands, *args[3:])

    def end(self) -> None:
        """Restore the original form of the program."""
        for node, args in self._arguments.items():
            node.args = args
        for node in self._made:
            self._edit.program.graph.erase_node(node)
        self._edit.retype()


@contextmanager
def separated_heads(edit: Editor) -> Generator[Separation]:
    """The attentions with several key/value heads, with separate head axes inside; the others are reported."""
    separation = Separation(edit)
    try:
        yield separation
    finally:
        separation.end()


def _repeated(edit: Editor, x: fx.Node, heads: int) -> fx.Node:
    """Each head repeated for the query heads that share it, by the operators that grouped-query models use."""
    copies = heads // as_int(nodes.tensor_type(x).shape[1])
    if copies == 1:
        return x
    spread = edit.call(aten.expand.default, edit.call(aten.unsqueeze.default, x, 2), [-1, -1, copies, -1, -1])
    return edit.call(aten.flatten.using_ints, spread, 1, 2)


def _obstacle(site: AttentionSite) -> str | None:
    """The reason the heads of an attention cannot have separate axes; None if they can."""
    attention = Attention(site.node)
    if any(nodes.tensor_type(operand).rank != 4 for operand in (attention.q, attention.k, attention.v)):
        return "its operands are not [batch, heads, tokens, features]"
    keys, values = (as_int(nodes.tensor_type(unrepeated(operand)).shape[1]) for operand in (attention.k, attention.v))
    if keys < 1 or site.heads < 1 or as_int(nodes.tensor_type(site.node).shape[1]) != site.heads:
        return "its number of heads varies"
    if keys != values or site.heads % keys:
        return f"{site.heads} query heads read {keys} key and {values} value heads"
    return None
