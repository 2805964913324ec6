"""Let an attention choose its heads from what it reads, so that they can be removed from it alone.

An `index_select` of all heads changes nothing, but behind it the heads are an axis of their own: removing some cuts its list of
heads, and what it reads stays whole, be it a bias that other attentions read too, or queries that are normed over all heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor

aten = torch.ops.aten

MASK, QUERY_AND_KEY, VALUE = (3,), (0, 1), (2,)
"""Arguments of an attention."""


def select_heads(edit: Editor, attention: fx.Node, arguments: Iterable[int]) -> list[fx.Node]:
    """Let an attention choose all heads of these arguments by number, where they have heads; the choices made."""
    made: list[fx.Node] = []
    for index in arguments:
        item, name = _argument(attention, index)
        if not nodes.is_tensor(item) or nodes.is_call(item, aten.index_select.default):
            continue
        typed = nodes.tensor_type(item)
        heads = typed.shape[-3] if typed.rank > 2 else 1
        if not isinstance(heads, int) or heads == 1:
            continue
        with edit.before(attention):
            numbers = edit.weight(f"{attention.name}.heads", torch.arange(heads, device=typed.device))
            chosen = edit.call(aten.index_select.default, item, typed.rank - 3, numbers)
        if index < len(attention.args):
            attention.args = (*attention.args[:index], chosen, *attention.args[index + 1 :])
        else:
            attention.kwargs = {**attention.kwargs, name: chosen}
        made.append(chosen)
    return made


def _argument(attention: fx.Node, index: int) -> tuple[object, str]:
    name = next(iter(("query", "key", "value", "attn_mask")[index : index + 1]))
    if str(attention.target).startswith("lissom"):
        name = ("q", "k", "v", "bias")[index]
    return (attention.args[index] if index < len(attention.args) else attention.kwargs.get(name)), name


def drop_selections(edit: Editor, made: Iterable[fx.Node]) -> None:
    """Take out the choices that still choose all there is, in order."""
    for chosen in made:
        item, dim, numbers = chosen.args
        size = nodes.tensor_type(item).shape[dim]  # pyright: ignore
        kept = edit.program.weight(str(numbers.target))  # pyright: ignore
        if torch.equal(kept.cpu(), torch.arange(int(size))):  # pyright: ignore[reportArgumentType]
            edit.replace(chosen, item)  # pyright: ignore[reportArgumentType]
            edit.rewritten -= 1
