"""Projections of one input in an ONNX model, merged into one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.rewriting import Writer, constant_of


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
        projection = _as_projection(node)
        if projection is not None and node.inputs[0] is not None:
            groups[node.inputs[0]].append(projection)
    merged = 0
    for x, group in groups.items():
        alike = [projection for projection in group if (projection.bias is None) == (group[0].bias is None)]
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
    bias = next(
        (constant for operand in reader.inputs if operand is not result and (constant := constant_of(operand)) is not None),
        None,
    )
    if bias is None or bias.shape != weight.shape[1:]:
        return _Projection(node, None, weight, None)
    return None if reader.outputs[0].is_graph_output() else _Projection(node, reader, weight, bias)


def _merge(model: ir.Model, x: ir.Value, group: Sequence[_Projection]) -> None:
    write, first = Writer(model), group[0].product
    named = first.inputs[1]
    assert named is not None

    def merged(arrays: Sequence[np.ndarray], axis: int) -> ir.Value:
        """A new weight, named after the first of its parts."""
        return write.weight(named, f"merged_{len(model.graph.initializers)}", np.concatenate(arrays, axis))

    sizes = [projection.weight.shape[1] for projection in group]
    result = write.call("MatMul", x, merged([projection.weight for projection in group], 1))
    biases = [projection.bias for projection in group if projection.bias is not None]
    if biases:
        result = write.call("Add", result, merged(biases, 0))
    parts = write.op_multi_out("Split", [result, write.integers(*sizes)], {"axis": -1}, num_outputs=len(group))
    for node in write.nodes:
        node.metadata_props.update(first.metadata_props)
    model.graph.insert_before(first, write.nodes)
    for projection, part in zip(group, parts, strict=True):
        part.shape, part.type = projection.result.shape, projection.result.type
        ir.convenience.replace_all_uses_with(projection.result, part)
