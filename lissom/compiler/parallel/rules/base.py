"""Shared by the placement rules: reading the placements of arguments, and stating which placements an operator needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from lissom.compiler.ir import dimension_map
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.placement import PARTIAL, REPLICATED, Placed, Spans, sharded
from lissom.compiler.ir.types import TensorType
from lissom.ops.quantization import dequantize, fake_quantize

aten = torch.ops.aten


@dataclass(frozen=True)
class Outcome:
    """The placement of a call's result, or of each of its results, and the placements it needs of its arguments.

    Attributes:
        wants: only the arguments whose placement is another.
        reason: why it needs them, where the operator alone does not say so.
    """

    result: Placed | tuple[Placed, ...]
    wants: Mapping[fx.Node, Placed] = field(default_factory=dict["fx.Node", "Placed"])
    reason: str | None = None


@dataclass(frozen=True)
class Reading:
    """The facts a rule may use: the placements of a call's arguments, and the dimensions that the plan shards.

    Attributes:
        known: the placement of every value before the call.
        planned: the spans that the plan gives a dimension of a value, from its axes; empty for one it does not shard.
        world_size: number of ranks.
        constant: the value of a weight that no call writes; None for any other node.
        by_position: whether values between the layers are sharded by position.
        gathered: linear layers that are sharded by columns and whose results are gathered at once.
    """

    known: Mapping[fx.Node, Placed | tuple[Placed, ...]]
    planned: Callable[[fx.Node, int], Spans] = lambda node, dim: ()
    world_size: int = 2
    constant: Callable[[fx.Node], torch.Tensor | None] = lambda node: None
    by_position: bool = False
    gathered: Collection[fx.Node] = ()

    def is_apart(self, spans: Spans) -> bool:
        """True when each rank holds a part of its own, so that sums of the parts are a sum over ranks."""
        return all(span.parts == self.world_size for span in spans)

    def fits(self, dims: Mapping[Any, Spans]) -> bool:
        """True when a value may be sharded along these dimensions: one, or several whose parts ranks take together."""
        parts = [max(span.parts for span in spans) for spans in dims.values()]
        return len(dims) < 2 or math.prod(parts) == self.world_size

    def of(self, argument: object) -> Placed:
        """The placement of a tensor argument."""
        placed = self.known[argument] if isinstance(argument, fx.Node) else REPLICATED
        return placed if isinstance(placed, Placed) else REPLICATED


Rule = Callable[[fx.Node, Reading], Outcome]
_WEIGHT_VIEWS = (*ops.SAME_VALUES, *ops.COPIES, fake_quantize, dequantize)
"""Calls between a weight and its reader through which zeros in the weight stay zeros for the reader."""


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a call, each once."""
    return [used for used in node.all_input_nodes if nodes.is_tensor(used)]


def settled(node: fx.Node, read: Reading, result: Placed | tuple[Placed, ...], wants: Mapping[fx.Node, Placed]) -> Outcome:
    """The outcome, without the wants that are met already."""
    return Outcome(result, {argument: want for argument, want in wants.items() if read.of(argument) != want})


def replicated(node: fx.Node, read: Reading) -> Outcome:
    """Every argument replicated, and the result replicated."""
    value_type = nodes.node_type(node)
    result = tuple(REPLICATED for _ in value_type) if isinstance(value_type, tuple) else REPLICATED
    whole = {used: REPLICATED for used in node.all_input_nodes if isinstance(read.known.get(used), Placed)}
    return settled(node, read, result, whole)


def alike(node: fx.Node, read: Reading, whole: Collection[int] = ()) -> Outcome:
    """The result is sharded where an argument is, and all arguments that have the dimension are sharded alike.

    Args:
        whole: dimensions of the result that the operator reads as a whole.
    """
    items = tensors(node)
    typed = nodes.node_type(node)
    rank = typed.rank if isinstance(typed, TensorType) else max(len(shape_of(tensor)) for tensor in items)
    dims: dict[int, Spans] = {}
    for tensor in items:
        shape = shape_of(tensor)
        for dim, spans in read.of(tensor).dims:
            place = dim + rank - len(shape)
            if place in whole or dims.setdefault(place, spans) != spans:
                return replicated(node, read)
    if not read.fits(dims):
        return replicated(node, read)
    wants = {tensor: aligned(tensor, dims, rank) for tensor in items}
    result = sharded(*dims.items())
    return settled(node, read, (result,) * len(typed) if isinstance(typed, tuple) else result, wants)


def aligned(argument: fx.Node, dims: Mapping[int, Spans], rank: int) -> Placed:
    """The placement an argument needs that is broadcast to a result of this rank, of which these dimensions are sharded."""
    shape = shape_of(argument)
    places = {dim: dim + rank - len(shape) for dim in range(len(shape))}
    return sharded(*((dim, dims[place]) for dim, place in places.items() if place in dims and shape[dim] != 1))


def moved(node: fx.Node, read: Reading, places: Mapping[int, int] | None = None) -> Outcome:
    """The outcome of a call that moves dimensions: shards and pending sums move with them.

    Args:
        places: where each dimension of the first argument goes, by the call's dimension map by default; a dimension that is not
            among them must not be sharded.
    """
    x = cast(fx.Node, node.args[0])
    placed, places = read.of(x), dimension_map.places(node) if places is None else places
    assert places is not None, f"{node.target} has no dimension map"
    if placed.partial:
        return Outcome(PARTIAL) if is_only_reader(node, x) else replicated(node, read)
    if any(dim not in places for dim, _ in placed.dims):
        return replicated(node, read)
    return Outcome(sharded(*((places[dim], spans) for dim, spans in placed.dims)))


def is_only_reader(node: fx.Node, value: fx.Node) -> bool:
    """True when nothing else reads the value, so that no other reader needs the reduced sum."""
    return list(value.users) == [node]


def is_weight(value: object) -> bool:
    """True for a weight behind views and dequantization: it is zero where a rank's shard is padded."""
    while nodes.is_call(value, *_WEIGHT_VIEWS):
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"
