"""Write KV-cache rows in place: new rows go into the state's own memory.

    new = index_copy(state, dim, places, rows);  …;  copy_(state, new)   ->   new = index_copy_(state, dim, places, rows)

The state is then neither copied before it is read nor after, so a token costs its own rows and not the whole cache. Nodes that
read the copy now read the state itself, which holds the same values until the next call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula
from lissom.compiler.ir.match import is_handed_out
from lissom.compiler.pipeline.pass_kinds import Rewrite

_WRITE = Formula("new = index_copy(state, ...)\ncopy_(state, new)")


@dataclass(frozen=True)
class WriteStateInPlace(Rewrite):
    """Writes KV-cache rows in place, rather than copying the cache."""

    def run(self, edit: Editor) -> None:
        for found in edit.matches(_WRITE):
            state, new, write = found["state"], found["new"], found.root
            if nodes.is_state_write(write) and edit.may_change(write, _obstacle(edit, state, new, write)):
                edit.change_call(new, torch.ops.aten.index_copy_.default, *new.args, **new.kwargs)
                edit.program.graph.erase_node(write)


def _obstacle(edit: Editor, state: fx.Node, new: fx.Node, write: fx.Node) -> str | None:
    """The reason the state cannot be written in place; None if it can."""
    if write.users:
        return "what the write yields is read"
    reads = [node for node in edit.program.graph.nodes if node.op == "get_attr" and node.target == state.target]
    if set(state.users) != {new, write} or len(reads) > 1:
        return f"'{state.target}' is read beside, and what it was before may be needed"
    if is_handed_out(edit.program, new):
        return "the caller is given the state, which the next call would change"
    return None
