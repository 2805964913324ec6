"""Lower quantized linear layers on CUDA devices to PyTorch's low-precision matrix products, with quantization in the graph.

    int8 on uint8   linear(Q/DQ(x), dequantize(W_q), b)  ->  (_int_mm(x_q - 128, W_qᵀ) - (z - 128) · Σ W_q) · s_x · s_w + b
    fp8 on fp8      linear(Q/DQ(x), dequantize(W_q), b)  ->  _scaled_mm(x_q, W_qᵀ, s_x, s_w) + b
    int4            linear(x, dequantize(W_q), b)        ->  _weight_int4pack_mm(x, W_q, s_w, z_w) + b
    int8            linear(x, dequantize(W_q), b)        ->  _weight_int8pack_mm(x, W_q, s_w) + b

Ordinary operators quantize x to exactly the values of `lissom::fake_quantize` and `lissom::fake_quantize_dynamic`, once for all
layers that read them. TorchInductor fuses these operators, and those after the product, into one kernel each; in eager PyTorch
each is a kernel of its own, in a CUDA graph. Sums of int8 products are exact. The requirements of the products are in PyTorch's
sources, `aten/src/ATen/native/cuda`:

- `_int_mm` (`Blas.cpp`): sizes of the weight are multiples of 8, and more than 16 rows, so 32 rows of zeros are added.
- `_scaled_mm` (`ScaledBlas.cpp`): multiples of 16. From compute capability 9.0 on it applies per-token scales itself to outputs
  in bfloat16; otherwise they are multiplied after it, in float32.
- `_weight_int4pack_mm` (`int4mm.cu`): activations in bfloat16, groups of 32 and more. Scales are rounded to bfloat16 too.
- `_weight_int8pack_mm` (`int8mm.cu`): any sizes, but up to PyTorch 2.13 one thread sums each output, without tensor cores. It
  is used where it is measured faster than the layer in floating point, at the sizes of the example.

The pass comes after `fold-quantized-weights`. It was tested on CPUs, with a stand-in for the int4 product, and was not yet run
on a CUDA device. Times on a CPU, whose low-precision products are slow, say nothing about one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx
from torch.nn import functional

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.analysis.structure.quantized_linear import QuantizedLayer, quantized_layer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LINEAR_PRODUCTS
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.measure.timing import GAIN, median_seconds
from lissom.ops import formats
from lissom.ops.formats import FORMATS, FP8_LARGEST
from lissom.ops.quantized_linear import MOST_INPUTS

aten = torch.ops.aten

Capability = tuple[int, int]

_NEWEST = (9, 0)
"""The capability that `always` assumes: that of every product."""
_NEEDED: dict[str, Capability] = {"int8": (8, 0), "fp8": (8, 9), "int4": (8, 0)}
_ROW_WISE = (9, 0)
"""The first that `_scaled_mm` supports row-wise scales on."""
_VALUES = {"int8": "uint8", "fp8": "fp8"}
"""The format of activations by that of weights."""
_MULTIPLES = {"int8": 8, "fp8": 16, "int4": 8}
"""Both sizes of a weight, or for int4 its output features, must be multiples of this."""
_ROWS = 32
"""Rows of zeros added for `_int_mm`: it needs at least 17 rows, and cuBLAS is fast with 32."""
_MIDDLE = 128
"""Subtracted from uint8, it gives int8."""
_GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True)
class LowerQuantizedProducts(Rewrite):
    """Lowers quantized linear layers to PyTorch's low-precision matrix products on CUDA devices.

    Attributes:
        always: lowers without measuring, on any device, as for compute capability 9.0.
    """

    always: bool = False

    def run(self, edit: Editor) -> None:
        lowering = _Lowering(edit)
        for node in edit.nodes(*LINEAR_PRODUCTS):
            layer = quantized_layer(node)
            if layer is None:
                continue
            device_capability = capability(nodes.tensor_type(layer.x).device)
            reason = _obstacle(layer, device_capability, any_device=self.always)
            if reason is None and not self.always and not layer.rounds and layer.format == "int8":
                reason = _slower(edit, layer)
            if edit.may_change(node, reason):
                edit.replace(node, lowering.lower(layer, row_wise=(device_capability or _NEWEST) >= _ROW_WISE))


def capability(device: torch.device) -> Capability | None:
    """The compute capability of a CUDA device; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _obstacle(layer: QuantizedLayer, device_capability: Capability | None, *, any_device: bool) -> str | None:
    """The reason PyTorch has no product for a layer; None if it has one.

    Args:
        device_capability: the device's compute capability.
    """
    if device_capability is None and not any_device:
        return f"it runs on {nodes.tensor_type(layer.x).device.type}"
    if layer.is_read_whole:
        return "its weight is read elsewhere too"
    if layer.blocks[0] not in (1, layer.sizes[0]):
        return "its weight has a scale for several features"
    reason = _obstacle_to_quantized(layer) if layer.rounds else _obstacle_to_weight_only(layer)
    if reason is not None:
        return reason
    format = layer.format.removeprefix("u")
    if device_capability is None and not layer.rounds:
        return "weight-only products have kernels on CUDA devices only"
    if device_capability is not None and device_capability < _NEEDED[format]:
        needed, has = (f"{major}.{minor}" for major, minor in (_NEEDED[format], device_capability))
        return f"products of {format} need compute capability {needed}, and this device has {has}"
    return None


