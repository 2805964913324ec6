"""`lissom::fused_layer_norm`, `fused_rms_norm` and `fused_rotary`: kernel and reference against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lissom.compiler.verify.divergence import relative_error
from lissom.ops.fused_rows import (
    fused_layer_norm,
    fused_layer_norm_reference,
    fused_rms_norm,
    fused_rms_norm_reference,
    fused_rotary,
    fused_rotary_reference,
)
from lissom.ops.native import kernel_dtypes, load_kernels
from lissom.ops.rotary import rotary_reference

load_kernels()
# float32: a sum of up to a hundred squares in another order.  bfloat16: the reference rounds after each of its operators.
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
# The reference takes both; where there are kernels, the operator takes what they do.
DTYPES = kernel_dtypes() or tuple(ALLOWED)


def numbers(*sizes, dtype=torch.float32, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 100),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from([fused_rms_norm, fused_rms_norm_reference]),
)
def test_rms_norm(rows, features, weighted, dtype, form):
    x, weight = numbers(rows, features, dtype=dtype), numbers(features, dtype=dtype) if weighted else None
    wanted = functional.rms_norm(x.double(), (features,), None if weight is None else weight.double(), 1e-5)
    found = form(x, weight, eps=1e-5)
    assert found.dtype == dtype
    assert relative_error(wanted, found.double()) < ALLOWED[dtype]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    features=st.integers(2, 100),
    weighted=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from([fused_layer_norm, fused_layer_norm_reference]),
)
def test_layer_norm(rows, features, weighted, biased, dtype, form):
    x = numbers(rows, features, dtype=dtype)
    weight, bias = (numbers(features, dtype=dtype, seed=n) if given else None for n, given in ((1, weighted), (2, biased)))
    doubles = [None if item is None else item.double() for item in (weight, bias)]
    wanted = functional.layer_norm(x.double(), (features,), *doubles, 1e-5)
    found = form(x, weight, bias, eps=1e-5)
    assert found.dtype == dtype
    # Two features may be close to each other, and their difference is what is normed.
    assert relative_error(wanted, found.double()) < ALLOWED[dtype] * (10 if features < 8 else 1)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.sampled_from([2, 8, 32, 50, 128])),
    rank=st.sampled_from([2, 3, 4]),
    halved=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from([fused_rotary, fused_rotary_reference]),
)
def test_rotary(sizes, rank, halved, interleaved, dtype, form):
    batch, heads, tokens, depth = sizes
    x = numbers(batch, tokens, heads, depth, dtype=dtype).transpose(1, 2)
    shape = (batch, 1, tokens, depth // 2 if halved else depth)[4 - rank :]
    cos, sin = numbers(*shape, dtype=dtype, seed=1), numbers(*shape, dtype=dtype, seed=2)
    if rank == 3:
        cos, sin = cos[:1], sin[:1]
    wanted = rotary_reference(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    found = form(x, cos, sin, interleaved=interleaved)
    assert found.shape == x.shape
    assert found.transpose(1, 2).is_contiguous()
    assert relative_error(wanted, found.double()) < ALLOWED[dtype]


def test_wrong_angles_are_refused():
    if load_kernels():
        pytest.skip(load_kernels())
    with pytest.raises(RuntimeError, match="one for each of an even number of features, here 8, or one a pair"):
        fused_rotary(numbers(1, 2, 3, 8), numbers(3, 5), numbers(3, 5))
