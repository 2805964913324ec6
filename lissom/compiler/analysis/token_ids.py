"""Token ids in a program: the inputs that hold them, the embeddings that look them up, and the LM heads that score them.

A program whose vocabulary was pruned maps its ids first, by a table of ids that is looked up like an embedding:
embedding(table, squeeze(embedding(new_ids, ids))).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import as_int, is_id_table, is_linear, weight_path, width
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import Embedding
from lissom.compiler.ir.match import only_user
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Slice

aten = torch.ops.aten

SAME_IDS = {*ops.MOVES, *ops.CONVERSIONS, *ops.IDENTITIES, aten.clamp_min.default}
"""Operators whose result holds ids of their first argument."""


@dataclass(frozen=True)
class Head:
    """An LM head.

    Attributes:
        linear: the linear layer, [..., vocabulary].
        tail: element-wise calls after it, in order.
    """

    linear: fx.Node
    tail: tuple[fx.Node, ...]

    @property
    def logits(self) -> fx.Node:
        return (self.linear, *self.tail)[-1]


@dataclass(frozen=True)
class TokenIds:
    """The token ids of a program.

    Attributes:
        size: the number of ids: the rows of the largest table that `input_ids` is looked up in, or any input without that name.
        inputs: the inputs with token ids.
        lookups: the embeddings of tables with that many rows, and of the parts of quantized tables.
        heads: the LM heads with that many outputs.
    """

    size: int
    inputs: tuple[fx.Node, ...]
    lookups: tuple[fx.Node, ...]
    heads: tuple[Head, ...]


def token_ids(program: Program) -> TokenIds | None:
    """The token ids of a program, in the order of the graph; None where no input is looked up in a table."""
    sources = id_sources(program)
    looked_up = {
        node: sources[ids] for node in program.nodes(aten.embedding.default) if (ids := Embedding(node).ids) in sources
    }
    tables = {node: source for node, source in looked_up.items() if not is_id_table(node)}
    paths = dict(zip(program.placeholders, (leaf.path for leaf in program.signature.tensors), strict=True))
    # Positions and segments are inputs with tables of their own.
    named = {node: source for node, source in tables.items() if paths[source].endswith("input_ids")}
    tables = named or tables
    size = max(map(_rows, tables), default=0)
    lookups = tuple(node for node in tables if _rows(node) == size)
    if not lookups:
        return None
    inputs = tuple(dict.fromkeys(tables[node] for node in lookups))
    stored = {_stored(Embedding(node).table) for node in lookups}
    return TokenIds(size, inputs, lookups, tuple(_heads(program, stored, size)))


def id_sources(program: Program) -> dict[fx.Node, fx.Node]:
    """The values that hold ids of an integer input, with that input; through tables of ids too."""
    sources = {node: node for node in program.placeholders if nodes.is_tensor(node) and _is_integer(node)}
    for node in program.nodes():
        held = Embedding(node).ids if is_id_table(node) else None
        if node.target in SAME_IDS and nodes.is_tensor(node):
            held = nodes.operand(node)
        if held in sources:
            sources[node] = sources[held]
    return sources


def id_inputs(program: Program) -> list[fx.Node]:
    """The inputs that are looked up in a table of ids: those of a program whose vocabulary was pruned."""
    sources = id_sources(program)
    return list(dict.fromkeys(sources[Embedding(node).ids] for node in program.nodes(*Embedding.targets) if is_id_table(node)))


def is_logit_mask(node: fx.Node) -> bool:
    """True for a call that sets the logits of some ids to -inf: a mask over the last dimension alone that is a weight."""
    if node.target is not aten.masked_fill.Scalar or nodes.argument(node, "value") != -math.inf:
        return False
    mask = nodes.argument(node, "mask")
    return isinstance(mask, fx.Node) and mask.op == "get_attr" and nodes.tensor_type(mask).rank == 1


def is_masked_logits(node: fx.Node) -> bool:
    """True for logits that are -inf at dropped ids: masked, or expanded to all ids after their rows were removed."""
    if node.target is not aten.index_select.default:
        return is_logit_mask(node)
    padded = nodes.operand(node)
    return nodes.is_call(padded, aten.constant_pad_nd.default) and nodes.argument(padded, "value") == -math.inf


def _is_integer(node: fx.Node) -> bool:
    return nodes.tensor_type(node).dtype in (torch.int32, torch.int64)


def _rows(lookup: fx.Node) -> int:
    return as_int(nodes.tensor_type(Embedding(lookup).table).shape[0])


def _stored(value: fx.Node) -> fx.Node:
    """The weight that a table or its quantized form is computed from."""
    while value.op == "call_function" and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def _heads(program: Program, tables: Iterable[fx.Node], size: int) -> Iterable[Head]:
    """The linear layers with an output per id that are tied to a table, or whose result is returned or masked."""
    for node in program.nodes():
        if not is_linear(node) or width(node) != size:
            continue
        head = Head(node, tuple(_tail(node)))
        ends = program.output in head.logits.users or any(map(is_logit_mask, head.logits.users))
        if ends or weight_path(node)[-1] in tables:
            yield head


def _tail(linear: fx.Node) -> Iterable[fx.Node]:
    """The element-wise calls and selections of tokens that follow a linear layer one by one."""
    node = linear
    while (user := only_user(node)) is not None and user.op == "call_function" and not is_logit_mask(user):
        part, others = Slice.of(user), [used for used in user.all_input_nodes if used is not node]
        selects = part is not None and part.dim % nodes.tensor_type(node).rank != nodes.tensor_type(node).rank - 1
        simple = ops.is_pointwise(user) or user.target in (*ops.CASTS, *ops.IDENTITIES) or selects
        if not simple or any(other.op != "get_attr" for other in others):
            return
        yield user
        node = user