def _obstacle_to_quantized(layer: QuantizedLayer) -> str | None:
    features, inputs = layer.sizes
    if layer.format not in _VALUES:
        return f"its weight is in {layer.format}, and PyTorch multiplies quantized values with {' or '.join(_VALUES)}"
    values = layer.values.kwargs["format"]
    if values != (wanted := _VALUES[layer.format]):
        return f"its input is quantized to {values}, and a weight in {layer.format} is multiplied with {wanted}"
    if layer.blocks[1] != 1:
        return "its weight has group-wise scales, and the product takes one scale per feature"
    if not layer.has_one_scale or any(operand.op != "get_attr" for operand in layer.values.all_input_nodes[1:]):
        return "its input is quantized with more than one scale, or with a computed one"
    if features % _MULTIPLES[layer.format] or inputs % _MULTIPLES[layer.format]:
        return f"its sizes, {features} and {inputs}, are not both multiples of {_MULTIPLES[layer.format]}"
    if inputs > MOST_INPUTS and layer.format == "int8":
        return f"it has {inputs} inputs, and 32-bit sums take at most {MOST_INPUTS}"
    return None


def _obstacle_to_weight_only(layer: QuantizedLayer) -> str | None:
    features, dtype = layer.sizes[0], nodes.tensor_type(layer.x).dtype
    if 0 in example_shape(layer.x):
        return "its number of rows depends on values, and it needs at least one"
    if layer.format == "int8" and layer.blocks[1] != 1:
        return "its weight has group-wise scales, and the product takes one scale per feature"
    if layer.format == "int8":
        return None
    if not layer.format.endswith("int4"):
        return f"its weight is in {layer.format}, and PyTorch multiplies floats with int8, int4 or uint4"
    if dtype != torch.bfloat16:
        reads = str(dtype).removeprefix("torch.")
        return f"int4 is multiplied with bfloat16, and this layer reads {reads}: put cast{{dtype=bf16}} before"
    if _group_of(layer) is None:
        return f"{layer.sizes[1] // layer.blocks[1]} inputs share a scale, and PyTorch takes multiples of {_GROUPS[-1]}"
    if features % _MULTIPLES["int4"]:
        return f"its number of features, {features}, is no multiple of {_MULTIPLES['int4']}"
    return None


def _group_of(layer: QuantizedLayer) -> int | None:
    """The largest group `_weight_int4pack_mm` takes that has one scale in this layer."""
    shared = layer.sizes[1] // layer.blocks[1]
    return next((group for group in _GROUPS if shared % group == 0), None)


