"""Operators that reduce over a sharded dimension without gathering it: ranks work on their shards and exchange a few numbers.

A sharded vocabulary is read by the loss and by token selection. For each row of logits a rank sends its maximum, its sum of
exponentials, or its best candidates (Shoeybi et al. 2019, arXiv:1909.08053, §3, for the cross entropy):

    log softmax(x) = x - m - log Σ exp(x - m),  m = max x      two all-reduces of one number per row; the result stays sharded
    argmax(x)                                                  one all-gather of each rank's best value and its index

Per-token dynamic quantization all-reduces the range of a row. A norm over all heads, as OLMo 2 has on its queries and keys,
all-reduces the sum of squares, and its output stays sharded:

    rms norm(x) = x / √(Σ x² / n + ε) · w                      one all-reduce of one number per row; two with a mean

Where all ranks need the whole row anyway, because the program returns it, they gather it and read the gathered row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.match import lookup_indices
from lissom.compiler.ir.operators import BEST, GATHERS, LAYER_NORMS, LOG_SOFTMAX, SOFTMAX, reduced_dims
from lissom.compiler.ir.placement import PARTIAL, REPLICATED, Placed, Span, can_gather
from lissom.compiler.ir.types import Size, TensorType
from lissom.compiler.parallel.rules.base import Outcome, Reading, Rule, alike, settled
from lissom.ops.quantization import fake_quantize_dynamic

aten = torch.ops.aten

CHOICES = (*LOG_SOFTMAX, *SOFTMAX, *BEST, aten.logsumexp.default, aten.topk.default)
"""Operators that read logits to select a token or to compute its probability."""
JOINT = (*CHOICES, *GATHERS, *LAYER_NORMS, aten.amax.default)
"""Operators that work on shards; dynamic quantization does too, see `exchanges`."""
LEAST_ROW = 4
"""The least length of a rank's shard of a row: shorter rows are gathered, in one collective where a softmax takes two."""
_EXACT = 2**24
"""float32 represents every index below it exactly."""


ROUNDS = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
"""The number of times each byte travels around a ring, apart from the rank's own shard, by the kind of collective."""


@dataclass(frozen=True)
class Exchange:
    """One collective.

    Attributes:
        kind: `all-reduce`, `reduce-scatter` or `all-gather`.
        shape: of the reduced or the gathered tensor.
    """

    kind: str
    shape: tuple[Size, ...]
    dtype: torch.dtype


def jointly(rule: Rule) -> Rule:
    """A rule that works on shards where `joint_span` allows it, and otherwise is the given rule."""

    def found(node: fx.Node, read: Reading) -> Outcome:
        if joint_span(node, read) is None:
            return rule(node, read)
        if nodes.is_call(node, *LAYER_NORMS):
            return alike(node, read)
        if nodes.is_call(node, *LOG_SOFTMAX, *SOFTMAX):
            return Outcome(read.of(node.args[0]))
        if nodes.is_call(node, *GATHERS):
            return settled(node, read, PARTIAL, {lookup_indices(node): REPLICATED})
        typed = nodes.node_type(node)
        return Outcome(tuple(REPLICATED for _ in typed) if isinstance(typed, tuple) else REPLICATED)

    return found


def joint_span(node: fx.Node, read: Reading) -> Span | None:
    """The span of the sharded dimension that a call reduces over on shards; None where it needs the whole dimension."""
    if node.target not in JOINT or not isinstance(node.args[0], fx.Node):
        return None
    x, dim = node.args[0], joint_dim(node)
    placed = read.of(x)
    if dim is None or [at for at, _ in placed.dims] != [dim]:
        return None
    if nodes.is_call(node, *LAYER_NORMS):
        (span, *others) = placed.spans(dim)
        # Every shard is held by equally many ranks, so that a sum over ranks counts each equally often.
        alike_often = not others and read.world_size % span.parts == 0 and isinstance(span.whole, int)
        return span if alike_often and _is_number(x) and alike(node, read).result != REPLICATED else None
    if not can_gather(placed, read.world_size):
        return None
    (span,) = placed.spans(dim)
    if not isinstance(span.whole, int) or cast(int, span.local) < LEAST_ROW or not _is_number(x):
        return None
    if nodes.is_call(node, *GATHERS) and not _is_alike(x, lookup_indices(node), dim):
        return None
    if nodes.is_call(node, aten.topk.default):
        k = nodes.argument(node, "k")
        if not isinstance(k, int) or not nodes.argument(node, "largest") or k * read.world_size * 2 >= span.whole:
            return None
    returned = node if nodes.is_call(node, *LOG_SOFTMAX, *SOFTMAX) else x
    return None if any(user.op == "output" for user in returned.users) else span


