"""PyTorch's own counter of operations as an oracle for ours, node by node."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lissom.compiler.analysis.cost import node_flops
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import call
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample

UNKNOWN = (
    *("aten._grouped_mm.default", "lissom.grouped_product.default"),
    *("lissom.gated_delta_rule.default", "lissom.selective_scan.default"),
)
"""Operators PyTorch does not count, although they multiply matrices."""


def miscounted(program: Program, example: Sample) -> list[str]:
    """The nodes we count otherwise than PyTorch does, with both counts; `example` is what the program was captured with."""
    found: list[str] = []
    values: dict[fx.Node, object] = {}
    feed = iter(example)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = program.weight(str(node.target)).detach().clone()
        elif node.op == "call_function":
            wanted, values[node] = counted(node, values)
            if node_flops(node) != wanted and str(node.target) not in UNKNOWN:
                found.append(f"{node.name} ({node.target}): {node_flops(node)}, PyTorch counts {wanted}")
    return found


def counted(node: fx.Node, values: dict[fx.Node, object]) -> tuple[int, object]:
    """What PyTorch counts for one call, and its result.

    Attention is counted as the products it is made of, because its kernel for the CPU goes uncounted; but its result is that
    kernel's, because views that follow rely on how it lies in memory.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if nodes.is_call(node, torch.ops.aten.scaled_dot_product_attention.default):
            with sdpa_kernel(SDPBackend.MATH):
                call(node, values.__getitem__)
        else:
            result = call(node, values.__getitem__)
    if nodes.is_call(node, torch.ops.aten.scaled_dot_product_attention.default):
        with torch.no_grad():
            result = call(node, values.__getitem__)
    return counter.get_total_flops(), result
