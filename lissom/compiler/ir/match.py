"""Small predicates and accessors that passes use to match patterns."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeGuard

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import CASTS, MAY_GIVE_BACK
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Gather

aten = torch.ops.aten


def strip_casts(node: fx.Node) -> fx.Node:
    """The value before any casts between floating types."""
    while nodes.is_call(node, *CASTS) and _is_floating(node) and _is_floating(nodes.operand(node)):
        node = nodes.operand(node)
    return node


def _is_floating(argument: object) -> bool:
    return nodes.is_tensor(argument) and nodes.tensor_type(argument).dtype.is_floating_point


def computed_from(starts: Iterable[object], through: Callable[[fx.Node], bool] = lambda node: True) -> Iterator[fx.Node]:
    """These nodes and all that they are computed from, each once, nearest first; what is no node is passed over.

    Args:
        through: whether to go on to the inputs of a node.
    """
    pending, seen = deque(starts), set[fx.Node]()
    while pending:
        node = pending.popleft()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            yield node
            if through(node):
                pending.extend(node.all_input_nodes)


def is_view(node: fx.Node) -> bool:
    """True when the result may be in the memory of the first argument."""
    if nodes.is_call(node, operator.getitem, *MAY_GIVE_BACK):
        return True
    schema = getattr(node.target, "_schema", None)
    aliases = [returned.alias_info for returned in schema.returns] if schema is not None else []
    return any(alias is not None and not alias.is_write for alias in aliases)


def is_own_weight(argument: object) -> TypeGuard[fx.Node]:
    """True for a weight that only one node reads."""
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and len(argument.users) == 1


def only_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads a value; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def memory_of(node: fx.Node) -> fx.Node:
    """The value in whose memory the node's result may be."""
    while is_view(node):
        node = nodes.operand(node)
    return node


def views_of(node: fx.Node) -> list[fx.Node]:
    """The node, and every value that may be in its memory."""
    values = [node]
    for view in values:
        values += [user for user in view.users if is_view(user) and nodes.operand(user) is view]
    return values


def is_read_by(node: fx.Node, operators: Collection[object]) -> bool:
    """True when one of these operators reads the node, or a value that may be in its memory."""
    return any(user.target in operators for view in views_of(node) for user in view.users)


def is_handed_out(program: Program, node: fx.Node, besides: Collection[fx.Node] = ()) -> bool:
    """True when the program returns the node's memory, whole or as a view.

    Args:
        besides: views that do not count.
    """
    return any(program.output in view.users for view in views_of(node) if view not in besides)


def other_argument(node: fx.Node, known: fx.Node) -> object:
    """The other operand of a commutative operator, given one; None when `known` is no operand."""
    left, right = node.args[:2]
    if left is known:
        return right
    return left if right is known else None


def number(program: Program | None, argument: object) -> float | None:
    """The number in an argument: a literal, or a constant of rank 0 in the program; None when it is neither."""
    if isinstance(argument, (int, float)):
        return float(argument)
    if program is None or not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    if str(argument.target) in program.state:
        return None
    weight = program.weight(str(argument.target))
    return float(weight) if weight.dim() == 0 and not isinstance(weight, torch.nn.Parameter) else None


def lookup_indices(node: fx.Node) -> fx.Node:
    """The indices that `gather` or `take_along_dim` looks up."""
    return Gather(node).indices
