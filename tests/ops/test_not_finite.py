"""NaN and infinities: kernels and references give them where PyTorch's operators do."""

import pytest
import torch
from torch.nn import functional

from lissom.ops.attention import attention_reference
from lissom.ops.epilogue import ACTIVATIONS
from lissom.ops.fused_attention import fused_attention_reference
from lissom.ops.native import kernel_dtypes, load_kernels, missing_int8_kernel, missing_weight_quantized_kernel
from lissom.ops.packed_linear import pack
from lissom.ops.quantization import fake_quantize_dynamic_reference, fake_quantize_reference
from lissom.ops.quantized_linear import fill_panels, pack_bytes, quantized_linear_reference
from lissom.ops.weight_quantized_linear import pack_blocks, pack_stored

load_kernels()
OPS = torch.ops.lissom
DTYPES = kernel_dtypes() or (torch.float32,)
CPU = torch.device("cpu")
NAN, INF = torch.nan, torch.inf
SPECIAL = torch.tensor([NAN, INF, -INF, -1e38, 1e38, 1.0, -1.0])
WINDOW = {"pattern": [0, -1, 1, -2000, 2000, 1, 0], "block": 16}


def attention_of(form, q, k, v, bias=None, **options):
    if form == "block sparse":
        return OPS.block_sparse_attention(q, k, v, bias, **WINDOW, **options)
    return OPS.fused_attention(q, k, v, bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "block sparse"])
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("keys", [1, 16, 40, 100, 700])
@pytest.mark.parametrize("given", ["nothing", "softcap", "sinks", "seen", "bias"])
def test_a_query_of_nan_gives_a_row_of_nan(dtype, form, queries, keys, given):
    q, k, v = (torch.randn(1, 2, tokens, 16).to(dtype) for tokens in (queries, keys, keys))
    q[0, 0, queries // 2, 3] = NAN
    options = {"softcap": {"softcap": 2.0}, "sinks": {"sinks": torch.zeros(2, 1, 1)}}.get(given, {})
    bias = {"seen": torch.arange(keys) < max(keys - 3, 1), "bias": torch.zeros(queries, keys)}.get(given)
    found = attention_of(form, q, k, v, bias, scale=0.25, **options)
    # In float32: bfloat16 products of oneDNN by AMX spread a NaN to the row beside it.
    wanted = fused_attention_reference(q.float(), k.float(), v.float(), bias, scale=0.25, **options)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().sum() == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "block sparse"])
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_nan_key_spoils_every_row_that_sees_it(dtype, form, queries, place):
    q, k, v = (torch.randn(1, 1, tokens, 16).to(dtype) for tokens in (queries, 100, 100))
    k[0, 0, place] = NAN
    seen = torch.ones(queries, 100, dtype=torch.bool)
    seen[0, place] = False
    found = attention_of(form, q, k, v, seen, scale=0.25)
    assert found.isnan().all(-1).flatten().tolist() == [False] + [True] * (queries - 1)
    # In float32: bfloat16 products of oneDNN by AMX spread a NaN to the row beside it.
    wanted = attention_reference(q.float(), k.float(), v.float(), seen, scale=0.25)
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "block sparse"])
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_sink_that_is_no_number_spoils_its_head(dtype, form, queries, value):
    q, k, v = (torch.randn(1, 2, tokens, 16).to(dtype) for tokens in (queries, 50, 50))
    sinks = torch.tensor([0.0, value]).view(2, 1, 1)
    found = attention_of(form, q, k, v, scale=0.25, sinks=sinks)
    assert found.isnan().flatten(2).all(-1).tolist() == [[False, True]]
    assert torch.equal(found.isnan(), attention_reference(q, k, v, scale=0.25, sinks=sinks).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "block sparse"])
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("score", [INF, -INF])
def test_infinite_scores_are_as_in_pytorchs_operator(dtype, form, queries, score):
    q, k, v = (torch.ones(1, 1, tokens, 16).to(dtype) for tokens in (queries, 50, 50))
    k[..., 0] = score
    found = attention_of(form, q, k, v, scale=0.25)
    # A row of which every score is minus infinity yields zeros, as does one that sees no key.
    assert torch.equal(found.nan_to_num(9.0), functional.scaled_dot_product_attention(q, k, v, scale=0.25).nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "block sparse"])
