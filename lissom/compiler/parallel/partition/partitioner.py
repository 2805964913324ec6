"""Carry out a plan of tensor parallelism: collectives where values are redistributed, local sizes, and weights for each rank.

All ranks get one graph. What differs between them is in weights: the rows of a vocabulary that a rank has, the part of a whole
value that it takes, whether it keeps a value that is to be summed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.placement import REPLICATED, Placed, Span, local_part, single
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.types import fixed
from lissom.compiler.ir.view_calls import Item
from lissom.compiler.parallel.partition.local_sizes import make_local
from lissom.compiler.parallel.partition.merge_collectives import merge_collectives
from lissom.compiler.parallel.partition.redistribute import all_gather, redistribute
from lissom.compiler.parallel.partition.state import PartitionState, is_sharded
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.parallel.rules.gathered import outcome, own_part
from lissom.compiler.parallel.rules.joint import joint_dim, joint_span
from lissom.errors import PassError
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic

aten = torch.ops.aten


def partition_program(edit: Editor, world_size: int) -> None:
    """Partition a program whose every value has a placement; a `PartitionedProgram` takes its place.

    Raises:
        PassError: when a value has no placement, or was changed since it got one.
    """
    state = PartitionState.of(edit, world_size)
    program = edit.program
    wants = {node: _wants(state, node) for node in program.nodes()}
    joint = {node: span for node in wants if (span := joint_span(node, state.read)) is not None}
    parts = {node: own_part(node, state.read) for node in state.read.gathered}
    gathered = {node: single(part.result) for node, part in parts.items() if part is not None}
    state.wanted_whole = {argument for wanted in wants.values() for argument, want in wanted.items() if want.is_replicated}
    state.wanted_whole.update(program.output.all_input_nodes)
    _shard_weights(state)
    for node, wanted in wants.items():
        # An item of several results was replaced together with the call.
        if not node._erased:
            edit.current = node
            _partition_call(state, node, wanted, joint.get(node))
            if node in gathered:
                _gather_at_once(state, node, gathered[node])
    _gather_outputs(state)
    edit.current = None
    if merged := merge_collectives(edit):
        edit.note(f"{merged} collectives joined others that are ready with them")
    names = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
    weights = {name: state.own.get(name) or [program.weight(name)] * world_size for name in names}
    ranks = tuple({name: parts[rank] for name, parts in weights.items()} for rank in range(world_size))
    edit.program = PartitionedProgram(program, ranks)


def _wants(state: PartitionState, node: fx.Node) -> Mapping[fx.Node, Placed]:
    """The placements that a call wants of its arguments. Raises PassError when the plan no longer holds."""
    propagated = outcome(node, state.read)
    if propagated.result != state.known[node]:
        raise PassError(
            f"partition: {place(state.edit.program, node)} would yield {propagated.result}, but the plan says "
            f"{state.known[node]}: it was changed since; put `shard` right before `partition`"
        )
    return dict(propagated.wants)


def _shard_weights(state: PartitionState) -> None:
    """Give every rank its shard of each weight; replicated weights are shared, and state is each rank's own."""
    program = state.edit.program
    scales = {str(scale.target) for node in program.nodes(fake_quantize, dequantize) if (scale := _scale(node)) is not None}
    for node in [node for node in program.graph.nodes if node.op == "get_attr"]:
        name, placed = str(node.target), state.known[node]
        assert isinstance(placed, Placed)
        is_state = name in program.state
        if placed.is_replicated and not is_state:
            continue
        weight = program.weight(name)
        if name not in state.own:
            # A scale is not zero: quantizing divides by it. Padding that it scales is zero.
            padding = 1 if name in scales else 0
            parts = [local_part(weight.detach(), placed, rank, padding) for rank in range(state.world_size)]
            if is_state:
                parts = [part.clone() for part in parts]
            if isinstance(weight, nn.Parameter):
                parts = [nn.Parameter(part, requires_grad=weight.requires_grad) for part in parts]
            state.own[name] = parts
            state.edit.rewritten += 1
        state.edit.set_weight(node, state.own[name][0], retype=False)


def _scale(quantizer: fx.Node) -> fx.Node | None:
    """The scale of a quantizer where it is a weight."""
    scale = nodes.operand(quantizer, 1)
    return scale if scale.op == "get_attr" else None


