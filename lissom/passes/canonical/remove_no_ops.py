"""Remove operators that give back what they were given.

Dropout outside training, assertions, aliases and copies, casts to the dtype at hand, slices, expands and reshapes to the
same sizes, and additions of 0 or multiplications by 1. An operator of these kinds is the identity exactly when its result has
its argument's type. `view` becomes `reshape`, because removing a copy may leave it a tensor it cannot view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler import fake
from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.kinds import Rewrite

aten = torch.ops.aten

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_COPIES = {aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten._to_copy.default}
_IDENTITY_IF_SAME_TYPE = _COPIES | {
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.repeat.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
}
_ZERO_IS_NEUTRAL = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
_ONE_IS_NEUTRAL = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar}


@dataclass(frozen=True)
class RemoveNoOps(Rewrite):
    """Removes dropout, assertions, aliases, copies, and casts and shape changes that change nothing."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes():
            if node.target in _ASSERTIONS:
                edit.erase(node)
                continue
            if node.target in _VIEWS:
                edit.change_call(node, aten.reshape.default, *node.args)
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and _gives_back(node) and not _guards_caller(edit, node, source):
                edit.replace(node, source)


def _gives_back(node: fx.Node) -> bool:
    """True when the call's result is its first argument."""
    if node.target in _DROPOUTS:
        return not nodes.argument(node, "train") or nodes.argument(node, "p") == 0
    if node.target in _ZERO_IS_NEUTRAL and not _is_number(node, 0):
        return False
    if node.target in _ONE_IS_NEUTRAL and not _is_number(node, 1):
        return False
    known = _IDENTITY_IF_SAME_TYPE | _ZERO_IS_NEUTRAL | _ONE_IS_NEUTRAL
    if node.target not in known or not nodes.is_tensor(node.args[0]):
        return False
    source: fx.Node = node.args[0]  # pyright: ignore[reportAssignmentType]
    mode = fake.mode_of(source)
    return fake.same_type(mode, nodes.node_type(node), nodes.node_type(source))


def _is_number(node: fx.Node, neutral: int) -> bool:
    """True when the second argument is this number; a number in another dtype is caught by the result's type."""
    other = node.args[1] if len(node.args) > 1 else None
    return isinstance(other, (int, float)) and other == neutral and "rounding_mode" not in node.kwargs


def _guards_caller(edit: Editor, node: fx.Node, source: fx.Node) -> bool:
    """True when a copy keeps the caller's tensor, a weight or state from being handed out itself."""
    if node.target not in _COPIES:
        return False
    if source.op == "get_attr" and str(source.target) in edit.program.state:
        return True
    return source.op in ("placeholder", "get_attr") and edit.program.output in node.users