@pytest.mark.parametrize("mask", ["boolean", "floats"])
def test_row_without_visible_key_yields_zeros_as_pytorch(dtype, form, mask):
    q, k, v = (torch.randn(1, 1, 20, 16).to(dtype) for _ in range(3))
    if mask == "boolean":  # NaN plus minus infinity is NaN
        q[0, 0, 3] = NAN
    seen = torch.ones(20, 20, dtype=torch.bool)
    seen[3] = seen[5] = False
    bias = seen if mask == "boolean" else torch.zeros(20, 20).masked_fill(~seen, -INF)
    found = attention_of(form, q, k, v, bias, scale=0.25)
    assert (found[0, 0, [3, 5]] == 0).all()
    assert found[0, 0, 4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rows", [1, 40])
def test_activations_of_no_numbers(dtype, activation, rows):
    x = SPECIAL.to(dtype)[:, None].expand(-1, 16).contiguous()[torch.arange(rows) % len(SPECIAL)]
    weight = torch.eye(16)[:1].expand(48, 16).to(dtype).contiguous()
    weight[:] = 0.0
    weight[:, 0] = 1.0
    x[:, 1:] = 0.0
    found = OPS.packed_linear(x, pack(weight), features=48, activation=activation)
    wanted = ACTIVATIONS[activation](x[:, :1].expand(-1, 48))
    finite = wanted.isfinite()
    if activation == "gelu":  # PyTorch's is NaN at infinity, where the limit is infinite
        finite |= x[:, :1] == INF
        assert (found[(x[:, 0] == INF)] == INF).all()
        wanted = wanted.masked_fill(x[:, :1] == INF, INF)
    assert torch.equal(found.isnan(), wanted.isnan())
    numbers = wanted.isfinite()
    # Activations are good to 2e-7, and rounded once to bfloat16.
    torch.testing.assert_close(found[numbers], wanted[numbers], rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF])
def test_norms_of_no_numbers(dtype, value):
    x = torch.randn(3, 20).to(dtype)
    x[1, 7] = value
    weight = pack(torch.eye(20).to(dtype))
    found = OPS.packed_linear_norm(x, weight, features=20, eps=1e-5)
    assert found.isnan().all(-1).tolist() == [False, True, False]
    found = OPS.fused_rms_norm(x, eps=1e-5)
    assert torch.equal(found.isnan(), functional.rms_norm(x, (20,), None, 1e-5).isnan())


@pytest.mark.skipif(missing_int8_kernel(torch.float32, CPU) is not None, reason="no kernel for bytes here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_bytes_of_no_numbers(dtype, granularity, value):
    x = torch.randn(3, 20).to(dtype)
    x[1, 7] = value
    q = torch.ones(5, 20, dtype=torch.int8)
    operands = x, pack_bytes(q), fill_panels(torch.ones(5), 5), fill_panels(q.sum(1, dtype=torch.int32), 5)
    for call in (OPS.quantized_linear, quantized_linear_reference):
        found = call(*operands, features=5, granularity=granularity)
        assert found.isnan().all(-1).tolist() == [granularity == "tensor", True, granularity == "tensor"]
    known = torch.tensor(0.02), torch.tensor(128, dtype=torch.uint8)
    found, wanted = (call(*operands, *known, features=5) for call in (OPS.quantized_linear, quantized_linear_reference))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found[1].isnan().all() == (value != value)


@pytest.mark.parametrize("format", ["int8", "uint8", "int4", "uint4", "fp8"])
def test_quantized_values_keep_nan(format):
    x = torch.tensor([1.0, NAN, -1.0, INF])
    zero_point = None if format in ("int8", "int4", "fp8") else torch.tensor(3.0)
    found = fake_quantize_reference(x, torch.tensor(0.5), zero_point, format=format)
    assert found.isnan().tolist() == [False, True, False, False]
    rows = torch.tensor([[1.0, 2.0], [NAN, 1.0]])
    assert fake_quantize_dynamic_reference(rows, format=format).isnan().any(-1).tolist() == [False, True]


@pytest.mark.skipif(
    missing_weight_quantized_kernel(torch.float32, CPU) is not None, reason="no kernel for stored integers here"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_nan_meets_stored_weights(dtype, rows):
    x = torch.randn(rows, 20).to(dtype)
    x[0, 7] = NAN
    q = torch.ones(5, 20, dtype=torch.uint8)
    operands = pack_stored(q, "uint4"), pack_blocks(torch.ones(5, 2), 5), pack_blocks(torch.ones(5, 2, dtype=torch.uint8), 5)
    found = OPS.weight_quantized_linear(x, *operands, features=5, format="uint4")
    assert found.isnan().all(-1).tolist() == [True] + [False] * (rows - 1)
