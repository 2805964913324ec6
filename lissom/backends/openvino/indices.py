"""Indices of copied rows: OpenVINO writes elsewhere for one out of range, so they are limited, and an output says so."""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.onnx.rewriting import Writer, nodes_of, shape_of
from lissom.backends.onnx.state import dimension_of
from lissom.backends.onnx.translation import DOMAIN, INDEX_COPY

OUTSIDE = "index_out_of_range"
"""The name of the output, [], int32: 1 after a call with an index out of range, else 0."""


def limit_indices(exported: ir.Model) -> None:
    """Limit the indices of each `index_copy`, and add the output; without any, do nothing."""
    flags: list[ir.Value] = []
    for node in nodes_of(exported, DOMAIN, INDEX_COPY):
        write = Writer(exported)
        x, index = node.inputs[:2]
        assert x is not None and index is not None
        size = shape_of(x)[dimension_of(node)]
        rows = write.integers(size) if isinstance(size, int) else write.length(x, dimension_of(node))
        last = write.call("Sub", rows, 1)
        inside = write.call("Min", write.call("Max", index, 0), last)
        inside = write.call("Reshape", inside, write.call("Shape", index))
        differs = write.call("Cast", write.call("Not", write.call("Equal", inside, index)), to=int(ir.DataType.INT32))
        flags.append(write.call("ReduceMax", write.call("Reshape", differs, -1), keepdims=0))
        inside.type, inside.shape = index.type, index.shape
        exported.graph.insert_before(node, write.nodes)
        node.replace_input_with(1, inside)
    if not flags:
        return
    write = Writer(exported)
    outside = write.call("Max", *flags)
    outside.name, outside.shape, outside.type = OUTSIDE, ir.Shape(()), ir.TensorType(ir.DataType.INT32)
    exported.graph.extend(write.nodes)
    exported.graph.outputs.append(outside)
