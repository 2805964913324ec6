"""`lissom::packed_linear` and its relative with a norm: kernel and reference against float64."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lissom.compiler.verify.divergence import relative_error
from lissom.ops.epilogue import ACTIVATIONS
from lissom.ops.native import kernel_dtypes, load_kernels
from lissom.ops.packed_linear import (
    pack,
    packed_embedding,
    packed_embedding_reference,
    packed_linear,
    packed_linear_norm,
    packed_linear_reference,
    unpack,
)
from lissom.ops.weight_quantized_linear import pack_stored

# float32: sums of up to 400 products, in another order, and an activation good to 2e-7.  bfloat16: one rounding of the result.
MISSING = load_kernels()
ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 5e-3}
# The reference takes both; where there are kernels, the operator takes what they do.
DTYPES = kernel_dtypes() or tuple(ALLOWED)
# `packed_linear` calls the C++ kernel where there is one for the dtype, else the reference.
FORMS = {"operator": (packed_linear, packed_linear_norm), "reference": (packed_linear_reference, packed_linear_reference)}


def numbers(*sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    return torch.randn(sizes, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 31, 32, 33, 96])
def test_packing_loses_nothing(dtype, features):
    weight = numbers(features, 6, dtype=dtype)
    assert torch.equal(unpack(pack(weight), features), weight)


@pytest.mark.skipif(torch.float32 not in DTYPES, reason="no kernels")
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_long_sums_are_made_of_short_ones(rows):
    # Gemma's layers of 2,048 inputs: summed in one go, errors of 4e-6 in one layer become 6e-5 in the model.
    x, weight = numbers(rows, 4096), numbers(64, 4096) / 64
    found = packed_linear(x, pack(weight), features=64)
    # Sums of 192 products, 22 of them: 5e-7 measured, and 5e-6 in one go.
    assert relative_error(x.double() @ weight.double().T, found.double()) <= 1.5e-6


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 130),
    inputs=st.integers(1, 420),
    features=st.integers(1, 200),
    activation=st.sampled_from(list(ACTIVATIONS)),
    combine=st.sampled_from(["none", "add", "mul"]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(list(FORMS)),
)
def test_numbers(rows, inputs, features, activation, combine, with_bias, dtype, form):
    inputs += inputs % 2 if dtype == torch.bfloat16 else 0
    x, weight = numbers(rows, inputs, dtype=dtype), numbers(features, inputs, dtype=dtype) * inputs**-0.5
    bias = numbers(features, dtype=dtype) if with_bias else None
    other = numbers(rows, features, dtype=dtype) if combine != "none" else None
    wanted = ACTIVATIONS[activation](functional.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    if other is not None:
        wanted = wanted * other.double() if combine == "mul" else wanted + other.double()
    options = {"combine": combine} if other is not None else {}
    found = FORMS[form][0](x, pack(weight), bias, other, features=features, activation=activation, **options)
    # The reference rounds to bfloat16 after each of its operators, which a sum that cancels shows.
    allowed = ALLOWED[dtype] * (1 if form == "operator" or dtype == torch.float32 else 8)
    assert found.dtype == dtype
    assert relative_error(wanted, found.double()) < allowed


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 130),
    features=st.integers(2, 100),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(list(FORMS)),
)
def test_numbers_with_a_norm(rows, features, parts, dtype, form):
    x, weight = numbers(rows, 64, dtype=dtype), numbers(features, 64, dtype=dtype) / 8
    other = numbers(rows, features, dtype=dtype) if parts[0] else None
    gain = numbers(features, dtype=dtype, seed=1) if parts[1] else None
    shift = numbers(features, dtype=dtype, seed=2) if parts[2] else None
    total = functional.linear(x.double(), weight.double()) + (other.double() if other is not None else 0)
    as_double = [None if item is None else item.double() for item in (gain, shift)]
    wanted = functional.layer_norm(total, (features,), *as_double, 1e-5)
    found = FORMS[form][1](x, pack(weight), None, other, gain, shift, features=features, eps=1e-5)
    # A row of few features may vary little, and the norm then magnifies what is rounded before it.
    spread = float(total.std(-1, correction=0).min())
    magnified = max(1.0, float(total.abs().max()) / spread)
    assert relative_error(wanted, found.double()) < ALLOWED[dtype] * (1 if dtype == torch.float32 else 4) * magnified


def test_packed_weight_has_memory_of_its_own():
    weight = torch.randn(64, 32).T  # packed already, but for its shape
    assert pack(weight).data_ptr() != weight.data_ptr()


def test_extreme_values_stay_what_they_are():
    x = torch.tensor([[torch.nan, 1.0], [1e30, -1e30], [-90.0, 90.0], [0.0, -1e-30]])
    identity = pack(torch.eye(2))
    for name in ("relu", "silu", "gelu", "gelu_tanh", "squared_relu"):
        wanted = ACTIVATIONS[name](functional.linear(x, torch.eye(2)))
        found = packed_linear(x, identity, features=2, activation=name)
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_rows_are_independent_of_the_batch():
    """A row's answer does not depend on how many others are computed beside it, nor on how they are shared out."""
    x, weight = numbers(300, 64), pack(numbers(96, 64))
    whole = packed_linear(x, weight, features=96)
    for rows in (1, 7, 29, 84, 113):
        assert torch.equal(packed_linear(x[:rows], weight, features=96), whole[:rows])


