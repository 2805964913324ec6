"""Replace linear layers with quantized weights by CPU kernels that read the quantized weights.

    linear(fake_quantize(x) | fake_quantize_dynamic(x), dequantize(W_q), b)   ->   lissom::quantized_linear(x, W_q, b)
    linear(x, dequantize(W_q), b)                                             ->   lissom::weight_quantized_linear(x, W_q, b)
    grouped_product(x, dequantize(W_q), offs)                                 ->   lissom::weight_quantized_linear_grouped(…)

The first (W8A8, W4A8) quantizes x inside the kernel and sums int8 products in int32; no quantized activation is written to
memory. The second (weight-only int8, int4, fp8 or fp4) dequantizes the weight in registers; int8 weights whose values need only
five or six bits are packed so with AVX-512, unless they are embedding tables too. The pass comes after
`fold-quantized-weights`. Weights stored as [features in, features out], as in GPT-2, are transposed when they are packed. An
embedding table tied to the LM head is held once, packed: its rows are looked up there. The matrices of experts are packed one
by one, into a stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.quantized_linear import QuantizedLayer, quantized_layer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Dequantize, Embedding, FakeQuantize, GroupedProduct
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import GROUPED_PRODUCTS, LINEAR_PRODUCTS
from lissom.compiler.ir.types import short_dtype
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.formats import BYTE_SCALES, FORMATS, SCALES
from lissom.ops.native import missing_int8_kernel, missing_weight_quantized_kernel, reads_few_bits_faster
from lissom.ops.packed_linear import packed_embedding
from lissom.ops.quantization import GROUP
from lissom.ops.quantized_linear import (
    MOST_INPUTS,
    STEP,
    X_FORMATS,
    fill_panels,
    pack_bytes,
    pack_groups,
    quantized_linear,
    quantized_linear_grouped,
)
from lissom.ops.weight_quantized_linear import (
    FORMS,
    narrowest,
    pack_blocks,
    pack_stored,
    weight_quantized_linear,
    weight_quantized_linear_grouped,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class PackQuantizedLinear(Rewrite):
    """Lowers linear layers with quantized weights to CPU kernels for W8A8, W4A8, W8A16 and W4A16."""

    def run(self, edit: Editor) -> None:
        packed: dict[tuple[fx.Node, bool], _Packed] = {}
        for node in edit.nodes(*LINEAR_PRODUCTS, *GROUPED_PRODUCTS):
            layer = quantized_layer(node)
            if layer is None or not edit.may_change(node, _obstacle(layer)):
                continue
            key = layer.stored, layer.rounds
            if key not in packed:
                packed[key] = _pack(edit, layer)
            with edit.before(node):
                call = _call(edit, layer, packed[key])
            edit.replace(node, call)
        for (stored, _), kept in packed.items():
            for user in list(stored.users):
                look_up = Embedding.of(user)
                if look_up is not None and look_up.table is stored:
                    with edit.before(user):
                        rows = _look_up_packed(edit, kept, look_up.ids)
                    edit.replace(user, rows)


def _obstacle(layer: QuantizedLayer) -> str | None:
    """The reason there is no kernel for a layer; None if there is one."""
    if layer.is_read_whole:
        return "its weight is read elsewhere too"
    x = nodes.tensor_type(layer.x)
    if layer.is_stacked and layer.granularity == "tensor":
        return "its input has one scale for the rows of all experts, and the kernel computes one per expert"
    if layer.rounds:
        return _obstacle_to_int8(layer) or missing_int8_kernel(x.dtype, x.device)
    return _obstacle_to_weight_only(layer, x.dtype) or missing_weight_quantized_kernel(x.dtype, x.device)


def _obstacle_to_int8(layer: QuantizedLayer) -> str | None:
    inputs = layer.sizes[1]
    if layer.format not in ("int8", "int4", "uint4"):
        return f"its weight is in {layer.format}, and the kernel multiplies with int8, int4 or uint4"
    if _is_grouped(layer) and inputs // layer.blocks[1] % STEP:
        return f"{inputs // layer.blocks[1]} of its inputs share a scale, and the kernel takes a multiple of {STEP}"
    if (zero_point := Dequantize(layer.weight).zero_point) is not None:
        if layer.granularity != "group":
            return f"its weight has zero points, and the kernel takes them only where {GROUP} activations share a scale"
        if nodes.tensor_type(zero_point).dtype != torch.uint8:
            return "its weight has zero points in floating point, and the kernel takes integers"
    if _is_grouped(layer) and (reason := _obstacle_to_group_scales(layer)):
        return reason
    if (given := layer.values.kwargs["format"]) != (wanted := X_FORMATS[layer.granularity]):
        return f"its input is quantized to {given} per-{layer.granularity}, and the kernel quantizes to {wanted}"
    if layer.granularity == "group" and inputs // layer.blocks[1] % GROUP:
        return f"{inputs // layer.blocks[1]} of its inputs share a scale of the weight, and {GROUP} of its activations"
    if not layer.has_one_scale and not layer.has_row_scales:
        return "its input is quantized with known scales that are neither one nor one for each row"
    if inputs > MOST_INPUTS:
        return f"it has {inputs} inputs, and 32-bit sums take at most {MOST_INPUTS}"
    return None


def _is_grouped(layer: QuantizedLayer) -> bool:
    """True if the int8 kernel reads the weight with group-wise scales, as it reads all of four bits."""
    return layer.blocks[1] != 1 or FORMATS[layer.format].bits == 4


def _obstacle_to_group_scales(layer: QuantizedLayer) -> str | None:
    if layer.blocks[0] not in (1, layer.sizes[0]):
        return "its weight has a scale for several features"
    dtype = nodes.tensor_type(Dequantize(layer.weight).scale).dtype
    if dtype not in (SCALES if layer.rounds else (*SCALES, *BYTE_SCALES)):
        return f"its weight's scale is in {short_dtype(dtype)}, and the kernel reads float16 and float32"
    return None


def _obstacle_to_weight_only(layer: QuantizedLayer, dtype: torch.dtype) -> str | None:
    if layer.format not in FORMS:
        return f"its weight is in {layer.format}, and the kernel reads {', '.join(FORMS)}"
    if reason := _obstacle_to_group_scales(layer):
        return reason
    if dtype == torch.bfloat16 and layer.sizes[1] % 2:
        return "its number of inputs is odd, and bfloat16 takes two at once"
    return None


def _call(edit: Editor, layer: QuantizedLayer, packed: _Packed) -> fx.Node:
    """The kernel's call; use inside `edit.before`."""
    operands: list[object] = [layer.x, *packed.operands]
    options: dict[str, object] = {"features": packed.features}
    if not layer.rounds:
        options["format"] = packed.format
        if (tensor_scale := Dequantize(layer.weight).tensor_scale) != 1:
            options["tensor_scale"] = tensor_scale
    elif layer.scale_is_known:
        values = FakeQuantize(layer.values)
        operands += [values.scale, values.zero_point, None]
    else:
        operands += [None, None, packed.zero_point]
        options["granularity"] = layer.granularity
    if layer.is_stacked:
        kernel = quantized_linear_grouped if layer.rounds else weight_quantized_linear_grouped
        return edit.call(kernel, *operands, offs=GroupedProduct(layer.node).ends, **options)
    return edit.call(quantized_linear if layer.rounds else weight_quantized_linear, *operands, layer.bias, **options)


