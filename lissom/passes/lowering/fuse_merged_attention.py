"""Let attention on a CPU read its heads from a merged projection, and write merged heads.

    q, k, v = split(qkv);  each: reshape to heads, transpose      ->  y = lissom::merged_attention(qkv, mask)
    y = reshape(transpose(lissom::fused_attention(q, k, v, mask)))

The heads may also come from qkv as [batch, tokens, 3, heads, head_dim], as timm's vision transformers split them. Where
`pack-tokens` looks up the rows of q, k and v behind the split, those of qkv are looked up once.

The view operators around the attention copy nothing, but each takes about a microsecond to call, and a layer has a dozen of
them: a tenth of the time of a small model on a short text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import joined_heads, swaps_heads
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import AttentionKernel
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import RESHAPES
from lissom.compiler.ir.view_calls import IndexSelect, Item, Permute, Reshape, Select, Split, Unbind
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_attention import fused_attention, merged_attention

aten = torch.ops.aten


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
                whole = merged.projection if merged.lookup is None else _looked_up(edit, merged.projection, merged.lookup)
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


@dataclass(frozen=True)
class _Merged:
    """The source of the heads: the projection [batch, tokens, features] that splits into exactly q, k and v, in this order.

    Attributes:
        lookup: the reshape of a lookup of rows that stands between each piece and its heads, that of q.
    """

    projection: fx.Node
    lookup: Reshape | None = None


def _looked_up(edit: Editor, projection: fx.Node, lookup: Reshape) -> fx.Node:
    """The rows of the whole projection that a lookup takes of a piece, [batch, tokens, features]."""
    selected = IndexSelect(lookup.x)
    rows = edit.call(aten.index_select.default, projection, selected.dim, selected.indices)
    return edit.call(aten.reshape.default, rows, [*lookup.sizes[:2], nodes.tensor_type(projection).shape[2]])


def _merged(node: fx.Node) -> _Merged | None:
    """The merged projection of an attention; None if there is none."""
    attention = AttentionKernel(node)
    heads = attention.q, attention.k, attention.v
    pieces = [_piece(head) for head in heads]
    if pieces[0] is None:
        packed = _packed(heads)
        return None if packed is None else _Merged(packed)
    split, _, lookup = pieces[0]
    places = [(piece[0], piece[1], _rows_of(piece[2])) for piece in pieces if piece is not None]
    results = nodes.node_type(split)
    whole = isinstance(results, tuple) and len(results) == 3
    if places != [(split, index, _rows_of(lookup)) for index in range(3)] or not whole:
        return None
    depths = {nodes.tensor_type(head).shape[3] for head in heads}
    return _Merged(Split(split).x, lookup) if len(depths) == 1 else None


def _rows_of(lookup: Reshape | None) -> tuple[object, ...]:
    """The dimension and the rows of a lookup, and the sizes it is reshaped to but the last; nothing without a lookup."""
    if lookup is None:
        return ()
    selected = IndexSelect(lookup.x)
    return (selected.dim, selected.indices, *lookup.sizes[:2])


def _packed(heads: Sequence[fx.Node]) -> fx.Node | None:
    """The merged projection, if it is reshaped to [batch, tokens, 3, heads, head_dim], permuted, and taken apart; else None."""
    parts = [_part(head) for head in heads]
    if parts[0] is None or parts != [(parts[0][0], index) for index in range(3)]:
        return None
    permuted = Permute.of(parts[0][0])
    if permuted is None or [*permuted.dims] != [2, 0, 3, 1, 4] or not nodes.is_call(permuted.x, *RESHAPES):
        return None
    source = nodes.operand(permuted.x)
    whole, unpacked = (nodes.tensor_type(tensor).shape for tensor in (source, permuted.x))
    return source if len(whole) == 3 and whole[:2] == unpacked[:2] and unpacked[2] == 3 else None


def _part(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor, and the index in its first dimension, that a value is taken from."""
    if (selected := Select.of(node)) is not None:
        source, index = selected, selected.index
    elif (item := Item.of(node)) is not None and (unbound := Unbind.of(item.source)) is not None:
        source, index = unbound, item.index
    else:
        return None
    return (source.x, index) if source.dim == 0 and isinstance(index, int) else None


def _piece(heads: fx.Node) -> tuple[fx.Node, int, Reshape | None] | None:
    """The split, and the index of its output, that [batch, heads, tokens, head_dim] is a view of, or the rows of a lookup."""
    if not swaps_heads(heads) or not nodes.is_call(nodes.operand(heads), *RESHAPES):
        return None
    apart = nodes.operand(heads)
    joined = nodes.operand(apart)
    lookup = _lookup(joined)
    piece = Item.of(joined if lookup is None else IndexSelect(lookup.x).x)
    split = None if piece is None else Split.of(piece.source)
    if piece is None or split is None:
        return None
    whole, part, by_head = map(nodes.tensor_type, (split.x, joined, apart))
    same = part.rank == 3 and by_head.rank == 4 and part.shape[:2] == by_head.shape[:2]
    return (split.node, piece.index, lookup) if whole.rank == 3 and split.dim in (-1, 2) and same else None


def _lookup(node: fx.Node) -> Reshape | None:
    """The reshape of rows, selected in the dimension of tokens, to [batch, tokens, features]; None for any other node."""
    selected = IndexSelect.of(nodes.operand(node)) if nodes.is_call(node, aten.reshape.default) else None
    return Reshape(node) if selected is not None and selected.dim == 1 else None
