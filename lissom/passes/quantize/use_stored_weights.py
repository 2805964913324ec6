"""Use weights as a GGUF file stores them: W becomes dequantize(W_q), with the integers, scales and minimums of the file.

    w = scale · q        w = scale · q - minimum

A GGUF file stores weights in blocks of 2 to 8 bits (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), which
transformers dequantizes when it loads the model. This pass undoes that: nothing is quantized anew, and the values are the same
bits. It takes Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and MXFP4, and holds five and six bits in eight; the
CPU kernels of eager, which take all types, pack them in five and six. ONNX Runtime has none for weights with minimums or in
MXFP4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.matrix import readers_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LINEAR_PRODUCTS
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.dequantized_rows import dequantize_rows_only
from lissom.errors import RequirementError
from lissom.frontends.checkpoints.stored_weights import StoredWeight, stored_form
from lissom.ops.formats import FORMATS
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.ops.quantization import dequantize

aten = torch.ops.aten
_ROWS = 4096
"""The number of rows that are dequantized at once for the comparison."""


@dataclass(frozen=True)
class UseStoredWeights(Rewrite):
    """Replaces weights that were read from a GGUF file by the integers and scales that the file stores."""

    def run(self, edit: Editor) -> None:
        reads = [node for node in edit.program if node.op == "get_attr"]
        stored_weights = {node: stored for node in reads if (stored := stored_form(edit.program.weight(str(node.target))))}
        if not stored_weights:
            raise RequirementError(
                f"use-stored-weights needs a model that was read from a GGUF file, and no weight of {edit.program.name} was; "
                f"load a directory with a GGUF file, and put this pass before those that change weights, or use quantize"
            )
        for finished, (node, stored) in enumerate(stored_weights.items()):
            edit.report("unpack", finished, len(stored_weights))
            if edit.may_change(node, _obstacle(node, stored)):
                blocks = stored.unpack()
                if edit.may_change(node, _difference(blocks, stored, edit.tensor(node))):
                    _use(edit, node, stored, blocks)


def _obstacle(node: fx.Node, stored: StoredWeight) -> str | None:
    """The reason a weight stays in floating point; None if it need not."""
    reader = next((user for user in readers_of(node) if user.target not in (*LINEAR_PRODUCTS, aten.embedding.default)), None)
    if reader is not None:
        return f"'{reader.name}' reads it, which is neither a linear layer nor an embedding"
    if stored.transposed and FORMATS[stored.kind.format].bits == 4 and stored.rows % 2:
        return f"its number of features, {stored.rows}, is odd, and {stored.kind.format} packs two per byte"
    return None


def _difference(blocks: StoredBlocks, stored: StoredWeight, weight: torch.Tensor) -> str | None:
    """The reason the blocks do not give the values of the weight; None if they do."""
    weight = weight.T if stored.transposed else weight
    if weight.dtype == torch.float32 and weight.shape == blocks.q.shape:
        pieces = (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS))
        if all(torch.equal(blocks.dequantize(rows), weight[rows].cpu()) for rows in pieces):
            return None
    return "its values are not those of the file: it was changed or cast after it was read"


def _use(edit: Editor, node: fx.Node, stored: StoredWeight, blocks: StoredBlocks) -> None:
    """Let all readers of a weight read it dequantized."""
    blocks = blocks.transposed() if stored.transposed else blocks
    name, device = str(node.target), edit.tensor(node).device
    parts = {blocks.format: blocks.packed(), "scale": blocks.scale, "zero_point": blocks.zero_point}
    with edit.before(node.next, like=[node]):
        kept = [edit.weight(f"{name}_{leaf}", tensor.to(device)) for leaf, tensor in parts.items() if tensor is not None]
        table = edit.call(dequantize, *kept, format=blocks.format, dtype=torch.float32)
    edit.replace(node, table)
    dequantize_rows_only(edit, table)
