"""Lower attention on a CPU to the kernel `lissom::fused_attention`, which reads queries, keys and values in place.

    scaled_dot_product_attention(q, k, v, mask)  |  lissom::attention(…)   ->  lissom::fused_attention(q, k, v, mask)

A KV cache in int8 with per-token scales, as `quantize-cache` writes it, is read in int8.

The kernel keeps a few rows of scores in cache, reads slices of a merged projection without copying them, and writes its output
in the layout of the output projection, so that the transpose and reshape after it copy nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import mask_of, operands_obstacle, scale_of, shared_operands, sinks_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.attention import attention
from lissom.ops.fused_attention import fused_attention
from lissom.ops.native import missing_kernel
from lissom.ops.quantization import dequantize

aten = torch.ops.aten

_PLAIN = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class FuseAttention(Rewrite):
    """Lowers attention to the CPU kernel `lissom::fused_attention`."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(partial(_obstacle, edit), _PLAIN, attention):
            q, (k, v) = node.args[0], shared_operands(node)
            kept = [_int8_cache(k), _int8_cache(v)]
            scales: dict[str, fx.Node] = {}
            if kept[0] is not None and kept[1] is not None:
                (k, k_scale), (v, v_scale) = kept[0], kept[1]
                scales = {"k_scale": k_scale, "v_scale": v_scale}
            mask = mask_of(node)
            options: dict[str, object] = (
                {} if node.target is _PLAIN else {key: node.kwargs[key] for key in node.kwargs if key != "scale"}
            )
            if options.get("sinks") is not None:
                options["sinks"] = sinks_of(node)
            if node.target is _PLAIN and nodes.argument(node, "is_causal"):
                options["causal"] = True
            scale = scale_of(node)
            with edit.before(node):
                masks = [mask] if mask is not None else []
                call = edit.call(fused_attention, q, k, v, *masks, scale=scale, **options, **scales)
            edit.replace(node, call)


def _int8_cache(node: object) -> tuple[fx.Node, fx.Node] | None:
    """The int8 tensor and scales of keys or values dequantized with a scale per token and head; None for any other node."""
    if not nodes.is_call(node, dequantize) or node.kwargs["format"] != "int8" or len(node.args) != 2:
        return None
    kept, scale = node.args
    alone = nodes.tensor_type(scale).shape == (*nodes.tensor_type(kept).shape[:-1], 1)
    return (kept, scale) if alone else None  # pyright: ignore[reportReturnType]


def _obstacle(edit: Editor, node: fx.Node) -> str | None:
    """Why an attention cannot be lowered; None when it can."""
    q = nodes.tensor_type(node.args[0])
    return operands_obstacle(edit, node) or missing_kernel(q.dtype, q.device)
