"""Lower attention on a CPU to the kernel `lissom::fused_attention`, which reads queries, keys and values where they lie.

    scaled_dot_product_attention(q, k, v, mask)  |  lissom::attention(…)   ->  lissom::fused_attention(q, k, v, mask)

Keys and values that are kept as int8 with a scale each, as `quantize-cache` leaves them, are read as they are.

The kernel keeps a few rows of scores in cache, reads slices of a merged projection without copying them, and writes its result
in the layout the output projection wants, so that the transposition and reshape behind it move nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler import fake
from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.key_value_heads import unrepeated
from lissom.compiler.kinds import Rewrite
from lissom.compiler.types import ScalarType
from lissom.ops.attention import attention
from lissom.ops.fused_attention import fused_attention
from lissom.ops.native import missing_kernel
from lissom.ops.quantization import dequantize

aten = torch.ops.aten

_PLAIN = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class FuseAttention(Rewrite):
    """Turns attention into `lissom::fused_attention`."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(partial(_obstacle, edit), _PLAIN, attention):
            q, k, v = node.args[:3]
            # The kernel lets several query heads read one key head, so the copies need not be made.
            shared = [unrepeated(k), unrepeated(v)]
            if shared[0] is not k and shared[1] is not v:
                k, v = shared
            kept = [_kept_in_bytes(k), _kept_in_bytes(v)]
            scales: dict[str, fx.Node] = {}
            if kept[0] is not None and kept[1] is not None:
                (k, k_scale), (v, v_scale) = kept[0], kept[1]
                scales = {"k_scale": k_scale, "v_scale": v_scale}
            mask = nodes.argument(node, "attn_mask" if node.target is _PLAIN else "bias")
            options = {} if node.target is _PLAIN else {key: node.kwargs[key] for key in node.kwargs if key != "scale"}
            if node.target is _PLAIN and nodes.argument(node, "is_causal"):
                options["causal"] = True
            scale = nodes.argument(node, "scale")
            if scale is None:
                scale = 1.0 / math.sqrt(int(nodes.tensor_type(q).shape[-1]))  # pyright: ignore[reportArgumentType]
            with edit.before(node):
                masks = [mask] if mask is not None else []
                call = edit.call(fused_attention, q, k, v, *masks, scale=scale, **options, **scales)
            edit.replace(node, call)


def _kept_in_bytes(node: object) -> tuple[fx.Node, fx.Node] | None:
    """The bytes and scales of keys or values that are turned back from int8, one scale a token and head; None otherwise."""
    if not nodes.is_call(node, dequantize) or node.kwargs["format"] != "int8" or len(node.args) != 2:
        return None
    kept, scale = node.args
    alone = nodes.tensor_type(scale).shape == (*nodes.tensor_type(kept).shape[:-1], 1)
    return (kept, scale) if alone else None  # pyright: ignore[reportReturnType]


def _obstacle(edit: Editor, node: fx.Node) -> str | None:
    """Why an attention cannot be lowered; None when it can."""
    q, k, v = (nodes.tensor_type(item) for item in node.args[:3])  # pyright: ignore[reportArgumentType]
    if q.rank != 4 or k.rank != 4 or v.rank != 4:
        return "its operands are not [batch, heads, tokens, head_dim]"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return "its operands differ in dtype"
    sinks = node.kwargs.get("sinks")
    if sinks is not None and nodes.tensor_type(sinks).shape[2:3] != (1,):
        return "its sinks differ from query to query"
    if node.target is _PLAIN and nodes.argument(node, "dropout_p"):
        return "it drops out weights"
    heads, key_heads = q.shape[1], k.shape[1]
    if not (isinstance(heads, int) and isinstance(key_heads, int) and isinstance(q.shape[-1], int)):
        return "its number of heads or their size is not fixed"
    grouped = node.target is _PLAIN and bool(nodes.argument(node, "enable_gqa"))
    if v.shape[1] != key_heads or (heads != key_heads and not (grouped and heads % key_heads == 0)):
        return f"{heads} query heads are broadcast with {key_heads} key and {v.shape[1]} value heads"
    same = (ScalarType(int, item.shape[0]) for item in (k, v))
    if not all(fake.same_type(edit.program.fake_mode, ScalarType(int, q.shape[0]), size) for size in same):
        return "its batch is broadcast"
    return missing_kernel(q.dtype, q.device)
