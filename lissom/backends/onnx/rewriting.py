"""Shared by the rewrites of an ONNX model: record nodes, replace a node, read a constant, read a shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import numpy as np
import onnx_ir as ir

Number = ir.Value | int
"""Integers: an int64 value, or a constant."""
Attribute = int | float | Sequence[int]


class Writer(ir.tape.Tape):
    """Records nodes for a model. Integers among the inputs of an operator become int64 vectors of one element."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.model = model

    def call(self, op_type: str, *inputs: Number | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        """The output of a new node."""
        values = [self.integers(value) if isinstance(value, int) else value for value in inputs]
        return self.op(op_type, values, attributes, domain=domain)

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", [], {"value": ir.tensor(array)})

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def weight(self, like: ir.Value, suffix: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A new weight, named after the one it is derived from; made once per name.

        Args:
            dtype: for dtypes that numpy lacks.
        """
        name = f"{like.name}_{suffix}"
        known = self.model.graph.initializers.get(name)
        if known is not None:
            return known
        typed = dtype or ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, const_value=ir.Tensor(np.array(array, order="C"), dtype=typed, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(typed)
        self.model.graph.register_initializer(value)
        return value

    def as_float(self, x: ir.Value) -> ir.Value:
        return x if x.dtype == ir.DataType.FLOAT else self.call("Cast", x, to=int(ir.DataType.FLOAT))

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """A size, [1], read from the model's inputs where possible, so that equal computations on sizes are shared."""
        size = shape_of(value)[axis]
        if isinstance(size, int):
            return self.integers(size)
        for given in self.model.graph.inputs:
            for place, other in enumerate(given.shape or ()):
                if other == size and size.value is not None:
                    return self.call("Shape", given, start=place, end=place + 1)
        axis %= len(shape_of(value))
        return self.call("Shape", value, start=axis, end=axis + 1)

    def counted(self, start: Number, end: Number, step: int = 1) -> ir.Value:
        """start, start + step, … below end; each is [1]."""
        ends = [
            self.constant(np.array(bound, np.int64)) if isinstance(bound, int) else self.call("Squeeze", bound)
            for bound in (start, end)
        ]
        return self.call("Range", *ends, self.constant(np.array(step, np.int64)))

    def shaped(self, value: ir.Value, *sizes: Number) -> ir.Value:
        """The value reshaped; -1 is inferred, 0 keeps a size."""
        return self.call("Reshape", value, self._shape(sizes))

    def padded(self, value: ir.Value, count: ir.Value, axis: int = 1) -> ir.Value:
        """[batch, tokens, ..] of rank 3, or of rank 4 with an axis of 2, padded with zeros at the end of the axis."""
        rank = 3 if axis == 1 else 4
        front, behind = self.integers(*[0] * (rank + axis)), self.integers(*[0] * (rank - axis - 1))
        return self.call("Pad", value, self.call("Concat", front, count, behind, axis=0))

    def expanded(self, value: ir.Value, *sizes: Number) -> ir.Value:
        """The value expanded to these sizes."""
        return self.call("Expand", value, self._shape(sizes))

    def _shape(self, sizes: Sequence[Number]) -> ir.Value:
        numbers = [size for size in sizes if isinstance(size, int)]
        return self.integers(*numbers) if len(numbers) == len(sizes) else self.call("Concat", *sizes, axis=0)

    def every(self, *conditions: ir.Value) -> ir.Value:
        return reduce(partial(self.call, "And"), conditions)

    def some(self, *conditions: ir.Value) -> ir.Value:
        return reduce(partial(self.call, "Or"), conditions)

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Replace a node with the nodes recorded here; `result` takes over its uses and its name."""
        graph = node.graph or self.model.graph
        graph.insert_before(node, self.nodes)
        for new in self.nodes:
            bodies = [given.as_graph() for given in new.attributes.values() if given.type == ir.AttributeType.GRAPH]
            for part in (new, *(inner for body in bodies for inner in body.all_nodes())):
                part.metadata_props.update(node.metadata_props)
        take_over(node.outputs[0], result)
        graph.remove(node, safe=True)


def take_over(old: ir.Value, result: ir.Value) -> None:
    """Give `result` the type, uses and name of another value, which loses them."""
    result.shape, result.type = old.shape, old.type
    name = old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    old.name, result.name = None, name


def nodes_of(model: ir.Model, domain: str, *op_types: str) -> list[ir.Node]:
    """The nodes of these operators, those in subgraphs included."""
    return [node for node in model.graph.all_nodes() if node.domain == domain and node.op_type in op_types]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or a constant; None for a computed value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def sizes_of(value: ir.Value) -> Sequence[int | ir.SymbolicDim]:
    """The shape of a value; empty where it is unknown."""
    return tuple(value.shape or ())


def shape_of(value: ir.Value | None) -> Sequence[int | ir.SymbolicDim]:
    """The shape of a value. Raises ValueError where it is unknown."""
    if value is None or value.shape is None:
        raise ValueError(f"'{value.name if value is not None else None}' has no shape")
    return tuple(value.shape)


def fixed_size(value: ir.Value, axis: int) -> int:
    """A size. Raises ValueError where it varies."""
    size = shape_of(value)[axis]
    if not isinstance(size, int):
        raise ValueError(f"dimension {axis} of '{value.name}' is {size}; it has to be fixed")
    return size