def test_inputs_of_any_layout_and_rank():
    x, weight = numbers(4, 3, 5, 8), numbers(6, 8)
    wanted = functional.linear(x.transpose(0, 2), weight)
    # Eight products.
    torch.testing.assert_close(packed_linear(x.transpose(0, 2), pack(weight), features=6), wanted, rtol=0, atol=3e-6)
    assert packed_linear(x[:0], pack(weight), features=6).shape == (0, 3, 5, 6)


def test_a_wrong_weight_is_refused():
    if MISSING:
        pytest.skip(MISSING)
    with pytest.raises(RuntimeError, match=r"a packed weight has the sizes .* must be contiguous with the sizes"):
        packed_linear(numbers(2, 8), pack(numbers(6, 9)), features=6)


def test_without_kernels_the_reference_runs():
    script = (
        "import torch; from lissom.ops.native import load_kernels, kernel_dtypes\n"
        "from lissom.ops.packed_linear import pack, packed_linear\n"
        "assert 'LISSOM_NATIVE=0' in load_kernels() and kernel_dtypes() == ()\n"
        "x, w = torch.randn(3, 8), torch.randn(6, 8)\n"
        "torch.testing.assert_close(packed_linear(x, pack(w), features=6), x @ w.T)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "LISSOM_NATIVE": "0"})


def test_this_machine_has_kernels_where_it_has_a_compiler():
    assert MISSING or torch.float32 in kernel_dtypes()


LOOK_UPS = pytest.mark.parametrize("look_up", [packed_embedding, packed_embedding_reference], ids=["operator", "reference"])


@LOOK_UPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_weight(look_up, dtype):
    weight = torch.randn(70, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    indices = torch.tensor([[0, 69, 31], [32, 31, 5]], dtype=torch.int32)
    found = look_up(pack(weight), indices, features=70, bits=8 * dtype.itemsize)
    assert torch.equal(found, weight[indices])


@LOOK_UPS
def test_rows_of_four_bits_are_packed_by_two(look_up):
    q = torch.randint(0, 16, (70, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    indices = torch.tensor([0, 69, 15, 16, 47, 48])
    found = look_up(pack_stored(q, "uint4"), indices, features=70, bits=4)
    assert torch.equal(torch.stack((found & 15, found >> 4), -1).flatten(1), q[indices])


@LOOK_UPS
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float32])
def test_indices_are_of_the_types_that_embeddings_take(look_up, dtype):
    """PyTorch reads uint8 as a mask."""
    with pytest.raises((RuntimeError, ValueError), match="must be int64 or int32"):
        look_up(pack(torch.zeros(70, 24)), torch.zeros(0, dtype=dtype), features=70, bits=32)


@LOOK_UPS
@pytest.mark.parametrize("index", [70, 95, -1])
def test_a_row_that_is_not_there_is_refused(look_up, index):
    with pytest.raises(IndexError, match="rows 0 to 69"):
        look_up(pack(torch.zeros(70, 24)), torch.tensor([0, index]), features=70, bits=32)
