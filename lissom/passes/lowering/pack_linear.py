"""Pack the weights of linear layers for the CPU kernel: x Wᵀ + b in panels of 32 features, `lissom::packed_linear`.

The packed weight replaces the original in the program, so one copy is held. An embedding table tied to the LM head is looked up
in the packed weight, `lissom::packed_embedding`. A weight with other readers is not packed: it would have to be held twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding, Linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.measure.choice import slower_than_pytorch
from lissom.ops.native import missing_kernel, refused_tiles
from lissom.ops.packed_linear import pack, packed_embedding, packed_linear

aten = torch.ops.aten


@dataclass(frozen=True)
class PackLinear(Rewrite):
    """Packs the weights of linear layers for the CPU kernel `lissom::packed_linear`."""

    def run(self, edit: Editor) -> None:
        packed: dict[str, fx.Node] = {}
        for node in edit.treatable(_obstacle, aten.linear.default):
            layer = Linear(node)
            name = str(layer.weight.target)
            if name not in packed:
                tensor = pack(edit.tensor(layer.weight))
                # An embedding table is looked up long before the LM head multiplies with it.
                with edit.before(layer.weight.next, like=[node]):
                    packed[name] = edit.weight(f"{name}_packed", tensor)
            features = nodes.tensor_type(layer.weight).shape[0]
            edit.replace_by(node, packed_linear, layer.x, packed[name], layer.bias, features=features)
        if packed and (note := refused_tiles()) is not None:
            edit.note(note)
        for node in edit.nodes(aten.embedding.default):
            table, ids = Embedding(node).table, Embedding(node).ids
            if str(table.target) not in packed:
                continue
            form = nodes.tensor_type(table)
            operands = packed[str(table.target)], ids
            edit.replace_by(node, packed_embedding, *operands, features=form.shape[0], bits=8 * form.dtype.itemsize)


def _reads_whole(user: fx.Node, weight: fx.Node) -> bool:
    """True for a reader that is neither a linear layer with this weight nor an embedding of its rows."""
    reads_rows = nodes.is_call(user, *Linear.targets, *Embedding.targets) and nodes.argument(user, "weight") is weight
    return not reads_rows or list(user.args).count(weight) > 1


def _obstacle(linear: fx.Node) -> str | None:
    """The reason a layer cannot be packed; None if it can."""
    x, weight = nodes.tensor_type(Linear(linear).x), Linear(linear).weight
    if weight.op != "get_attr":
        return "its weight is computed"
    if any(_reads_whole(user, weight) for user in weight.users):
        return "its weight is read elsewhere too"
    form = nodes.tensor_type(weight)
    if form.rank != 2 or form.dtype != x.dtype:
        return "its weight is no matrix of the input's dtype"
    if x.dtype == torch.bfloat16 and nodes.fixed_size(weight, 1) % 2:
        return "its number of inputs is odd, and bfloat16 takes two at once"
    if x.dtype == torch.float16 and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this processor has no float16 arithmetic, and multiplies slower in it than in float32: take cast{dtype=bf16}"
    return missing_kernel(x.dtype, x.device) or _slower(linear)


def _slower(linear: fx.Node) -> str | None:
    """The reason PyTorch's product is the faster one, at the sizes of the example; None if ours is."""
    layer = Linear(linear)
    features, inputs = example_shape(layer.weight)
    return slower_than_pytorch(nodes.tensor_type(layer.x).dtype, math.prod(example_shape(layer.x)[:-1]), inputs, features)