def joint_dim(node: fx.Node) -> int | None:
    """The one dimension such a call reduces over, counted from the front; None where it reduces over several."""
    rank = len(shape_of(node.args[0]))
    if nodes.is_call(node, aten.amax.default, aten.logsumexp.default, *BEST):
        dims = reduced_dims(node, rank)
        return next(iter(dims)) if len(dims) == 1 and nodes.argument(node, "dim") not in (None, []) else None
    if nodes.is_call(node, *LAYER_NORMS):
        return rank - 1 if len(cast("list[int]", node.args[1])) == 1 else None
    dim = nodes.argument(node, "dim")
    return dim % rank if isinstance(dim, int) and rank else None


def _is_number(value: fx.Node) -> bool:
    return nodes.tensor_type(value).dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_alike(x: fx.Node, index: fx.Node, dim: int) -> bool:
    """True when indices and the tensor they index have the same sizes apart from this dimension."""
    if len(shape_of(index)) != len(shape_of(x)):
        return False
    return all(a == b for at, (a, b) in enumerate(zip(shape_of(x), shape_of(index), strict=True)) if at != dim)


def packed_dtype(tensor_type: TensorType, dim: int) -> torch.dtype:
    """A dtype that holds both values and their indices without loss, so that one collective sends both."""
    size = tensor_type.shape[dim]
    return torch.float32 if tensor_type.dtype != torch.float64 and isinstance(size, int) and size < _EXACT else torch.float64


def computed_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of sums of exponentials and of squares: at least float32."""
    dtype = nodes.tensor_type(node).dtype
    return dtype if dtype == torch.float64 else torch.float32


def candidates(node: fx.Node, span: Span) -> int:
    """The number of candidates that a rank sends per row."""
    return min(cast(int, nodes.argument(node, "k")), cast(int, span.local)) if nodes.is_call(node, aten.topk.default) else 1


def exchanges(node: fx.Node, read: Reading) -> tuple[Exchange, ...]:
    """The collectives inside a call that works on shards; empty for any other call."""
    if node.target is fake_quantize_dynamic:
        typed = nodes.tensor_type(node)
        placed = read.known.get(node)
        granularity = nodes.argument(node, "granularity")
        if not isinstance(placed, Placed) or not placed.spans(typed.rank - 1) or granularity == "group":
            return ()
        rows = typed.shape[:-1] if granularity == "token" else (1,) * (typed.rank - 1)
        return (Exchange("all-reduce", (*rows, 2), typed.dtype),)
    span = joint_span(node, read)
    if span is None or nodes.is_call(node, *GATHERS):
        return ()
    tensor_type, dim = nodes.tensor_type(node.args[0]), cast(int, joint_dim(node))
    rest = (*tensor_type.shape[:dim], *tensor_type.shape[dim + 1 :])
    if nodes.is_call(node, *BEST, aten.topk.default):
        return (Exchange("all-gather", (read.world_size, 2, *rest, candidates(node, span)), packed_dtype(tensor_type, dim)),)
    if nodes.is_call(node, aten.amax.default):
        return (Exchange("all-reduce", rest, tensor_type.dtype),)
    if nodes.is_call(node, aten.rms_norm.default):
        return (Exchange("all-reduce", rest, computed_dtype(node)),)
    return (Exchange("all-reduce", rest, computed_dtype(node)),) * 2


def numbers_a_row(exchanges: tuple[Exchange, ...], node: fx.Node) -> int:
    """The number of elements these collectives exchange per row of the call's input."""
    tensor_type = nodes.tensor_type(node.args[0])
    dim = joint_dim(node) if node.target in JOINT else tensor_type.rank - 1
    rows = math.prod(size for at, size in enumerate(tensor_type.shape) if at != dim)
    return sum(int(math.prod(exchange.shape) / rows) for exchange in exchanges)  # pyright: ignore[reportArgumentType]


def all_exchanges(graph: fx.Graph, read: Reading) -> Mapping[fx.Node, tuple[Exchange, ...]]:
    """The collectives inside calls, by call; calls without any are left out."""
    by_call = {node: exchanges(node, read) for node in graph.nodes if node.op == "call_function"}
    return {node: items for node, items in by_call.items() if items}
