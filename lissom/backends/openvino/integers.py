"""Checks of OpenVINO's integer kernels, layer by layer, before they are used.

OpenVINO fuses Q/DQ with static scales into products of integers, and quantizes the activations of layers with integer weights
itself, per group, where DYNAMIC_QUANTIZATION_GROUP_SIZE says so. Its executed graph does not name the latter, so their outputs
tell: they are those of rounded activations, and not those of the activations themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lissom.backends.onnx.integer_matmul import distance, nodes_for
from lissom.backends.onnx.quantized_layers import Layer, quantized_layers
from lissom.backends.onnx.rewriting import Writer
from lissom.backends.onnx.translation import ROUND
from lissom.compiler.verify.divergence import LOCAL_TOLERANCE
from lissom.errors import VerifyError
from lissom.ops.quantization import GROUP

_FEWER = 0.1
"""How much closer the outputs of a kernel that rounds its activations are to those of rounded activations than to others."""
_FUSED, _BY_GROUP = "fused", "by_group"


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer of an IR.

    Attributes:
        names: that it may have in OpenVINO's executed graph, of its product, a sum behind it, or its weight.
        rounds: its kernel was seen to quantize activations by group.
    """

    layer: Layer
    names: Sequence[str]
    rounds: bool


@dataclass(frozen=True)
class Quantized:
    """The quantized layers of an IR.

    Attributes:
        group: the size of the groups in which OpenVINO quantizes activations; 0 where it does not.
    """

    layers: Sequence[QuantizedLayer]
    group: int


def group_size(layers: Sequence[Layer]) -> int:
    """The size of the groups in which OpenVINO has to quantize activations; 0 where it must not.

    It holds for all layers with integer weights, so one without rounded activations, or with others, excludes it.
    """
    kinds = {_kind(layer) for layer in layers if _is_integer(layer)}
    return GROUP if _BY_GROUP in kinds and kinds <= {_BY_GROUP, _FUSED} else 0


def write_check(exported: ir.Model, group: int) -> tuple[ir.Model, Mapping[str, tuple[int, str]]]:
    """The exported model with the errors of each integer product as further outputs: one to the product of rounded values in
    floating point, and where activations are rounded by group, one to the product of the values themselves.

    Args:
        group: as `group_size` gives it.

    Returns:
        By the names of the error outputs, the layer's index and what it compares with, `rounded` or `plain`.
    """
    model, names = exported.clone(), dict[str, tuple[int, str]]()
    for index, layer in enumerate(quantized_layers(model)):
        if not _is_integer(layer) or _kind(layer) is None or (_kind(layer) == _BY_GROUP and not group):
            continue
        write, inputs, product = Writer(model), layer.product.inputs, layer.product.outputs[0]
        assert layer.stored is not None
        weight = write.weight(layer.weight, f"floats_{index}", layer.stored.floats())
        compared = {"rounded": inputs[0]} | ({"plain": layer.x} if _kind(layer) == _BY_GROUP else {})
        for what, x in compared.items():
            wanted = write.call("MatMul", x, weight)
            wanted = write.call("Add", wanted, inputs[2]) if len(inputs) > 2 else wanted
            name = f"error_{index}_{what}"
            names[name] = index, what
            model.graph.outputs.append(distance(write, wanted, product, name))
        model.graph.insert_after(layer.product, nodes_for(write, layer))
        if _kind(layer) == _BY_GROUP:
            layer.product.replace_input_with(0, layer.x)
    return model, names


def rounded_by_kernels(errors: Mapping[str, float], names: Mapping[str, tuple[int, str]]) -> set[int]:
    """The indices of the layers whose kernels round activations by group as the program does.

    Args:
        errors: the outputs of the model of `write_check`, by name.

    Raises:
        VerifyError: when an integer product with static scales differs from the same product in floating point.
    """
    by_layer: dict[int, dict[str, float]] = {}
    for name, (index, what) in names.items():
        by_layer.setdefault(index, {})[what] = errors[name]
    worst = max((error["rounded"] for error in by_layer.values() if "plain" not in error), default=0.0)
    if not worst <= LOCAL_TOLERANCE:
        raise VerifyError(f"an integer product has a relative error of {worst:.2g}, allowed {LOCAL_TOLERANCE:.2g}")
    return {index for index, error in by_layer.items() if "plain" in error and error["rounded"] <= _FEWER * error["plain"]}


def leave_rounding(exported: ir.Model, indices: set[int]) -> None:
    """Let these layers read their activations as they are; OpenVINO's kernels round them."""
    for index, layer in enumerate(quantized_layers(exported)):
        if index in indices:
            layer.product.replace_input_with(0, layer.x)


def _is_integer(layer: Layer) -> bool:
    return layer.stored is not None and layer.stored.form.is_integer


def _kind(layer: Layer) -> str | None:
    """How OpenVINO may compute a layer with integer weights from integers; None where it cannot."""
    if layer.rounded is None or layer.obstacle is not None:
        return None
    return _BY_GROUP if layer.by_group else _FUSED if layer.rounded.op_type == ROUND else None
