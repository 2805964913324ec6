"""Calls whose operands have the names of the operator's schema: `Linear(node).weight` for `node.args[1]`.

    if (layer := Linear.of(node)) is not None:
        width = nodes.fixed_size(layer.weight, 0)

A class stands for operators that do the same under the same names of parameters. An operand that a call leaves out has the
schema's default. `tests/compiler/ir/test_calls.py` compares every class with the schemas of its operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import torch
from torch import fx

from lissom import ops
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as families
from lissom.ops.quantization import dequantize, fake_quantize

aten = torch.ops.aten
T = TypeVar("T")


class Operand(Generic[T]):
    """The argument of a call for a parameter of its operator.

    Attributes:
        names: the names that the operators of a class have for it.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    @overload
    def __get__(self, call: None, owner: type[Call]) -> Self: ...
    @overload
    def __get__(self, call: Call, owner: type[Call]) -> T: ...
    def __get__(self, call: Call | None, owner: type[Call]) -> Self | T:
        if call is None:
            return self
        argument: Any = nodes.argument(call.node, *self.names)
        return argument


class Call:
    """A call of one of `targets`, with its operands as attributes."""

    targets: ClassVar[tuple[object, ...]] = ()

    def __init__(self, node: fx.Node) -> None:
        assert node.target in self.targets, f"{node.target} is no {type(self).__name__}"
        self.node = node

    @classmethod
    def of(cls, node: object) -> Self | None:
        """The call that a node makes; None where it calls another operator, or nothing."""
        return cls(node) if nodes.is_call(node, *cls.targets) else None


class Linear(Call):
    """x Wᵀ + b."""

    targets = (aten.linear.default,)
    x = Operand[fx.Node]("input")
    weight = Operand[fx.Node]("weight")
    bias = Operand[fx.Node | None]("bias")


class Matmul(Call):
    """x y."""

    targets = families.MATMULS
    x = Operand[fx.Node]("self")
    y = Operand[fx.Node]("other", "mat2")


class AddedProduct(Call):
    """beta · b + alpha · x y."""

    targets = families.MATMULS_WITH_BIAS
    bias = Operand[fx.Node]("self")
    x = Operand[fx.Node]("mat1", "batch1")
    y = Operand[fx.Node]("mat2", "batch2")
    alpha = Operand[float]("alpha")
    beta = Operand[float]("beta")


class GroupedProduct(Call):
    """Rows times the matrix of their group."""

    targets = families.GROUPED_PRODUCTS
    x = Operand[fx.Node]("input")
    weight = Operand[fx.Node]("weight")
    ends = Operand[fx.Node]("offs")


class Einsum(Call):
    """A sum of products in Einstein's notation."""

    targets = (aten.einsum.default,)
    equation = Operand[str]("equation")
    tensors = Operand[Sequence[fx.Node]]("tensors")


class Convolution(Call):
    """A convolution over one to three dimensions."""

    targets = families.CONVOLUTIONS
    x = Operand[fx.Node]("input")
    weight = Operand[fx.Node]("weight")
    bias = Operand[fx.Node | None]("bias")
    stride = Operand[int | Sequence[int | fx.Node]]("stride")
    padding = Operand[str | int | Sequence[int | fx.Node]]("padding")
    dilation = Operand[int | Sequence[int | fx.Node]]("dilation")
    groups = Operand[int]("groups")


class Embedding(Call):
    """Rows of a table."""

    targets = (aten.embedding.default,)
    table = Operand[fx.Node]("weight")
    ids = Operand[fx.Node]("indices")


class Attention(Call):
    """softmax(q kᵀ · scale + mask) v, by PyTorch's operator or ours."""

    targets = families.ATTENTIONS
    q = Operand[fx.Node]("query", "q")
    k = Operand[fx.Node]("key", "k")
    v = Operand[fx.Node]("value", "v")
    mask = Operand[fx.Node | None]("attn_mask", "bias")
    scale = Operand[float | None]("scale")


