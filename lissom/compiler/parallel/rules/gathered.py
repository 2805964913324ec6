"""Linear layers that are sharded by themselves: column-wise, with an all-gather of their output.

A layer that belongs to no pair, such as the projections of a recurrence or of an attention without a head axis, is sharded to
save memory and computation. Each rank multiplies with its rows of the weight, and all ranks get the whole output:

    y = [x A₁ᵀ, x A₂ᵀ, …]                                          one all-gather, (N - 1) / N of the bytes of y

It is `ColumnParallelLinear(gather_output=True)` of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, §3).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.placement import REPLICATED, Placed, can_gather
from lissom.compiler.parallel.rules import sequence as sequence
from lissom.compiler.parallel.rules import table as rules
from lissom.compiler.parallel.rules.base import Outcome, Reading, is_weight, tensors
from lissom.compiler.parallel.rules.joint import Exchange


def outcome(node: fx.Node, read: Reading) -> Outcome:
    """The outcome of a call by its rule, or replicated where the plan gathers its result at once."""
    own = own_part(node, read)
    return sequence.outcome(node, read) if own is None else Outcome(REPLICATED, own.wants)


def own_part(node: fx.Node, read: Reading) -> Outcome | None:
    """The placement of such a layer's output before the all-gather, and of its arguments; None for any other call."""
    if node not in read.gathered:
        return None
    whole = {used: REPLICATED for used in tensors(node) if not is_weight(used) and not read.of(used).is_replicated}
    propagated = rules.outcome(node, replace(read, known=ChainMap(whole, cast("dict[fx.Node, Placed]", read.known))))
    part = propagated.result
    if not isinstance(part, Placed) or not part.spans(len(shape_of(node)) - 1) or not can_gather(part, read.world_size):
        return None
    return Outcome(part, {**whole, **propagated.wants})


def gatherings(read: Reading) -> Mapping[fx.Node, tuple[Exchange, ...]]:
    """The all-gather of each such layer."""
    typed = {node: nodes.tensor_type(node) for node in read.gathered if own_part(node, read) is not None}
    return {node: (Exchange("all-gather", tensor_type.shape, tensor_type.dtype),) for node, tensor_type in typed.items()}
