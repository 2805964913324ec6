"""Turn linear layers whose weights are stored in integers into kernels that read these integers.

    linear(fake_quantize(x) | fake_quantize_dynamic(x), dequantize(W_q), b)   ->   lissom::quantized_linear(x, W_q, b)

x is rounded inside the kernel, products and sums are whole numbers, and no rounded value is written to memory. It comes behind
`fold-quantized-weights`. Weights kept the other way round, as GPT-2 keeps them, are turned when they are packed. A table of
embeddings that is an output head too is held once, packed: its rows are looked up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.kinds import Rewrite
from lissom.ops.native import missing_byte_kernel
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic
from lissom.ops.quantized_linear import FORMAT, MOST_INPUTS, PANEL, fill_panels, pack_bytes, quantized_linear

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int)


@dataclass(frozen=True)
class PackQuantizedLinear(Rewrite):
    """Turns linear layers of stored integers into `lissom::quantized_linear`."""

    def run(self, edit: Editor) -> None:
        packed: dict[fx.Node, _Packed] = {}
        for node in edit.nodes(*_PRODUCTS):
            layer = _layer_of(node)
            if layer is None:
                continue
            reason = layer.obstacle()
            if reason is not None:
                edit.skip(node, reason)
                continue
            if layer.stored not in packed:
                packed[layer.stored] = _pack(edit, layer)
            with edit.before(node):
                call = layer.call(edit, packed[layer.stored])
            edit.replace(node, call)
        for stored, kept in packed.items():
            _look_up_packed(edit, stored, kept)


@dataclass
class _Layer:
    """A linear layer of stored integers: node, what it multiplies, and whether the weight is [features in, features out]."""

    node: fx.Node
    values: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def stored(self) -> fx.Node:
        return cast(fx.Node, self.weight.args[0])

    @property
    def rounds(self) -> bool:
        return nodes.is_call(self.values, fake_quantize, fake_quantize_dynamic)

    @property
    def x(self) -> fx.Node:
        """What the layer reads before it is rounded."""
        return cast(fx.Node, self.values.args[0]) if self.rounds else self.values

    def obstacle(self) -> str | None:
        """Why there is no kernel for it; None when there is one."""
        form = self.weight.kwargs["format"]
        if form != "int8" or nodes.argument(self.weight, "zero_point") is not None:
            return f"its weight is in {form}, and the kernel multiplies with int8"
        shape = cast("Sequence[int]", nodes.tensor_type(self.weight).shape)
        features, inputs = shape[::-1] if self.transposed else shape
        blocks = cast("Sequence[int]", nodes.tensor_type(self.weight.args[1]).shape)
        blocks = blocks[::-1] if self.transposed else blocks
        if len(blocks) and tuple(blocks) not in ((features, 1), (1, 1)):
            return "its weight has a scale for each group, and sums of bytes are scaled once a feature"
        if not self.rounds:
            return "what it reads is not rounded"
        if self.values.kwargs["format"] != FORMAT:
            return f"what it reads is rounded to {self.values.kwargs['format']}, and the kernel rounds to {FORMAT}"
        if self.values.target is fake_quantize and any(
            nodes.tensor_type(item).rank for item in self.values.all_input_nodes[1:]
        ):
            return "what it reads is rounded with more than one scale"
        if inputs > MOST_INPUTS:
            return f"it sums {inputs} products, and sums of 32 bits hold {MOST_INPUTS}"
        if any(_reads_whole(user) for user in self.weight.users):
            return "its weight is read elsewhere too"
        x = nodes.tensor_type(self.x)
        return missing_byte_kernel(x.dtype, x.device)

    def call(self, edit: Editor, packed: _Packed) -> fx.Node:
        """The kernel's call; use inside `edit.before`."""
        known = self.values.target is fake_quantize
        grid = (*self.values.args[1:], None, None)[:2] if known else (None, None)
        options = {} if known else {"granularity": self.values.kwargs.get("granularity", "token")}
        operands = [self.x, *packed.operands, *grid, self.bias]
        while operands[-1] is None:
            operands.pop()
        return edit.call(quantized_linear, *operands, features=packed.features, **options)


@dataclass
class _Packed:
    """A packed weight in the program: operands of the kernel, and the weight's sizes."""

    operands: Sequence[fx.Node]
    features: int
    inputs: int
    readers: list[fx.Node] = field(default_factory=list[fx.Node])


def _layer_of(node: fx.Node) -> _Layer | None:
    """The layer of stored integers a product is; None for any other."""
    if node.kwargs:
        return None
    if node.target is aten.addmm.default:
        bias, x, weight = node.args
    else:
        x, weight, bias = (*node.args, None)[:3]
    transposed = node.target is not aten.linear.default
    while nodes.is_call(weight, *_TRANSPOSES):
        weight, transposed = weight.args[0], not transposed
    if not nodes.is_call(weight, dequantize) or nodes.tensor_type(weight).rank != 2 or not isinstance(x, fx.Node):
        return None
    if any(item.op != "get_attr" for item in weight.all_input_nodes):
        return None
    return _Layer(node, x, weight, cast("fx.Node | None", bias), transposed)


def _reads_whole(user: fx.Node) -> bool:
    """True for what needs the weight in floating point, all of it."""
    if nodes.is_call(user, *_TRANSPOSES):
        return any(_reads_whole(item) for item in user.users)
    return user.target not in _PRODUCTS


def _pack(edit: Editor, layer: _Layer) -> _Packed:
    q = edit.program.weight(str(layer.stored.target)).detach()
    scale = edit.program.weight(str(layer.weight.all_input_nodes[1].target)).detach()
    q = q.T if layer.transposed else q
    features, inputs = q.shape
    name = str(layer.stored.target)
    values = {
        "packed": pack_bytes(q),
        "packed_scale": fill_panels(scale.float(), features),
        "packed_sums": fill_panels(q.sum(1, dtype=torch.int32), features),
    }
    with edit.before(layer.stored.next, like=[layer.node]):
        return _Packed([edit.weight(f"{name}_{leaf}", value) for leaf, value in values.items()], features, inputs)


def _look_up_packed(edit: Editor, stored: fx.Node, kept: _Packed) -> None:
    """Let look-ups of rows read the packed weight, so that no other is held: row i is [i // 32, :, i % 32, :]."""
    for look_up in [user for user in stored.users if user.target is aten.embedding.default and user.args[0] is stored]:
        ids = look_up.args[1]
        with edit.before(look_up):
            panel = edit.call(aten.floor_divide.default, ids, PANEL)
            column = edit.call(aten.remainder.Scalar, ids, PANEL)
            rows = edit.call(aten.index.Tensor, kept.operands[0], [panel, None, column])
            flat = edit.call(aten.flatten.using_ints, rows, -2, -1)
            whole = edit.call(aten.slice.Tensor, flat, -1, 0, kept.inputs)
        edit.replace(look_up, whole)