def _slower(edit: Editor, layer: QuantizedLayer) -> str | None:
    """The measured times, where weight-only int8 does not make a layer faster."""
    q, scale, _ = layer.parts(edit)
    x = torch.randn(example_shape(layer.x), device=q.device).to(nodes.tensor_type(layer.x).dtype).reshape(-1, q.shape[1])
    operands = x, q.contiguous(), per_feature(scale, q.shape[0]).to(x.dtype)
    integers = median_seconds(partial(aten._weight_int8pack_mm.default, *operands))
    floats = median_seconds(partial(functional.linear, x, formats.dequantize(q, scale, None, x.dtype)))
    if integers <= GAIN * floats:
        return None
    return (
        f"with int8 weights it takes {1e3 * integers:.3g} ms, in floating point {1e3 * floats:.3g} ms; "
        "scheme=int8-dynamic quantizes its input too"
    )


@dataclass(frozen=True)
class _QuantizedInput:
    """Quantized activations in the program.

    Attributes:
        q: [rows, inputs], for int8 with added rows of zeros.
        scale: [rows, 1] or [].
        offset: zero point - 128, of that shape in int32; None for fp8.
        rows: how many there are.
    """

    q: fx.Node
    scale: fx.Node
    offset: fx.Node | None
    rows: fx.Node | int


