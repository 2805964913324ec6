"""Families of operators, each defined once, by which analyses and passes test a node's target.

A family holds operator objects of `torch.ops`, so that `node.target in FAMILY` and `program.nodes(*FAMILY)` work. Where an
analysis needs only some of a family, it builds its own set from these and says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import fx

from lissom import ops
from lissom.ops import attention, grouped_product
from lissom.ops.quantization import dequantize, fake_quantize, fake_quantize_dynamic

aten = torch.ops.aten
Rule = TypeVar("Rule")

# Identities and conversions

CASTS = (aten.to.dtype, aten._to_copy.default)
"""Change the dtype."""
CASTS_LIKE = (aten.to.other, aten.type_as.default)
"""Take the dtype of a second tensor."""
CONVERSIONS = (*CASTS, aten.to.device, aten.to.dtype_layout, *CASTS_LIKE)
"""Change the dtype, the device or the layout."""
COPIES = (aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)
ALIASES = (aten.alias.default, aten.detach.default)
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
"""In inference they return their argument."""
IDENTITIES = (*COPIES, *ALIASES, *DROPOUTS)
"""Return the values of their first argument in the same dtype."""

# Views: operators that move values, and compute nothing

MEMORY_VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Reshapes that never copy."""
SIZED_RESHAPES = (aten.reshape.default, *MEMORY_VIEWS)
"""Reshapes whose second argument lists the sizes of the whole result."""
RESHAPES = (*SIZED_RESHAPES, aten.flatten.using_ints, aten.unflatten.int)
RESHAPES_AS = (aten.reshape_as.default, aten.view_as.default)
"""Reshapes that take the sizes of a second tensor."""
READ_LAYOUT = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype, aten.pad.default)
"""Operators that read memory as it is laid out.

Fake tensors of torch 2.13 cannot pad by a length that varies unless the tensor is contiguous.
"""
EXPANDS = (aten.expand.default, aten.broadcast_to.default)
MATRIX_TRANSPOSES = (aten.t.default, aten.mT.default, aten.numpy_T.default)
"""Transposes that name no dimensions."""
TRANSPOSES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, *MATRIX_TRANSPOSES)
"""For a matrix, each of these is the transpose."""
PERMUTATIONS = (aten.permute.default, *TRANSPOSES)
"""Dimensions in another order."""
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
INSERTED_OR_GONE = (aten.unsqueeze.default, *SQUEEZES)
"""Dimensions of size 1 that come or go."""
SPLITS = (
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes),
    *(aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices),
)
"""Split a dimension into pieces."""
CONCATENATIONS = (aten.cat.default, aten.concat.default, aten.concatenate.default)
JOINS = (*CONCATENATIONS, aten.stack.default)
REPEATS = (aten.repeat.default, aten.repeat_interleave.self_int)
PARTS = (aten.slice.Tensor, aten.select.int)
"""Some of the indices of one dimension."""
SAME_VALUES = (*RESHAPES, *PERMUTATIONS, *INSERTED_OR_GONE)
"""Views that keep each value once."""
REORDERED = (aten.flip.default, aten.roll.default)
"""The indices of dimensions in another order."""
SEVERAL = (*SPLITS, aten.unbind.int)
"""Take a tensor apart."""

MOVES = {
    *(*RESHAPES, *EXPANDS, aten.expand_as.default, *REPEATS, *INSERTED_OR_GONE, *PARTS, aten.index_select.default, *SEVERAL),
}
"""Only move values, to places that the axes tell; permutations, whose places their dimensions tell, are not among them."""
SHAPES = {
    *(*SAME_VALUES, *EXPANDS, aten.repeat_interleave.self_int, *PARTS, *SEVERAL),
    *(*CASTS, *IDENTITIES),
}
"""Allowed between the parts of a layer besides element-wise operators: views, casts, copies, dropout."""
GATHERS = (aten.gather.default, aten.take_along_dim.default)
LOOKUPS = (aten.gather.default, aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.take.default)
"""Read only those elements of a tensor that indices name."""
MAY_GIVE_BACK = (
    *(*DROPOUTS, aten.type_as.default, aten.sum_to_size.default, aten.conj_physical.default),
    *(aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default),
    *(aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default),
)
"""May return their argument, though their schemas promise a new tensor."""
ASSERTIONS = (
    *(aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)
"""Compute nothing, and raise where something does not hold."""

SIZES_AT: dict[object, int] = {
    **dict.fromkeys((*SIZED_RESHAPES, *EXPANDS), 1),
    aten.unflatten.int: 2,
    **dict.fromkeys((aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format), 0),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), 1),
}
"""The index of the argument that lists the sizes."""

