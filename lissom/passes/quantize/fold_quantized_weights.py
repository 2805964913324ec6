"""Store quantized weights as integers or fp8: fake_quantize(W) becomes dequantize(W_q).

The values are bit-identical. In an embedding only the rows that are looked up are dequantized:
embedding(dequantize(W_q), ids) becomes dequantize(embedding(W_q, ids)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize, fake_quantize

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldQuantizedWeights(Rewrite):
    """Stores quantized weights as integers or fp8, in place of `lissom::fake_quantize`."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(fake_quantize):
            weight = node.args[0]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                _fold(edit, node, weight)


def _fold(edit: Editor, node: fx.Node, weight: fx.Node) -> None:
    form = FORMATS[str(node.kwargs["format"])]
    value = edit.tensor(weight)
    if form.bits == 4 and value.shape[-1] % 2:
        edit.skip(node, f"its last dimension, {value.shape[-1]}, is odd, and int4 packs two per byte")
        return
    scale, *zero_point = map(edit.tensor, node.all_input_nodes[1:])
    q = formats.quantize(value, scale, zero_point[0] if zero_point else None, form)
    dtype = nodes.tensor_type(node).dtype
    with edit.before(node):
        stored = edit.weight(f"{weight.target}_{form.name}", formats.pack_halves(q) if form.bits == 4 else q)
        folded = edit.call(dequantize, stored, *node.all_input_nodes[1:], format=form.name, dtype=dtype)
    edit.replace(node, folded)
    for user in list(folded.users):
        if user.target is aten.embedding.default and user.args[0] is folded:
            with edit.before(user):
                rows = [_rows(edit, item, user.args[1]) for item in folded.all_input_nodes]
                looked_up = edit.call(dequantize, *rows, format=form.name, dtype=dtype)
            edit.replace(user, looked_up)


def _rows(edit: Editor, table: fx.Node, ids: object) -> fx.Node:
    """The rows of a table that are looked up; a row that all ids share is broadcast to them."""
    shape = nodes.tensor_type(table).shape
    if shape[0] != 1:
        return edit.call(aten.embedding.default, table, ids)
    rank = nodes.tensor_type(ids).rank  # pyright: ignore[reportArgumentType]
    return edit.call(aten.reshape.default, table, [*([1] * rank), *shape[1:]])
