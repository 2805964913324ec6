"""A value moved from one placement to another: all-reduce, all-gather, reduce-scatter, or a slice on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, GROUP, WAIT
from lissom.compiler.ir.placement import REPLICATED, Placed, indices_of
from lissom.compiler.ir.types import Size
from lissom.compiler.parallel.partition.state import PartitionState
from lissom.compiler.parallel.plan import redistribution_steps

aten = torch.ops.aten


@dataclass(frozen=True)
class _Move:
    """A value that `reader` wants in another placement."""

    value: fx.Node
    have: Placed
    want: Placed
    reader: fx.Node


def redistribute(state: PartitionState, value: fx.Node, want: Placed, reader: fx.Node) -> fx.Node:
    """The value in the placement wanted, made once, before its first reader."""
    if (value, want) in state.moved:
        return state.moved[value, want]
    have = state.known[value]
    assert isinstance(have, Placed)
    move, moved = _Move(value, have, want, reader), value
    with state.edit.before(reader, like=[value]):
        for step in redistribution_steps(have, want, state.world_size, has_whole=value in state.wanted_whole) or ():
            moved = _stepped(state, step, moved, move)
    state.edit.rewritten += 1
    state.moved[value, want] = moved
    nodes.set_placed(moved, want)
    return moved


def _stepped(state: PartitionState, step: str, value: fx.Node, move: _Move) -> fx.Node:
    """The value after one step of `redistribution_steps`."""
    match step:
        case "all-reduce":
            return state.reduced(value, "sum")
        case "reduce-scatter":
            return state.positions.scattered(value, move.want)
        case "spread":
            return state.positions.spread(value, move.have)
        case "mask":
            return _on_first_rank(state, value, nodes.tensor_type(move.value).dtype)
        case "all-gather":
            if move.have.is_by_position:
                return state.positions.gathered(value, move.have)
            return all_gather(state, value, move.have, state.shape(move.value).shape)
        case _ if move.want.is_by_position:
            whole = redistribute(state, move.value, REPLICATED, move.reader) if move.have.partial else value
            return state.positions.own_part(whole, move.want)
        case _:
            return _own_part(state, value, move.want)


def all_gather(state: PartitionState, value: fx.Node, have: Placed, shape: Sequence[Size]) -> fx.Node:
    """The blocks of all ranks concatenated, without padding.

    Args:
        shape: of the whole value.
    """
    ((dim, (span,)),) = have.dims
    call = state.edit.call
    # The operator gathers along the first dimension.
    if dim:
        value = call(aten.transpose.int, value, 0, dim)
        value = call(aten.clone.default, value, memory_format=torch.contiguous_format)
    gathered = call(WAIT, call(ALL_GATHER, value, state.world_size, GROUP))
    if dim:
        gathered = call(aten.transpose.int, gathered, 0, dim)
    return call(aten.slice.Tensor, gathered, dim, 0, shape[dim]) if span.is_padded else gathered


def _on_first_rank(state: PartitionState, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value on rank 0 and zeros elsewhere."""
    parts = [torch.full((), float(rank == 0), dtype=dtype) for rank in range(state.world_size)]
    first = state.own_weight(f"rank.is_first_{str(dtype).removeprefix('torch.')}", parts)
    return state.edit.call(aten.mul.Tensor, value, first)


def _own_part(state: PartitionState, value: fx.Node, want: Placed) -> fx.Node:
    """A rank's part of a whole value; where it has none, any other, since what it is multiplied with is zero."""
    for dim, spans in want.dims:
        parts = [indices_of(spans, rank).clamp_min(0) for rank in range(state.world_size)]
        name = f"rank.indices_{'_'.join(f'{s.outer}x{s.size}x{s.inner}by{s.parts}e{s.every}' for s in spans)}"
        value = state.edit.call(aten.index_select.default, value, dim, state.own_weight(name, parts))
    return value
