"""Remove branches that add nothing to the residual stream.

    x + f(x) = x                                                where f(x) is zero whatever x is

An attention or a feed-forward is such a branch when weight and bias of its last layer are zero, and all operators between it
and the residual add keep zero: a scale, a norm without a bias, a reshape. The residual add is removed, and with it all
operators that only the branch needs. Inputs are taken to be finite.
"""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.analysis.axes.zeros import Zeros, is_zero, zeros
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor

aten = torch.ops.aten


def eliminate_layers(edit: Editor) -> None:
    """Remove attentions and feed-forwards that add zero to the residual stream."""
    zero, sites = edit.program.fact(zeros), edit.program.fact(structure)
    outputs = [site.output or site.node for site in sites.attention] + [site.down for site in sites.feed_forward]
    for node in edit.nodes(aten.add.Tensor):
        if (term := _other_than_zero(node, zero)) is not None:
            edit.replace(node, term)
    edit.program.drop_dead()
    for node in outputs:
        if is_zero(zero, node) and not node._erased:
            edit.skip(node, "its output is zero, but its reader is no sum of two values of one size")


def _other_than_zero(node: fx.Node, zero: Zeros) -> fx.Node | None:
    """The term that equals a sum because the other one is zero and is not needed for the result's sizes."""
    if node.kwargs or len(node.args) != 2:
        return None
    for first, second in (node.args, reversed(node.args)):
        if is_zero(zero, first) and nodes.is_tensor(second) and nodes.node_type(second) == nodes.node_type(node):
            return second
    return None
