"""The error of a program's outputs from quantizing activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.nn import functional

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Binary
from lissom.compiler.ir.operators import FAKE_QUANTIZES, INTEGER_PRODUCTS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.view_calls import Cast
from lissom.compiler.verify.divergence import compare, run_samples
from lissom.ops import int8_product, quantize_rows
from lissom.ops.epilogue import ACTIVATIONS

aten = torch.ops.aten


def rounding_loss(program: Program, samples: Sequence[Sample], outputs: Sequence[Sequence[object]]) -> float:
    """The relative error of a program's outputs against those without quantization of activations.

    Our kernels that quantize internally stay as they are.
    """
    plain = program.copy()
    for node in plain.nodes():
        if node.target in FAKE_QUANTIZES and nodes.operand(node).op != "get_attr":
            node.replace_all_uses_with(nodes.operand(node))
            plain.graph.erase_node(node)
        elif node.target is int8_product:
            _multiply_before_quantization(plain.graph, node)
        elif node.target in INTEGER_PRODUCTS:
            _multiply_floats(plain.graph, node)
    return compare(run_samples(plain, samples), outputs).relative_error


def _multiply_floats(graph: fx.Graph, product: fx.Node) -> None:
    """Replace a product of quantized values by one of the values before quantization, on the same scale."""
    q, weight, *scales = product.args
    cast = nodes.operand(product)
    while cast.target is not aten.to.dtype:
        cast = nodes.operand(cast)
    if Cast(cast).dtype is not torch.float32:
        value = nodes.operand(Cast(cast).x)  # before it is clamped
        if nodes.is_call(value, aten.add.Tensor) and nodes.is_call(rounded := Binary(value).left, aten.round.default):
            with graph.inserting_before(cast):
                value = graph.call_function(aten.add.Tensor, (nodes.operand(rounded), Binary(value).right))
        cast.args = value, torch.float32
    with graph.inserting_before(product):
        weight = graph.call_function(aten.to.dtype, (weight, torch.float32))
        if scales:
            q, weight = (graph.call_function(aten.mul.Tensor, pair) for pair in ((q, scales[0]), (weight, scales[1])))
        float_product = graph.call_function(aten.matmul.default, (q, weight))
        if scales and scales[2] is not None:
            float_product = graph.call_function(aten.add.Tensor, (float_product, scales[2]))
        if scales:
            float_product = graph.call_function(aten.to.dtype, (float_product, scales[4]))
    product.replace_all_uses_with(float_product)
    graph.erase_node(product)


def _multiply_before_quantization(graph: fx.Graph, product: fx.Node) -> None:
    """Replace `int8_product` by its formula on the values before quantization."""
    step = nodes.operand(product)
    while step.target not in (quantize_rows, aten.round.default):
        step = nodes.operand(step)
    x = nodes.operand(step)
    names = ("weight", "weight_scale", "bias", "other")
    operands = [x if step.target is quantize_rows else Binary(x).left, *(nodes.argument(product, name) for name in names)]
    with graph.inserting_before(product):
        plain = graph.call_function(_float_product, tuple(operands), dict(product.kwargs))  # pyright: ignore[reportArgumentType]
    product.replace_all_uses_with(plain)
    graph.erase_node(product)


def _float_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, *,
    dtype: torch.dtype, activation: str = "none", combine: str = "add",
) -> torch.Tensor:  # fmt: skip
    matrix = weight.float() * scale[:, None]
    y = ACTIVATIONS[activation](functional.linear(x.float(), matrix, None if bias is None else bias.float()))
    if other is not None:
        y = y * other.float() if combine == "mul" else y + other.float()
    return y.to(dtype)
