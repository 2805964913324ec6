"""Placement rules: ranks that hold shards of the arguments compute, as partitioned, the whole result."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.placement import PARTIAL, REPLICATED, Placed, Span, sharded, whole_of
from lissom.compiler.parallel.partition.partitioner import partition_program
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.parallel.plan import redistribution_steps
from lissom.compiler.parallel.rules.base import Reading
from lissom.compiler.parallel.rules.gathered import outcome
from lissom.compiler.parallel.rules.table import rule_of
from lissom.compiler.verify.divergence import TOLERANCE, relative_error
from tools.suites.opinfo.calls import Call, OneCall, program_of, run

_MOST = 12
"""The most placements of the arguments that are tried for one call and world size."""
Choice = tuple[Placed, ...]


def has_placement_rule(one: OneCall) -> bool:
    """True when the operator has a placement rule."""
    return rule_of(one.call) is not None


def check_placements(call: Call, generator: random.Random) -> str:
    """The fault of the placement rule of a call; empty if it is right."""
    one = program_of(call)
    assert one is not None
    wanted = run(one)
    sizes = {size for node in one.weights for size in shape_of(node)}
    for world_size in (2, *((5,) if 5 in sizes else ())):
        for choice in _choices(one, world_size, generator):
            if problem := _check(call, choice, world_size, wanted):
                return problem
    return ""


def _choices(one: OneCall, world_size: int, generator: random.Random) -> list[Choice]:
    """Placements of the arguments: one sharded or partial, then two of equal sizes, then all alike, then random ones."""
    weights = one.weights
    whole = [REPLICATED] * len(weights)
    options = [_options(node, world_size) for node in weights]
    choices = [(*whole[:at], placed, *whole[at + 1 :]) for at, items in enumerate(options) for placed in items]
    for (a, left), (b, right) in combinations(enumerate(options), 2):
        for one_placed, other in ((x, y) for x in left for y in right if _alike(x, y)):
            pair = list(whole)
            pair[a], pair[b] = one_placed, other
            choices.append(tuple(pair))
    choices += [tuple(choice) for choice in _from_the_last(weights, world_size)]
    if len(weights) > 1:
        choices += [tuple(generator.choice([REPLICATED, *items]) for items in options) for _ in range(_MOST // 3)]
    choices = list(dict.fromkeys(choices))
    return choices if len(choices) <= _MOST else generator.sample(choices, _MOST)


def _options(node: fx.Node, world_size: int) -> list[Placed]:
    """The placements of one argument: sharded along a dimension, or along the inner part of one, or a pending sum."""
    placements = [PARTIAL] if nodes.tensor_type(node).dtype.is_floating_point else []
    for dim, size in enumerate(shape_of(node)):
        if not isinstance(size, int) or size < 2:
            continue
        placements.append(sharded((dim, (Span(1, size, 1, world_size),))))
        if size % 2 == 0 and size // 2 >= world_size:
            placements.append(sharded((dim, (Span(2, size // 2, 1, world_size),))))
            placements.append(sharded((dim, (Span(1, size // 2, 1, world_size), Span(1, size // 2, 1, world_size)))))
            placements.append(sharded((dim, (Span(1, size // 2, 2, world_size),))))
    return placements


def _alike(left: Placed, right: Placed) -> bool:
    return left.partial == right.partial and [spans for _, spans in left.dims] == [spans for _, spans in right.dims]


def _from_the_last(weights: list[fx.Node], world_size: int) -> Iterator[list[Placed]]:
    """All arguments sharded along the same dimension, counted from the last, where they have it."""
    for back in range(1, max((len(shape_of(node)) for node in weights), default=0) + 1):
        sizes = {shape_of(node)[-back] for node in weights if len(shape_of(node)) >= back} - {1}
        if len(sizes) == 1 and isinstance(size := sizes.pop(), int) and size > 1:
            has = [len(shape_of(node)) >= back and shape_of(node)[-back] == size for node in weights]
            yield [
                sharded((len(shape_of(node)) - back, (Span(1, size, 1, world_size),))) if there else REPLICATED
                for node, there in zip(weights, has, strict=True)
            ]


def _check(call: Call, choice: Choice, world_size: int, wanted: list[torch.Tensor]) -> str:
    """Partition a new program of the call with these placements of its arguments, run the ranks, and compare."""
    one = program_of(call)
    assert one is not None
    known: dict[fx.Node, Placed | tuple[Placed, ...]] = dict(zip(one.weights, choice, strict=True))
    claim = f"{call} with {', '.join(map(_spelled, choice))} on {world_size} ranks"
    read = Reading(known, world_size=world_size, constant=one.program.constant)
    wants: list[Placed] = []
    try:
        for node in dict.fromkeys((one.call, *one.results)):
            decision = outcome(node, read)
            wants += decision.wants.values()
            steps = (redistribution_steps(read.of(operand), want, world_size) for operand, want in decision.wants.items())
            if decision.reason or any(step is None for step in steps):
                # A plan does not shard these arguments then.
                return ""
            known[node] = decision.result
        if all(known[node] == REPLICATED for node in one.results) and all(want == REPLICATED for want in wants):
            # The rule shards nothing.
            return ""
        claim += f" gives {known[one.call]}"
        for node, placed in known.items():
            nodes.set_placed(node, placed)
        edit = Editor(one.program, "partition")
        partition_program(edit, world_size)
        assert isinstance(edit.program, PartitionedProgram)
        ranks = edit.program.run_ranks([])
    except Exception as error:
        return f"{claim}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    for index, (value, node, parts) in enumerate(zip(wanted, one.results, zip(*ranks, strict=True), strict=True)):
        placed = known[node]
        assert isinstance(placed, Placed)
        # Blocks of several spans cannot be gathered; each rank then returns its own part.
        wholes = parts if _can_return(placed, world_size) else (whole_of(parts, placed),)
        worst = max((relative_error(value, actual), number) for number, actual in enumerate(wholes))
        if worst[0] > TOLERANCE[torch.float32] and not _is_rounding(call, value, wholes[worst[1]]):
            return f"{claim}: result {index} differs by {worst[0]:.2g}"
    return ""


def _is_rounding(call: Call, value: torch.Tensor, actual: torch.Tensor) -> bool:
    """True where terms of a sum cancel, so that the result is small beside the rounding of the terms."""
    if value.shape != actual.shape or value.dtype != torch.float32:
        return False
    terms = sum(float(tensor.abs().sum()) for tensor in call.tensors if tensor.is_floating_point())
    return bool((value - actual).abs().max() <= 4 * torch.finfo(torch.float32).eps * terms)


def _can_return(placed: Placed, world_size: int) -> bool:
    """True when every rank can return the whole value."""
    return redistribution_steps(placed, REPLICATED, world_size) is not None


def _spelled(placed: Placed) -> str:
    if not placed.dims:
        return str(placed)
    ((dim, spans),) = placed.dims
    return f"Shard({dim}: {', '.join(f'{span.outer}x{span.size}x{span.inner}' for span in spans)})"
