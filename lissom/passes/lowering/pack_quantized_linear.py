"""Turn linear layers whose weights are stored in integers into kernels that read these integers.

    linear(fake_quantize(x) | fake_quantize_dynamic(x), dequantize(W_q), b)   ->   lissom::quantized_linear(x, W_q, b)
    linear(x, dequantize(W_q), b)                                             ->   lissom::weight_quantized_linear(x, W_q, b)

In the first x is rounded inside the kernel, products and sums are whole numbers, and no rounded value is written to memory.
In the second the weight, of eight or four bits, becomes floats in registers. The pass comes behind `fold-quantized-weights`.
Weights kept the other way round, as GPT-2 keeps them, are turned when they are packed. A table of embeddings that is an output
head too is held once, packed: its rows are looked up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.grids import FORMATS, unpack_halves
from lissom.compiler.kinds import Rewrite
from lissom.ops.native import missing_byte_kernel, missing_stored_kernel
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic
from lissom.ops.quantized_linear import FORMAT, MOST_INPUTS, PANEL, fill_panels, pack_bytes, quantized_linear
from lissom.ops.weight_quantized_linear import FORMS, SCALES, pack_blocks, pack_stored, weight_quantized_linear

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int)


@dataclass(frozen=True)
class PackQuantizedLinear(Rewrite):
    """Turns linear layers of stored integers into `lissom::quantized_linear` and `lissom::weight_quantized_linear`."""

    def run(self, edit: Editor) -> None:
        packed: dict[tuple[fx.Node, bool], _Packed] = {}
        for node in edit.nodes(*_PRODUCTS):
            layer = _layer_of(node)
            if layer is None:
                continue
            reason = layer.obstacle()
            if reason is not None:
                edit.skip(node, reason)
                continue
            key = layer.stored, layer.rounds
            if key not in packed:
                packed[key] = _pack(edit, layer)
            with edit.before(node):
                call = layer.call(edit, packed[key])
            edit.replace(node, call)
        for (stored, _), kept in packed.items():
            for look_up in [user for user in stored.users if _is_look_up(user, stored)]:
                with edit.before(look_up):
                    rows = _look_up_packed(edit, kept, look_up.args[1])
                edit.replace(look_up, rows)


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

    @property
    def format(self) -> str:
        return str(self.weight.kwargs["format"])

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks with a scale the weight is cut into, along features out and features in."""
        shape = cast("Sequence[int]", nodes.tensor_type(self.weight.args[1]).shape) or (1, 1)
        return cast("tuple[int, int]", tuple(shape[::-1] if self.transposed else shape))

    @property
    def sizes(self) -> tuple[int, int]:
        """Features out and features in."""
        shape = cast("Sequence[int]", nodes.tensor_type(self.weight).shape)
        return cast("tuple[int, int]", tuple(shape[::-1] if self.transposed else shape))

    def obstacle(self) -> str | None:
        """Why there is no kernel for it; None when there is one."""
        if any(_reads_whole(user) for user in self.weight.users):
            return "its weight is read elsewhere too"
        x = nodes.tensor_type(self.x)
        if self.rounds:
            return self._obstacle_to_bytes() or missing_byte_kernel(x.dtype, x.device)
        return self._obstacle_to_floats(x.dtype) or missing_stored_kernel(x.dtype, x.device)

    def _obstacle_to_bytes(self) -> str | None:
        if self.format != "int8":
            return f"its weight is in {self.format}, and the kernel multiplies with int8"
        if self.blocks[1] != 1:
            return "its weight has a scale for each group, and sums of bytes are scaled once a feature"
        if self.values.kwargs["format"] != FORMAT:
            return f"what it reads is rounded to {self.values.kwargs['format']}, and the kernel rounds to {FORMAT}"
        if self.values.target is fake_quantize and any(
            nodes.tensor_type(item).rank for item in self.values.all_input_nodes[1:]
        ):
            return "what it reads is rounded with more than one scale"
        if self.sizes[1] > MOST_INPUTS:
            return f"it sums {self.sizes[1]} products, and sums of 32 bits hold {MOST_INPUTS}"
        return None

    def _obstacle_to_floats(self, dtype: torch.dtype) -> str | None:
        if self.format not in FORMS:
            return f"its weight is in {self.format}, and the kernel reads {', '.join(FORMS)}"
        if self.blocks[0] not in (1, self.sizes[0]):
            return "its weight has a scale for several features"
        if nodes.tensor_type(self.weight.args[1]).dtype not in SCALES:
            return "its weight's scale is neither float16 nor float32"
        if dtype == torch.bfloat16 and self.sizes[1] % 2:
            return "its number of inputs is odd, and bfloat16 takes two at once"
        return None

    def call(self, edit: Editor, packed: _Packed) -> fx.Node:
        """The kernel's call; use inside `edit.before`."""
        operands: list[object] = [self.x, *packed.operands]
        options: dict[str, object] = {"features": packed.features}
        if not self.rounds:
            options["format"] = self.format
        elif self.values.target is fake_quantize:
            operands += (*self.values.args[1:], None)[:2]
        else:
            operands += (None, None)
            options["granularity"] = self.values.kwargs.get("granularity", "token")
        operands.append(self.bias)
        while operands[-1] is None:
            operands.pop()
        return edit.call(quantized_linear if self.rounds else weight_quantized_linear, *operands, **options)


