"""Lower quantized linear layers on CUDA devices to low-precision matrix products, with quantization in the graph.

With Triton, to Lissom's own kernels, which take any sizes, groups and zero points:

    int8 on uint8   linear(Q/DQ(x), dequantize(W_q), b)  ->  int8_product(quantize_rows(x), W_q, s_w, Σ W_q, b)
    int4            linear(x, dequantize(W_q), b)        ->  int4_product(x, W_q, s_w, z_w, b)

An int8 layer is one kernel that quantizes its input, for all layers that read it, and one product, into which `fuse-epilogues`
fuses what follows. With static or per-tensor scales ordinary operators quantize the input. Without Triton, and for other
formats, the products are PyTorch's:

    int8 on uint8   linear(Q/DQ(x), dequantize(W_q), b)  ->  (_int_mm(x_q - 128, W_qᵀ) - (z - 128) · Σ W_q) · s_x · s_w + b
    fp8 on fp8      linear(Q/DQ(x), dequantize(W_q), b)  ->  _scaled_mm(x_q, W_qᵀ, s_x, s_w) + b
    int4            linear(x, dequantize(W_q), b)        ->  _weight_int4pack_mm(x, W_q, s_w, z_w) + b
    int8            linear(x, dequantize(W_q), b)        ->  _weight_int8pack_mm(x, W_q, s_w) + b

Ordinary operators then quantize x to exactly the values of `lissom::fake_quantize` and `lissom::fake_quantize_dynamic`, once
for all layers that read them. TorchInductor fuses these operators, and those after the product, into one kernel each; in eager
PyTorch each is a kernel of its own, in a CUDA graph. Sums of int8 products are exact. The requirements of the products are in
PyTorch's sources, `aten/src/ATen/native/cuda`:

- `_int_mm` (`Blas.cpp`): sizes of the weight are multiples of 8, and more than 16 rows, so 32 rows of zeros are added.
- `_scaled_mm` (`ScaledBlas.cpp`): multiples of 16. From compute capability 9.0 on it applies per-token scales itself to outputs
  in bfloat16; otherwise they are multiplied after it, in float32.
- `_weight_int4pack_mm` (`int4mm.cu`): activations in bfloat16, groups of 32 and more. Scales are rounded to bfloat16 too.
- `_weight_int8pack_mm` (`int8mm.cu`): any sizes, but up to PyTorch 2.13 one thread sums each output, without tensor cores. It
  is used where it is measured faster than the layer in floating point, at the sizes of the example.

With `cpu=true` int8 layers on CPUs get PyTorch's products too, for TorchInductor, which fuses the operators around them; there
`_int_mm` takes any sizes. `eager` has faster kernels of its own on CPUs.

The pass comes after `fold-quantized-weights`. What it makes for CUDA was tested on CPUs and a pretended GPU, and has not been
run on a CUDA device yet.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from lissom.ops.quantized_linear import MOST_INPUTS
from lissom.ops.triton_kernels import obstacle
from lissom.passes.lowering.lower_quantized_products.products import GROUPS, Lowering, group_of, is_for_triton
from lissom.passes.lowering.lower_quantized_products.quantized_input import QuantizedInput
from lissom.passes.lowering.lower_quantized_products.stored_weights import StoredWeights, per_feature

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
"""Both sizes of a weight, or for int4 its output features, must be multiples of this for PyTorch's products."""
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LowerQuantizedProducts(Rewrite):
    """Lowers quantized linear layers to low-precision matrix products on CUDA devices.

    Attributes:
        always: lowers without measuring, on any device, as for compute capability 9.0.
        triton: lowers int8 and int4 to Lissom's Triton kernels.
        cpu: lowers int8 on CPUs too.
    """

    always: bool = False
    triton: bool = False
    cpu: bool = False

    def run(self, edit: Editor) -> None:
        weights, inputs, without = StoredWeights(edit), dict[fx.Node, QuantizedInput](), dict[str, int]()
        for node in edit.nodes(*LINEAR_PRODUCTS):
            layer = quantized_layer(node)
            if layer is None:
                continue
            found = capability(nodes.tensor_type(layer.x).device)
            reason = self._obstacle(layer, found)
            if reason is None and not self.always and not layer.rounds and layer.format == "int8":
                reason = _slower(edit, layer)
            if edit.may_change(node, reason):
                row_wise = (found or _NEWEST) >= _ROW_WISE
                edit.replace(node, Lowering(edit, self.triton, row_wise, not self.cpu, weights, inputs).lower(layer))
                missing = None if self.triton or found is None else obstacle(nodes.tensor_type(layer.x).device)
                if missing is not None and is_for_triton(layer):
                    without[missing] = without.get(missing, 0) + 1
        for missing, count in without.items():
            edit.note(f"{count} layers of int8 and int4 without Triton's kernels: {missing}")

    def _obstacle(self, layer: QuantizedLayer, found: Capability | None) -> str | None:
        """The reason there is no product for a layer; None if there is one.

        Args:
            found: the device's compute capability.
        """
        format, device = layer.format.removeprefix("u"), nodes.tensor_type(layer.x).device.type
        on_cpu = self.cpu and device == "cpu"
        if found is None and not self.always and not on_cpu:
            return f"it runs on {device}"
        if on_cpu and format != "int8":
            return f"its weight is in {format}, and PyTorch multiplies int8 on CPUs"
        if layer.is_read_whole:
            return "its weight is read elsewhere too"
        if layer.blocks[0] not in (1, layer.sizes[0]):
            return "its weight has a scale for several features"
        triton = self.triton and is_for_triton(layer)
        if layer.rounds:
            reason = _obstacle_to_quantized(layer, any_size=triton or on_cpu)
        else:
            reason = _obstacle_to_weight_only(layer, triton=triton)
        if reason is not None:
            return reason
        if found is None and not layer.rounds and not triton and not on_cpu:
            return "weight-only products have kernels on CUDA devices only"
        if found is not None and found < _NEEDED[format]:
            needed, has = (f"{major}.{minor}" for major, minor in (_NEEDED[format], found))
            return f"products of {format} need compute capability {needed}, and this device has {has}"
        return None


