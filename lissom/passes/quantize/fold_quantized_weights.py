"""Store quantized weights as integers, fp8 or fp4: fake_quantize(W) becomes dequantize(W_q).

The values are bit-identical. In an embedding only the rows that are looked up are dequantized:
embedding(dequantize(W_q), ids) becomes dequantize(embedding(W_q, ids)).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import FakeQuantize
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.dequantized_rows import dequantize_rows_only
from lissom.ops.formats import FORMATS
from lissom.ops.native import load_kernels
from lissom.ops.quantization import dequantize, fake_quantize, quantize_weight


@dataclass(frozen=True)
class FoldQuantizedWeights(Rewrite):
    """Stores quantized weights as integers, fp8 or fp4, in place of `lissom::fake_quantize`."""

    def run(self, edit: Editor) -> None:
        load_kernels()
        for node in edit.nodes(fake_quantize):
            weight = FakeQuantize(node).x
            if weight.op == "get_attr":
                _fold(edit, node, weight)


def _fold(edit: Editor, node: fx.Node, weight: fx.Node) -> None:
    form = FORMATS[FakeQuantize(node).format]
    value = edit.tensor(weight)
    if form.bits == 4 and value.shape[-1] % 2:
        edit.skip(node, f"its last dimension, {value.shape[-1]}, is odd, and {form.name} packs two per byte")
        return
    scale, *zero_point = map(edit.tensor, node.all_input_nodes[1:])
    q = quantize_weight(value.detach(), scale, *zero_point, **node.kwargs)
    dtype = nodes.tensor_type(node).dtype
    with edit.before(node):
        stored = edit.weight(f"{weight.target}_{form.name}", q)
        folded = edit.call(dequantize, stored, *node.all_input_nodes[1:], **node.kwargs, dtype=dtype)
    edit.replace(node, folded)
    dequantize_rows_only(edit, folded)