@dataclass
class _Packed:
    """A packed weight in the program: the kernel's operands that hold it, its sizes, and the bits of a number in it."""

    operands: Sequence[fx.Node | None]
    features: int
    inputs: int
    bits: int


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


def _is_look_up(user: fx.Node, stored: fx.Node) -> bool:
    return user.target is aten.embedding.default and user.args[0] is stored


def _pack(edit: Editor, layer: _Layer) -> _Packed:
    form = FORMATS[layer.format]
    q, scale, *zero_point = (edit.program.weight(str(item.target)).detach() for item in layer.weight.all_input_nodes)
    q = unpack_halves(q, form) if form.bits == 4 else q
    q, scale, *zero_point = (item.T if layer.transposed and item.dim() else item for item in (q, scale, *zero_point))
    features, inputs = q.shape
    if layer.rounds:
        sums = q.sum(1, dtype=torch.int32)
        parts = {"": pack_bytes(q), "_scale": fill_panels(scale.float(), features), "_sums": fill_panels(sums, features)}
    else:
        grid = zip(("_scale", "_zero_point"), (scale, *zero_point), strict=False)
        parts = {"": pack_stored(q, form.name), **{leaf: pack_blocks(item, features) for leaf, item in grid}}
    with edit.before(layer.stored.next, like=[layer.node]):
        operands: list[fx.Node | None] = [
            edit.weight(f"{layer.stored.target}_packed{leaf}", value) for leaf, value in parts.items()
        ]
    return _Packed([*operands, *[None] * (3 - len(operands))], features, inputs, form.bits)


def _look_up_packed(edit: Editor, packed: _Packed, ids: object) -> fx.Node:
    """Rows of a packed weight, so that no other is held: row i is [i // 32, :, i % 32]; use inside `edit.before`."""
    panel = edit.call(aten.floor_divide.default, ids, PANEL)
    column = edit.call(aten.remainder.Scalar, ids, PANEL)
    if packed.bits == 8:
        rows = edit.call(aten.index.Tensor, packed.operands[0], [panel, None, column])
        if nodes.tensor_type(packed.operands[0]).rank == 3:
            return rows
        flat = edit.call(aten.flatten.using_ints, rows, -2, -1)
        return edit.call(aten.slice.Tensor, flat, -1, 0, packed.inputs)
    shared = edit.call(aten.remainder.Scalar, column, PANEL // 2)
    half = edit.call(aten.floor_divide.default, column, PANEL // 2)
    shift = edit.call(aten.to.dtype, edit.call(aten.mul.Scalar, half, 4), torch.uint8)
    both = edit.call(aten.index.Tensor, packed.operands[0], [panel, None, shared])
    shifted = edit.call(aten.bitwise_right_shift.Tensor, both, edit.call(aten.unsqueeze.default, shift, -1))
    single = edit.call(aten.bitwise_and.Scalar, shifted, 15)
    pairs = edit.call(aten.unflatten.int, single, -1, [packed.inputs // 2, 2])
    low, high = (edit.call(aten.select.int, pairs, -1, index) for index in range(2))
    return edit.call(aten.bitwise_or.Tensor, low, edit.call(aten.bitwise_left_shift.Tensor_Scalar, high, 4))