def capability(device: torch.device) -> Capability | None:
    """The compute capability of a CUDA device; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _obstacle_to_quantized(layer: QuantizedLayer, *, any_size: bool) -> str | None:
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
    if not any_size and (features % _MULTIPLES[layer.format] or inputs % _MULTIPLES[layer.format]):
        return f"its sizes, {features} and {inputs}, are not both multiples of {_MULTIPLES[layer.format]}"
    if inputs > MOST_INPUTS and layer.format == "int8":
        return f"it has {inputs} inputs, and 32-bit sums take at most {MOST_INPUTS}"
    return None


def _obstacle_to_weight_only(layer: QuantizedLayer, *, triton: bool) -> str | None:
    features, dtype = layer.sizes[0], nodes.tensor_type(layer.x).dtype
    if triton:
        return None if dtype in _HALVES else f"int4 is multiplied with bfloat16 or float16, and {_reads(dtype)}"
    if 0 in example_shape(layer.x):
        return "its number of rows depends on values, and it needs at least one"
    if layer.format == "int8" and layer.blocks[1] != 1:
        return "its weight has group-wise scales, and the product takes one scale per feature"
    if layer.format == "int8":
        return None
    if not layer.format.endswith("int4"):
        return f"its weight is in {layer.format}, and PyTorch multiplies floats with int8, int4 or uint4"
    if dtype != torch.bfloat16:
        return f"int4 is multiplied with bfloat16, and {_reads(dtype)}"
    if group_of(layer) is None:
        return f"{layer.sizes[1] // layer.blocks[1]} inputs share a scale, and PyTorch takes multiples of {GROUPS[-1]}"
    if features % _MULTIPLES["int4"]:
        return f"its number of features, {features}, is no multiple of {_MULTIPLES['int4']}"
    return None


def _reads(dtype: torch.dtype) -> str:
    return f"this layer reads {str(dtype).removeprefix('torch.')}: put cast{{dtype=bf16}} before"


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
