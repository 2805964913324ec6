"""Sequence parallelism: between the layers, values are sharded by position, and each rank computes its own tokens.

The output of a row-wise layer is a pending sum over ranks. Where its readers are position-wise (the residual stream, norms,
element-wise operators), a reduce-scatter gives each rank the sum at its own positions. An all-gather before the next
column-wise layer collects the positions of all ranks. Both together send as many bytes as one all-reduce:

    all-reduce: 2 (N - 1) / N of the bytes = reduce-scatter: (N - 1) / N + all-gather: (N - 1) / N

and the values in between take 1/N of the memory and the computation. A length that is no multiple of N is padded with tokens
that no other token ever sees, and the all-gather drops them. Korthikanti et al. 2022, "Reducing Activation Recomputation in
Large Transformer Models", arXiv:2205.05198, §4.2.2.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.fake import hint
from lissom.compiler.ir.operators import LAYER_NORMS
from lissom.compiler.ir.placement import POSITIONS, REPLICATED, Placed, Span, sharded
from lissom.compiler.parallel.rules import table as rules
from lissom.compiler.parallel.rules import views as views
from lissom.compiler.parallel.rules.base import Outcome, Reading, is_weight, tensors

_EACH_TOKEN = (rules.pointwise, rules.norm, rules.summed, rules.reduced, views.same)
"""The rules of operators that may be position-wise; reductions are, where they reduce other dimensions."""


def outcome(node: fx.Node, read: Reading) -> Outcome:
    """The outcome of a call by its rule, sharded by position where the plan asks for it and the call allows it."""
    propagated = rules.outcome(node, read)
    if not read.by_position:
        return propagated
    known = {argument: read.of(argument) for argument in tensors(node)}
    sharded_ones = {argument: placed for argument, placed in known.items() if placed.is_by_position}
    # All arguments become pending sums over ranks, which are reduced later, together with others.
    stay_sums = all(propagated.wants.get(argument, placed).partial for argument, placed in known.items())
    if propagated.wants and isinstance(propagated.result, Placed) and propagated.result.partial and stay_sums:
        return propagated
    # The pending sums that the call wants replicated.
    sums = {
        argument: by_position(argument, read.world_size)
        for argument, placed in known.items()
        if placed.partial and propagated.wants.get(argument) == REPLICATED and not position_obstacle(argument, read.world_size)
    }
    if not sharded_ones and not sums:
        return propagated
    meets_whole = not sums and any(placed.is_replicated and _is_as_large(argument, node) for argument, placed in known.items())
    if rules.rule_of(node) in _EACH_TOKEN and not meets_whole and not _is_one_of_several_norms(node):
        given = {**sharded_ones, **sums}
        each = rules.outcome(node, replace(read, known=ChainMap(given, cast("dict[fx.Node, Placed]", read.known))))
        kept = all(each.wants.get(argument, placed) == placed for argument, placed in given.items())
        if isinstance(each.result, Placed) and each.result.is_by_position and kept:
            return Outcome(each.result, {**sums, **each.wants})
    whole = dict.fromkeys(sharded_ones, REPLICATED)
    propagated = rules.outcome(node, replace(read, known=ChainMap(whole, cast("dict[fx.Node, Placed]", read.known))))
    return Outcome(propagated.result, {**whole, **propagated.wants}, propagated.reason)


def _is_as_large(value: fx.Node, node: fx.Node) -> bool:
    """True for a computed value of the result's sizes, such as the output of a replicated layer at a residual add.

    The residual stream is gathered there once: sharded, it would be gathered before each further replicated layer.
    """
    return value.op == "call_function" and not is_weight(value) and shape_of(value) == shape_of(node)


def by_position(value: fx.Node, world_size: int) -> Placed:
    """The placement of a value, [batch, positions, …], sharded by position."""
    return sharded((1, (Span(1, shape_of(value)[1], 1, world_size, site=POSITIONS),)))


def position_obstacle(value: fx.Node, world_size: int) -> str | None:
    """The reason a value cannot be sharded by position; None if it can."""
    shape = shape_of(value)
    if len(shape) < 3:
        return "it has no dimension of positions"
    # Where ranks hold one position or none of the example, shape inference would take a dynamic size for a constant 1.
    length = hint(cast(torch.Tensor, nodes.value(value)).shape[1])
    if length <= world_size:
        which = "" if isinstance(shape[1], int) else " of the example"
        return f"the {length} positions{which} are not more than {world_size} ranks"
    return None


def _is_one_of_several_norms(node: fx.Node) -> bool:
    """True for a norm whose input other norms read too, as before parallel attention and feed-forward.

    They read it replicated, so that one all-gather of the input serves them all.
    """
    if rules.rule_of(node) is not rules.norm:
        return False
    (x, *_) = node.all_input_nodes
    # The program's output has no rule.
    norms = (user for user in x.users if nodes.is_call(user, *LAYER_NORMS) and user.args[0] is x)
    return sum(1 for _ in norms) > 1
