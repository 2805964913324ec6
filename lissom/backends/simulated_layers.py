"""Which quantized layers of a lowered program a backend computes from integers, and what is said of the others.

A backend's passes put kernels in the place of a product together with the Q/DQ operators around it. A product that still reads
what such an operator gives has no kernel: it runs in floating point, on rounded values, as exact and no faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of, is_linear, is_quantizer, weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.errors import UnsupportedError
from lissom.ops import (
    packed_linear,
    packed_linear_norm,
    quantized_linear,
    quantized_linear_norm,
    sparse_linear,
    weight_quantized_linear,
    weight_quantized_linear_norm,
)
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize

aten = torch.ops.aten

_KERNELS = {
    *(quantized_linear, quantized_linear_norm),
    *(aten._int_mm.default, aten._scaled_mm.default, aten._weight_int4pack_mm.default, aten._weight_int8pack_mm.default),
}
"""Operators that compute a quantized layer from integers, one per layer."""
_OTHER_LAYERS = {
    *(aten.linear.default, sparse_linear, packed_linear, packed_linear_norm),
    *(weight_quantized_linear, weight_quantized_linear_norm),
}
"""Operators of linear layers in floating point whose weight `is_linear` does not see."""


@dataclass(frozen=True)
class SimulatedLayer:
    """A quantized layer that is computed in floating point.

    node: its name in the program. module: its path. format: what it is rounded to, in words. reason: why there is no kernel.
    """

    node: str
    module: str
    format: str
    reason: str = "no kernel took its place"


def simulated_layers(program: Program) -> list[SimulatedLayer]:
    """The quantized layers of a lowered program that no kernel has taken the place of."""
    found: list[SimulatedLayer] = []
    for node in program.nodes():
        rounded = _rounded_operands(node)
        if not rounded:
            continue
        described = " on ".join(_describe(program, item) for item in rounded)
        found.append(SimulatedLayer(node.name, nodes.origin(node).module_path, described, _reason(rounded)))
    return found


def count_kernels(program: Program) -> int:
    """How many layers of a lowered program kernels compute from integers."""
    return sum(_is_kernel(node) for node in program.nodes())


def explain(layers: Iterable[SimulatedLayer], steps: Sequence[Step]) -> list[SimulatedLayer]:
    """The layers; one whose reason is not known has that which a pass for quantized layers gave for leaving it alone."""
    reasons = {skip.node: skip.reason for step in steps if "quantized" in step.spelling for skip in step.skipped}
    return [
        replace(layer, reason=reasons.get(layer.node, layer.reason)) if layer.reason == SimulatedLayer.reason else layer
        for layer in layers
    ]


def refuse(backend: str, layers: Sequence[SimulatedLayer], total: int) -> None:
    """Refuse layers without a kernel. total: how many layers are quantized.

    Raises: UnsupportedError, when there is one.
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
    """The sentence for the history: how many quantized layers run in integers. kernels: by which operators."""
    said = f"{total - len(layers)} of {total} quantized layers run in integers{kernels and f': {kernels}'}"
    if not layers:
        return said
    reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers))
    return f"{said}; {len(layers)} in floating point on rounded values: {reasons}"


def _reason(rounded: Sequence[fx.Node]) -> str:
    """Why there is no kernel, as far as formats and the device tell."""
    on_cuda = all(nodes.tensor_type(item).device.type == "cuda" for item in rounded)
    if not on_cuda and any(item.kwargs["format"] == "fp8" for item in rounded):
        return "products of fp8 need a CUDA device"
    return SimulatedLayer.reason


def _is_kernel(node: fx.Node) -> bool:
    return node.target in _KERNELS


def _rounded_operands(node: fx.Node) -> list[fx.Node]:
    """What rounds the weight and the values of a layer: its Q/DQ operators; none for a kernel, or anything but a layer."""
    if is_linear(node):
        weight = weight_of(node)
        candidates: Sequence[object] = [_rounding_of(weight, node) if weight is not None else None, input_of(node)]
    elif nodes.is_call(node, *_OTHER_LAYERS):
        candidates = node.all_input_nodes[::-1]
    else:
        return []
    return [item for item in candidates if isinstance(item, fx.Node) and is_quantizer(item) and not _is_looked_up(item)]


def _is_looked_up(quantizer: fx.Node) -> bool:
    """True for rows of a table that are turned back: what reads them reads floating point."""
    first = quantizer.args[0]
    return nodes.is_call(quantizer, dequantize) and isinstance(first, fx.Node) and first.op != "get_attr"


def _rounding_of(weight: fx.Node, layer: fx.Node) -> fx.Node | None:
    """The operator that rounds a layer's weight, through views."""
    pending, seen = [*layer.args], set[fx.Node]()
    while pending:
        item = pending.pop()
        if not isinstance(item, fx.Node) or item in seen:
            continue
        seen.add(item)
        if is_quantizer(item) and item.args[0] is weight:
            return item
        if item is not input_of(layer):
            pending += item.args
    return None


def _describe(program: Program, rounding: fx.Node) -> str:
    """`int8 weights, a scale a channel`, `uint8 values, a scale a token`."""
    form = FORMATS[str(rounding.kwargs["format"])]
    first = rounding.args[0]
    if not (isinstance(first, fx.Node) and first.op == "get_attr"):
        scale = rounding.kwargs.get("granularity")
        return f"{form.name} values, a scale a {scale}" if scale else f"{form.name} values, one scale from calibration"
    shape = nodes.tensor_type(rounding.args[1]).shape
    whole = nodes.tensor_type(rounding).shape
    if all(size == 1 for size in shape):
        return f"{form.name} weights, one scale"
    if all(size in (1, full) for size, full in zip(shape, whole, strict=True)):
        return f"{form.name} weights, a scale a channel"
    groups = max(int(full) // int(size) for size, full in zip(shape, whole, strict=True))
    return f"{form.name} weights, a scale for {groups} neighbours"
