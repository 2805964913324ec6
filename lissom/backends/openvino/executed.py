"""Which quantized layers OpenVINO runs in integers, or reads integer weights for, from the graph that it executes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import openvino

from lissom.backends.onnx.quantization import format_of
from lissom.backends.onnx.translation import ROUND
from lissom.backends.openvino.integers import Quantized, QuantizedLayer
from lissom.backends.simulated_layers import SimulatedLayer
from lissom.ops.quantization import GROUP

INTEGERS = {"i8", "u8", "i4", "u4"}


def unfused(graph: openvino.Model, quantized: Quantized) -> list[SimulatedLayer]:
    """The quantized layers that OpenVINO computes in floating point, each with the reason.

    A layer with a static scale for its activations has a kernel where the product reads two integer tensors, and a weight-only
    layer where it reads an integer weight.

    Args:
        graph: the graph that OpenVINO executes.
    """
    read = dict(_products(graph))
    left: list[SimulatedLayer] = []
    for item in quantized.layers:
        types = next((read[name] for name in item.names if name in read), None)
        reason = _reason(item, types, quantized.group)
        if reason is not None:
            left.append(item.layer.simulated(reason))
    return left


def _reason(item: QuantizedLayer, read: Sequence[str] | None, group: int) -> str | None:
    """The reason a layer has no kernel; None if it has one.

    Args:
        read: the element types of the input and the weight that its product reads.
        group: as in `Quantized`.
    """
    layer = item.layer
    if layer.stored is None:
        return "its weight is not stored in integers"
    if not layer.stored.form.is_integer or (layer.rounded is not None and not format_of(layer.rounded).is_integer):
        return "OpenVINO has no products of fp8 on a CPU"
    if layer.rounded is not None and layer.rounded.op_type != ROUND and not layer.by_group:
        return "OpenVINO has no kernel that quantizes activations per token or per tensor at run time"
    if layer.by_group and not group:
        return f"OpenVINO quantizes activations only where all layers with integer weights have them in groups of {GROUP}"
    if layer.by_group and not item.rounds:
        return "OpenVINO's kernel does not quantize its activations on this processor"
    if read is None:
        return "OpenVINO's graph has no product of its name"
    if read[1] not in INTEGERS:
        return f"OpenVINO's product reads its weight in {read[1]}"
    if layer.rounded is not None and not layer.by_group and read[0] not in INTEGERS:
        return f"OpenVINO's product reads its input in {read[0]}"
    return None


def kernels(quantized: Quantized, left: Sequence[SimulatedLayer]) -> str:
    """How many layers have which kernel, in words.

    Args:
        left: the layers without one.
    """
    without = {layer.node for layer in left}
    kinds = Counter(
        "with integer weights" if item.layer.rounded is None else "from integers"
        for item in quantized.layers
        if item.layer.product.name not in without
    )
    return ", ".join(f"{count} products {kind}" for kind, count in kinds.items())


def _products(graph: openvino.Model) -> Iterator[tuple[str, Sequence[str]]]:
    """The products of a graph by each of the names that were fused into them and that of their weight, with the element types
    that they read."""
    for node in graph.get_ordered_ops():
        info = node.get_rt_info()
        if node.get_input_size() < 2 or str(_text(info, "layerType")) not in ("FullyConnected", "MatMul"):
            continue
        read = [node.input(index).get_element_type().get_type_name() for index in range(2)]
        yield node.input_value(1).get_node().get_friendly_name(), read
        for name in _text(info, "originalLayersNames").split(","):
            # A Gemm is a product and a sum.
            yield name.removesuffix("/WithoutBiases"), read


def _text(info: Mapping[str, openvino.OVAny], key: str) -> str:
    return info[key].astype(str) if key in info else ""
