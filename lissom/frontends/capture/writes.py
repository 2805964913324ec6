"""Writes of buffers in an exported program become values that it returns, without tracing the model again."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import DROPOUTS

aten = torch.ops.aten


def return_writes(exported: ExportedProgram) -> bool:
    """Replace writes of whole buffers, `cache.copy_(updated)`, by outputs, as `run_decompositions` does in a second trace.

    True where no write is left; False, with the program unchanged, where there are other writes, or where the buffer is read in
    its old and its new form through views.
    """
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if spec.kind == InputKind.BUFFER}
    written: dict[fx.Node, fx.Node] = {}
    order = {node: place for place, node in enumerate(exported.graph.nodes)}
    calls = [node for node in order if (schema := _schema(node)) is not None and schema.is_mutable]
    for call in calls:
        if call.target is not aten.copy_.default or len(call.args) != 2:
            return False
        buffer, value = call.args
        if not isinstance(buffer, fx.Node) or not isinstance(value, fx.Node) or buffer.name not in kinds or buffer in written:
            return False
        late = [node for node in _same_memory(buffer, calls) if any(order[user] > order[call] for user in node.users)]
        if late not in ([], [buffer]) or not _alike(buffer, value):
            return False
        written[buffer] = value
    if any(value in calls or value in _same_memory(buffer, calls) for buffer in written for value in written.values()):
        return False
    for call in calls:
        buffer, value = call.args
        assert isinstance(buffer, fx.Node) and isinstance(value, fx.Node)
        call.replace_all_uses_with(value)
        buffer.replace_all_uses_with(value, delete_user_cb=lambda user, call=call: order[user] > order[call])
        exported.graph.erase_node(call)
    output = exported.graph.output_node()
    ends = sorted(written, key=order.__getitem__)
    specs = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(written[buffer].name), kinds[buffer.name].target)
        for buffer in ends
    ]
    returned = output.args[0]
    assert isinstance(returned, (tuple, list))
    output.args = ((*(written[buffer] for buffer in ends), *returned),)
    exported.graph_signature.output_specs[:0] = specs
    return True


def _schema(node: fx.Node) -> torch.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _same_memory(node: fx.Node, calls: Collection[fx.Node]) -> set[fx.Node]:
    """The node and all nodes that may share its memory and hold what it held before these calls wrote to it."""
    reached, open_nodes = {node}, [node]
    while open_nodes:
        for user in open_nodes.pop().users:
            schema = _schema(user)
            # At inference a dropout returns its operand, which its schema does not say.
            shares = schema is None or user.target in DROPOUTS or any(returned.alias_info for returned in schema.returns)
            if shares and user.op == "call_function" and user not in reached and user not in calls:
                reached.add(user)
                open_nodes.append(user)
    return reached


def _alike(buffer: fx.Node, value: fx.Node) -> bool:
    old, new = nodes.value(buffer), nodes.value(value)
    return isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype)
