"""Attention sites: the operator, its input and output projections, and the kinds of its mask and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import (
    as_int,
    features,
    input_of,
    is_linear,
    is_quantizer,
    producers,
    residual_of,
    source,
)
from lissom.compiler.analysis.structure.masks import MaskKind, mask_kind
from lissom.compiler.analysis.structure.operands import softcap_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.operators import NORMS, SHAPES, is_pointwise
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import fixed
from lissom.compiler.ir.view_calls import Repeat, RepeatInterleave

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionSite:
    """One attention.

    Attributes:
        node: the attention operator.
        q: its query projection; empty when there is none.
        k: its key projection.
        v: its value projection.
        output: its output projection.
        packed: whether q, k and v come from one layer.
        cross: whether k and v come from other tokens than q.
        heads: the number of query heads.
        key_value_heads: the number of key/value heads.
        head_dim: the size of a head.
        scale: the factor on the scores, None for 1/√head_dim.
        mask: the kind of mask.
        positions: `rotary`, `relative` (a learned or computed bias per distance), or `none here`.
        softcap: the soft-cap of the scores, None without one.
        sinks: whether each row has an extra logit besides its keys.
        residual: the residual add after it; None when there is none.
    """

    node: fx.Node
    q: tuple[fx.Node, ...]
    k: tuple[fx.Node, ...]
    v: tuple[fx.Node, ...]
    output: fx.Node | None
    packed: bool
    cross: bool
    heads: int
    key_value_heads: int
    head_dim: int
    scale: float | None
    mask: MaskKind
    positions: str
    softcap: float | None
    sinks: bool
    residual: fx.Node | None

    @property
    def path(self) -> str:
        return nodes.origin(self.node).module_path


def attention_site(program: Program, node: fx.Node, rotary: set[fx.Node]) -> AttentionSite:
    """The site of one attention operator; `rotary` holds the nodes of the rotary cos and sin tables."""
    attention = Attention(node)
    q, k, v = (producers(operand) for operand in (attention.q, attention.k, attention.v))
    types = [nodes.tensor_type(operand) for operand in (attention.q, attention.k)]
    query_sources = {source(input_of(layer)) for layer in q}
    cross = bool(k) and query_sources.isdisjoint({source(input_of(layer)) for layer in k})
    heads, groups = (as_int(tensor_type.shape[-3]) if tensor_type.rank > 2 else 1 for tensor_type in types)
    head_dim = as_int(types[0].shape[-1])
    if heads < 1 and len(q) == 1:
        # Batch and heads are one dimension: the heads follow from the q features of the projection.
        heads = groups = features(q[0], 0) // (3 if q == k == v else 1) // head_dim
    mask = mask_kind(program, node)
    between = {value for value in computed_from([attention.q], lambda value: value not in q) if value not in q}
    turned = between & rotary or any(not rotary.isdisjoint(value.all_input_nodes) for value in between)
    positions = "rotary" if turned else "relative" if mask.bias else "none here"
    output = _consumer(node)
    return AttentionSite(
        node=node,
        q=q,
        k=k,
        v=v,
        output=output,
        packed=len({*q, *k, *v}) == 1 and bool(q),
        cross=cross,
        heads=heads,
        key_value_heads=_shared_groups(attention.k, groups),
        head_dim=head_dim,
        scale=None if attention.scale is None else float(attention.scale),
        mask=mask,
        positions=positions,
        softcap=abs(float(softcap_of(node))) or None,
        sinks=node.kwargs.get("sinks") is not None,
        residual=residual_of(output or node),
    )


def _shared_groups(node: fx.Node, heads: int) -> int:
    """The heads of keys before they were repeated for the query heads that share them."""
    while nodes.is_call(node, *SHAPES, aten.repeat.default):
        before = nodes.operand(node)
        if (interleaved := RepeatInterleave.of(node)) is not None:
            return heads // fixed(interleaved.repeats)
        if (repeated := Repeat.of(node)) is not None and len(repeated.counts) > 2 and isinstance(repeated.counts[-3], int):
            return heads // repeated.counts[-3]
        if nodes.is_call(node, aten.expand.default) and nodes.is_tensor(before):
            old, new = nodes.tensor_type(before).shape, nodes.tensor_type(node).shape
            grown = [size for size, old_size in zip(new, old, strict=False) if old_size == 1 and size != 1]
            if len(old) == len(new) == 5 and grown and isinstance(grown[0], int) and heads % grown[0] == 0:
                return heads // grown[0]
        node = before
    return heads


def _consumer(node: fx.Node) -> fx.Node | None:
    """The first linear layer that reads a value through views, casts, gates, norms and quantizers."""
    frontier, seen = list(node.users), set()
    for _ in range(24):
        following: list[fx.Node] = []
        for user in frontier:
            if is_linear(user):
                return user
            passes = user.target in SHAPES or user.target in NORMS or is_pointwise(user) or is_quantizer(user)
            if passes and user not in seen:
                seen.add(user)
                following += user.users
        frontier = following
    return None
