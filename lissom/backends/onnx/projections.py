"""Other parts of a transformer that one ONNX model can say in several ways: projections, rotary embeddings, RMS norms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.translation import DOMAIN, ROTARY


def expand_rotary(model: ir.Model, fused: bool) -> int:
    """Put plain operators in the place of each rotary embedding, or one where that can be; how many became one."""
    count = 0
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != ROTARY:
            continue
        tape = ir.tape.Tape()
        found = _rotary_embedding(tape, node) if fused else None
        count += found is not None
        replace(model, node, tape, found or _turned(tape, node))
    return count


def replace(model: ir.Model, node: ir.Node, tape: ir.tape.Tape, result: ir.Value) -> None:
    """Let the graph use a result, and the nodes recorded for it, in the place of a node."""
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


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    x, cos, sin = node.inputs
    assert x is not None and cos is not None and sin is not None
    return x, cos, sin


def _turned(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    """(a, b) → (a · cos − b · sin, b · cos + a · sin), one operator each; a, b: halves or neighbours."""
    x, cos, sin = _operands(node)
    features, interleaved = fixed_last(x), bool(node.attributes.get_int("interleaved", 0))
    if interleaved:
        rows = tape.op("Shape", [x], {"start": 0, "end": -1})
        pairs = tape.op("Reshape", [x, tape.op("Concat", [rows, _integers(tape, features // 2, 2)], {"axis": 0})])
        halves = tape.op_multi_out("Split", [pairs], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        a, b = (tape.op("Squeeze", [half, _integers(tape, -1)]) for half in halves)
    else:
        a, b = tape.op_multi_out("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    if fixed_last(cos) != features:
        first = tape.op("Sub", [tape.op("Mul", [a, cos]), tape.op("Mul", [b, sin])])
        second = tape.op("Add", [tape.op("Mul", [b, cos]), tape.op("Mul", [a, sin])])
        return _joined(tape, first, second, x, interleaved)
    turned = _joined(tape, tape.op("Neg", [b]), a, x, interleaved)
    return tape.op("Add", [tape.op("Mul", [x, cos]), tape.op("Mul", [turned, sin])])


def _joined(tape: ir.tape.Tape, a: ir.Value, b: ir.Value, like: ir.Value, interleaved: bool) -> ir.Value:
    """The two members of each pair side by side again."""
    if not interleaved:
        return tape.op("Concat", [a, b], {"axis": -1})
    apart = [tape.op("Unsqueeze", [item, _integers(tape, -1)]) for item in (a, b)]
    return tape.op("Reshape", [tape.op("Concat", apart, {"axis": -1}), tape.op("Shape", [like])])


def _rotary_embedding(tape: ir.tape.Tape, node: ir.Node) -> ir.Value | None:
    """`RotaryEmbedding` of [batch, heads, tokens, head_dim] with angles of [1 or batch, 1, tokens, …]; None for others.

    It wants one angle a pair, so tables that hold each twice are cut to their first half.
    """
    x, cos, sin = _operands(node)
    features, interleaved = fixed_last(x), bool(node.attributes.get_int("interleaved", 0))
    if len(_sizes(x)) != 4 or any(len(_sizes(table)) != 4 or _sizes(table)[1] != 1 for table in (cos, sin)):
        return None
    if fixed_last(cos) == features and (interleaved or not (_is_doubled(cos) and _is_doubled(sin))):
        return None
    tables: list[ir.Value] = []
    batch = tape.op("Shape", [x], {"start": 0, "end": 1})
    for table in (cos, sin):
        flat = tape.op("Squeeze", [table, _integers(tape, 1)])
        if fixed_last(table) == features:
            flat = tape.op("Slice", [flat, *(_integers(tape, number) for number in (0, features // 2, -1))])
        wanted = tape.op("Concat", [batch, _integers(tape, 1, 1)], {"axis": 0})
        tables.append(tape.op("Expand", [flat, wanted]))
    return tape.op("RotaryEmbedding", [x, *tables], {"interleaved": int(interleaved)})


def _is_doubled(table: ir.Value) -> bool:
    """True when the second half of the last dimension is the first again, as angles joined to themselves give."""
    value: ir.Value | None = table
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _axis(node) == len(_sizes(value)) - 1
        scaled = node.op_type == "Mul" and any(other is not None and not _sizes(other) for other in node.inputs)
        if node.op_type not in ("Cos", "Sin", "Cast", "Unsqueeze") and not scaled:
            return False
        value = next((item for item in node.inputs if item is not None and _sizes(item)), None)
    return False


def _axis(node: ir.Node) -> int:
    axis, value = node.attributes.get_int("axis", 0), node.outputs[0]
    return axis % len(_sizes(value))


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
    """Write products of one input with several weights as one product and a split; how many groups there were."""
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
    parts = tape.op_multi_out("Split", [result, _integers(tape, *sizes)], {"axis": -1}, num_outputs=len(group))
    for node in tape.nodes:
        node.metadata_props.update(group[0].product.metadata_props)
    model.graph.insert_before(group[0].product, tape.nodes)
    for item, part in zip(group, parts, strict=True):
        part.shape, part.type = item.result.shape, item.result.type
        ir.convenience.replace_all_uses_with(item.result, part)


def _weight(model: ir.Model, node: ir.Node, array: np.ndarray) -> ir.Value:
    """A new weight, named by the first it is made of."""
    name = f"{node.inputs[1].name}_merged_{len(model.graph.initializers)}"  # pyright: ignore[reportOptionalMemberAccess]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value


def write_out_rms_norms(model: ir.Model) -> int:
    """Write each RMS norm in parts, which ONNX Runtime fuses with the sum in front of it; how many there were."""
    count = 0
    for node in list(model.graph):
        x, scale = (*node.inputs, None, None)[:2]
        if node.op_type != "RMSNormalization" or x is None or scale is None or x.dtype != ir.DataType.FLOAT:
            continue
        if node.attributes.get_int("axis", -1) not in (-1, len(_sizes(x)) - 1):
            continue
        tape = ir.tape.Tape()
        two, epsilon = (
            tape.op("Constant", [], {"value": ir.tensor(np.array(number, np.float32))})
            for number in (2.0, node.attributes.get_float("epsilon", 1e-5))
        )
        mean = tape.op("ReduceMean", [tape.op("Pow", [x, two]), _integers(tape, -1)])
        root = tape.op("Sqrt", [tape.op("Add", [mean, epsilon])])
        replace(model, node, tape, tape.op("Mul", [tape.op("Div", [x, root]), scale]))
        count += 1
    return count


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """What an initializer or a constant holds; None for anything computed."""
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if found is None else found.numpy()


def _integers(tape: ir.tape.Tape, *numbers: int) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})


def _sizes(value: ir.Value) -> Sequence[int | ir.SymbolicDim]:
    return tuple(value.shape or ())


def fixed_last(value: ir.Value) -> int:
    """The last size, which does not vary."""
    size = _sizes(value)[-1]
    if not isinstance(size, int):
        raise ValueError(f"the last size of '{value.name}' is {size}; it has to be fixed")
    return size
