"""The operators that a program in an artifact may call, by name; the overload is `default` where none is written.

A file may call an operator with any arguments, so an operator is on the list only when it computes its results from its
arguments and does nothing else. The list was made from PyTorch 2.13 as follows.

1. Included: the operators in captured models of the zoo, and those that Lissom's passes make or match.
2. Included: the operators that PyTorch tags as core or pointwise, and the public tensor functions that models use.
3. Excluded: operators that draw random numbers, seed, write to an argument other than state, print, wait, read files, take
   objects other than tensors, numbers and text, or compute gradients; special functions that no model uses.
4. Excluded: operators that read uninitialised memory (`empty`), or that do not check the sizes of their arguments and so read
   out of bounds: `_reshape_alias`, `_nested_view_from_buffer`, `_sparse_coo_tensor_unsafe`, `_unsafe_index`, `_fft_c2r`,
   `_native_batch_norm_legit`. `as_strided` checks the storage, `_unsafe_view` the number of elements. Attention, batch
   norm with running statistics, and recurrent layers lack some checks; the functions in `backends/eager/methods.py` make them.

`python -m tools.list_operators` collects the operators of the zoo again, and prints those that are missing here.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES: Mapping[str, str] = {
    "aten": """
    __and__.Scalar __and__.Tensor __lshift__.Scalar __lshift__.Tensor __or__.Scalar __or__.Tensor __rshift__.Scalar
    __rshift__.Tensor __xor__.Scalar __xor__.Tensor _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async.msg
    _assert_scalar _assert_tensor_metadata _conj _grouped_mm _int_mm _is_all_true _log_softmax
    _native_batch_norm_legit_no_training _scaled_mm _softmax _to_copy _unique2 _unsafe_view _upsample_bicubic2d_aa
    _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec _weight_int4pack_mm
    _weight_int8pack_mm _weight_norm abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add.Scalar add.Tensor addbmm addcdiv addcmul addmm
    addmm.dtype addmv addr adjoint affine_grid_generator alias all all.dim all.dims alpha_dropout amax amin aminmax
    angle any any.dim any.dims arange arange.start arange.start_step arctan2 argmax argmin argsort argsort.stable
    as_strided asin asinh atan atan2 atanh atleast_1d atleast_1d.Sequence atleast_2d atleast_2d.Sequence atleast_3d
    atleast_3d.Sequence avg_pool1d avg_pool2d avg_pool3d baddbmm baddbmm.dtype batch_norm bincount bitwise_and.Scalar
    bitwise_and.Scalar_Tensor bitwise_and.Tensor bitwise_left_shift.Scalar_Tensor bitwise_left_shift.Tensor
    bitwise_left_shift.Tensor_Scalar bitwise_not bitwise_or.Scalar bitwise_or.Scalar_Tensor bitwise_or.Tensor
    bitwise_right_shift.Scalar_Tensor bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar
    bitwise_xor.Scalar_Tensor bitwise_xor.Tensor block_diag bmm broadcast_tensors broadcast_to bucketize.Scalar
    bucketize.Tensor cartesian_prod cat cdist ceil celu channel_shuffle chunk clamp clamp.Tensor clamp_max
    clamp_max.Tensor clamp_min clamp_min.Tensor clip clip.Tensor clone col2im column_stack complex concat concatenate
    conj conj_physical constant_pad_nd contiguous conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution copy copy_ copysign.Scalar
    copysign.Tensor cos cosh cosine_similarity count_nonzero count_nonzero.dim_IntList cross cummax cummin cumprod
    cumsum deg2rad detach diag diag_embed diagonal diagonal_scatter diff digamma div.Scalar div.Scalar_mode div.Tensor
    div.Tensor_mode divide.Scalar divide.Scalar_mode divide.Tensor divide.Tensor_mode dot dropout dsplit.array
    dsplit.int dstack einsum elu embedding empty_like eq.Scalar eq.Tensor erf erfc erfinv exp exp2 expand expand_as
    expm1 eye eye.m fake_quantize_per_channel_affine fake_quantize_per_tensor_affine feature_dropout
    fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill.Scalar fill.Tensor fix flatten.using_ints flip
    fliplr flipud float_power.Scalar float_power.Tensor_Scalar float_power.Tensor_Tensor floor floor_divide
    floor_divide.Scalar fmax fmin fmod.Scalar fmod.Tensor frac frexp.Tensor frobenius_norm.dim full full_like gather
    gcd ge.Scalar ge.Tensor gelu glu greater.Scalar greater.Tensor greater_equal.Scalar greater_equal.Tensor
    grid_sampler group_norm gru.input gt.Scalar gt.Tensor hamming_window hamming_window.periodic
    hamming_window.periodic_alpha hamming_window.periodic_alpha_beta hann_window hann_window.periodic hardshrink
    hardsigmoid hardswish hardtanh heaviside histc hsplit.array hsplit.int hstack hypot i0 igamma igammac im2col imag
    index.Tensor index_add index_copy index_copy_ index_fill.int_Scalar index_fill.int_Tensor index_put index_reduce
    index_select inner instance_norm inverse isclose isfinite isin.Scalar_Tensor isin.Tensor_Scalar isin.Tensor_Tensor
    isinf isnan isneginf isposinf istft item kron kthvalue layer_norm lcm ldexp.Tensor le.Scalar le.Tensor leaky_relu
    lerp.Scalar lerp.Tensor less.Scalar less.Tensor less_equal.Scalar less_equal.Tensor lgamma lift_fresh_copy
    linalg_cross linalg_det linalg_inv linalg_matrix_norm linalg_matrix_norm.str_ord linalg_norm linalg_norm.ord_str
    linalg_solve linalg_vector_norm linear linspace linspace.Scalar_Tensor linspace.Tensor_Scalar
    linspace.Tensor_Tensor log log10 log1p log2 log_sigmoid log_softmax.int logaddexp logaddexp2 logcumsumexp
    logical_and logical_not logical_or logical_xor logit logspace logspace.Scalar_Tensor logspace.Tensor_Scalar
    logspace.Tensor_Tensor logsumexp lstm.input lt.Scalar lt.Tensor mT masked_fill.Scalar masked_fill.Tensor
    masked_scatter masked_select matmul matrix_H max max.dim max.other max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean mean.dim median median.dim meshgrid
    meshgrid.indexing min min.dim min.other minimum mish mm mm.dtype moveaxis.int moveaxis.intlist movedim.int
    movedim.intlist mse_loss mul.Scalar mul.Tensor multiply.Scalar multiply.Tensor mv mvlgamma nan_to_num nanmean
    nansum narrow narrow.Tensor native_layer_norm ne.Scalar ne.Tensor neg negative new_empty new_full new_ones
    new_zeros nextafter nonzero norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype norm.ScalarOpt_dtype
    not_equal.Scalar not_equal.Tensor numpy_T one_hot ones ones_like outer pad pairwise_distance permute pixel_shuffle
    pixel_unshuffle polar polygamma positive pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu prod prod.dim_int
    rad2deg ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder.Scalar
    remainder.Scalar_Tensor remainder.Tensor repeat repeat_interleave.Tensor repeat_interleave.self_Tensor
    repeat_interleave.self_int replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj
    resolve_neg rms_norm rnn_relu.input rnn_tanh.input roll rot90 round round.decimals row_stack rsqrt rsub.Scalar
    rsub.Tensor scalar_tensor scaled_dot_product_attention scatter.reduce scatter.src scatter.value
    scatter.value_reduce scatter_add scatter_reduce.two select.int select_scatter selu sgn sigmoid sign signbit silu
    sin sinc sinh slice.Tensor slice_scatter softmax.int softplus softshrink sort sort.stable special_entr special_erf
    special_erfcx special_expit special_expm1 special_i0e special_i1 special_i1e special_log_ndtr special_ndtri
    special_xlog1py special_xlog1py.other_scalar special_xlog1py.self_scalar special_xlogy special_xlogy.other_scalar
    special_xlogy.self_scalar special_zeta special_zeta.other_scalar special_zeta.self_scalar split.Tensor split.sizes
    split_with_sizes sqrt square squeeze squeeze.dim squeeze.dims stack std std.correction std.dim std_mean
    std_mean.correction std_mean.dim stft stft.center sub.Scalar sub.Tensor subtract.Scalar subtract.Tensor sum
    sum.dim_IntList swapaxes swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_size.int
    sym_storage_offset sym_stride sym_stride.int t take take_along_dim tan tanh tensor_split.indices
    tensor_split.sections tensor_split.tensor_indices_or_sections tensordot threshold tile to.device to.dtype
    to.dtype_layout to.other topk trace transpose.int tril tril_indices triu triu_indices true_divide.Scalar
    true_divide.Tensor trunc type_as unbind.int unflatten.int unfold unique_consecutive unique_dim unsqueeze
    upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_linear1d
    upsample_linear1d.vec upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec
    upsample_nearest3d upsample_nearest3d.vec upsample_trilinear3d upsample_trilinear3d.vec var var.correction var.dim
    var_mean var_mean.correction var_mean.dim vdot view view.dtype view_as view_as_complex view_as_real vsplit.array
    vsplit.int vstack where where.Scalar where.ScalarOther where.ScalarSelf where.self xlogy.Scalar_Other
    xlogy.Scalar_Self xlogy.Tensor zero zeros zeros_like
    """,
    "lissom": """
    attention block_sparse_attention block_sparse_linear block_sparse_linear_norm block_sparse_quantized_linear
    block_sparse_quantized_linear_norm change_basis dequantize fake_quantize fake_quantize_dynamic fused_attention
    fused_layer_norm fused_rms_norm fused_rotary gated_delta_rule grouped_product int4_product int8_product linear_attention
    merged_attention packed_embedding packed_linear packed_linear_norm quantize_rows quantized_linear quantized_linear_grouped
    quantized_linear_norm rotary selective_scan sparse_linear squared_relu unpadded_attention weight_quantized_linear
    weight_quantized_linear_grouped weight_quantized_linear_norm
    """,
}
ALLOWED = frozenset(
    f"{namespace}.{name}" if "." in name else f"{namespace}.{name}.default"
    for namespace, names in _NAMES.items()
    for name in names.split()
)
"""Names as PyTorch writes them, `aten.linear.default`."""
FIXED: Mapping[str, Mapping[str, object]] = {
    "aten.dropout.default": {"train": False},
    "aten.feature_dropout.default": {"train": False},
    "aten.alpha_dropout.default": {"train": False},
    "aten.scaled_dot_product_attention.default": {"dropout_p": 0.0},
    **{f"aten.{name}.input": {"train": False} for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
"""Arguments with a single allowed value: with any other, the operator draws random numbers."""