@dataclass(frozen=True)
class _Lowering:
    """Lowers layers; activations and weights that layers share are quantized and converted once."""

    edit: Editor
    rounded: dict[fx.Node, _QuantizedInput] = field(default_factory=dict["fx.Node", "_QuantizedInput"])
    weights: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict["tuple[fx.Node, str]", "fx.Node"])

    def lower(self, layer: QuantizedLayer, *, row_wise: bool) -> fx.Node:
        """The output of the lowered layer."""
        if layer.rounds and layer.values not in self.rounded:
            with self.edit.before(layer.values):
                self.rounded[layer.values] = self._round(layer)
        with self.edit.before(layer.node):
            if not layer.rounds:
                product = self._weight_only_product(layer)
            elif layer.format == "int8":
                product = self._int8_product(layer)
            elif row_wise and self._scales_rows(layer):
                return self._unflatten(layer, self._scaled_product(layer))
            else:
                product = self._fp8_product(layer)
            return self._unflatten(layer, self._with_bias(layer, product))

    def _round(self, layer: QuantizedLayer) -> _QuantizedInput:
        """The operators that quantize a layer's input, as `formats.scale_for` and `formats.quantize` do."""
        call = self.edit.call
        x = self._flatten(layer.x)
        rows = self.edit.size(x, 0)
        if nodes.tensor_type(x).dtype != torch.float32:
            x = call(aten.to.dtype, x, torch.float32)
        scale, inverse, shift, offset = (self._static_scale if layer.scale_is_known else self._dynamic_scale)(layer, x)
        scaled = call(aten.mul.Tensor, x, inverse)
        if shift is None:
            q = call(aten.to.dtype, call(aten.clamp.default, scaled, -FP8_LARGEST, FP8_LARGEST), FORMATS["fp8"].storage)
            return _QuantizedInput(call(aten.contiguous.default, q), scale, None, rows)
        whole = call(aten.add.Tensor, call(aten.round.default, scaled), shift)
        q = call(aten.to.dtype, call(aten.clamp.default, whole, -_MIDDLE, _MIDDLE - 1), torch.int8)
        if not isinstance(rows, int) or rows < _ROWS:
            q = call(aten.constant_pad_nd.default, q, [0, 0, 0, _ROWS], 0)
        return _QuantizedInput(call(aten.contiguous.default, q), scale, offset, rows)

    def _dynamic_scale(self, layer: QuantizedLayer, x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]:
        """Scale, its inverse, and for int8 the zero point - 128 in float32 and int32, from the range of x."""
        call = self.edit.call
        by_token = layer.granularity == "token"
        both = call(aten.aminmax.default, x, **({"dim": -1, "keepdim": True} if by_token else {}))
        low = call(aten.clamp_max.default, self.edit.item(both, 0), 0)
        high = call(aten.clamp_min.default, self.edit.item(both, 1), 0)
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

    def _static_scale(self, layer: QuantizedLayer, x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]:
        """Static scale and zero point, stored as weights."""
        scale, *rest = layer.values.all_input_nodes[1:]
        step = self.edit.tensor(scale).float()
        inverse = self.edit.weight(f"{scale.target}_inverse", step.reciprocal())
        scale = self.edit.weight(f"{scale.target}_step", step)
        if FORMATS[str(layer.values.kwargs["format"])].symmetric:
            return scale, inverse, None, None
        zero_point = self.edit.tensor(rest[0]).float() if rest else torch.zeros_like(step)
        shift = self.edit.weight(f"{scale.target}_shift", zero_point - _MIDDLE)
        return scale, inverse, shift, self.edit.weight(f"{scale.target}_offset", (zero_point - _MIDDLE).int())

    def _int8_product(self, layer: QuantizedLayer) -> fx.Node:
        call, values = self.edit.call, self.rounded[layer.values]
        product = call(aten._int_mm.default, values.q, self._columns(layer))
        if nodes.tensor_type(values.q).shape[0] != values.rows:
            product = call(aten.slice.Tensor, product, 0, 0, values.rows)
        sums = self._keep(layer, "sums", lambda: layer.parts(self.edit)[0].sum(1, dtype=torch.int32))
        product = call(aten.sub.Tensor, product, call(aten.mul.Tensor, values.offset, sums))
        return call(aten.mul.Tensor, product, call(aten.mul.Tensor, values.scale, self._scales(layer)))

    def _scales_rows(self, layer: QuantizedLayer) -> bool:
        """True when `_scaled_mm` can apply all scales of a layer: bfloat16, per-token."""
        operands = [layer.x] if layer.bias is None else [layer.x, layer.bias]
        by_row = nodes.tensor_type(self.rounded[layer.values].scale).rank == 2
        return by_row and all(nodes.tensor_type(operand).dtype == torch.bfloat16 for operand in operands)

    def _scaled_product(self, layer: QuantizedLayer) -> fx.Node:
        values, scales = self.rounded[layer.values], self.edit.call(aten.unsqueeze.default, self._scales(layer), 0)
        operands = values.q, self._columns(layer), values.scale, scales, layer.bias, None, torch.bfloat16
        return self.edit.call(aten._scaled_mm.default, *operands)

    def _fp8_product(self, layer: QuantizedLayer) -> fx.Node:
        call, values = self.edit.call, self.rounded[layer.values]
        one = self._keep(layer, "one", lambda: torch.ones((), device=self.edit.tensor(layer.stored).device))
        product = call(aten._scaled_mm.default, values.q, self._columns(layer), one, one, None, None, torch.float32)
        return call(aten.mul.Tensor, product, call(aten.mul.Tensor, values.scale, self._scales(layer)))

    def _weight_only_product(self, layer: QuantizedLayer) -> fx.Node:
        x = self.edit.call(aten.contiguous.default, self._flatten(layer.x))
        if layer.format == "int8":
            scales = self._scales(layer, nodes.tensor_type(x).dtype)
            return self.edit.call(aten._weight_int8pack_mm.default, x, self._matrix(layer), scales)
        q, scale, zero_point = layer.parts(self.edit)
        group = _group_of(layer) or 0
        packed = self._keep(layer, "tiles", lambda: tiles(q))
        repeats = layer.sizes[1] // layer.blocks[1] // group
        scales = self._keep(layer, "grid", lambda: tile_grid(scale, zero_point, layer.sizes[0], repeats))
        return self.edit.call(aten._weight_int4pack_mm.default, x, packed, group, scales)

    def _with_bias(self, layer: QuantizedLayer, product: fx.Node) -> fx.Node:
        """The bias added, and the result in the layer's dtype."""
        if layer.bias is not None:
            product = self.edit.call(aten.add.Tensor, product, layer.bias)
        dtype = nodes.tensor_type(layer.node).dtype
        return product if nodes.tensor_type(product).dtype == dtype else self.edit.call(aten.to.dtype, product, dtype)

    def _flatten(self, x: fx.Node) -> fx.Node:
        """[rows, inputs] of [..., inputs]."""
        x_type = nodes.tensor_type(x)
        return x if x_type.rank == 2 else self.edit.call(aten.reshape.default, x, [-1, x_type.shape[-1]])

    def _unflatten(self, layer: QuantizedLayer, product: fx.Node) -> fx.Node:
        """[..., features] of [rows, features]."""
        rank = nodes.tensor_type(layer.node).rank
        if rank == 2:
            return product
        sizes = [self.edit.size(layer.x, dim) for dim in range(rank - 1)]
        return self.edit.call(aten.reshape.default, product, [*sizes, layer.sizes[0]])

    def _columns(self, layer: QuantizedLayer) -> fx.Node:
        """The quantized weight as [inputs, features], a transposed view of [features, inputs]: the layout for tensor cores."""
        return self.edit.call(aten.transpose.int, self._matrix(layer), 0, 1)

    def _matrix(self, layer: QuantizedLayer) -> fx.Node:
        """The quantized weight, [features, inputs]."""
        if not layer.transposed:
            return layer.stored
        return self._keep(layer, "turned", lambda: layer.parts(self.edit)[0].contiguous())

    def _scales(self, layer: QuantizedLayer, dtype: torch.dtype = torch.float32) -> fx.Node:
        """[features] in that dtype."""
        part = "scales" if dtype == torch.float32 else f"scales_{str(dtype).removeprefix('torch.')}"
        return self._keep(layer, part, lambda: per_feature(layer.parts(self.edit)[1], layer.sizes[0]).to(dtype))

    def _keep(self, layer: QuantizedLayer, part: str, make: Callable[[], torch.Tensor]) -> fx.Node:
        """A new weight derived from the quantized one, made once."""
        key = layer.stored, part
        if key not in self.weights:
            with self.edit.program.graph.inserting_before(layer.stored.next):
                self.weights[key] = self.edit.weight(f"{layer.stored.target}_{part}", make())
        return self.weights[key]


