"""A program partitioned for several ranks: one graph, the weights of each rank, and a lock-step run of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, COLLECTIVES
from lissom.compiler.ir.interpreter import Observer, call, last_uses_of, with_values
from lissom.compiler.ir.placement import REPLICATED, Placed, at_sizes, local_part, whole_of
from lissom.compiler.ir.program import Program
from lissom.errors import PassError

_REDUCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "max": lambda parts: parts.amax(0),
}


class PartitionedProgram(Program):
    """A program for several ranks, which all run the same graph with weights of their own.

    It runs all ranks in lock-step in one process, so it is verified like any other; `of_rank` gives what one process runs.

    Args:
        program: the graph with its collectives, and the weights of rank 0.

    Attributes:
        ranks: the weights of each rank, by name.
    """

    is_simulation: ClassVar[bool] = True

    def __init__(self, program: Program, ranks: tuple[Mapping[str, torch.Tensor], ...]) -> None:
        super().__init__(program.name, program.graph_module, program.signature, program.state)
        self.ranks = ranks
        self.edits = program.edits
        self.about, self.vocabulary = program.about, program.vocabulary

    def of_rank(self, rank: int) -> Program:
        """The program of one rank: the same graph, with its collectives, and the rank's weights.

        Raises:
            PassError: when there is no such rank.
        """
        count = len(self.ranks)
        if not 0 <= rank < count:
            raise PassError(f"{self.name} has no rank {rank}: it has {count} ranks, 0 to {count - 1}")
        program = super().copy()
        for name in program.weights():
            program.set_weight(name, self.ranks[rank][name])
        return program

    def copy(self) -> PartitionedProgram:
        return PartitionedProgram(super().copy(), self.ranks)

    def set_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Always refused, since the ranks hold parts of the weight. Raises PassError."""
        raise PassError(
            f"the weight '{name}' cannot be changed in a program partitioned for {len(self.ranks)} ranks, which hold parts "
            f"of it; change it before `partition`, or in one rank's program, `program.of_rank(rank)`"
        )

    def state_tensors(self) -> list[torch.Tensor]:
        """The buffers a call may write, those of every rank."""
        return [weights[name] for weights in self.ranks for name in self.state]

    def state_values(self) -> list[torch.Tensor]:
        """The buffers a call may write, each a copy assembled from the ranks' parts."""
        reads = {str(node.target): node for node in self.graph.nodes if node.op == "get_attr"}
        return [whole_of([weights[name] for weights in self.ranks], _placed(reads[name])).clone() for name in self.state]

    def run(self, inputs: Sequence[torch.Tensor], observe: Observer | None = None) -> list[object]:
        """The flat outputs of rank 0, from a run of all ranks in lock-step.

        Args:
            observe: sees values assembled from the ranks' parts; a tensor it returns is sharded.
        """
        return self.run_ranks(inputs, observe)[0]

    def run_ranks(self, inputs: Sequence[torch.Tensor], observe: Observer | None = None) -> list[list[object]]:
        """The flat outputs of every rank; arguments as for `run`."""
        if observe is None:
            return run_ranks(self.graph, self.ranks, inputs)
        sizes = self._sizes(inputs)

        def show(node: fx.Node, parts: list[object]) -> list[object] | None:
            tensors = [part for part in parts if isinstance(part, torch.Tensor)]
            if len(tensors) < len(parts):
                observe(node, parts[0])
                return None
            placed = at_sizes(_placed(node), sizes)
            value = observe(node, whole_of(tensors, placed))
            return [local_part(value, placed, rank) for rank in range(len(parts))] if isinstance(value, torch.Tensor) else None

        return run_ranks(self.graph, self.ranks, inputs, show)

    def _sizes(self, inputs: Sequence[torch.Tensor]) -> dict[sympy.Symbol, int]:
        """The dynamic sizes in a call with these inputs."""
        sizes: dict[object, int] = {}
        for node, tensor in zip(self.placeholders, inputs, strict=True):
            sizes.update(zip(nodes.tensor_type(node).shape, tensor.shape, strict=True))
        return {size: number for size, number in sizes.items() if isinstance(size, sympy.Symbol)}


def run_ranks(
    graph: fx.Graph,
    ranks: Sequence[Mapping[str, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    observe: Callable[[fx.Node, list[object]], list[object] | None] | None = None,
) -> list[list[object]]:
    """The flat outputs of each rank of a graph with collectives, all ranks run in lock-step in this process.

    Args:
        ranks: the weights of each rank, by name.
        observe: gets every call's results on all ranks, in order, and may return others.
    """
    values: dict[fx.Node, list[Any]] = {}
    last_uses = last_uses_of(graph)
    feed = iter(inputs)
    for node in graph.nodes:
        if node.op == "output":
            return [list(with_values(node.args[0], lambda used, rank=rank: values[used][rank])) for rank in range(len(ranks))]
        if node.op == "placeholder":
            values[node] = [next(feed)] * len(ranks)
        elif node.op == "get_attr":
            values[node] = [weights[str(node.target)] for weights in ranks]
        elif node.target in COLLECTIVES:
            values[node] = [*_together(node.target, values[nodes.operand(node)], node.args[1:])]
        else:
            values[node] = [call(node, lambda used, rank=rank: values[used][rank]) for rank in range(len(ranks))]
        if node.op == "call_function" and observe is not None:
            values[node] = observe(node, values[node]) or values[node]
        for used in last_uses.get(node, ()):
            del values[used]
    raise AssertionError("a graph ends in its output node")


def _together(target: object, parts: Sequence[torch.Tensor], options: Sequence[object]) -> list[torch.Tensor]:
    """The result of a collective on each rank, from the input of each rank.

    Args:
        options: the arguments after the tensor.
    """
    world_size = len(parts)
    if target is ALL_GATHER:
        return [torch.cat([*parts])] * world_size
    reduced = _REDUCTIONS[str(options[0])](torch.stack([*parts]))
    return [reduced] * world_size if target is ALL_REDUCE else [*reduced.chunk(world_size)]


def _placed(node: fx.Node) -> Placed:
    placed = nodes.placed(node)
    return placed if isinstance(placed, Placed) else REPLICATED
