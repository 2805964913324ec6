"""Use weights as their file stores them: W becomes dequantize(W_q), with the integers, scales and zero points of the file.

    w = scale · q        w = scale · q - minimum        w = scale · (q - zero_point)

A GGUF file stores weights in blocks of 2 to 8 bits (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), which
transformers dequantizes when it loads the model. This pass undoes that: nothing is quantized anew, and the values are the same
bits. It takes Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and MXFP4, and holds five and six bits in eight; the
CPU kernels of eager, which take all types, pack them in five and six. ONNX Runtime has none for weights with minimums or in
MXFP4.

Checkpoints that are quantized by compressed-tensors, GPTQ or AWQ store int4, int8 or fp8, with a scale per channel or per
group. Where a group of GPTQ holds inputs that are not neighbours (`desc_act`), its columns are sorted by group, and the layer
reads its input in their order, x[..., order].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.matrix import readers_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LINEAR_PRODUCTS
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.dequantized_rows import dequantize_rows_only
from lissom.errors import RequirementError
from lissom.frontends.checkpoints.stored_weights import Stored, stored_form
from lissom.ops.formats import FORMATS
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.ops.quantization import dequantize

aten = torch.ops.aten
_ROWS = 4096
"""The number of rows that are dequantized at once for the comparison."""


@dataclass(frozen=True)
class UseStoredWeights(Rewrite):
    """Replaces weights of a GGUF file or a quantized checkpoint by the integers and scales that the file stores."""

    def run(self, edit: Editor) -> None:
        reads = [node for node in edit.program if node.op == "get_attr"]
        stored_weights = {node: stored for node in reads if (stored := stored_form(edit.program.weight(str(node.target))))}
        if not stored_weights:
            raise RequirementError(
                f"use-stored-weights needs a model that was read from a GGUF file or a quantized checkpoint, and no weight of "
                f"{edit.program.name} was; load such a directory, and put this pass before those that change weights, or use "
                f"quantize"
            )
        if rounded := sum(stored.rounds_input for stored in stored_weights.values()):
            edit.note(f"the checkpoint quantizes the inputs of {rounded} layers too; here they stay in floating point")
        orders: list[_Order] = []
        for finished, (node, stored) in enumerate(stored_weights.items()):
            edit.report("unpack", finished, len(stored_weights))
            if edit.may_change(node, _obstacle(node, stored)):
                blocks = stored.unpack()
                if edit.may_change(node, _difference(blocks, stored, edit.tensor(node))):
                    _use(edit, node, stored, blocks, orders)


def _obstacle(node: fx.Node, stored: Stored) -> str | None:
    """The reason a weight stays in floating point; None if it need not."""
    reader = next((user for user in readers_of(node) if user.target not in (*LINEAR_PRODUCTS, aten.embedding.default)), None)
    if reader is not None:
        return f"'{reader.name}' reads it, which is neither a linear layer nor an embedding"
    packed = stored.rows if stored.transposed else stored.columns
    if FORMATS[stored.format].bits == 4 and packed % 2:
        return f"its number of features, {packed}, is odd, and {stored.format} packs two per byte"
    if stored.column_order is not None and (
        other := next((user for user in node.users if not _reads_columns(user, node)), None)
    ):
        return f"its columns are stored in another order, and '{other.name}' is no linear layer whose input can have it"
    return None


def _reads_columns(user: fx.Node, weight: fx.Node) -> bool:
    """True for a layer that multiplies its input with the columns of a weight."""
    return user.target is aten.linear.default and user.args[1] is weight and user.args[0] is not weight


def _difference(blocks: StoredBlocks, stored: Stored, weight: torch.Tensor) -> str | None:
    """The reason the blocks do not give the values of the weight; None if they do."""
    weight = weight.T if stored.transposed else weight
    if weight.dtype == torch.float32 and weight.shape == blocks.q.shape:
        pieces = (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS))
        order = slice(None) if stored.column_order is None else stored.column_order
        if all(torch.equal(blocks.dequantize(rows), weight[rows].cpu()[:, order]) for rows in pieces):
            return None
    return "its values are not those of the file: it was changed or cast after it was read"


@dataclass(frozen=True)
class _Order:
    """An order of inputs in the program: layers that read the same values in the same order read them once."""

    columns: torch.Tensor
    node: fx.Node
    sorted_inputs: dict[fx.Node, fx.Node]


def _use(edit: Editor, node: fx.Node, stored: Stored, blocks: StoredBlocks, orders: list[_Order]) -> None:
    """Let all readers of a weight read it dequantized."""
    blocks = blocks.transposed() if stored.transposed else blocks
    name, device = str(node.target), edit.tensor(node).device
    parts = {blocks.format: blocks.packed(), "scale": blocks.scale, "zero_point": blocks.zero_point}
    with edit.before(node.next, like=[node]):
        kept = [edit.weight(f"{name}_{leaf}", tensor.to(device)) for leaf, tensor in parts.items() if tensor is not None]
        table = edit.call(dequantize, *kept, format=blocks.format, dtype=torch.float32)
    if stored.column_order is not None:
        order = _order(edit, node, stored.column_order.to(device), orders)
        for layer in list(node.users):
            _sort_input(edit, layer, order)
    edit.replace(node, table)
    dequantize_rows_only(edit, table)


def _order(edit: Editor, node: fx.Node, columns: torch.Tensor, orders: list[_Order]) -> _Order:
    """The order as a weight of the program, made once."""
    known = next((order for order in orders if torch.equal(order.columns, columns)), None)
    if known is None:
        with edit.before(node, like=[node]):
            known = _Order(columns, edit.weight(f"{node.target}_order", columns), {})
        orders.append(known)
    return known


def _sort_input(edit: Editor, layer: fx.Node, order: _Order) -> None:
    """Let a linear layer read its input in the order of the stored columns."""
    x, *rest = layer.args
    if not isinstance(x, fx.Node):
        return
    known = order.sorted_inputs.get(x)
    with edit.before(layer):
        if known is None or layer < known:
            known = edit.call(aten.index_select.default, x, nodes.tensor_type(x).rank - 1, order.node)
            order.sorted_inputs[x] = known
        call = edit.call(aten.linear.default, known, *rest)
    edit.replace(layer, call)