class Norm(Call):
    """A layer norm or an RMS norm over the last dimensions."""

    targets = families.LAYER_NORMS
    x = Operand[fx.Node]("input")
    shape = Operand[list[int]]("normalized_shape")
    weight = Operand[fx.Node | None]("weight")
    eps = Operand[float | None]("eps")


class Rotary(Call):
    """Rotary position embedding."""

    targets = (ops.rotary,)
    x = Operand[fx.Node]("x")
    cos = Operand[fx.Node]("cos")
    sin = Operand[fx.Node]("sin")
    interleaved = Operand[bool]("interleaved")


class Softmax(Call):
    """exp(x) / Σ exp(x)."""

    targets = families.SOFTMAX
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")


class Where(Call):
    """A choice by condition."""

    targets = families.WHERE
    condition = Operand[fx.Node]("condition")
    chosen = Operand[fx.Node | float]("self")
    other = Operand[fx.Node | float]("other")


class MaskedFill(Call):
    """A value where a mask is true."""

    targets = families.MASKED_FILLS
    x = Operand[fx.Node]("self")
    mask = Operand[fx.Node]("mask")
    value = Operand[fx.Node | float]("value")


class Binary(Call):
    """Arithmetic on two operands."""

    targets = (
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar),
        *(aten.div.Tensor, aten.div.Scalar),
    )
    left = Operand[fx.Node]("self")
    right = Operand[fx.Node | float]("other")


class AttentionKernel(Call):
    """Attention by one of our kernels that read q, k and v apart."""

    targets = (ops.fused_attention, ops.block_sparse_attention)
    q = Operand[fx.Node]("q")
    k = Operand[fx.Node]("k")
    v = Operand[fx.Node]("v")
    bias = Operand[fx.Node | None]("bias")


class BlockSparseAttention(AttentionKernel):
    """Attention to the blocks of keys that a pattern keeps."""

    targets = (ops.block_sparse_attention,)
    layout = Operand[fx.Node | None]("layout")
    pattern = Operand[Sequence[int]]("pattern")
    block = Operand[int]("block")


class Dequantize(Call):
    """Stored integers, fp8 or fp4 as floating-point values."""

    targets = (dequantize,)
    q = Operand[fx.Node]("q")
    scale = Operand[fx.Node]("scale")
    zero_point = Operand[fx.Node | None]("zero_point")
    format = Operand[str]("format")
    tensor_scale = Operand[float]("tensor_scale")


class FakeQuantize(Call):
    """Quantization with a static scale, then dequantization."""

    targets = (fake_quantize,)
    x = Operand[fx.Node]("x")
    scale = Operand[fx.Node]("scale")
    zero_point = Operand[fx.Node | None]("zero_point")
    format = Operand[str]("format")
    tensor_scale = Operand[float]("tensor_scale")


class Logical(Call):
    """And, or."""

    targets = (*families.AND, *families.OR)
    left = Operand[fx.Node]("self")
    right = Operand[fx.Node]("other")


class PackedEmbedding(Call):
    """Rows of a packed table."""

    targets = (ops.packed_embedding,)
    ids = Operand[fx.Node]("indices")
    features = Operand[int]("features")


class QuantizedLinear(Call):
    """A kernel of a linear layer that reads a quantized weight."""

    targets = families.QUANTIZED_LINEARS
    weight = Operand[fx.Node]("weight")
    scale = Operand[fx.Node]("scale")


class TopK(Call):
    """The largest or smallest elements of a dimension."""

    targets = (aten.topk.default,)
    x = Operand[fx.Node]("self")
    k = Operand[int | fx.Node]("k")


class UnpaddedAttention(Call):
    """Attention on rows without padding."""

    targets = (ops.unpadded_attention,)
    low = Operand[int | None]("low")
    high = Operand[int | None]("high")


class WeightedLayer(Call):
    """A linear layer, a convolution, or a kernel of a quantized linear layer."""

    targets = (aten.linear.default, *families.GROUPED_PRODUCTS, *families.CONVOLUTIONS, *families.QUANTIZED_LINEARS)
    weight = Operand[fx.Node]("weight")
