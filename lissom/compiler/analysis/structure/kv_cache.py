"""The KV cache of a decoder: the state that rows of new tokens are written to, and the attentions that read it."""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.operators import SHAPES
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Copy, IndexCopy

aten = torch.ops.aten


def written_rows(write: fx.Node) -> IndexCopy | None:
    """The new state of `copy_(state, index_copy(state, 2, places, rows))` with floating-point rows; None for other writes."""
    state, new = nodes.tensor_type(Copy(write).x), IndexCopy.of(Copy(write).source)
    if not nodes.is_state_write(write) or new is None or new.x is not Copy(write).x or new.dim != 2:
        return None
    return new if state.dtype.is_floating_point and state.rank == 4 else None


def cache_writes(program: Program) -> list[tuple[fx.Node, IndexCopy]]:
    """The writes to a KV cache in floating point, in order, each with the new state."""
    writes = ((write, written_rows(write)) for write in program.nodes(aten.copy_.default))
    return [(write, new) for write, new in writes if new is not None]


def readers_of_keys(keys: fx.Node) -> list[Attention] | None:
    """The attentions that read a new state as their keys, through views alone; None where it is read in another way too."""
    found, pending = dict[fx.Node, Attention](), [keys]
    for value in pending:
        for user in value.users:
            attention = Attention.of(user)
            if attention is not None and attention.k is value and value not in (attention.q, attention.v):
                found[user] = attention
            elif user.target in SHAPES:
                pending.append(user)
            elif not nodes.is_state_write(user):
                return None
    return [*found.values()]
