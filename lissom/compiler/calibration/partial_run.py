"""Partial runs: samples stopped between two nodes of a program, so that later weights can be fitted to their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import call, last_uses_of
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample

_LEAST = 1e-2
"""If the largest value is smaller, float16 would lose bits of values that matter."""


class Stream:
    """The values of some samples, each stopped at one place of a program; only values that are read later are kept.

    They are kept as float16 when it can represent them: its eleven bits suffice for sums over thousands of tokens, and the
    residual streams of all the data need half the memory. Weights are read when a node is computed, so a weight set after a
    sample has stopped before it takes effect.
    """

    def __init__(self, program: Program, data: Sequence[Sample]) -> None:
        self.program = program
        self._order = list(program.graph.nodes)
        self._index = {node: index for index, node in enumerate(self._order)}
        self._last_uses = last_uses_of(program.graph)
        self._held: list[dict[fx.Node, object]] = [dict(zip(program.placeholders, sample, strict=True)) for sample in data]
        self._place = [0 for _ in data]

    def peek(self, sample: int, wanted: Sequence[fx.Node]) -> list[torch.Tensor]:
        """The values of later nodes for one sample, which does not advance."""
        values = {node: _read(node, value) for node, value in self._held[sample].items()}
        needed = [node for node in computed_from(wanted, lambda node: node not in values) if node not in values]
        for node in sorted(needed, key=self._index.__getitem__):
            if node.op == "call_function":
                values[node] = self._call(node, values)
        return [self._value(node, values) for node in wanted]

    def advance(self, sample: int, last: fx.Node, wanted: Sequence[fx.Node] = ()) -> list[torch.Tensor]:
        """Run one sample past `last`; returns the values of the wanted nodes, which are kept or computed on the way."""
        held = {node: _read(node, value) for node, value in self._held[sample].items()}
        values = {node: held[node] for node in wanted if node in held}
        end = self._index[last] + 1
        for node in self._order[self._place[sample] : end]:
            if node.op == "call_function":
                held[node] = self._call(node, held)
            if node in wanted and node.op != "get_attr":
                values[node] = held[node]
            for used in self._last_uses.get(node, ()):
                held.pop(used, None)
        self._place[sample] = max(self._place[sample], end)
        self._held[sample] = {node: _as_half(value) for node, value in held.items()}
        return [self._value(node, values) for node in wanted]

    def _call(self, node: fx.Node, values: dict[fx.Node, object]) -> object:
        with torch.no_grad():
            return call(node, lambda used: self._value(used, values))

    def _value(self, node: fx.Node, values: Mapping[fx.Node, object]) -> Any:
        return self.program.weight(str(node.target)) if node.op == "get_attr" else values[node]


def _as_half(value: object) -> object:
    """A float32 tensor as float16, unless its largest value is too large or too small for it."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or not value.numel():
        return value
    largest = float(value.abs().max())
    return value.half() if _LEAST < largest < torch.finfo(torch.float16).max / 2 else value


def _read(node: fx.Node, value: object) -> object:
    """The tensor in the node's dtype."""
    return value.to(nodes.tensor_type(node).dtype) if isinstance(value, torch.Tensor) else value
