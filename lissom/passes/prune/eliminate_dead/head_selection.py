"""Select the heads of an attention's operands, so that heads can be removed from this attention only.

An `index_select` of all heads is the identity, but its output has a head axis of its own. Removing heads then shortens the list
of indices, and the input keeps all heads: a bias that other attentions read too, or queries with a norm over all heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.view_calls import IndexSelect

aten = torch.ops.aten

MASK, QUERY_AND_KEY, VALUE = (3,), (0, 1), (2,)
"""Argument positions of an attention."""


def select_heads(edit: Editor, attention: fx.Node, arguments: Iterable[int]) -> list[fx.Node]:
    """Insert an `index_select` of all heads before these arguments, where they have heads; returns the inserted calls."""
    made: list[fx.Node] = []
    for index in arguments:
        name = nodes.overload(attention)._schema.arguments[index].name
        operand = nodes.argument(attention, name)
        if not nodes.is_tensor(operand) or nodes.is_call(operand, aten.index_select.default):
            continue
        typed = nodes.tensor_type(operand)
        heads = typed.shape[-3] if typed.rank > 2 else 1
        if not isinstance(heads, int) or heads == 1:
            continue
        with edit.before(attention):
            numbers = edit.weight(f"{attention.name}.heads", torch.arange(heads, device=typed.device))
            chosen = edit.call(aten.index_select.default, operand, typed.rank - 3, numbers)
        nodes.set_argument(attention, name, chosen)
        made.append(chosen)
    return made


def drop_selections(edit: Editor, made: Iterable[fx.Node]) -> None:
    """Remove the selections that still select all heads in order."""
    for chosen in made:
        selection = IndexSelect(chosen)
        size = nodes.fixed_size(selection.x, selection.dim)
        if torch.equal(edit.tensor(selection.indices).cpu(), torch.arange(size)):
            edit.replace(chosen, selection.x)
            edit.rewritten -= 1
