"""Embeddings of dequantized tables: rows are looked up in the quantized table, and only they are dequantized.

embedding(dequantize(W_q), ids)  ->  dequantize(embedding(W_q, ids))
"""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding
from lissom.compiler.ir.editor import Editor
from lissom.ops.quantization import dequantize

aten = torch.ops.aten


def dequantize_rows_only(edit: Editor, table: fx.Node) -> None:
    """Let the embeddings of a dequantized table look up its quantized rows."""
    for user in list(table.users):
        lookup = Embedding.of(user)
        if lookup is not None and lookup.table is table:
            with edit.before(user):
                rows = [_rows(edit, operand, lookup.ids) for operand in table.all_input_nodes]
                looked_up = edit.call(dequantize, *rows, **table.kwargs)
            edit.replace(user, looked_up)


def _rows(edit: Editor, table: fx.Node, ids: fx.Node) -> fx.Node:
    """The rows of a table that are looked up; a row that all ids share is broadcast to them."""
    shape = nodes.tensor_type(table).shape
    if shape[0] != 1:
        return edit.call(aten.embedding.default, table, ids)
    rank = nodes.tensor_type(ids).rank
    return edit.call(aten.reshape.default, table, [*([1] * rank), *shape[1:]])