@dataclass
class _Packed:
    """A packed weight in the program: the kernel's operands that hold it, its sizes, and its format.

    Attributes:
        zero_point: an operand that comes after others.
    """

    operands: Sequence[fx.Node | None]
    features: int
    inputs: int
    format: str
    zero_point: fx.Node | None


def _pack(edit: Editor, layer: QuantizedLayer) -> _Packed:
    form = FORMATS[layer.format]
    q, scale, zero_point = layer.parts(edit)
    features, inputs = q.shape[-2:]
    tables = [user for user in layer.stored.users if user.target is aten.embedding.default]
    narrows = reads_few_bits_faster() and not (layer.rounds or tables)
    format = narrowest(q, form.name) if narrows else form.name
    if layer.is_stacked:
        scales = scale if scale.dim() else scale.expand(len(q))
        experts = zip(q, scales, [None] * len(q) if zero_point is None else zero_point, strict=True)
        each = [_packed_parts(layer, *expert, format) for expert in experts]
        parts = {leaf: torch.stack([expert_parts[leaf] for expert_parts in each]) for leaf in each[0]}
    else:
        parts = _packed_parts(layer, q, scale, zero_point, format)
    with edit.before(layer.stored.next, like=[layer.node]):
        operands: list[fx.Node | None] = [
            edit.weight(f"{layer.stored.target}_packed{leaf}", value) for leaf, value in parts.items()
        ]
    operands += [None] * (3 - len(operands))
    return _Packed(operands[:3], features, inputs, format, next(iter(operands[3:]), None))


def _packed_parts(
    layer: QuantizedLayer, q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, format: str
) -> dict[str, torch.Tensor]:
    """A packed weight, its scales, and its sums or zero points, by the suffixes of their names."""
    features, form = len(q), FORMATS[layer.format]
    if layer.rounds and _is_grouped(layer):
        parts: dict[str, torch.Tensor] = {}
        parts |= zip(("", "_scale", "_sums"), pack_groups(q, scale, form.bits, zero_point), strict=True)
        if zero_point is not None:
            parts["_zero_point"] = pack_blocks(zero_point, features)
    elif layer.rounds:
        sums = q.sum(1, dtype=torch.int32)
        parts = {"": pack_bytes(q), "_scale": fill_panels(scale.float(), features), "_sums": fill_panels(sums, features)}
    else:
        grid = zip(("_scale", "_zero_point"), (scale, zero_point), strict=True)
        kept = {leaf: pack_blocks(tensor, features) for leaf, tensor in grid if tensor is not None}
        parts = {"": pack_stored(q, format), **kept}
    return parts


def _look_up_packed(edit: Editor, packed: _Packed, ids: fx.Node) -> fx.Node:
    """An embedding of rows of a packed weight; use inside `edit.before`."""
    bits = FORMS[packed.format].bits
    rows = edit.call(packed_embedding, packed.operands[0], ids, features=packed.features, bits=bits)
    if bits == 4 or nodes.tensor_type(packed.operands[0]).rank == 3:
        return rows
    return edit.call(aten.slice.Tensor, rows, -1, 0, packed.inputs)