def per_feature(scale: torch.Tensor, features: int) -> torch.Tensor:
    """[features] of a scale that is [], [1, 1] or [features, 1], in float32."""
    return scale.float().reshape(-1).expand(features).contiguous()


def tiles(q: torch.Tensor) -> torch.Tensor:
    """A four-bit weight in the layout of `_weight_int4pack_mm`.

    Args:
        q: [features, inputs], not packed, in the range of its format. The operator packs elements from 0 to 15, two per byte,
            the first in the high half, with up to 8 tiles of 16 inputs next to each other.
    """
    low, high = (q + 8 if q.dtype == torch.int8 else q).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    together = next(count for count in (8, 4, 2) if q.shape[1] % (16 * count) == 0)
    return aten._convert_weight_to_int4pack.default((low << 4 | high).contiguous(), together)


def tile_grid(scale: torch.Tensor, zero_point: torch.Tensor | None, features: int, repeats: int) -> torch.Tensor:
    """Scales and offsets, [groups, features, 2] in bfloat16: `_weight_int4pack_mm` multiplies by (q - 8) · scale + offset.

    Args:
        scale: [features or 1, blocks] or []; a zero point in floating point is subtracted after scaling.
        zero_point: likewise.
        repeats: groups per block.
    """
    step = scale.float().reshape(-1, scale.shape[-1] if scale.dim() else 1).expand(features, -1)
    if zero_point is None:
        offset = torch.zeros_like(step)
    elif zero_point.is_floating_point():
        offset = 8 * step - zero_point.float().reshape_as(step)
    else:
        offset = (8 - zero_point.float()) * step
    return torch.stack((step, offset), -1).repeat_interleave(repeats, 1).transpose(0, 1).bfloat16().contiguous()
