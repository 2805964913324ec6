"""Samples on their way through a program, stopped between two nodes, so that weights further on fit what arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import call, last_uses_of
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample

_LEAST = 1e-2
"""Below it, float16 has fewer bits for values that matter."""


class Stream:
    """The values of some samples at one place of a program each; only those that are read further on are held.

    They are held as float16 where that can hold them: its eleven bits are many for sums over thousands of tokens, and half the
    memory is that of the residual streams of all the data. Weights are read when a node is computed, so one that is set behind
    the place of a sample counts.
    """

    def __init__(self, program: Program, data: Sequence[Sample]) -> None:
        self.program = program
        self._order = list(program.graph.nodes)
        self._index = {node: index for index, node in enumerate(self._order)}
        self._last_uses = last_uses_of(program.graph)
        self._held: list[dict[fx.Node, object]] = [dict(zip(program.placeholders, sample, strict=True)) for sample in data]
        self._place = [0 for _ in data]

    def peek(self, sample: int, wanted: Sequence[fx.Node]) -> list[torch.Tensor]:
        """What nodes further on yield for one sample, which stays where it is."""
        values = {node: _read(node, value) for node, value in self._held[sample].items()}
        needed, pending = set[fx.Node](), list(wanted)
        while pending:
            node = pending.pop()
            if node not in needed and node not in values and node.op == "call_function":
                needed.add(node)
                pending += node.all_input_nodes
        for node in sorted(needed, key=self._index.__getitem__):
            values[node] = self._call(node, values)
        return [self._value(node, values) for node in wanted]

    def advance(self, sample: int, last: fx.Node, wanted: Sequence[fx.Node] = ()) -> list[torch.Tensor]:
        """Move one sample past `last`; gives what the wanted nodes yield, which are held or lie on the way."""
        held = {node: _read(node, value) for node, value in self._held[sample].items()}
        found = {node: held[node] for node in wanted if node in held}
        end = self._index[last] + 1
        for node in self._order[self._place[sample] : end]:
            if node.op == "call_function":
                held[node] = self._call(node, held)
            if node in wanted and node.op != "get_attr":
                found[node] = held[node]
            for used in self._last_uses.get(node, ()):
                held.pop(used, None)
        self._place[sample] = max(self._place[sample], end)
        self._held[sample] = {node: _short(value) for node, value in held.items()}
        return [self._value(node, found) for node in wanted]

    def _call(self, node: fx.Node, values: dict[fx.Node, object]) -> object:
        with torch.no_grad():
            return call(node, lambda used: self._value(used, values))

    def _value(self, node: fx.Node, values: Mapping[fx.Node, object]) -> torch.Tensor:
        found = self.program.weight(str(node.target)) if node.op == "get_attr" else values[node]
        return cast(torch.Tensor, found)


def _short(value: object) -> object:
    """A float32 tensor as float16, where no value of it is too large or but a rounding of zero."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or not value.numel():
        return value
    largest = float(value.abs().max())
    return value.half() if _LEAST < largest < torch.finfo(torch.float16).max / 2 else value


def _read(node: fx.Node, value: object) -> object:
    """The tensor in the dtype the node yields."""
    return value.to(nodes.tensor_type(node).dtype) if isinstance(value, torch.Tensor) else value
