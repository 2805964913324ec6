"""What rewrites of an ONNX model share: replace a node, read a constant, read a shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def replace(model: ir.Model, node: ir.Node, tape: ir.tape.Tape, result: ir.Value) -> None:
    """Replace a node with the nodes recorded on the tape; `result` takes over its uses and its name."""
    graph = node.graph or model.graph
    graph.insert_before(node, tape.nodes)
    for new in tape.nodes:
        bodies = [given.as_graph() for given in new.attributes.values() if given.type == ir.AttributeType.GRAPH]
        for part in (new, *(inner for body in bodies for inner in body.all_nodes())):
            part.metadata_props.update(node.metadata_props)
    old = node.outputs[0]
    result.shape, result.type = old.shape, old.type
    name = old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or a constant; None for a computed value."""
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if found is None else found.numpy()


def integers(tape: ir.tape.Tape, *numbers: int) -> ir.Value:
    """A constant of int64, [len(numbers)]."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})


def sizes_of(value: ir.Value) -> Sequence[int | ir.SymbolicDim]:
    """The shape of a value; empty where it is unknown."""
    return tuple(value.shape or ())


def fixed_last(value: ir.Value) -> int:
    """The last size.

    Raises: ValueError when it varies.
    """
    size = sizes_of(value)[-1]
    if not isinstance(size, int):
        raise ValueError(f"the last size of '{value.name}' is {size}; it has to be fixed")
    return size
