"""Finds which dimensions of a program's tensors are the same dimension.

Every dimension of every value gets an axis (`axis.py`); one rule per operator (`rules.py`) derives the axes of its result from
those of its arguments. Removing an index of an axis, or sharding it, is then the same edit everywhere the
axis occurs. An operator without a rule pins its axes and is named in the refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from lissom.compiler.analysis.axes import rules
from lissom.compiler.analysis.axes.axis import Axis, pin
from lissom.compiler.analysis.axes.base import Value, fresh
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType


@dataclass(frozen=True)
class Occurrence:
    """A place where an axis occurs: dimension `dim` of the tensor of `node`."""

    node: fx.Node
    dim: int


@dataclass(frozen=True)
class Axes:
    """The axes of a program.

    Attributes:
        of: for each node that yields a tensor, one axis per dimension; for each that yields several tensors, a tuple of these.
    """

    of: Mapping[fx.Node, Value]

    def axis(self, node: fx.Node, dim: int) -> Axis:
        """The axis of one dimension of a node's tensor."""
        axis = self.of[node][dim]
        assert isinstance(axis, Axis), f"'{node.name}' yields several tensors"
        return axis.find()

    def occurrences(self, axis: Axis) -> list[Occurrence]:
        """Every place where an atom of the axis occurs: removing an index of it, or sharding it, changes all of them."""
        atoms = set(axis.atoms())
        return [
            Occurrence(node, dim)
            for node, value in self.of.items()
            for dim, candidate in enumerate(value)
            if isinstance(candidate, Axis) and not atoms.isdisjoint(candidate.atoms())
        ]

    def obstacle(self, axis: Axis, *, zero: bool = False) -> str | None:
        """The reason indices of the axis cannot be removed; None if they can.

        Args:
            zero: whether the removed values are exactly zero wherever a norm reads them.
        """
        for atom in axis.atoms():
            if atom.pinned is not None:
                return atom.pinned
            if not isinstance(atom.size, int):
                return "its size varies from call to call"
            if atom.whole or (atom.normed and not zero):
                return "an operator reads all of it at once, so its length changes the numbers"
        return None


def axes(program: Program) -> Axes:
    """The axes of a program; use it as `program.fact(axes)`."""
    of: dict[fx.Node, Value] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            break
        value_type = nodes.node_type(node)
        if node.op == "call_function" and isinstance(value_type, (TensorType, tuple)):
            of[node] = rules.apply(node, of)
        elif node.op == "call_function":
            rules.read_sizes(node, of)
        elif isinstance(value_type, TensorType):
            of[node] = fresh(value_type, "an input of the program" if node.op == "placeholder" else None)
    for leaf in program.output.all_input_nodes:
        for axis in of.get(leaf, ()):
            if isinstance(axis, Axis):
                pin(axis, "an output of the program")
    return Axes(of)
