"""Quantized layers of a lowered program that have no kernel, and are simulated in floating point.

A backend's passes replace a product and the Q/DQ operators around it with a kernel. A product that still reads the output of
such an operator has no kernel: it runs in floating point on quantized values, as accurate and no faster than before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom import ops
from lissom.compiler.analysis.structure.linear import input_of, is_linear, is_quantizer, weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import (
    GROUPED_PRODUCTS,
    INT8_LINEARS,
    INTEGER_PRODUCTS,
    PACKED_LINEARS,
    PACKED_PRODUCTS,
    WEIGHT_ONLY_LINEARS,
)
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.errors import UnsupportedError
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize

aten = torch.ops.aten

_KERNELS = {*INT8_LINEARS, *INTEGER_PRODUCTS, *PACKED_PRODUCTS}
"""Operators that compute a quantized layer from integers, one per layer."""
_OTHER_LAYERS = {
    *(aten.linear.default, ops.sparse_linear, *PACKED_LINEARS),
    *WEIGHT_ONLY_LINEARS,
}
"""Operators of linear layers in floating point whose weight `is_linear` does not see."""


@dataclass(frozen=True)
class SimulatedLayer:
    """A quantized layer that is simulated in floating point.

    Attributes:
        node: its name in the program.
        module: its path.
        format: of weights and activations, in words.
        reason: why it has no kernel.
    """

    node: str
    module: str
    format: str
    reason: str = "no kernel took its place"


def simulated_layers(program: Program) -> list[SimulatedLayer]:
    """The quantized layers of a lowered program without a kernel."""
    layers = [(node, quantizers) for node in program.nodes() if (quantizers := _quantizers(node))]
    return [
        SimulatedLayer(node.name, nodes.origin(node).module_path, " on ".join(map(_describe, items)), _reason(node, items))
        for node, items in layers
    ]


def count_kernels(program: Program) -> int:
    """The number of layers of a lowered program that are integer kernels."""
    return len(program.nodes(*_KERNELS))


def explain(layers: Iterable[SimulatedLayer], steps: Sequence[Step]) -> list[SimulatedLayer]:
    """The layers; where no reason is known, with the reason for which a pass skipped the layer."""
    reasons = {skip.node: skip.reason for step in steps if "quantized" in step.spelling for skip in step.skipped}
    return [
        replace(layer, reason=reasons.get(layer.node, layer.reason)) if layer.reason == SimulatedLayer.reason else layer
        for layer in layers
    ]


def refuse(backend: str, layers: Sequence[SimulatedLayer], total: int) -> None:
    """Refuse layers without a kernel.

    Args:
        total: how many layers are quantized.

    Raises:
        UnsupportedError: when there is one.
    """
    if not layers:
        return
    first = layers[0]
    count = f"{total}" if len(layers) == total else f"{len(layers)} of {total}"
    raise UnsupportedError(
        f"backend '{backend}' has no kernel for {count} quantized layers, first '{first.module or first.node}' with "
        f"{first.format}: {first.reason}; choose another scheme or backend, or simulate=True to compute them in floating "
        f"point, no faster than before"
    )


def account(layers: Sequence[SimulatedLayer], total: int, kernels: str = "") -> str:
    """The sentence for the history: how many quantized layers run in integers.

    Args:
        kernels: by which operators.
    """
    said = f"{total - len(layers)} of {total} quantized layers run in integers{kernels and f': {kernels}'}"
    if not layers:
        return said
    reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers))
    return f"{said}; {len(layers)} in floating point on quantized values: {reasons}"


def _reason(node: fx.Node, quantizers: Sequence[fx.Node]) -> str:
    """The reason a layer has no kernel, by operator, formats and device."""
    on_cuda = all(nodes.tensor_type(quantizer).device.type == "cuda" for quantizer in quantizers)
    on_activations = [quantizer for quantizer in quantizers if nodes.operand(quantizer).op != "get_attr"]
    if not on_cuda and any(quantizer.kwargs["format"] == "fp8" for quantizer in on_activations):
        return "products of fp8 need a CUDA device"
    if on_cuda and node.target in GROUPED_PRODUCTS:
        return "experts have kernels for quantized weights on a CPU only"
    if any(nodes.is_call(user, aten.index_select.default) for quantizer in quantizers for user in quantizer.users):
        return "a rank takes its part of the input after it is quantized, since groups of equal scale do not fit the ranks"
    return SimulatedLayer.reason


def _quantizers(node: fx.Node) -> list[fx.Node]:
    """The Q/DQ operators on the weight and the input of a layer; empty for kernels and other nodes."""
    if is_linear(node):
        weight = weight_of(node)
        candidates: Sequence[object] = [_weight_quantizer(weight, node) if weight is not None else None, input_of(node)]
    elif nodes.is_call(node, *_OTHER_LAYERS):
        candidates = node.all_input_nodes[::-1]
    else:
        return []
    wholes = [_whole(operand) for operand in candidates if isinstance(operand, fx.Node)]
    return [whole for whole in wholes if is_quantizer(whole) and not _is_looked_up(whole)]


def _whole(value: fx.Node) -> fx.Node:
    """The value that a rank takes its part of; any other value as it is."""
    while nodes.is_call(value, aten.index_select.default):
        value = nodes.operand(value)
    return value


def _is_looked_up(quantizer: fx.Node) -> bool:
    """True for dequantized rows of an embedding table, whose readers are no quantized layers."""
    return nodes.is_call(quantizer, dequantize) and nodes.operand(quantizer).op != "get_attr"


def _weight_quantizer(weight: fx.Node, layer: fx.Node) -> fx.Node | None:
    """The quantizer of a layer's weight, through views."""
    pending, seen = [*layer.args], set[fx.Node]()
    while pending:
        value = pending.pop()
        if not isinstance(value, fx.Node) or value in seen:
            continue
        seen.add(value)
        if is_quantizer(value) and nodes.operand(value) is weight:
            return value
        if value is not input_of(layer):
            pending += value.args
    return None


def _describe(quantizer: fx.Node) -> str:
    """`int8 weights (per-channel)`, `uint8 activations (per-token)`."""
    form = FORMATS[str(quantizer.kwargs["format"])]
    if nodes.operand(quantizer).op != "get_attr":
        scale = quantizer.kwargs.get("granularity")
        return f"{form.name} activations ({f'per-{scale}' if scale else 'static'})"
    shape = nodes.tensor_type(nodes.argument(quantizer, "scale")).shape
    whole = nodes.tensor_type(quantizer).shape
    if all(size == 1 for size in shape):
        return f"{form.name} weights (per-tensor)"
    if all(size in (1, full) for size, full in zip(shape, whole, strict=True)):
        return f"{form.name} weights (per-channel)"
    groups = max(int(full) // int(size) for size, full in zip(shape, whole, strict=True))
    return f"{form.name} weights (groups of {groups})"
