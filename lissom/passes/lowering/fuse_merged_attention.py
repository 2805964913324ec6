"""Let attention on a CPU read its heads from a merged projection, and write merged heads.

    q, k, v = split(qkv);  each: reshape to heads, transpose      ->  y = lissom::merged_attention(qkv, mask)
    y = reshape(transpose(lissom::fused_attention(q, k, v, mask)))

The heads may also come from qkv as [batch, tokens, 3, heads, head_dim], as timm's vision transformers split them.

The view operators around the attention copy nothing, but each takes about a microsecond to call, and a layer has a dozen of
them: a tenth of the time of a small model on a short text.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx

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
            merged, joined = _merged(node), _joined(node)
            assert merged is not None and joined is not None
            options = {name: value for name, value in node.kwargs.items() if name != "sinks"}
            heads, key_heads = (nodes.tensor_type(item).shape[1] for item in node.args[:2])
            with edit.before(node):
                call = edit.call(merged_attention, merged, *node.args[3:], heads=heads, key_heads=key_heads, **options)
            edit.replace(joined, call)


def _obstacle(node: fx.Node) -> str | None:
    """Why an attention cannot be fused; None when it can."""
    if node.kwargs.get("sinks") is not None:
        return "it has sinks"
    if _merged(node) is None:
        return "its queries, keys and values are not the heads of one merged projection"
    if _joined(node) is None:
        return "its heads are not joined right behind it"
    return None


def _merged(attention: fx.Node) -> fx.Node | None:
    """The projection [batch, tokens, features] that splits into exactly q, k and v, in this order."""
    pieces = [_piece(item) for item in attention.args[:3]]
    if pieces[0] is None:
        return _packed(attention)
    split = pieces[0][0]
    if pieces != [(split, 0), (split, 1), (split, 2)] or len(nodes.node_type(split)) != 3:  # pyright: ignore
        return None
    depths = {nodes.tensor_type(item).shape[3] for item in attention.args[:3]}
    return split.args[0] if len(depths) == 1 else None  # pyright: ignore[reportReturnType]


def _packed(attention: fx.Node) -> fx.Node | None:
    """The same for a projection that is reshaped to [batch, tokens, 3, heads, head_dim], permuted, and taken apart."""
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


def _piece(heads: object) -> tuple[fx.Node, int] | None:
    """The split, and the index of its output, that [batch, heads, tokens, head_dim] is a view of."""
    if not _swaps_heads(heads) or not nodes.is_call(heads.args[0], *RESHAPES):
        return None
    cut = heads.args[0]
    piece = cut.args[0]
    if not nodes.is_call(piece, operator.getitem) or not nodes.is_call(piece.args[0], *SPLITS):
        return None
    split = piece.args[0]
    whole, part, found = (nodes.tensor_type(item) for item in (split.args[0], piece, cut))
    last = nodes.argument(split, "dim") in (-1, 2)
    ok = whole.rank == 3 and last and found.rank == 4 and part.shape[:2] == found.shape[:2]
    return (split, int(piece.args[1])) if ok else None  # pyright: ignore[reportArgumentType]


def _joined(attention: fx.Node) -> fx.Node | None:
    """The reshape that merges the heads of the attention's output, where nothing else reads them."""
    if len(attention.users) != 1:
        return None
    swapped = next(iter(attention.users))
    if not _swaps_heads(swapped) or len(swapped.users) != 1:
        return None
    joined = next(iter(swapped.users))
    if not nodes.is_call(joined, *RESHAPES) or nodes.tensor_type(joined).rank != 3:
        return None
    return joined if nodes.tensor_type(joined).shape[:2] == nodes.tensor_type(swapped).shape[:2] else None


def _swaps_heads(node: object) -> TypeGuard[fx.Node]:
    """True for a call that swaps the dimensions of tokens and heads."""
    if nodes.is_call(node, aten.permute.default):
        return list(node.args[1]) == [0, 2, 1, 3]  # pyright: ignore[reportArgumentType]
    if not nodes.is_call(node, aten.transpose.int) or nodes.tensor_type(node).rank != 4:
        return False
    return {int(item) % 4 for item in node.args[1:3]} == {1, 2}  # pyright: ignore[reportArgumentType]
