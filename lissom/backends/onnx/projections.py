"""Projections of one input in an ONNX model, merged into one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.rewriting import constant_of, integers


@dataclass(frozen=True)
class _Projection:
    """A product with a weight, and the bias added to it, if any."""

    product: ir.Node
    sum: ir.Node | None
    weight: np.ndarray
    bias: np.ndarray | None

    @property
    def result(self) -> ir.Value:
        return (self.sum or self.product).outputs[0]


def merge_projections(model: ir.Model) -> int:
    """Merge products of one input with several weights into one product and a split; returns the number of groups."""
    groups: dict[ir.Value, list[_Projection]] = defaultdict(list)
    for node in model.graph:
        found = _as_projection(node)
        if found is not None and node.inputs[0] is not None:
            groups[node.inputs[0]].append(found)
    merged = 0
    for x, group in groups.items():
        alike = [item for item in group if (item.bias is None) == (group[0].bias is None)]
        if len(alike) > 1:
            _merge(model, x, alike)
            merged += 1
    return merged


def _as_projection(node: ir.Node) -> _Projection | None:
    weight = constant_of(node.inputs[1]) if node.op_type == "MatMul" and node.domain == "" else None
    result = node.outputs[0]
    if weight is None or weight.ndim != 2:
        return None
    uses = list(result.uses())
    reader = uses[0].node if len(uses) == 1 and not result.is_graph_output() else None
    if reader is None or reader.op_type != "Add":
        return None if result.is_graph_output() else _Projection(node, None, weight, None)
    bias = next((found for item in reader.inputs if item is not result and (found := constant_of(item)) is not None), None)
    if bias is None or bias.shape != weight.shape[1:]:
        return _Projection(node, None, weight, None)
    return None if reader.outputs[0].is_graph_output() else _Projection(node, reader, weight, bias)


def _merge(model: ir.Model, x: ir.Value, group: Sequence[_Projection]) -> None:
    tape = ir.tape.Tape()
    sizes = [item.weight.shape[1] for item in group]
    result = tape.op("MatMul", [x, _weight(model, group[0].product, np.concatenate([item.weight for item in group], 1))])
    biases = [item.bias for item in group if item.bias is not None]
    if biases:
        result = tape.op("Add", [result, _weight(model, group[0].product, np.concatenate(biases))])
    parts = tape.op_multi_out("Split", [result, integers(tape, *sizes)], {"axis": -1}, num_outputs=len(group))
    for node in tape.nodes:
        node.metadata_props.update(group[0].product.metadata_props)
    model.graph.insert_before(group[0].product, tape.nodes)
    for item, part in zip(group, parts, strict=True):
        part.shape, part.type = item.result.shape, item.result.type
        ir.convenience.replace_all_uses_with(item.result, part)


def _weight(model: ir.Model, node: ir.Node, array: np.ndarray) -> ir.Value:
    """A new weight, named after the first of its parts."""
    name = f"{node.inputs[1].name}_merged_{len(model.graph.initializers)}"  # pyright: ignore[reportOptionalMemberAccess]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value
