"""Raise softmax written as separate operators to one operator.

    softmax(x) = exp(x − c) / Σ exp(x − c)        c the same along the dimension; c = max x keeps exp from overflowing

The subtraction of the maximum is optional. Without it the separate operators overflow where `softmax` does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Binary
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import unshifted
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseSoftmax(Rewrite):
    """Replaces softmax written as separate operators by `softmax`."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.div.Tensor):
            powers, total = Binary(node).left, Binary(node).right
            if node.kwargs or not isinstance(total, fx.Node) or (dim := _summed(powers, total)) is None:
                continue
            argument = nodes.operand(powers)
            argument = unshifted(argument, dim) or argument
            with edit.before(node, like=[powers, total, node]):
                raised = edit.call(aten.softmax.int, argument, dim)
            edit.replace(node, raised)


def _summed(powers: fx.Node, total: fx.Node) -> int | None:
    """The dimension over which `total` sums the exponentials, kept with size 1; None when it is no such sum."""
    if not nodes.is_call(powers, aten.exp.default) or not nodes.is_call(total, aten.sum.dim_IntList):
        return None
    dims, keep, dtype = (nodes.argument(total, name) for name in ("dim", "keepdim", "dtype"))
    of_powers = nodes.operand(total) is powers and keep and dtype is None
    if not of_powers or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    return int(dims[0]) % nodes.tensor_type(powers).rank
