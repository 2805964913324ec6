"""Let attention on a CPU read its heads from a merged projection, and write merged heads.

    q, k, v = split(qkv);  each: reshape to heads, transpose      ->  y = lissom::merged_attention(qkv, mask)
    y = reshape(transpose(lissom::fused_attention(q, k, v, mask)))

The heads may also come from qkv as [batch, tokens, 3, heads, head_dim], as timm's vision transformers split them. Where
`pack-tokens` looks up the rows of q, k and v behind the split, those of qkv are looked up once.

The view operators around the attention copy nothing, but each takes about a microsecond to call, and a layer has a dozen of
them: a tenth of the time of a small model on a short text.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import joined_heads, swaps_heads
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import RESHAPES, SPLITS
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
            heads, key_heads = (nodes.tensor_type(item).shape[1] for item in node.args[:2])
            rest = {name: value for name, value in node.kwargs.items() if name != "sinks"}
            with edit.before(node):
                whole = merged.projection if merged.lookup is None else _looked_up(edit, merged.projection, merged.lookup)
                call = edit.call(merged_attention, whole, *node.args[3:], heads=heads, key_heads=key_heads, **rest)
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
    """Where the heads come from: the projection [batch, tokens, features] that splits into exactly q, k and v, in this order.

    lookup: the reshape of a lookup of rows that stands between each piece and its heads, that of q.
    """

    projection: fx.Node
    lookup: fx.Node | None = None


def _looked_up(edit: Editor, projection: fx.Node, lookup: fx.Node) -> fx.Node:
    """The rows of the whole projection that a lookup takes of a piece, [batch, tokens, features]."""
    selected, sizes = lookup.args
    rows = edit.call(aten.index_select.default, projection, *selected.args[1:])  # pyright: ignore
    return edit.call(aten.reshape.default, rows, [*sizes[:2], nodes.tensor_type(projection).shape[2]])  # pyright: ignore


def _merged(attention: fx.Node) -> _Merged | None:
    """The merged projection of an attention; None if there is none."""
    pieces = [_piece(item) for item in attention.args[:3]]
    if pieces[0] is None:
        packed = _packed(attention)
        return None if packed is None else _Merged(packed)
    split, _, lookup = pieces[0]
    taken = [(piece[0], piece[1], _rows_of(piece[2])) for piece in pieces if piece is not None]
    if taken != [(split, index, _rows_of(lookup)) for index in range(3)] or len(nodes.node_type(split)) != 3:  # pyright: ignore
        return None
    depths = {nodes.tensor_type(item).shape[3] for item in attention.args[:3]}
    return _Merged(split.args[0], lookup) if len(depths) == 1 else None  # pyright: ignore[reportArgumentType]


def _rows_of(lookup: fx.Node | None) -> tuple[object, ...]:
    """The dimension and the rows of a lookup, and the sizes it is reshaped to but the last; nothing without a lookup."""
    if lookup is None:
        return ()
    selected, sizes = lookup.args
    return (*selected.args[1:], *sizes[:2])  # pyright: ignore


def _packed(attention: fx.Node) -> fx.Node | None:
    """The merged projection, if it is reshaped to [batch, tokens, 3, heads, head_dim], permuted, and taken apart; else None."""
    parts = [_part(item) for item in attention.args[:3]]
    if parts[0] is None or parts != [(parts[0][0], index) for index in range(3)]:
        return None
    permuted = parts[0][0]
    if not nodes.is_call(permuted, aten.permute.default) or [*permuted.args[1]] != [2, 0, 3, 1, 4]:  # pyright: ignore
        return None
    reshaped = permuted.args[0]
    if not nodes.is_call(reshaped, *RESHAPES):
        return None
    whole, found = (nodes.tensor_type(item).shape for item in (reshaped.args[0], reshaped))
    return reshaped.args[0] if len(whole) == 3 and whole[:2] == found[:2] and found[2] == 3 else None  # pyright: ignore


def _part(item: object) -> tuple[fx.Node, int] | None:
    """The tensor, and the index in its first dimension, that a value is taken from."""
    if nodes.is_call(item, operator.getitem) and nodes.is_call(item.args[0], aten.unbind.int):
        taken, index = item.args[0], item.args[1]
    elif nodes.is_call(item, aten.select.int):
        taken, index = item, item.args[2]
    else:
        return None
    first = nodes.argument(taken, "dim") == 0 and isinstance(index, int)
    return (taken.args[0], index) if first else None  # pyright: ignore[reportReturnType]


def _piece(heads: object) -> tuple[fx.Node, int, fx.Node | None] | None:
    """The split, and the index of its output, that [batch, heads, tokens, head_dim] is a view of, or the rows of a lookup."""
    if not swaps_heads(heads) or not nodes.is_call(heads.args[0], *RESHAPES):
        return None
    cut = heads.args[0]
    found = nodes.tensor_type(cut)
    piece = cut.args[0]
    lookup = None
    if isinstance(piece, fx.Node) and _looks_up(piece):
        lookup, piece = piece, piece.args[0].args[0]  # pyright: ignore
    if not nodes.is_call(piece, operator.getitem) or not nodes.is_call(piece.args[0], *SPLITS):
        return None
    split = piece.args[0]
    whole, part = nodes.tensor_type(split.args[0]), nodes.tensor_type(lookup or piece)
    last = nodes.argument(split, "dim") in (-1, 2)
    ok = whole.rank == 3 and last and found.rank == 4 and part.rank == 3 and part.shape[:2] == found.shape[:2]
    return (split, int(piece.args[1]), lookup) if ok else None  # pyright: ignore[reportArgumentType]


def _looks_up(node: fx.Node) -> bool:
    """True for rows that are selected in the dimension of tokens, and reshaped to [batch, tokens, features]."""
    selected = node.args[0] if nodes.is_call(node, aten.reshape.default) else None
    return nodes.is_call(selected, aten.index_select.default) and nodes.argument(selected, "dim") == 1
