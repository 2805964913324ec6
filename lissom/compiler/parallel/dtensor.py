"""Weights of a partitioned program as `DTensor`s.

`Shard(dim)` means contiguous blocks of equal size, the last ones shorter. It cannot express a packed projection that is sharded
in each of its parts, key/value heads that several ranks hold, or a number of heads that the ranks do not divide.
https://docs.pytorch.org/docs/stable/distributed.tensor.html
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.placement import Placed, indices_of
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import fixed
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_OWN = "rank."
"""The prefix of constants that `partition` adds and that differ between ranks, such as a rank's number."""


def as_dtensors(program: Program, mesh: DeviceMesh) -> dict[str, DTensor]:
    """The weights by name, on a mesh of the ranks, of a partitioned program or of one rank's program.

    `full_tensor()` of each is the model's weight. Constants that `partition` added are left out.

    Raises:
        UnsupportedError: for a mesh of another size, and for a weight whose placement `DTensor` cannot express.
    """
    from torch.distributed.tensor import DTensor

    ranks = program.ranks if isinstance(program, PartitionedProgram) else ()
    world_size = len(ranks) or _world_size(program)
    if mesh.ndim != 1 or mesh.size() != world_size:
        raise UnsupportedError(
            f"{program.name} is partitioned for {world_size} ranks, and the mesh is {[*mesh.shape]}; give one of [{world_size}]"
        )
    rank = mesh.get_local_rank()
    own = ranks[rank] if ranks else program.weights()
    dtensors: dict[str, DTensor] = {}
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in dtensors or name.startswith(_OWN):
            continue
        placed = nodes.placed(node)
        if not isinstance(placed, Placed):
            raise UnsupportedError(
                f"the weight '{name}' of {program.name} has no placement: the program was not partitioned, or was lowered "
                f'since; take the one that passes="shard{{world_size=N}},partition" gives'
            )
        local, shape, placement = dtensor_parts(name, own[name], placed, world_size, rank)
        stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        dtensors[name] = DTensor.from_local(
            local.contiguous(), mesh, [placement], run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )
    return dtensors


def _world_size(program: Program) -> int:
    placed = [nodes.placed(node) for node in program.graph.nodes]
    spans = [span for placement in placed if isinstance(placement, Placed) for _, spans in placement.dims for span in spans]
    return max((span.parts * span.every for span in spans), default=1)


def dtensor_parts(
    name: str, weight: torch.Tensor, placed: Placed, world_size: int, rank: int
) -> tuple[torch.Tensor, list[int], Placement]:
    """This rank's shard without padding, the shape of the whole weight, and the placement. Raises UnsupportedError."""
    from torch.distributed.tensor import Shard

    shape, local = [*weight.shape], weight.detach()
    if not placed.dims:
        return local, shape, placed.placements[0]
    (dim, spans), *others = placed.dims
    span, reason = spans[0], ""
    if others:
        reason = "it is sharded along several dimensions at once"
    elif len(spans) > 1 or span.outer != 1:
        reason = "it is packed, and sharded in each of its parts"
    elif span.parts != world_size:
        reason = f"it is sharded in {span.parts}, and each part is on several of the {world_size} ranks"
    elif span.is_padded and span.inner != 1:
        reason = f"its {span.size} blocks do not divide among {world_size} ranks"
    if reason:
        raise UnsupportedError(
            f"the weight '{name}' is no DTensor: {reason}, which the placements of torch.distributed.tensor cannot say; "
            f"use the program's own weights"
        )
    shape[dim] = fixed(span.whole)
    kept = (indices_of(spans, rank) >= 0).sum()
    return local.narrow(dim, 0, int(kept)), shape, Shard(dim)
