"""Small questions passes ask of nodes while they look for a pattern."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.program import Program

aten = torch.ops.aten

CASTS = (aten.to.dtype, aten._to_copy.default)


def strip_casts(node: fx.Node) -> fx.Node:
    """The value before any casts between floating types."""
    while nodes.is_call(node, *CASTS):
        source = node.args[0]
        if not nodes.is_tensor(source) or not nodes.tensor_type(source).dtype.is_floating_point:  # pyright: ignore
            return node
        node = source  # pyright: ignore[reportAssignmentType]
    return node


def other_argument(node: fx.Node, known: fx.Node) -> object:
    """The second operand of a commutative operator, given one; None when `known` is no operand."""
    left, right = node.args[0], node.args[1]
    if left is known:
        return right
    return left if right is known else None


def number(program: Program, item: object) -> float | None:
    """The number an argument is: a literal, or a constant of rank 0 in the program; None when it is neither."""
    if isinstance(item, (int, float)):
        return float(item)
    if not isinstance(item, fx.Node) or item.op != "get_attr" or str(item.target) in program.state:
        return None
    weight = program.weight(str(item.target))
    return float(weight) if weight.dim() == 0 and not isinstance(weight, torch.nn.Parameter) else None


def scalar_and_node(program: Program, node: object, targets: Collection[object]) -> tuple[float, fx.Node] | None:
    """The number and the value a commutative operator combines, in either order; None when it does not."""
    if not isinstance(node, fx.Node) or node.target not in targets or node.kwargs:
        return None
    for item, other in (node.args, reversed(node.args)):
        found = number(program, item)
        if found is not None and nodes.is_tensor(other):
            return found, other  # pyright: ignore[reportReturnType]
    return None
