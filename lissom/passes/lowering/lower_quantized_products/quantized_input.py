"""The operators that quantize the input of a layer, for all layers that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.quantized_linear import QuantizedLayer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.ops import formats, quantize_rows
from lissom.ops.formats import FORMATS, FP8_LARGEST

aten = torch.ops.aten

_ROWS = 32
"""Rows of zeros added for `_int_mm`: it needs at least 17 rows, and cuBLAS is fast with 32."""
_MIDDLE = 128
"""Subtracted from uint8, it gives int8."""
_TAKEN = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that `quantize_rows` takes."""


@dataclass(frozen=True)
class QuantizedInput:
    """Quantized activations in the program.

    Attributes:
        q: [rows, inputs], for `_int_mm` with added rows of zeros; for Triton's kernels [..., inputs].
        scale: [rows, 1] or [..., 1], or [].
        offset: zero point - 128, of that shape in int32; None for fp8.
        rows: how many there are; None for Triton's kernels.
    """

    q: fx.Node
    scale: fx.Node
    offset: fx.Node | None
    rows: fx.Node | int | None


def flatten(edit: Editor, x: fx.Node) -> fx.Node:
    """[rows, inputs] of [..., inputs]."""
    x_type = nodes.tensor_type(x)
    return x if x_type.rank == 2 else edit.call(aten.reshape.default, x, [-1, x_type.shape[-1]])


def quantize_input(edit: Editor, layer: QuantizedLayer, *, triton: bool, pads: bool) -> QuantizedInput:
    """Quantizes a layer's input as `formats.scale_for` and `formats.quantize` do; use inside `edit.before`.

    Args:
        triton: for Triton's kernels.
        pads: few rows get rows of zeros after them.
    """
    call = edit.call
    by_token = not layer.scale_is_known and layer.granularity == "token"
    if triton and by_token and nodes.tensor_type(layer.x).dtype in _TAKEN:
        rounded = call(quantize_rows, layer.x)
        return QuantizedInput(edit.item(rounded, 0), edit.item(rounded, 1), edit.item(rounded, 2), None)
    x = layer.x if triton else flatten(edit, layer.x)
    rows = None if triton else edit.size(x, 0)
    if nodes.tensor_type(x).dtype != torch.float32:
        x = call(aten.to.dtype, x, torch.float32)
    scale, inverse, shift, offset = (_static_scale if layer.scale_is_known else _dynamic_scale)(edit, layer, x)
    scaled = call(aten.mul.Tensor, x, inverse)
    if shift is None:
        q = call(aten.to.dtype, call(aten.clamp.default, scaled, -FP8_LARGEST, FP8_LARGEST), FORMATS["fp8"].storage)
        return QuantizedInput(call(aten.contiguous.default, q), scale, None, rows)
    whole = call(aten.add.Tensor, call(aten.round.default, scaled), shift)
    q = call(aten.to.dtype, call(aten.clamp.default, whole, -_MIDDLE, _MIDDLE - 1), torch.int8)
    if pads and rows is not None and (not isinstance(rows, int) or rows < _ROWS):
        q = call(aten.constant_pad_nd.default, q, [0, 0, 0, _ROWS], 0)
    return QuantizedInput(call(aten.contiguous.default, q), scale, offset, rows)


_Scale = tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]
"""Scale, its inverse, and for int8 the zero point - 128 in float32 and int32."""


def _dynamic_scale(edit: Editor, layer: QuantizedLayer, x: fx.Node) -> _Scale:
    """From the range of x."""
    call = edit.call
    by_token = layer.granularity == "token"
    both = call(aten.aminmax.default, x, **({"dim": -1, "keepdim": True} if by_token else {}))
    low = call(aten.clamp_max.default, edit.item(both, 0), 0)
    high = call(aten.clamp_min.default, edit.item(both, 1), 0)
    form = FORMATS[str(layer.values.kwargs["format"])]
    if form.symmetric:
        reach = call(aten.maximum.default, call(aten.neg.default, low), high)
    else:
        reach = call(aten.sub.Tensor, high, low)
    steps = form.high if form.symmetric else form.high - form.low
    scale = call(aten.clamp_min.default, call(aten.div.Tensor, reach, steps), formats.LEAST)
    inverse = call(aten.reciprocal.default, scale)
    if form.symmetric:
        return scale, inverse, None, None
    zero_point = call(aten.round.default, call(aten.neg.default, call(aten.div.Tensor, low, scale)))
    shift = call(aten.sub.Tensor, call(aten.clamp.default, zero_point, form.low, form.high), _MIDDLE)
    return scale, inverse, shift, call(aten.to.dtype, shift, torch.int32)


def _static_scale(edit: Editor, layer: QuantizedLayer, x: fx.Node) -> _Scale:
    """From calibration, stored as weights."""
    scale, *rest = layer.values.all_input_nodes[1:]
    step = edit.tensor(scale).float()
    inverse = edit.weight(f"{scale.target}_inverse", step.reciprocal())
    scale = edit.weight(f"{scale.target}_step", step)
    if FORMATS[str(layer.values.kwargs["format"])].symmetric:
        return scale, inverse, None, None
    zero_point = edit.tensor(rest[0]).float() if rest else torch.zeros_like(step)
    shift = edit.weight(f"{scale.target}_shift", zero_point - _MIDDLE)
    return scale, inverse, shift, edit.weight(f"{scale.target}_offset", (zero_point - _MIDDLE).int())
