"""State shared by the steps of a partition: placement and type of every value, and the weights that differ between ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_REDUCE, GROUP, WAIT
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.placement import REPLICATED, Placed, Spans
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.types import TensorType, ValueType
from lissom.compiler.parallel.partition.joint import Joint
from lissom.compiler.parallel.partition.sequence import Positions
from lissom.compiler.parallel.rules.base import Reading
from lissom.compiler.parallel.sites import linear_layers
from lissom.errors import PassError

Placement = Placed | tuple[Placed, ...]


@dataclass
class PartitionState:
    """A program on its way from one with placements to one of several ranks.

    Attributes:
        known: the placement of every value, and types: its type before the partition.
        read: what the rules of placements ask of the plan.
        moved: values redistributed so far, by the value and the placement wanted.
        stands_for: by a call that was replaced, what replaced it.
        own: by name the weights that differ between ranks, one for each rank.
        reads: by the name asked for in `own_weight` the name of the weight it made.
        wanted_whole: values that a call or the caller reads whole.
    """

    edit: Editor
    world_size: int
    known: dict[fx.Node, Placement]
    types: dict[fx.Node, ValueType]
    read: Reading
    moved: dict[tuple[fx.Node, Placed], fx.Node] = field(default_factory=dict[tuple[fx.Node, Placed], fx.Node])
    stands_for: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    own: dict[str, list[torch.Tensor]] = field(default_factory=dict[str, list[torch.Tensor]])
    reads: dict[str, str] = field(default_factory=dict[str, str])
    wanted_whole: set[fx.Node] = field(default_factory=set[fx.Node])

    @classmethod
    def of(cls, edit: Editor, world_size: int) -> PartitionState:
        """The state before the first step. Raises PassError when a value has no placement."""
        program = edit.program
        placements = {node: nodes.placed(node) for node in program.graph.nodes if node.op != "output"}
        known = {node: placed for node, placed in placements.items() if placed is not None}
        if missing := next((node for node in placements if node not in known), None):
            where = place(program, missing)
            raise PassError(f"partition: {where} has no placement; put `shard` right before `partition`")
        by_position = any(isinstance(placed, Placed) and placed.is_by_position for placed in known.values())
        # A column-wise layer with a replicated result is one whose output is gathered at once.
        gathered = {node for node, _ in linear_layers(program) if known[node] == REPLICATED}

        def as_planned(node: fx.Node, dim: int) -> Spans:
            placed = known[node]
            return placed.spans(dim) if isinstance(placed, Placed) else ()

        read = Reading(known, as_planned, world_size, program.constant, by_position, gathered)
        return cls(edit, world_size, known, {node: nodes.node_type(node) for node in known}, read)

    @cached_property
    def joint(self) -> Joint:
        return Joint(self.edit, self.world_size, self.own_weight, self.reduced)

    @cached_property
    def positions(self) -> Positions:
        return Positions(self.edit, self.world_size, self.own_weight)

    def shape(self, node: fx.Node) -> TensorType:
        """The type of a tensor before the partition."""
        value_type = self.types[node]
        assert isinstance(value_type, TensorType)
        return value_type

    def own_weight(self, name: str, parts: list[torch.Tensor]) -> fx.Node:
        """A read of a weight that differs between ranks; one asked for again by the same name is kept once."""
        program = self.edit.program
        if name not in self.reads:
            device = next(value_type for value_type in self.types.values() if isinstance(value_type, TensorType)).device
            parts = [part.to(device) for part in parts]
            node = self.edit.weight(name, parts[0])
            self.reads[name] = str(node.target)
            self.own[str(node.target)] = parts
        else:
            target = self.reads[name]
            reads = (node for node in program.graph.nodes if node.op == "get_attr" and node.target == target)
            value = next(nodes.value(node) for node in reads if nodes.has_value(node))
            node = program.graph.get_attr(target)
            nodes.set_value(node, value)
        nodes.set_placed(node, REPLICATED)
        return node

    def reduced(self, value: fx.Node, reduction: str) -> fx.Node:
        """An all-reduce of a value: `sum` or `max`."""
        started = self.edit.call(ALL_REDUCE, value, reduction, GROUP)
        reduced = self.edit.call(WAIT, started)
        for node in (started, reduced):
            nodes.set_placed(node, REPLICATED)
        return reduced

    def replace(self, node: fx.Node, replacement: fx.Node) -> None:
        """Replace a call with one that has another type on a rank, and the same placement."""
        placed = self.known[node]
        self.stands_for[node] = replacement
        if node in self.wanted_whole:
            self.wanted_whole.add(replacement)
        self.types[replacement], self.known[replacement] = self.types[node], placed
        nodes.set_placed(replacement, placed)
        nodes.set_value(node, nodes.value(replacement))
        self.edit.replace(node, replacement)


def is_sharded(placed: Placement) -> bool:
    """True when a value, or one of several, is sharded."""
    return any(part.is_sharded for part in (placed if isinstance(placed, tuple) else (placed,)))
