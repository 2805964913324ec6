"""Partition a program that `shard` has planned: one graph for all ranks, with collectives, and the weights of each rank.

A value is redistributed where its reader needs another placement: an all-reduce for a partial sum, an all-gather for shards, an
`index_select` of the rank's own indices for a shard of a replicated value. In an embedding table sharded by rows, each rank
looks up the rows that it holds:

    own = ids - first row;   held = clamp(own, 0, rows - 1);   embedding(table, held), zeros where own ≠ held

Constant sizes in the program become a rank's sizes. A shard of a weight is a view of the original where its indices are
contiguous, and a copy otherwise. Dynamic quantization of a sharded activation uses the range over all ranks, from a small
all-reduce. Consecutive small collectives that do not depend on each other are merged.

The program holds all ranks and runs them in lock-step, so it is verified like any other; `program.of_rank(rank)` is what one
process runs. Shoeybi et al. 2019, arXiv:1909.08053, §3; the operators are those of `torch.distributed._functional_collectives`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.parallel.partition.partitioner import partition_program
from lissom.compiler.pipeline.pass_kinds import Requirement, Rewrite


def _first_without_placement(program: Program) -> fx.Node | None:
    return next((node for node in program.graph.nodes if node.op != "output" and nodes.placed(node) is None), None)


@dataclass(frozen=True)
class Partition(Rewrite):
    """Carries out the plan of `shard`: inserts collectives and gives each rank its shards of the weights."""

    requires = (
        Requirement("every value has a placement on ranks", _first_without_placement, "put shard right before this pass"),
    )

    def run(self, edit: Editor) -> None:
        world_size = _world_size(edit.program)
        if world_size < 2:
            edit.note("nothing is sharded: the plan replicates every value")
            return
        partition_program(edit, world_size)
        edit.note(f"all {world_size} ranks run this program; `program.of_rank(rank)` has one rank's weights")


def _world_size(program: Program) -> int:
    """The number of ranks of the plan: the largest number of shards of any value."""
    placements = [nodes.placed(node) for node in program.graph.nodes]
    values = [
        part for placed in placements for part in (placed if isinstance(placed, tuple) else (placed,)) if part is not None
    ]
    return max((span.parts for placed in values for _, spans in placed.dims for span in spans), default=1)
