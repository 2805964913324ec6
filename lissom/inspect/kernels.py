"""The kernels of a program: which one runs each operator, on what shape, in what numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from lissom import ops
from lissom.compiler.analysis.flops import is_counted
from lissom.compiler.analysis.structure.linear import input_of, weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators
from lissom.compiler.ir.calls import QuantizedLinear
from lissom.compiler.ir.types import TensorType
from lissom.ops.native import instructions_for, load_kernels, multiplies_bfloat16

aten = torch.ops.aten

_NATIVE = {*ops.KERNELS, ops.gated_delta_rule, ops.selective_scan}
_INT8 = {*operators.INT8_LINEARS}
_WEIGHT_ONLY = {*operators.WEIGHT_ONLY_LINEARS}
_LINEARS = {
    *(aten.linear.default, ops.sparse_linear, *operators.PACKED_LINEARS),
    *operators.QUANTIZED_LINEARS,
}
_ATTENTIONS = {*operators.ATTENTIONS, ops.fused_attention, ops.block_sparse_attention, ops.linear_attention}
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Kernel:
    """The kernel that runs an operator.

    Attributes:
        library: `Lissom` or `PyTorch`.
        operator: its short name.
        details: instruction set and numbers: `avx512_bf16, float32`.
    """

    library: str
    operator: str
    details: str

    def __str__(self) -> str:
        return f"{self.library} {self.operator}, {self.details}"


def kernel_of(node: fx.Node, measured: bool = False) -> Kernel:
    """The kernel of an operator call on a CPU.

    Args:
        measured: whether PyTorch's kernel was timed against ours, and was faster.
    """
    name, numbers = short_name(node).removeprefix("lissom."), _dtype(node)
    own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lissom"
    if not own:
        return Kernel("PyTorch", name, f"{numbers}, measured faster" if measured else numbers)
    if node.target not in _NATIVE or load_kernels():
        return Kernel("Lissom", name, f"by PyTorch's operators, {numbers}")
    if node.target in _INT8:
        layer = QuantizedLinear(node)
        weight, scale = nodes.tensor_type(layer.weight), nodes.tensor_type(layer.scale)
        few = "int4 weights, " if weight.dtype == torch.uint8 else ""
        # Sums of groups are scaled one by one, which tiles of AMX cannot do.
        grouped = node.kwargs.get("granularity") == "group" or scale.rank == weight.rank - 1
        instructions = instructions_for(torch.float32 if grouped else torch.int8)
        return Kernel("Lissom", name, f"{instructions}, {few}int8")
    dtype = nodes.tensor_type(node).dtype if nodes.is_tensor(node) else torch.float32
    if node.target in _WEIGHT_ONLY:
        numbers = f"{node.kwargs['format']} weights, {numbers}"
    elif node.target in _LINEARS and dtype == torch.bfloat16 and not multiplies_bfloat16():
        numbers = "bfloat16 widened to float32"
    return Kernel("Lissom", name, f"{instructions_for(dtype)}, {numbers}")


def _dtype(node: fx.Node) -> str:
    value_type = _first(nodes.node_type(node))
    return str(value_type.dtype).removeprefix("torch.") if isinstance(value_type, TensorType) else "no tensor"


def _first(value_type: object) -> object:
    return next(iter(value_type), None) if isinstance(value_type, tuple) else value_type


def short_name(node: fx.Node) -> str:
    """`transpose`, `lissom.rotary`."""
    schema = getattr(node.target, "_schema", None)
    return getattr(node.target, "__name__", "") if schema is None else schema.name.removeprefix("aten::").replace("::", ".")


def module_pattern(node: fx.Node) -> str:
    """The module path with `*` for the numbers of layers: `encoder.layer.*.output.dense`; empty for the model itself."""
    return without_numbers(nodes.origin(node).module_path)


def without_numbers(path: str) -> str:
    """A module path with `*` for the numbers of layers."""
    return _NUMBER.sub(".*", path)


def operator_name(node: fx.Node) -> str:
    """The short name; for products with the module: `linear in encoder.layer.*.output.dense`."""
    path = module_pattern(node) if is_counted(node) else ""
    return f"{short_name(node)} in {path}" if path else short_name(node)


def shape_of(node: fx.Node, sizes: Mapping[sympy.Symbol, int]) -> str:
    """`64 × 384 → 1536` (rows, inputs, features) for a linear layer, heads and tokens for attention, else the output's sizes.

    Args:
        sizes: the sizes of dimensions; sizes that depend on values are `?`.
    """
    output = _sizes(node, sizes)
    x = _input_of(node)
    if x is not None:
        *rows, inputs = _sizes(x, sizes)
        return f"{_product(rows)} × {inputs} → {output[-1]}"
    if node.target is ops.merged_attention:
        batch, tokens, width = _sizes(node, sizes)
        heads = int(str(node.kwargs["heads"]))
        return f"{heads} heads × {int(width) // heads}, {batch} × {tokens} tokens"
    if node.target is ops.unpadded_attention:
        batch, tokens = _sizes(nodes.argument(node, "slots"), sizes)
        return f"{output[1]} heads × {output[3]}, {batch} × {tokens} tokens, unpadded"
    if node.target in _ATTENTIONS and len(output) == 4:
        batch, heads, tokens, width = output
        keys = _sizes(nodes.argument(node, _parameter(node, 1)), sizes)[-2]
        return f"{heads} heads × {width}, {batch} × {tokens} tokens" + ("" if keys == tokens else f", {keys} keys")
    return " × ".join(output)


def _input_of(node: fx.Node) -> fx.Node | None:
    """The input of a linear layer; None for any other node."""
    product = node.target in (*operators.MATMULS, *operators.GROUPED_PRODUCTS) and weight_of(node) is not None
    if not product and node.target not in (*_LINEARS, *operators.MATMULS_WITH_BIAS):
        return None
    return input_of(node) if nodes.tensor_type(input_of(node)).rank else None


def _parameter(node: fx.Node, index: int) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.arguments[index].name


def _sizes(node: object, sizes: Mapping[sympy.Symbol, int]) -> list[str]:
    value_type = _first(nodes.node_type(node)) if isinstance(node, fx.Node) else None
    if not isinstance(value_type, TensorType):
        return []
    numbers = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    shape = (size.xreplace(numbers) if isinstance(size, sympy.Expr) else size for size in value_type.shape)
    return ["?" if isinstance(size, sympy.Expr) and not size.is_number else str(size) for size in shape]


def _product(sizes: list[str]) -> str:
    return "?" if "?" in sizes else str(math.prod(map(int, sizes)))
