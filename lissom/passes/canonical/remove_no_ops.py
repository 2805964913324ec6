"""Remove operators that return their argument unchanged.

Dropout outside training, assertions, aliases and copies, casts to the same dtype, slices, expands and reshapes to the same
sizes, splits of which one piece is the whole, concatenations of one tensor, and additions of 0 or multiplications by 1. Such an
operator is the identity exactly when its result has its argument's type. `view` becomes `reshape`, because without a copy its
argument may have strides that it cannot view; `type_as` becomes a cast to a named dtype, and `copy`, to which export turns an
assignment and which has no gradient, a cast of what is assigned.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_handed_out, is_read_by, is_view, memory_of, views_of
from lissom.compiler.ir.view_calls import Copy
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_COPIES = {*ops.COPIES, aten._to_copy.default}
_IDENTITY_IF_SAME_TYPE = {
    *(*ops.COPIES, *ops.ALIASES, *ops.CONVERSIONS, *ops.EXPANDS, aten.expand_as.default, *ops.RESHAPES, *ops.RESHAPES_AS),
    *(aten.repeat.default, *ops.SQUEEZES, aten.slice.Tensor, operator.getitem, *ops.CONCATENATIONS),
}
_ZERO_IS_NEUTRAL = {*ops.ADD, *ops.SUBTRACT}
_ONE_IS_NEUTRAL = {*ops.MULTIPLY, *ops.DIVIDE, aten.pow.Tensor_Scalar}


@dataclass(frozen=True)
class RemoveNoOps(Rewrite):
    """Removes dropout, assertions, aliases, copies, and casts and shape changes without effect."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes():
            if node.target in ops.ASSERTIONS:
                edit.erase(node)
                continue
            if node.target in ops.MEMORY_VIEWS:
                edit.change_call(node, aten.reshape.default, *node.args)
            if node.target is aten.copy.default:
                _assign(edit, node)
            source = _source(node)
            if node.target in ops.CASTS_LIKE and not node.kwargs and len(node.args) == 2:
                tensor_type = nodes.tensor_type(node)
                if tensor_type.device == nodes.tensor_type(source).device:
                    edit.change_call(node, aten.to.dtype, source, tensor_type.dtype)
            if isinstance(source, fx.Node) and _gives_back(node) and not _guards(edit, node, source):
                edit.replace(node, source)


def _source(node: fx.Node) -> object:
    """The value that the call may give back: its first argument, the tensor it takes a piece of, or the only one it joins."""
    first = node.args[0] if node.args else None
    if node.target is operator.getitem and nodes.is_call(first, *ops.SPLITS):
        return nodes.operand(first)
    if node.target in ops.CONCATENATIONS and isinstance(first, list) and len(first) == 1:
        return first[0]
    return first


def _assign(edit: Editor, node: fx.Node) -> None:
    """Make a `copy` a cast of its second argument, in the sizes of the first."""
    place, value = Copy(node).x, Copy(node).source
    wanted, given = nodes.tensor_type(place), nodes.tensor_type(value)
    if wanted.device != given.device:
        return
    if given.shape != wanted.shape:
        with edit.before(node):
            value = edit.call(aten.expand.default, value, [edit.size(place, dim) for dim in range(wanted.rank)])
    edit.change_call(node, aten.to.dtype, value, wanted.dtype)


def _gives_back(node: fx.Node) -> bool:
    """True when the call's result is its source."""
    if node.target in ops.DROPOUTS:
        return not nodes.argument(node, "train") or nodes.argument(node, "p") == 0
    if node.target in _ZERO_IS_NEUTRAL and not _is_number(node, 0):
        return False
    if node.target in _ONE_IS_NEUTRAL and not _is_number(node, 1):
        return False
    known = _IDENTITY_IF_SAME_TYPE | _ZERO_IS_NEUTRAL | _ONE_IS_NEUTRAL
    source = _source(node) if node.target in known else None
    return nodes.is_tensor(source) and fake.same_type(fake.mode_of(source), nodes.node_type(node), nodes.node_type(source))


def _is_number(node: fx.Node, neutral: int) -> bool:
    """True when the second argument is this number; type promotion shows in the result's type."""
    other = nodes.argument(node, "other", "exponent")
    return isinstance(other, (int, float)) and other == neutral and "rounding_mode" not in node.kwargs


def _guards(edit: Editor, node: fx.Node, source: fx.Node) -> bool:
    """True for a copy that is needed: an input, weight or state that would be returned itself, or a memory layout."""
    if not _copies(node):
        return False
    memory = memory_of(source)
    if memory.op == "get_attr" and str(memory.target) in edit.program.state:
        return True
    # The program would return an input, a weight, or one output twice.
    again = memory.op in ("placeholder", "get_attr") or is_handed_out(edit.program, memory, besides=views_of(node))
    if again and is_handed_out(edit.program, node):
        return True
    return is_read_by(node, ops.READ_LAYOUT)


def _copies(node: fx.Node) -> bool:
    """True when the result has memory of its own, even where its values are unchanged."""
    copy = node.target in (aten.to.dtype, aten.to.device, aten.to.other) and bool(nodes.argument(node, "copy"))
    return copy or node.target in _COPIES or not is_view(node)
