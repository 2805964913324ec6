"""State in ONNX: an input of the model with the state before a call, and an output with the state after it.

Where the only reader of a state is an operator that computes the new one in place, input and output share memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import fx

from lissom.backends.exported import leaves_of
from lissom.backends.onnx.rewriting import Writer, nodes_of, shape_of
from lissom.backends.onnx.translation import DOMAIN, INDEX_COPY
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Copy

aten = torch.ops.aten

_IN_PLACE: Mapping[tuple[str, str], Mapping[int, int]] = {
    # Copies its first input unless it is the output's memory, and checks every index before it writes.
    ("", "ScatterND"): {0: 0},
    # Writes the new keys and values only, where past and present are one memory.
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
}
"""Operators whose kernels may write an output over an input: by the input's index the output's."""


def return_state(program: Program) -> None:
    """Turn the state of a program into further inputs and outputs; the program then writes to no buffer."""
    graph = program.graph
    start = next(node for node in graph.nodes if node.op != "placeholder")
    held: dict[str, fx.Node] = {}
    reads: dict[fx.Node, str] = {}
    for index, name in enumerate(program.state):
        with graph.inserting_before(start):
            held[name] = graph.placeholder(f"past_{index}")
    given = set(held.values())
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in held:
            reads[node] = str(node.target)
            nodes.set_value(held[reads[node]], nodes.value(node))
            continue
        written = reads[nodes.operand(node)] if nodes.is_state_write(node) else None
        for used in node.all_input_nodes:
            if used in reads:
                node.replace_input_with(used, held[reads[used]])
        if written is not None:
            held[written] = _stored(graph, node)
            node.replace_all_uses_with(held[written])
            graph.erase_node(node)
    for node in reads:
        graph.erase_node(node)
    leaves: list[fx.Node] = []
    for leaf in (*leaves_of(program), *held.values()):
        assert isinstance(leaf, fx.Node)
        # An ONNX model returns each value once, and no input unchanged.
        again = leaf in leaves or leaf in given
        with graph.inserting_before(program.output):
            leaves.append(graph.call_function(aten.clone.default, (leaf,)) if again else leaf)
    program.output.args = (tuple(leaves),)


def _stored(graph: fx.Graph, write: fx.Node) -> fx.Node:
    """The state after a write, in the state's dtype and shape."""
    memory, value = Copy(write).x, Copy(write).source
    kept, given = nodes.tensor_type(memory), nodes.tensor_type(value)
    with graph.inserting_before(write):
        if given.shape != kept.shape:
            sizes = [nodes.fixed_size(memory, dim) for dim in range(kept.rank)]
            value = graph.call_function(aten.expand.default, (value, sizes))
        if given.dtype != kept.dtype:
            value = graph.call_function(aten._to_copy.default, (value,), {"dtype": kept.dtype})
    nodes.set_value(value, nodes.value(memory))
    return value


def shared_states(model: ir.Model, past: Sequence[str], present: Sequence[str]) -> list[bool]:
    """For each state whether its input and output may share memory."""
    inputs = {value.name: value for value in model.graph.inputs}
    return [_is_written_in_place(inputs[name], result) for name, result in zip(past, present, strict=True)]


def _is_written_in_place(past: ir.Value, present: str) -> bool:
    uses = list(past.uses())
    if len(uses) != 1:
        return False
    node, place = uses[0].node, uses[0].idx
    result = _IN_PLACE.get((node.domain, node.op_type), {}).get(place)
    return (
        result is not None
        and node.outputs[result].name == present
        and node.attributes.get_string("reduction", "none") == "none"
    )


def expand_index_copies(model: ir.Model) -> None:
    """Replace each `index_copy` with `ScatterND`."""
    for node in nodes_of(model, DOMAIN, INDEX_COPY):
        write = Writer(model)
        write.replace(node, _scattered(write, node))


def is_index_copy(node: ir.Node | None) -> bool:
    """True for an `index_copy` node: inputs x, index and source, attribute `dim`."""
    return node is not None and node.domain == DOMAIN and node.op_type == INDEX_COPY


def dimension_of(node: ir.Node) -> int:
    """The dimension of an `index_copy` node."""
    return node.attributes.get_int("dim", 0) % len(shape_of(node.inputs[0]))


def _scattered(write: Writer, node: ir.Node) -> ir.Value:
    call, (x, index, source) = write.call, node.inputs
    assert x is not None and index is not None
    dim = dimension_of(node)
    places = checked_places(write, call("Reshape", index, -1), _size(write, x, dim))
    leading = [_size(write, x, axis) for axis in range(dim)]
    rows = call("Concat", *leading, call("Shape", places), 1, axis=0)
    columns: list[ir.Value] = []
    for axis, numbers in enumerate([*(write.counted(0, size) for size in leading), places]):
        # Broadcast from its own dimension to [..., rows, ..., 1].
        apart = write.shaped(numbers, *[1] * axis, -1, *[1] * (dim + 1 - axis))
        columns.append(call("Expand", apart, rows))
    return call("ScatterND", x, call("Concat", *columns, axis=-1), source)


def _size(write: Writer, x: ir.Value, axis: int) -> ir.Value:
    """A size of x, [1]: a constant where it is fixed, so that x has no further reader."""
    size = shape_of(x)[axis]
    return write.integers(size) if isinstance(size, int) else write.call("Shape", x, start=axis, end=axis + 1)


def checked_places(write: Writer, index: ir.Value, size: ir.Value | int) -> ir.Value:
    """The index with negative numbers moved out of range: ONNX would wrap them around, and PyTorch refuses them."""
    return write.call("Where", write.call("Less", index, 0), size, index)
