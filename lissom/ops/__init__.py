"""Custom operators: computations for which PyTorch has no single operator. Importing this package registers them."""

from collections.abc import Callable, Mapping

import torch

from lissom.ops.attention import attention, attention_reference
from lissom.ops.block_sparse_attention import block_sparse_attention
from lissom.ops.block_sparse_linear import (
    block_sparse_linear,
    block_sparse_linear_norm,
    block_sparse_quantized_linear,
    block_sparse_quantized_linear_norm,
)
from lissom.ops.change_basis import change_basis, change_basis_reference
from lissom.ops.dense_linear import linear
from lissom.ops.flex_attention import flex_block_sparse_attention as flex_block_sparse_attention
from lissom.ops.fused_attention import fused_attention, merged_attention, unpadded_attention
from lissom.ops.fused_rows import fused_layer_norm, fused_rms_norm, fused_rotary
from lissom.ops.grouped_product import grouped_product, run_grouped_product
from lissom.ops.linear_attention import linear_attention, linear_attention_reference
from lissom.ops.packed_linear import packed_embedding, packed_linear, packed_linear_norm
from lissom.ops.quantized_linear import quantized_linear, quantized_linear_grouped, quantized_linear_norm
from lissom.ops.quantized_products import int4_product as int4_product
from lissom.ops.quantized_products import int8_product as int8_product
from lissom.ops.quantized_products import quantize_rows as quantize_rows
from lissom.ops.recurrences import gated_delta_rule as gated_delta_rule
from lissom.ops.recurrences import selective_scan as selective_scan
from lissom.ops.rotary import rotary, rotary_reference
from lissom.ops.sparse_linear import sparse_linear as sparse_linear
from lissom.ops.squared_relu import squared_relu, squared_relu_reference
from lissom.ops.weight_quantized_linear import (
    weight_quantized_linear,
    weight_quantized_linear_grouped,
    weight_quantized_linear_norm,
)

IMPLEMENTATIONS: Mapping[object, Callable[..., torch.Tensor]] = {
    attention: attention_reference,
    rotary: rotary_reference,
    squared_relu: squared_relu_reference,
    change_basis: change_basis_reference,
    grouped_product: run_grouped_product,
    linear_attention: linear_attention_reference,
    torch.ops.aten.linear.default: linear,
}
"""Python implementations of operators; calling them directly avoids the overhead of PyTorch's dispatcher."""

KERNELS = (
    block_sparse_linear,
    block_sparse_linear_norm,
    block_sparse_quantized_linear,
    block_sparse_quantized_linear_norm,
    packed_embedding,
    packed_linear,
    packed_linear_norm,
    quantized_linear,
    quantized_linear_grouped,
    quantized_linear_norm,
    weight_quantized_linear,
    weight_quantized_linear_grouped,
    weight_quantized_linear_norm,
    fused_attention,
    block_sparse_attention,
    merged_attention,
    unpadded_attention,
    fused_layer_norm,
    fused_rms_norm,
    fused_rotary,
)
"""The operators that programs are lowered to on a CPU; their kernels are in `lissom.ops.native`."""
