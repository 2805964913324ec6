"""Lower attention on a CPU to the kernel `lissom::fused_attention`, which reads queries, keys and values in place.

    scaled_dot_product_attention(q, k, v, mask)  |  lissom::attention(…)   ->  lissom::fused_attention(q, k, v, mask)

A KV cache in int8 with per-token scales, as `quantize-cache` writes it, is read in int8.

The kernel keeps a few rows of scores in cache, reads slices of a merged projection without copying them, and writes its output
in the layout of the output projection, so that the transpose and reshape after it copy nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import fx

from lissom.compiler.analysis.structure import operands
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention, Dequantize
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import ATTENTIONS
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_attention import fused_attention
from lissom.ops.native import missing_kernel


@dataclass(frozen=True)
class FuseAttention(Rewrite):
    """Lowers attention to the CPU kernel `lissom::fused_attention`."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(partial(_obstacle, edit), *ATTENTIONS):
            q, (k, v) = Attention(node).q, operands.shared_operands(node)
            options: dict[str, object] = {"scale": None}
            if node.target is not operands.PLAIN:
                options |= node.kwargs
            options["scale"] = operands.scale_of(node)
            if options.get("sinks") is not None:
                options["sinks"] = operands.sinks_of(node)
            if operands.is_causal(node):
                options["causal"] = True
            held = _int8_cache(k), _int8_cache(v)
            if held[0] is not None and held[1] is not None:
                (k, options["k_scale"]), (v, options["v_scale"]) = held[0], held[1]
            edit.replace_by(node, fused_attention, q, k, v, operands.mask_of(node), **options)


def _int8_cache(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The int8 tensor and scales of keys or values dequantized with a scale per token and head; None for any other node."""
    stored = Dequantize.of(node)
    if stored is None or stored.format != "int8" or stored.zero_point is not None:
        return None
    alone = nodes.tensor_type(stored.scale).shape == (*nodes.tensor_type(stored.q).shape[:-1], 1)
    return (stored.q, stored.scale) if alone else None


def _obstacle(edit: Editor, node: fx.Node) -> str | None:
    """The reason an attention cannot be lowered; None if it can."""
    q = nodes.tensor_type(Attention(node).q)
    return operands.operands_obstacle(edit, node) or missing_kernel(q.dtype, q.device)
