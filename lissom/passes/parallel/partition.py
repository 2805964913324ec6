"""Partition a program that `shard` has planned: one graph for all ranks, with collectives, and the weights of each rank.

Values that do not lie as what reads them wants are redistributed: a sum over ranks by an all-reduce, parts by an all-gather, a
part of a whole value by a look-up of the rank's own indices. A vocabulary sharded by rows is looked up where a rank has the
row:

    own = ids - first row;   held = clamp(own, 0, rows - 1);   embedding(table, held), zeros where own ≠ held

Sizes written into the program become those of a rank. Weights are views of the originals where a rank's indices are neighbours,
copies elsewhere. What a quantized layer reads is rounded with the range of all ranks' parts, which a small all-reduce finds.
Short values whose collectives follow one another, and do not depend on one another, are sent together.

The program holds all ranks and runs them in lock-step, so it is checked like any other; `program.of_rank(rank)` is what one
process runs. Shoeybi et al. 2019, arXiv:1909.08053, §3; the operators are those of `torch.distributed._functional_collectives`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.placement import Placed
from lissom.compiler.ir.program import Program
from lissom.compiler.parallel.partition.partitioner import partition_program
from lissom.compiler.pipeline.pass_kinds import Requirement, Rewrite


def _first_without_placement(program: Program) -> fx.Node | None:
    return next((node for node in program.graph.nodes if node.op != "output" and nodes.placed(node) is None), None)


@dataclass(frozen=True)
class Partition(Rewrite):
    """Carries out the plan of `shard`: collectives where values are redistributed, and a part of the weights for each rank."""

    requires = (
        Requirement("every value has a placement on ranks", _first_without_placement, "put shard right before this pass"),
    )

    def run(self, edit: Editor) -> None:
        world_size = _world_size(edit.program)
        if world_size < 2:
            edit.note("nothing is sharded: the plan leaves every value whole")
            return
        partition_program(edit, world_size)
        edit.note(f"the program is that of each of {world_size} ranks; `program.of_rank(rank)` has one rank's weights")


def _world_size(program: Program) -> int:
    """How many ranks the plan is for: as many as the most parts there are."""
    found = [placed for node in program.graph.nodes for placed in _placements(node)]
    return max((span.parts for placed in found for _, spans in placed.dims for span in spans), default=1)


def _placements(node: fx.Node) -> tuple[Placed, ...]:
    placed = nodes.placed(node)
    return placed if isinstance(placed, tuple) else () if placed is None else (placed,)
