"""One rule per operator: the placement of its result from the placements of its arguments, and the placements it needs.

A rule needs an argument replicated where the operator reads all of a dimension at once, and sharded like the other arguments
elsewhere. Operators whose dimensions are declared share one rule, `by_name.py`. An operator without a rule gets its arguments
replicated. The table is at the end; `views.py` has the rules of views, `lookups.py` those of operators that look up
indices, `stored.py` those of quantized values and of state.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import channel_dim, shape_of
from lissom.compiler.ir.dimensions import declaration
from lissom.compiler.ir.operators import is_pointwise, reduced_dims, rule_table
from lissom.compiler.ir.placement import PARTIAL, REPLICATED, is_padded, sharded
from lissom.compiler.ir.types import TensorType
from lissom.compiler.parallel.rules import lookups as lookups
from lissom.compiler.parallel.rules import stored as stored
from lissom.compiler.parallel.rules import views as views
from lissom.compiler.parallel.rules.base import (
    Outcome,
    Reading,
    Rule,
    alike,
    is_only_reader,
    moved,
    replicated,
    settled,
    tensors,
)
from lissom.compiler.parallel.rules.by_name import by_name
from lissom.compiler.parallel.rules.joint import jointly
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic

aten = torch.ops.aten


def outcome(node: fx.Node, read: Reading) -> Outcome:
    """The outcome of a call; an operator without a rule gets everything replicated."""
    return (rule_of(node) or replicated)(node, read)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of the operator a node calls; None when it has none."""
    rule = RULES.get(node.target)
    if rule is None and is_pointwise(node):
        return pointwise
    if rule is None and declaration(node) is not None:
        return by_name
    if rule is None and not isinstance(nodes.node_type(node), (TensorType, tuple)):
        return read_number
    if rule is None and not tensors(node):
        return replicated
    return rule


def pointwise(node: fx.Node, read: Reading) -> Outcome:
    """Element-wise operators: sharded where an argument is.

    Pending sums stay pending under c · x and x + y, and are reduced before any other operator.
    """
    items = tensors(node)
    if any(is_padded(read.of(tensor)) for tensor in _poles(node)):
        # Zeros that fill up would become infinite, and then not a number where weights of zero should take them away.
        return replicated(node, read)
    partial = [tensor for tensor in items if read.of(tensor).partial]
    if not partial:
        return alike(node, read)
    lone = [tensor for tensor in partial if is_only_reader(node, tensor)]
    if not lone:
        return alike(node, read)
    if nodes.is_call(node, aten.add.Tensor, aten.sub.Tensor):
        others = [tensor for tensor in items if tensor not in lone]
        same = all(shape_of(tensor) == shape_of(node) for tensor in partial)
        if len(node.all_input_nodes) == 2 == len(items) and same and (not others or _joins_a_sum(node, read)):
            return settled(node, read, PARTIAL, dict.fromkeys(items, PARTIAL))
    if len(lone) < len(partial):
        return alike(node, read)
    scales = nodes.is_call(node, aten.mul.Tensor, aten.mul.Scalar) or (
        nodes.is_call(node, aten.div.Tensor, aten.div.Scalar) and node.args[0] in partial
    )
    if (scales and len(partial) == 1 and nodes.tensor_type(partial[0]).dtype == nodes.tensor_type(node).dtype) or nodes.is_call(
        node, aten.neg.default
    ):
        others = [tensor for tensor in items if tensor not in partial and not read.of(tensor).is_replicated]
        if not others and shape_of(partial[0]) == shape_of(node):
            return Outcome(PARTIAL)
    return alike(node, read)


def _poles(node: fx.Node) -> list[fx.Node]:
    """The arguments for which the result is infinite or NaN where they are 0."""
    if nodes.is_call(node, aten.div.Tensor):
        divisor = node.args[1]
        return [divisor] if isinstance(divisor, fx.Node) else []
    return tensors(node) if nodes.is_call(node, aten.reciprocal.default, aten.rsqrt.default, aten.log.default) else []


def _joins_a_sum(node: fx.Node, read: Reading) -> bool:
    """True where the sum of a replicated and a partial value is added to another partial one: one all-reduce serves both."""
    users = list(node.users)
    if len(users) != 1 or not nodes.is_call(users[0], aten.add.Tensor) or len(users[0].all_input_nodes) != 2:
        return False
    (addend,) = [used for used in users[0].all_input_nodes if used is not node] or [node]
    # What comes later is not placed yet when a plan is made, and must not count when it is carried out either.
    return addend < node and addend in read.known and read.of(addend).partial and is_only_reader(users[0], addend)


def read_number(node: fx.Node, read: Reading) -> Outcome:
    """A number: the size of a dimension that is not sharded is the same on every rank; other values are read replicated."""
    if nodes.is_call(node, aten.sym_size.int):
        x = cast(fx.Node, node.args[0])
        if not read.of(x).spans(cast(int, node.args[1]) % len(shape_of(x))):
            return Outcome(REPLICATED)
    return replicated(node, read)


def embedding(node: fx.Node, read: Reading) -> Outcome:
    """Rows of an embedding table.

    A table sharded by rows gives a pending sum: zeros on every rank but the one that has the row. A table sharded by columns
    gives sharded features.
    """
    table, ids = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    placed = read.of(table)
    rows = placed.spans(0)
    blocks = len(rows) < 2 and all(span.outer == span.inner == 1 for span in rows) and read.is_apart(rows)
    if placed.partial or len(placed.dims) > 1 or not blocks:
        return replicated(node, read)
    result = PARTIAL if rows else sharded((len(shape_of(node)) - 1, placed.spans(1)))
    return settled(node, read, result, {ids: REPLICATED})