# New tensors

ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
FILLS = (aten.full.default, aten.new_full.default, aten.full_like.default)
NEW_TENSORS = (
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.scalar_tensor.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
)
"""Constant tensors of sizes the call lists."""
UNFILLED = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
"""New tensors that hold what their memory held before."""
FILLED_LIKE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
"""Constant tensors of their argument's shape."""
LIKE = (*FILLED_LIKE, aten.empty_like.default, aten.rand_like.default, aten.randn_like.default)
"""New tensors of their argument's shape."""
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)

STATE_WRITES = (aten.copy_.default, aten.index_copy_.default)
"""The operators that may write state."""

# Element-wise operators

ADD = (aten.add.Tensor, aten.add.Scalar)
SUBTRACT = (aten.sub.Tensor, aten.sub.Scalar)
MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
DIVIDE = (aten.div.Tensor, aten.div.Scalar)
AND = (aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
OR = (aten.__or__.Tensor, aten.logical_or.default, aten.bitwise_or.Tensor)
NOT = (aten.logical_not.default, aten.bitwise_not.default)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
MASKED_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_UNTAGGED = {
    *(aten.__and__.Tensor, aten.__or__.Tensor, *WHERE, aten.masked_fill.Tensor, aten.isin.Tensor_Scalar, aten.isclose.default),
    *(aten.floor_divide.default, aten.floor_divide.Scalar, aten.hardswish.default, aten.log_sigmoid.default),
}
"""Element-wise operators that PyTorch does not tag as such."""
_NO_ACTIVATIONS = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.floor_divide, aten.neg, aten.lerp, aten.minimum, aten.maximum),
    *(aten.clone, aten.copy, aten.detach, aten.alias, aten.where, aten.masked_fill, aten.__and__, aten.__or__),
    *(aten.logical_and, aten.logical_or, aten.logical_not, aten.bitwise_and, aten.bitwise_or, aten.bitwise_not),
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isin, aten.isclose),
}
"""Arithmetic, choices and comparisons, in any overload."""
EPILOGUES = (aten.relu.default, aten.gelu.default, aten.silu.default, ops.squared_relu)
"""Activations that kernels of linear layers compute as part of their product."""
HOMOGENEOUS = (aten.relu.default, aten.leaky_relu.default)
"""Activations with f(s · x) = s · f(x) for positive s."""
KEEPS_ZERO = {
    *(aten.relu6, aten.leaky_relu, aten.elu, aten.selu, aten.mish, aten.hardswish, aten.tanh),
    *(aten.neg, aten.abs, aten.sign, aten.sqrt, aten.square, aten.sin, aten.asinh, aten.atan, aten.expm1, aten.log1p, aten.erf),
    *(overload.overloadpacket for overload in (*IDENTITIES, *CONVERSIONS, *EPILOGUES)),
}
"""Element-wise functions, in any overload, with f(0) = 0."""
ZERO_OF_ZEROS = {
    *(aten.index, aten.gather, aten.take_along_dim, aten.flip, aten.roll),
    *(aten.sum, aten.mean, aten.amax, aten.cumsum, aten.avg_pool1d, aten.avg_pool2d),
}
"""Operators, in any overload, that return zeros when their whole argument is zero."""

# Reductions, and operators over one dimension

SUMS = (aten.sum.dim_IntList, aten.sum.default)
_NORMS_OF_VECTORS = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
"""Reductions that take the order of the norm before the dimensions."""
REDUCTIONS = (
    *(aten.mean.dim, aten.mean.default, aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim),
    *(aten.amax.default, aten.amin.default, aten.argmax.default, aten.argmin.default, aten.logsumexp.default),
    *(aten.any.dim, aten.any.default, aten.all.dim, aten.all.default, aten.prod.dim_int, *_NORMS_OF_VECTORS),
)
"""Reductions other than sums."""
REDUCTIONS_WITH_INDICES = (aten.max.dim, aten.min.dim)
"""Reductions that return values and indices."""
BEST = (aten.argmax.default, aten.max.dim)
"""Reductions to the index of the largest value."""
SOFTMAX = (aten.softmax.int, aten._softmax.default)
LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
CUMULATIVE = (aten.cumsum.default, aten.cumprod.default)
SORTS = (aten.topk.default, aten.sort.default)
"""Return the values of one dimension in order, and their indices."""