def _partition_call(state: PartitionState, node: fx.Node, wants: Mapping[fx.Node, Placed], joint: Span | None) -> None:
    """Redistribute the arguments of a call, replace or correct it, and infer its type anew."""
    for argument, want in wants.items():
        argument = state.stands_for.get(argument, argument)
        node.replace_input_with(argument, redistribute(state, argument, want, node))
    if _look_up(state, node) or _quantize_jointly(state, node):
        return
    if joint is not None:
        _compute_jointly(state, node, joint)
        return
    placed = state.known[node]
    if is_sharded(placed) or any(is_sharded(state.known.get(used, REPLICATED)) for used in node.all_input_nodes):
        make_local(state, node, placed)
    # A call with the same arguments keeps its type: data-dependent sizes would get new symbols, whose ranges are unknown.
    if wants or is_sharded(placed) or any(nodes.node_type(used) != state.types.get(used) for used in node.all_input_nodes):
        state.edit.retype_call(node)


def _look_up(state: PartitionState, node: fx.Node) -> bool:
    """Replace an embedding whose table is sharded by rows: zeros for the rows of other ranks. False for any other call."""
    if not nodes.is_call(node, aten.embedding.default):
        return False
    table, ids = Embedding(node).table, Embedding(node).ids
    spans = single(state.known[table]).spans(0)
    if not spans:
        return False
    span = spans[0]
    block, call = fixed(span.block), state.edit.call
    starts = [torch.full((), rank // span.every % span.parts * block, dtype=torch.int64) for rank in range(state.world_size)]
    with state.edit.before(node):
        own = call(aten.sub.Tensor, ids, state.own_weight(f"rank.first_row_{span.size}by{span.parts}", starts))
        held = call(aten.clamp.default, own, 0, block - 1)
        others = call(aten.unsqueeze.default, call(aten.ne.Tensor, own, held), -1)
        rows = call(aten.embedding.default, table, held)
        rows = call(aten.masked_fill.Scalar, rows, others, 0)
    state.replace(node, rows)
    return True


def _quantize_jointly(state: PartitionState, node: fx.Node) -> bool:
    """Quantize sharded rows with the range of all ranks' parts. False for any other call, and where ranks hold whole groups."""
    placed = state.known[node]
    if not nodes.is_call(node, fake_quantize_dynamic) or not isinstance(placed, Placed):
        return False
    if nodes.argument(node, "granularity") == "group":
        return False
    if spans := placed.spans(state.shape(node).rank - 1):
        with state.edit.before(node):
            quantized = state.joint.quantize(node, spans)
        state.replace(node, quantized)
    return bool(spans)


def _compute_jointly(state: PartitionState, node: fx.Node, span: Span) -> None:
    """Replace a call that reads a sharded dimension by one that computes on the shards and exchanges a few numbers per row."""
    unsharded, dim = state.shape(nodes.operand(node)), joint_dim(node)
    assert dim is not None
    typed = state.types[node]
    result_dtype = nodes.tensor_type(typed[0] if isinstance(typed, tuple) else typed).dtype
    with state.edit.before(node):
        outputs = state.joint.compute(node, unsharded, result_dtype, dim, span)
    if not isinstance(typed, tuple):
        state.replace(node, outputs[0])
        return
    for user in list(node.users):
        state.replace(user, outputs[Item(user).index])
    state.edit.erase(node)


def _gather_at_once(state: PartitionState, node: fx.Node, part: Placed) -> None:
    """Gather the output of a column-wise layer that belongs to no pair."""
    with state.edit.before(node):
        own = state.edit.call(nodes.overload(node), *node.args, **node.kwargs)
        nodes.set_placed(own, part)
        whole = all_gather(state, own, part, state.shape(node).shape)
    state.replace(node, whole)


def _gather_outputs(state: PartitionState) -> None:
    """Let every rank return whole values."""
    output = state.edit.program.output
    for leaf in output.all_input_nodes:
        placed = state.known[leaf]
        if isinstance(placed, Placed) and not placed.is_replicated:
            output.replace_input_with(leaf, redistribute(state, leaf, REPLICATED, output))