def over(*names: str) -> Rule:
    """The rule of an operator that reads as a whole the dimensions that these of its arguments name."""

    def rule(node: fx.Node, read: Reading) -> Outcome:
        x = cast(fx.Node, node.args[0])
        rank = len(shape_of(x)) or 1
        given = [nodes.argument(node, name) for name in names]
        whole = {cast(int, dim) % rank for dims in given for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
        placed = read.of(x)
        if placed.partial or any(dim in whole for dim, _ in placed.dims):
            return replicated(node, read)
        value_type = nodes.node_type(node)
        result = placed if isinstance(value_type, TensorType) else tuple(placed for _ in cast("tuple[object, ...]", value_type))
        return settled(node, read, result, {tensor: REPLICATED for tensor in tensors(node) if tensor is not x})

    return rule


@jointly
def norm(node: fx.Node, read: Reading) -> Outcome:
    """layer_norm, rms_norm: not over a sharded dimension, unless the ranks all-reduce their sums."""
    return by_name(node, read)


def convolution(node: fx.Node, read: Reading) -> Outcome:
    """Depthwise convolutions may be sharded by channel; other convolutions read all channels."""
    x, weight = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    bias = nodes.argument(node, "bias")
    at = channel_dim(node)
    if nodes.argument(node, "groups") == shape_of(node)[at] == shape_of(x)[at] and not read.of(x).partial:
        spans = read.of(x).spans(at) or read.of(weight).spans(0)
        wants = {x: sharded((at, spans)), weight: sharded((0, spans))}
        if isinstance(bias, fx.Node):
            wants[bias] = sharded((0, spans))
        if all(dim == at for dim, _ in read.of(x).dims):
            return settled(node, read, sharded((at, spans)), wants)
    return replicated(node, read)


def summed(node: fx.Node, read: Reading) -> Outcome:
    """Sums: over a sharded dimension the result is a pending sum over ranks; the sum of a pending sum stays pending."""
    x = cast(fx.Node, node.args[0])
    placed, removed = read.of(x), reduced_dims(node, len(shape_of(x)))
    inside = [dim for dim, _ in placed.dims if dim in removed]
    if placed.partial:
        stays = is_only_reader(node, x) and nodes.tensor_type(node).dtype.is_floating_point
        return Outcome(PARTIAL) if stays else replicated(node, read)
    if inside and len(placed.dims) == 1 and not is_padded(placed) and read.is_apart(placed.dims[0][1]):
        return Outcome(PARTIAL) if nodes.tensor_type(x).dtype.is_floating_point else replicated(node, read)
    return reduced(node, read)


def reduced(node: fx.Node, read: Reading) -> Outcome:
    """max, mean, …: not over a sharded dimension. A pending sum is taken before."""
    if read.of(node.args[0]).partial:
        return replicated(node, read)
    propagated, types = moved(node, read), nodes.node_type(node)
    several = isinstance(types, tuple) and not isinstance(propagated.result, tuple)
    return Outcome((propagated.result,) * len(types), propagated.wants) if several else propagated  # pyright: ignore


RULES: dict[object, Rule] = rule_table(
    (views.getitem, [operator.getitem]),
    (pointwise, [*ops.CONVERSIONS, *ops.FILLED_LIKE]),
    (views.same, ops.IDENTITIES),
    (embedding, [aten.embedding.default]),
    (jointly(over("dim")), [*ops.SOFTMAX, *ops.LOG_SOFTMAX, aten.topk.default]),
    (over("dim"), [*ops.CUMULATIVE, aten.sort.default, aten.glu.default]),
    (convolution, ops.CONVOLUTIONS),
    (norm, ops.LAYER_NORMS),
    (summed, ops.SUMS),
    (reduced, [*ops.REDUCTIONS, *ops.REDUCTIONS_WITH_INDICES]),
    # Some of the reductions ranks can work out together.
    (jointly(reduced), [aten.amax.default, aten.logsumexp.default, *ops.BEST]),
    (stored.written, [aten.copy_.default]),
    (stored.rows_exchanged, [aten.index_copy.default, aten.index_copy_.default]),
    (moved, [aten.permute.default, *ops.TRANSPOSES, aten.unsqueeze.default, *ops.SQUEEZES]),
    (moved, [aten.select.int, aten.repeat.default]),
    (views.reshape, ops.RESHAPES),
    (views.expand, ops.EXPANDS),
    (views.repeat_interleave, [aten.repeat_interleave.self_int]),
    (views.cat, ops.CONCATENATIONS),
    (views.stack, [aten.stack.default]),
    (views.split, ops.SPLITS),
    (views.several, [aten.unbind.int]),
    (views.slice_of, [aten.slice.Tensor]),
    (views.pad, [aten.constant_pad_nd.default, aten.pad.default]),
    (lookups.index_select, [aten.index_select.default]),
    (jointly(lookups.gather), ops.GATHERS),
    (lookups.index, [aten.index.Tensor]),
    (stored.quantized_row, [fake_quantize_dynamic]),
    (stored.turned_back, [fake_quantize, dequantize]),
)
"""By operator."""
