"""Channels that can be given another basis: an axis on which every operator commutes with an orthogonal matrix.

With x' = x Q along an axis of size n, Q Qᵀ = I,

    layers that write x    W'ᵀ = Wᵀ Q,  b' = b Q          tables, biases and constants that are added: likewise
    layers that read x     W x = (W Q) x'                  so every weight is multiplied by Q along the axis
    q · k                  (q Q) · (k Q)
    x / √(mean x² + ε)     its size is that of x', so an RMS norm without weight commutes with Q
    sums, views, factors that are the same for all channels, caches: nothing to do

Any other operator on the axis treats channels one by one, and is the reason why it cannot be rotated.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import Value
from lissom.compiler.analysis.axes.columns import WeightUnits, unit_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import MaskedFill, Norm
from lissom.compiler.ir.dimension_map import dim_of
from lissom.compiler.ir.dimensions import Named, named, parts_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import reduced_dims
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Copy

aten = torch.ops.aten

_MOVES = {
    *(*ops.MOVES, *ops.PERMUTATIONS, *ops.CASTS, *ops.IDENTITIES, *ops.JOINS, operator.getitem, aten.sym_size.int),
    *(*ops.FILLED_LIKE[:1], aten.constant_pad_nd.default),
}
"""Operators that move channels together; an axis that they take apart is no single axis any more."""
_ALONG_OTHERS = (*ops.SUMS, aten.mean.dim)
"""Linear reductions, which may run over other dimensions."""


def rotation_obstacle(program: Program, axis: Axis) -> str | None:
    """The reason an axis cannot be given another basis; None if it can."""
    known = program.fact(axes)
    if axis.form != "atom" or not isinstance(axis.size, int):
        return "its channels are split into pieces that are used apart"
    if axis.pinned is not None:
        return axis.pinned
    for node in program.graph.nodes:
        if node.op == "get_attr" and _on(known.of[node], axis) and not program.weight(str(node.target)).is_floating_point():
            return f"'{node.target}' has integers"
        if node.op == "call_function" and (_touches(node, axis, known) and not _commutes(node, axis, known)):
            return f"{place(program, node)} treats its channels one by one"
    return None


def _on(value: Value, axis: Axis) -> bool:
    """True when a value has the axis in one of its dimensions."""
    return any(axis in part.atoms() if isinstance(part, Axis) else _on(part, axis) for part in value)


def _touches(node: fx.Node, axis: Axis, known: Axes) -> bool:
    return any(_on(known.of[value], axis) for value in (node, *node.all_input_nodes) if value in known.of)


def _commutes(node: fx.Node, axis: Axis, known: Axes) -> bool:
    """True when the call of rotated operands is the rotated result."""
    target = node.target
    operands = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    have = [operand for operand in operands if operand in known.of and _on(known.of[operand], axis)]
    if target in _MOVES or nodes.is_state_write(node):
        return True
    if target in (aten.add.Tensor, aten.sub.Tensor):
        # A number, or a value without the axis, would be added to every channel.
        return len(have) == 2
    if target in ops.MULTIPLY:
        return len(have) == 1
    if target in ops.DIVIDE:
        return have == [node.args[0]]
    if target is aten.neg.default:
        return True
    if (filled := MaskedFill.of(node)) is not None:
        return have == [filled.x] and isinstance(filled.value, (int, float)) and filled.value == 0
    if target in _ALONG_OTHERS:
        dims = known.of[nodes.operand(node)]
        return not any(_on(dims[dim : dim + 1], axis) for dim in reduced_dims(node, len(dims)))
    if target in (aten.index_copy.default, aten.index_select.default):
        return not _on(known.of[nodes.operand(node)][dim_of(node, len(known.of[node])) :][:1], axis)
    if target is aten.index.Tensor:
        return have == [node.args[0]]
    if target is aten.rms_norm.default:
        return Norm(node).weight is None and len(Norm(node).shape) == 1 and known.axis(Norm(node).x, -1) is axis
    if target in ops.CONVOLUTIONS:
        return nodes.argument(node, "groups") == 1
    call = named(node)
    return call is not None and _is_contracted(call, axis, known)


def _is_contracted(call: Named, axis: Axis, known: Axes) -> bool:
    """True when a call is linear along the axis: it sums two operands over it, or keeps that of one factor."""
    attention = call.node.target in ops.ATTENTIONS
    names = {name for operand, dim, name in call.places() if axis in known.axis(operand.node, dim).atoms()}
    compound = {dim for operand in call.operands for dim in operand.dims if len(parts_of(dim)) > 1}
    if any(name in parts_of(dim) for name in names for dim in compound):
        return False
    for name in names:
        if name in call.whole | call.normed | call.fixed:
            return False
        with_it = [operand for operand in call.operands if name in operand.dims]
        factors = [operand for operand in with_it if operand.is_factor]
        added = [operand for operand in call.operands if operand.is_added]
        if name in call.summed:
            # The scores of an attention are no factor of its result, yet q and k meet in one product.
            if len(with_it) != 2 or not (attention or len(factors) == 2):
                return False
        elif len(factors) != 1 or any(operand.node in known.of and operand not in with_it for operand in added):
            return False
    return bool(names)


def turn(edit: Editor, chosen: Mapping[Axis, torch.Tensor]) -> None:
    """Give axes another basis: every weight with one of them is multiplied by its basis along it.

    State is stored in the new basis under another name.

    Args:
        chosen: the basis of each axis, [size, size] in float64.
    """
    known = edit.program.fact(axes)
    held: list[tuple[WeightUnits, torch.Tensor]] = []
    for node in [node for node in known.of if node.op == "get_attr"]:
        for dim in range(nodes.tensor_type(node).rank):
            whole = known.axis(node, dim)
            for axis in chosen.keys() & set(whole.atoms()):
                held.append((WeightUnits(node, dim, unit_of(whole, [axis])), chosen[axis]))
    for units, basis in held:
        edit.current = units.weight
        rows = units.read(edit.program)
        units.write(edit, torch.tensordot(basis.T.to(rows.device), rows.double(), 1))
        edit.rewritten += 1
    for node in dict.fromkeys(units.weight for units, _ in held if units.name in edit.program.state):
        rename_state(edit, node)


def rename_state(edit: Editor, read: fx.Node) -> None:
    """Give a state that is stored in another basis another name, so that it is not compared with what it was before."""
    with edit.before(read):
        (new,) = edit.exchange_state(read, {f"{read.target}_rotated": edit.tensor(read)})
    for user in list(read.users):
        if (write := Copy.of(user)) is None or write.x is not read:
            user.replace_input_with(read, new)
            continue
        with edit.before(user):
            edit.call(aten.copy_.default, new, write.source)
        edit.program.graph.erase_node(user)
    edit.program.graph.erase_node(read)
    edit.program.edits += 1
