"""Keys of the KV cache, and the queries that meet them, in another basis.

    q · k = (q H) · (k H)

Where nothing but views lies between the projections and the scores, H is folded into the projections' weights. Rotary embeddings and norms of queries and
keys have scales or angles of their own for each feature, so H is applied after them, to the tokens of the call only: a key is
rotated once, when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.structure.kv_cache import readers_of_keys, written_rows
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import STATE_WRITES
from lissom.compiler.ir.view_calls import IndexCopy
from lissom.ops import change_basis
from lissom.passes.quantize.rotate.channels import rename_state, rotation_obstacle, turn

aten = torch.ops.aten


def rotate_keys(edit: Editor, basis_of: Callable[[int], torch.Tensor]) -> None:
    """Rotate the keys of every KV cache in floating point.

    Args:
        basis_of: an orthogonal matrix of a size, in float64.
    """
    caches = _key_caches(edit)
    if not caches:
        edit.note("the program has no KV cache in floating point; compile_generation makes one")
        return
    known = edit.program.fact(axes)
    folded: dict[Axis, torch.Tensor] = {}
    online: list[tuple[IndexCopy, list[Attention]]] = []
    for new, attentions in caches:
        axis = known.axis(new.node, -1)
        if axis not in folded and rotation_obstacle(edit.program, axis) is None:
            folded[axis] = basis_of(nodes.fixed_size(new.node, -1))
        elif axis not in folded:
            online.append((new, attentions))
    turn(edit, folded)
    reads: dict[tuple[int, torch.dtype], fx.Node] = {}
    for new, attentions in online:
        edit.current = new.node
        size, typed = nodes.fixed_size(new.node, -1), nodes.tensor_type(new.node)
        if (size, typed.dtype) not in reads:
            with edit.before(next(iter(edit.program.nodes())), like=[new.node]):
                basis = basis_of(size).to(typed.dtype).to(typed.device)
                reads[size, typed.dtype] = edit.weight("rotation", basis)
        _rotate_online(edit, new, attentions, reads[size, typed.dtype])
    edit.note(f"keys and queries: {len(folded)} folded into projections, {len(online)} rotated at each call")


def _key_caches(edit: Editor) -> list[tuple[IndexCopy, list[Attention]]]:
    """The writes to caches of keys, with the attentions that read them; those read in another way too are reported."""
    caches: list[tuple[IndexCopy, list[Attention]]] = []
    for write in edit.nodes(*STATE_WRITES[:1]):
        new = written_rows(write)
        attentions = None if new is None else readers_of_keys(new.node)
        if new is not None and attentions:
            caches.append((new, attentions))
    return caches


def _rotate_online(edit: Editor, new: IndexCopy, attentions: Sequence[Attention], basis: fx.Node) -> None:
    """Multiply the rows that are written, the state, and the queries of its readers by the basis."""
    with edit.before(new.node):
        rows = edit.call(change_basis, new.source, basis)
    new.node.replace_input_with(new.source, rows)
    held = edit.tensor(new.x)
    edit.set_weight(new.x, change_basis(held, edit.tensor(basis)))
    rename_state(edit, new.x)
    for attention in attentions:
        with edit.before(attention.node):
            queries = edit.call(change_basis, attention.q, basis)
        attention.node.replace_input_with(attention.q, queries)
    edit.rewritten += 1
