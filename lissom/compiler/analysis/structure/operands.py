"""The operands of an attention in the form that kernels accept, and the views that split and join its heads."""

from __future__ import annotations

import math

import torch
from torch import fx

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula
from lissom.compiler.ir.match import only_user
from lissom.compiler.ir.operators import RESHAPES

aten = torch.ops.aten

PLAIN = aten.scaled_dot_product_attention.default
"""PyTorch's attention."""
SWAPPED = "transpose(x, 1, 2) | transpose(x, 2, 1) | permute(x, [0, 2, 1, 3])"
"""The dimensions of tokens and heads of x exchanged, in four dimensions."""
_SWAPPED = Formula(SWAPPED, lambda found: nodes.tensor_type(found.root).rank == 4)
_REPEATED = Formula(
    """
    spread = expand(unsqueeze(x, 2), ...)
    RESHAPES(spread, ...) | repeat_interleave(x, repeats, 1, ...)
    """,
    lambda found: nodes.tensor_type(found.root).rank == nodes.tensor_type(found["x"]).rank == 4,
    repeats=int,
)


def scale_of(node: fx.Node) -> float:
    """The factor on the scores."""
    attention = Attention(node)
    return 1.0 / math.sqrt(nodes.fixed_size(attention.q, -1)) if attention.scale is None else attention.scale


def softcap_of(attention: fx.Node) -> float:
    """The soft cap of the scores; 0 when there is none."""
    softcap = attention.kwargs.get("softcap") or 0.0
    assert isinstance(softcap, (int, float))
    return softcap


def is_causal(attention: fx.Node) -> bool:
    """True for PyTorch's attention with the flag `is_causal`."""
    return nodes.is_call(attention, PLAIN) and bool(nodes.argument(attention, "is_causal"))


def mask_of(attention: fx.Node) -> fx.Node | None:
    """The mask or bias of an attention; None when there is none."""
    mask = nodes.argument(attention, "attn_mask", "bias")
    return mask if isinstance(mask, fx.Node) else None


def sinks_of(node: fx.Node) -> fx.Node | None:
    """The attention sink logits before they are expanded over batch and queries; None when there are none."""
    sinks = node.kwargs.get("sinks")
    while nodes.is_call(sinks, aten.expand.default) and nodes.tensor_type(nodes.operand(sinks)).rank == 4:
        sinks = nodes.operand(sinks)
    return sinks if isinstance(sinks, fx.Node) else None


def unrepeated(node: object) -> fx.Node:
    """Keys or values before their heads are repeated for the query heads that share them; the node itself if they are not.

    Args:
        node: [batch, heads, tokens, features], computed by unsqueeze, expand and reshape, or by repeat_interleave.
    """
    assert isinstance(node, fx.Node)
    if (source_type := _REPEATED.match(node)) is None or "spread" not in source_type.values:
        return node if source_type is None else source_type["x"]
    (_, heads, *rest), (_, wanted, *wanted_rest) = (nodes.tensor_type(item).shape for item in (source_type["x"], node))
    copies = nodes.tensor_type(source_type["spread"]).shape[2]
    repeats = isinstance(copies, int) and isinstance(heads, int) and wanted == heads * copies
    return source_type["x"] if repeats and wanted_rest == rest else node


def shared_operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The keys and values of an attention before they are repeated; unchanged unless both are.

    In kernels several query heads read one key head, so the copies are not needed.
    """
    k, v = Attention(node).k, Attention(node).v
    shared = unrepeated(k), unrepeated(v)
    return (k, v) if shared[0] is k or shared[1] is v else shared


def operands_obstacle(edit: Editor, node: fx.Node) -> str | None:
    """The reason none of our kernels accepts an attention's operands; None if one does."""
    attention = Attention(node)
    q, k, v = (nodes.tensor_type(operand) for operand in (attention.q, attention.k, attention.v))
    if q.rank != 4 or k.rank != 4 or v.rank != 4:
        return "its operands are not [batch, heads, tokens, head_dim]"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return "its operands differ in dtype"
    sinks = sinks_of(node)
    if sinks is not None and nodes.tensor_type(sinks).shape[2:3] != (1,):
        return "its sinks differ from query to query"
    if node.target is PLAIN and nodes.argument(node, "dropout_p"):
        return "it drops out weights"
    heads, key_heads = q.shape[1], k.shape[1]
    if not (isinstance(heads, int) and isinstance(key_heads, int) and isinstance(q.shape[-1], int)):
        return "its number of heads or their size is not fixed"
    grouped = node.target is PLAIN and bool(nodes.argument(node, "enable_gqa"))
    if v.shape[1] != key_heads or (heads != key_heads and not (grouped and heads % key_heads == 0)):
        return f"{heads} query heads are broadcast with {key_heads} key and {v.shape[1]} value heads"
    if not all(fake.same_size(edit.program.fake_mode, q.shape[0], operand.shape[0]) for operand in (k, v)):
        return "its batch is broadcast"
    return None


def joined_heads(attention: fx.Node) -> fx.Node | None:
    """The reshape that merges the heads of the attention's output, where nothing else reads them."""
    swapped = only_user(attention)
    if swapped is None or _SWAPPED.match(swapped) is None:
        return None
    joined = only_user(swapped)
    if not nodes.is_call(joined, *RESHAPES) or nodes.tensor_type(joined).rank != 3:
        return None
    return joined if nodes.tensor_type(joined).shape[:2] == nodes.tensor_type(swapped).shape[:2] else None
