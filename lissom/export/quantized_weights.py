"""Weights that a program holds quantized: integers or fp8, scales and zero points, by the names of the model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Dequantize, Embedding
from lissom.compiler.ir.program import Program
from lissom.ops.formats import FORMATS, unpack_halves
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.ops.quantization import dequantize


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that a program dequantizes.

    Attributes:
        name: of the weight in the model.
        node: the call of `lissom::dequantize`.
        order: the column of the weight at each stored column; None where they are the same.
    """

    name: str
    node: fx.Node
    stored: StoredBlocks
    order: torch.Tensor | None


def quantized_weights(program: Program) -> Iterator[QuantizedWeight]:
    """The quantized weights of a program whose weights are folded, on the CPU.

    A table that is looked up and multiplied comes twice.
    """
    for node in program.nodes(dequantize):
        q, scale, *zero_point = (constant(program, argument) for argument in node.args)
        stored_as, form = attribute_of(Dequantize(node).q), Dequantize(node).format
        if stored_as is None or q is None or scale is None or None in zero_point:
            continue
        if scale.dtype == torch.float8_e4m3fn:
            scale = scale.float() * Dequantize(node).tensor_scale
        whole = q if FORMATS[form].bits == 8 else unpack_halves(q, FORMATS[form])
        stored = StoredBlocks(whole, scale, zero_point[0] if zero_point else None, form)
        name = str(stored_as.target).removesuffix(f"_{form}")
        yield QuantizedWeight(name, node, stored, _column_order(program, node))


def in_floating_point(stored: StoredBlocks) -> torch.Tensor:
    """The weight in float32."""
    return stored.dequantize(slice(None)) if stored.scale.dim() else stored.q * stored.scale


def attribute_of(node: object) -> fx.Node | None:
    """The node of a weight, also where only the rows that are looked up are dequantized."""
    if (lookup := Embedding.of(node)) is not None:
        node = lookup.table
    return node if isinstance(node, fx.Node) and node.op == "get_attr" else None


def constant(program: Program, node: object) -> torch.Tensor | None:
    """The values of a weight on the CPU; None for another node."""
    attribute = attribute_of(node)
    return None if attribute is None else program.weight(str(attribute.target)).detach().cpu()


def _column_order(program: Program, weight: fx.Node) -> torch.Tensor | None:
    """The order in which the layer of a dequantized weight reads its input; None where this is the input's own."""
    inputs = (user.args[0] for user in weight.users if user.target is torch.ops.aten.linear.default)
    sorted_input = next((x for x in inputs if nodes.is_call(x, torch.ops.aten.index_select.default)), None)
    return None if sorted_input is None else constant(program, nodes.argument(sorted_input, "index"))
