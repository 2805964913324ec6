"""Norms in an ONNX model: written so that ONNX Runtime fuses them with the residual add before them, or does not."""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.onnx.rewriting import Writer, nodes_of, sizes_of


def write_out_rms_norms(model: ir.Model) -> int:
    """Decompose each RMS norm, so that ONNX Runtime fuses it with the residual add before it; returns how many."""
    count = 0
    for node in nodes_of(model, "", "RMSNormalization"):
        x, scale = (*node.inputs, None, None)[:2]
        if x is None or scale is None or x.dtype != ir.DataType.FLOAT:
            continue
        if node.attributes.get_int("axis", -1) not in (-1, len(sizes_of(x)) - 1):
            continue
        write = Writer(model)
        call, two, epsilon = write.call, write.number(2.0), write.number(node.attributes.get_float("epsilon", 1e-5))
        mean = call("ReduceMean", call("Pow", x, two), -1)
        write.replace(node, call("Mul", call("Div", x, call("Sqrt", call("Add", mean, epsilon))), scale))
        count += 1
    return count


def keep_norms_apart(model: ir.Model) -> int:
    """Write the residual add before each layer norm as `Sum`, which ONNX Runtime does not fuse with it; returns how many.

    The fused operator, `SkipLayerNormalization`, is slower on a CPU than the two.
    """
    count = 0
    for node in model.graph:
        added = node.inputs[0].producer() if node.op_type == "LayerNormalization" and node.inputs[0] is not None else None
        if added is not None and added.op_type == "Add":
            added.op_type = "Sum"
            count += 1
    return count
