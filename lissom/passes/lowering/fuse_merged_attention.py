"""Let attention on a CPU read its heads from a merged projection, and write merged heads.

    q, k, v = split(qkv);  each: reshape to heads, transpose      ->  y = lissom::merged_attention(qkv, mask)
    y = reshape(transpose(lissom::fused_attention(q, k, v, mask)))

The heads may also come from qkv as [batch, tokens, 3, heads, head_dim], as timm's vision transformers split them. Where
`pack-tokens` looks up the rows of q, k and v behind the split, those of qkv are looked up once.

The view operators around the attention copy nothing, but each takes about a microsecond to call, and a layer has a dozen of
them: a tenth of the time of a small model on a short text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import as_int
from lissom.compiler.analysis.structure.operands import SWAPPED, joined_heads
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import AttentionKernel
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula, Match
from lissom.compiler.ir.view_calls import Reshape
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_attention import fused_attention, merged_attention

aten = torch.ops.aten


_PIECE = Formula(
    f"""
    split = SPLITS(whole, sizes, -1)
    piece = split[index]
    looked_up = reshape(index_select(piece, 1, rows), shape)
    joined = piece | looked_up
    x = RESHAPES(joined, ...)
    {SWAPPED}
    """,
    lambda match: _keep_rows(match, "joined", "x") and _are_three(match["split"]),
    index=int,
    sizes=object,
    shape=object,
)
"""The heads of a piece of a projection, or of rows looked up in it."""
_PACKED = Formula(
    """
    apart = RESHAPES(whole, ...)
    permuted = permute(apart, [2, 0, 3, 1, 4])
    select(permuted, 0, index) | unbind(permuted, 0)[index]
    """,
    lambda match: _keep_rows(match, "whole", "apart") and as_int(nodes.tensor_type(match["apart"]).shape[2]) == 3,
    index=int,
)
"""The heads of a third of a projection, which is reshaped to [batch, tokens, 3, heads, head_dim]."""


@dataclass(frozen=True)
class FuseMergedAttention(Rewrite):
    """Fuses splitting and joining heads into the attention kernel behind a merged projection."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(_obstacle, fused_attention):
            merged, joined = _merged(node), joined_heads(node)
            assert merged is not None and joined is not None
            attention = AttentionKernel(node)
            heads, key_heads = (nodes.tensor_type(operand).shape[1] for operand in (attention.q, attention.k))
            rest = {name: value for name, value in node.kwargs.items() if name != "sinks"}
            with edit.before(node):
                whole = _looked_up(edit, merged) if "rows" in merged.values else merged["whole"]
                call = edit.call(merged_attention, whole, attention.bias, heads=heads, key_heads=key_heads, **rest)
            edit.replace(joined, call)


def _obstacle(node: fx.Node) -> str | None:
    """The reason an attention cannot be fused; None if it can."""
    if node.kwargs.get("sinks") is not None:
        return "it has sinks"
    if _merged(node) is None:
        return "its queries, keys and values are not the heads of one merged projection"
    if joined_heads(node) is None:
        return "its heads are not joined right behind it"
    return None


def _looked_up(edit: Editor, piece: Match) -> fx.Node:
    """The rows of the whole projection that are looked up in a piece, [batch, tokens, features]."""
    rows = edit.call(aten.index_select.default, piece["whole"], 1, piece["rows"])
    sizes = [*Reshape(piece["looked_up"]).sizes[:2], nodes.tensor_type(piece["whole"]).shape[2]]
    return edit.call(aten.reshape.default, rows, sizes)


def _merged(node: fx.Node) -> Match | None:
    """The queries of an attention as a part of a merged projection of exactly its queries, keys and values; None for others."""
    attention = AttentionKernel(node)
    heads = attention.q, attention.k, attention.v
    if len({nodes.tensor_type(head).shape[3] for head in heads}) > 1:
        return None
    for formula, source in ((_PIECE, "split"), (_PACKED, "permuted")):
        parts = [match for head in heads if (match := formula.match(head)) is not None]
        same = len({(match[source], *_rows(match)) for match in parts}) == 1
        if same and [match.number("index") for match in parts] == [0, 1, 2]:
            return parts[0]
    return None


def _are_three(split: fx.Node) -> bool:
    """True for a split of [batch, tokens, features] into three pieces."""
    results = nodes.node_type(split)
    return isinstance(results, tuple) and len(results) == 3 == nodes.tensor_type(nodes.operand(split)).rank


def _rows(piece: Match) -> tuple[object, ...]:
    """The rows that are looked up in a piece, and the sizes of batch and tokens that they are reshaped to."""
    return (piece["rows"], *Reshape(piece["looked_up"]).sizes[:2]) if "rows" in piece.values else ()


def _keep_rows(match: Match, joined: str, apart: str) -> bool:
    """True when a reshape of [batch, tokens, features] keeps batch and tokens."""
    before, after = nodes.tensor_type(match[joined]).shape, nodes.tensor_type(match[apart]).shape
    return len(before) == 3 and before[:2] == after[:2]