# Layers

BATCHED_MATMULS = (aten.matmul.default, aten.bmm.default)
MATMULS = (*BATCHED_MATMULS, aten.mm.default)
MATMULS_WITH_BIAS = (aten.addmm.default, aten.baddbmm.default)
LINEAR_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
"""Operators that a linear layer may be, apart from convolutions."""
PLAIN_RNNS = (aten.rnn_tanh.input, aten.rnn_relu.input)
"""All layers of an RNN without gates at once."""
RECURRENT_LAYERS = {aten.lstm.input: 4, aten.gru.input: 3, **dict.fromkeys(PLAIN_RNNS, 1)}
"""All layers of an LSTM, GRU or RNN at once, and how many matrices of a step lie in one of its weights."""
RECURRENCES = (ops.gated_delta_rule, ops.selective_scan)
"""Layers that run through the tokens in order, with a state."""
PACKED_LINEARS = (
    *(ops.packed_linear, ops.packed_linear_norm),
    *(ops.block_sparse_linear, ops.block_sparse_linear_norm),
)
"""Kernels of linear layers that read a packed weight in floating point, their second argument."""
GROUPED_PRODUCTS = (grouped_product,)
"""Products of rows with the matrix of their group, out of a stack [groups, in_features, out_features]."""
BASES = (ops.change_basis,)
"""Products that give features another basis."""
INTEGER_PRODUCTS = (aten._int_mm.default, aten._scaled_mm.default, ops.int8_product)
"""Products of quantized matrices on CUDA devices."""
PACKED_PRODUCTS = (aten._weight_int4pack_mm.default, aten._weight_int8pack_mm.default, ops.int4_product)
"""Products with a quantized weight on CUDA devices."""
INT8_LINEARS = (
    *(ops.quantized_linear, ops.quantized_linear_grouped, ops.quantized_linear_norm),
    *(ops.block_sparse_quantized_linear, ops.block_sparse_quantized_linear_norm),
)
"""Kernels of linear layers that quantize their input."""
WEIGHT_ONLY_LINEARS = (ops.weight_quantized_linear, ops.weight_quantized_linear_grouped, ops.weight_quantized_linear_norm)
"""Kernels of linear layers with a quantized weight and floating-point products."""
QUANTIZED_LINEARS = (*INT8_LINEARS, *WEIGHT_ONLY_LINEARS)
"""Kernels of linear layers that read a quantized weight, their second argument."""
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
TRANSPOSED_CONVOLUTIONS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LAYER_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
"""Norms over the last dimensions."""
NORMS = (*LAYER_NORMS, aten.batch_norm.default, aten.group_norm.default)
ATTENTIONS = (aten.scaled_dot_product_attention.default, attention)
"""Softmax attention: PyTorch's operator, and ours with soft-capped scores and sinks."""
FAKE_QUANTIZES = (fake_quantize, fake_quantize_dynamic)
"""Quantize, then dequantize."""
QUANTIZERS = (*FAKE_QUANTIZES, dequantize)


def rule_table(*entries: tuple[Rule, Iterable[object]]) -> dict[object, Rule]:
    """A table from operators to rules, from pairs of a rule and its operators."""
    return {target: rule for rule, targets in entries for target in targets}


def packet_of(node: fx.Node) -> object:
    """The operator a node calls, without its overload: `aten.add` for `aten.add.Tensor`; None for any other function."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def is_pointwise(node: fx.Node) -> bool:
    """True when each value of the result depends on one value of each argument."""
    return node.target in _UNTAGGED or torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_activation(node: fx.Node) -> bool:
    """True for an element-wise operator that is more than arithmetic, a choice or a comparison."""
    return is_pointwise(node) and packet_of(node) not in _NO_ACTIVATIONS


def reduced_dims(node: fx.Node, rank: int) -> set[int]:
    """The dimensions a reduction removes, counted from the front; all of them when the call names none."""
    index = 2 if node.target in _NORMS_OF_VECTORS else 1
    given = node.args[index] if len(node.args) > index else node.kwargs.get("dim")
    if given is None or given == [] or rank == 0:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}  # pyright: ignore
