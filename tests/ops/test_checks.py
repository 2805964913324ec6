"""What kernels, references and fake kernels refuse alike, and the empty operands they take."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lissom
from lissom.ops.block_sparse_linear import block_sparse_linear_reference, block_sparse_quantized_linear_reference
from lissom.ops.blocked_attention import blocked_attention
from lissom.ops.fused_attention import (
    fused_attention_reference,
    merged_attention_reference,
    unpadded_attention_reference,
)
from lissom.ops.fused_rows import fused_layer_norm_reference, fused_rms_norm_reference, fused_rotary_reference
from lissom.ops.native import load_kernels
from lissom.ops.packed_linear import pack, packed_embedding_reference, packed_linear_reference
from lissom.ops.pattern import Pattern
from lissom.ops.quantized_linear import quantized_linear_reference
from lissom.ops.weight_quantized_linear import weight_quantized_linear_reference

load_kernels()
OPS = torch.ops.lissom
X = torch.randn(3, 10)
WEIGHT = pack(torch.randn(40, 10))
BYTES = torch.zeros(2, 3, 32, 4, dtype=torch.int8)
STORED = torch.zeros(2, 10, 32, dtype=torch.int8)
FOUR_BITS = torch.zeros(2, 10, 16, dtype=torch.uint8)
ONES, SUMS, BLOCKS = torch.ones(64), torch.zeros(64, dtype=torch.int32), torch.ones(2, 1, 32)
IDS = torch.tensor([0, 39])
FOUR, FOUR_BLOCKS = torch.randn(5, 8), torch.randn(3, 4, 32)
BYTE_BLOCKS = torch.ones(3, 32, 4, dtype=torch.int8)
PLACES, ENDS = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
QKV = torch.randn(2, 5, 64)
ANGLES = torch.randn(5, 8)
REFERENCES = {
    "packed_linear": packed_linear_reference,
    "packed_embedding": packed_embedding_reference,
    "block_sparse_linear": block_sparse_linear_reference,
    "block_sparse_quantized_linear": block_sparse_quantized_linear_reference,
    "quantized_linear": quantized_linear_reference,
    "weight_quantized_linear": weight_quantized_linear_reference,
    "fused_attention": fused_attention_reference,
    "merged_attention": merged_attention_reference,
    "unpadded_attention": unpadded_attention_reference,
    "block_sparse_attention": blocked_attention,
    "fused_layer_norm": fused_layer_norm_reference,
    "fused_rms_norm": fused_rms_norm_reference,
    "fused_rotary": fused_rotary_reference,
}
EMBEDDING = {"features": 40, "bits": 32}
STORED_INT8 = {"features": 40, "format": "int8"}
SCALES = {"k_scale": torch.ones(2, 2, 7, 1), "v_scale": torch.ones(2, 2, 7, 1)}
HEADS = {"heads": 2, "key_heads": 1, "scale": 1.0}
WRONG = [
    ("packed_linear", (X, WEIGHT[:1]), {"features": 40}),
    ("packed_linear", (X, WEIGHT.flatten()), {"features": 40}),
    ("packed_linear", (X, WEIGHT.transpose(1, 2)), {"features": 40}),
    ("packed_linear", (X, WEIGHT.double()), {"features": 40}),
    ("packed_linear", (X, WEIGHT), {"features": -1}),
    ("packed_linear", (X, WEIGHT), {"features": 2**62}),
    ("packed_linear", (X[0, 0], WEIGHT), {"features": 40}),
    ("packed_linear", (X, WEIGHT, torch.ones(1)), {"features": 40}),
    ("packed_linear", (X, WEIGHT, None, torch.ones(40)), {"features": 40}),
    ("packed_linear", (X, WEIGHT, None, torch.ones(1, 3, 40)), {"features": 40}),
    ("packed_linear", (X, WEIGHT), {"features": 40, "combine": "sub"}),
    ("packed_linear", (X, WEIGHT), {"features": 40, "activation": "tanh"}),
    ("packed_embedding", (WEIGHT, IDS), {"features": 80, "bits": 32}),
    ("packed_embedding", (WEIGHT[..., :16].contiguous(), IDS), EMBEDDING),
    ("packed_embedding", (FOUR_BITS[:, :9].contiguous(), IDS), {"features": 40, "bits": 4}),
    ("packed_embedding", (WEIGHT, IDS), {"features": 40, "bits": 2}),
    ("packed_embedding", (WEIGHT, IDS.float()), EMBEDDING),
    ("block_sparse_linear", (FOUR, FOUR_BLOCKS, PLACES.long(), ENDS), {"features": 40}),
    ("block_sparse_linear", (FOUR, FOUR_BLOCKS[:2], PLACES, ENDS), {"features": 40}),
    ("block_sparse_linear", (FOUR[:, :7], FOUR_BLOCKS, PLACES, ENDS), {"features": 40}),
    ("block_sparse_linear", (FOUR, FOUR_BLOCKS, PLACES, ENDS), {"features": 80}),
    ("block_sparse_linear", (FOUR.bfloat16(), FOUR_BLOCKS, PLACES, ENDS), {"features": 40}),
    ("block_sparse_quantized_linear", (FOUR, BYTE_BLOCKS, PLACES, ENDS[:1], ONES, SUMS), {"features": 40}),
    ("block_sparse_quantized_linear", (FOUR, BYTE_BLOCKS, PLACES, ENDS, ONES[:40], SUMS), {"features": 40}),
    ("block_sparse_quantized_linear", (FOUR, BYTE_BLOCKS, PLACES, ENDS, ONES, SUMS), {"features": 40, "granularity": "group"}),
    ("quantized_linear", (X, BYTES[:, :2].contiguous(), ONES, SUMS), {"features": 40}),
    ("quantized_linear", (X, BYTES, ONES[:40], SUMS), {"features": 40}),
    ("quantized_linear", (X, BYTES, ONES, SUMS.long()), {"features": 40}),
    ("quantized_linear", (X, BYTES, ONES, SUMS, torch.ones(2)), {"features": 40}),
    ("quantized_linear", (X, BYTES, ONES, SUMS), {"features": 40, "granularity": "row"}),
    ("quantized_linear", (torch.ones(1, 2**17), torch.ones(1, 2**15, 32, 4).char(), ONES[:32], SUMS[:32]), {"features": 1}),
    ("weight_quantized_linear", (X, STORED, ONES), STORED_INT8),
    ("weight_quantized_linear", (X, STORED.float(), BLOCKS), STORED_INT8),
    ("weight_quantized_linear", (X, STORED, BLOCKS.repeat(1, 3, 1)), STORED_INT8),
    ("weight_quantized_linear", (X, STORED, BLOCKS.double()), STORED_INT8),
    ("weight_quantized_linear", (X, STORED, BLOCKS, BLOCKS.to(torch.int8)), STORED_INT8),
    ("weight_quantized_linear", (X, STORED, BLOCKS), {"features": 40, "format": "int2"}),
    ("weight_quantized_linear", (X, STORED, BLOCKS), {**STORED_INT8, "tensor_scale": 1e300}),
    ("weight_quantized_linear", (X, STORED, BLOCKS), {**STORED_INT8, "tensor_scale": float("nan")}),
    ("fused_attention", (Q, K, K[:, :1]), {"scale": 1.0}),
    ("fused_attention", (Q, K[:1], K[:1]), {"scale": 1.0}),
    ("fused_attention", (Q, K[..., :4], K), {"scale": 1.0}),
    ("fused_attention", (Q, K[:, :0], K[:, :0]), {"scale": 1.0}),
    ("fused_attention", (Q[:, :3], K, K), {"scale": 1.0}),
    ("fused_attention", (Q, K.bfloat16(), K), {"scale": 1.0}),
    ("fused_attention", (Q, K, K, torch.ones(6)), {"scale": 1.0}),
    ("fused_attention", (Q, K, K), {"scale": 1.0, "sinks": torch.ones(5)}),
    ("fused_attention", (Q, K, K), {"scale": 1.0, **SCALES}),
    ("fused_attention", (Q, K.char(), K.char()), {"scale": 1.0, **SCALES, "k_scale": torch.ones(2, 2, 7)}),
    ("fused_attention", (Q, K.char(), K.char()), {"scale": 1.0, "k_scale": SCALES["k_scale"]}),
    ("fused_attention", (Q, K.char(), torch.zeros(0, dtype=torch.int8)), {"scale": 1.0, **SCALES}),
    ("merged_attention", (QKV,), {"heads": 0, "key_heads": 0, "scale": 1.0}),
    ("merged_attention", (QKV,), {"heads": 2, "key_heads": -1, "scale": 1.0}),
    ("merged_attention", (QKV,), {"heads": 2**62, "key_heads": 2**62, "scale": 1.0}),
    ("merged_attention", (QKV,), {"heads": 5, "key_heads": 2, "scale": 1.0}),
    ("unpadded_attention", (Q, Q, Q, IDS[None], IDS[:1]), {"scale": 1.0}),
    ("unpadded_attention", (Q[:1], K[:1], K[:1], IDS[None, :1], IDS[:1]), {"scale": 1.0}),
    ("unpadded_attention", (Q[:1], Q[:1], Q[:1], IDS, IDS[:1]), {"scale": 1.0}),
    ("unpadded_attention", (Q[:1], Q[:1], Q[:1], IDS[None, :1], IDS[None, :1]), {"scale": 1.0}),
    ("unpadded_attention", (Q[:1], Q[:1], Q[:1], IDS[None, :1].float(), IDS[:1]), {"scale": 1.0}),
    ("unpadded_attention", (Q[:1], Q[:1], Q[:1], IDS[None, :1], IDS[:1], torch.ones(3)), {"scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, 1, 1, 0, 9, 1], "block": 4, "scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, -1, 1, 0, 9, 0, 0], "block": 4, "scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, -1, 1, 0, 9, 1, 2**31 - 1], "block": 4, "scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, -(2**63), 1, 0, 9, 1, 0], "block": 4, "scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, -1, 1, -(2**40), 9, 1, 0], "block": 4, "scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, -1, 1, 0, 9, 1, 0], "block": 0, "scale": 1.0}),
    ("block_sparse_attention", (Q, K, K), {"pattern": [0, 0, 0, 0, 0, 1, 0], "block": 4, "scale": 1.0}),
    (
        "block_sparse_attention",
        (Q, K, K, None, torch.ones(3, 2, 2, dtype=torch.bool)),
        {"pattern": [0, 0, 0, 0, 0, 1, 0], "block": 4, "scale": 1.0},
    ),
    ("fused_layer_norm", (X, None, torch.ones(9)), {"eps": 1e-5}),
    ("fused_layer_norm", (X[0, 0],), {"eps": 1e-5}),
    ("fused_rms_norm", (X, torch.ones(9)), {"eps": 1e-5}),
    ("fused_rms_norm", (X[0, 0],), {"eps": 1e-5}),
    ("fused_rotary", (Q, ANGLES[:, :3], ANGLES[:, :3]), {}),
    ("fused_rotary", (Q, ANGLES, ANGLES[:, :4]), {}),
    ("fused_rotary", (Q, ANGLES.double(), ANGLES.double()), {}),
    ("fused_rotary", (Q[..., :7], ANGLES[:, :7], ANGLES[:, :7]), {}),
    ("fused_rotary", (Q, ANGLES[:4], ANGLES[:4]), {}),
]


@pytest.mark.parametrize(("name", "operands", "options"), WRONG)
def test_wrong_operands_are_refused_alike(name, operands, options):
    operator, reference = getattr(OPS, name), REFERENCES[name]
    for call in (operator, reference):
        with pytest.raises(RuntimeError) as error:
            call(*operands, **options)
        assert "INTERNAL ASSERT" not in str(error.value)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError):
        operator(*operands, **options)


@pytest.mark.parametrize("ids", [[40], [-1], [2**40], [-(2**63)]])
def test_ids_past_the_table_are_refused(ids):
    for call in (OPS.packed_embedding, packed_embedding_reference):
        with pytest.raises(IndexError, match="index out of range in packed_embedding, which has rows 0 to 39"):
            call(WEIGHT, torch.tensor(ids), **EMBEDDING)


@pytest.mark.skipif(bool(load_kernels()), reason="the kernels' own")
def test_memory_that_cannot_be_read_is_refused():
    gone = X.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="a tensor has no memory; it may be fake, or its storage was freed"):
        OPS.fused_rms_norm(gone, eps=1e-5)
    unaligned = torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10)
    with pytest.raises(RuntimeError, match="x is not aligned to its dtype; clone it"):
        OPS.fused_rms_norm(unaligned, eps=1e-5)
    with pytest.raises(RuntimeError, match="the seconds to wait are not a number"):
        OPS.barrier(torch.zeros(2, 8, dtype=torch.int64), 0, 1, torch.nan)
    with pytest.raises(RuntimeError, match="rank 2 is out of range for 2 ranks"):
        OPS.barrier(torch.zeros(2, 8, dtype=torch.int64), 2, 1, 0.0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("rows", [2, 40])
def test_a_layer_without_inputs_gives_its_bias(rows):
    layer = nn.Linear(0, 4).eval()
    x = torch.randn(rows, 0)
    assert torch.equal(lissom.compile(layer, x)(x), layer(x))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (0, 0)])
def test_nothing_is_quantized_to_nothing(granularity, sizes):
    weight = torch.zeros(1, -(-sizes[1] // 4), 32, 4, dtype=torch.int8)
    operands = torch.zeros(sizes), weight, ONES[:32], SUMS[:32], None, None, None, torch.ones(7)
    for call in (OPS.quantized_linear, quantized_linear_reference):
        assert torch.equal(call(*operands, features=7, granularity=granularity), torch.ones(sizes[0], 7))
    assert OPS.fake_quantize_dynamic(torch.zeros(sizes), format="uint8", granularity=granularity).shape == sizes


def test_causal_float_bias_reads_no_memory_before_it():
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    bias = torch.randn(33, 33)
    found = OPS.fused_attention(q, k, v, bias, scale=0.4, causal=True)
    # Sums of 33 products in another order.
    torch.testing.assert_close(found, fused_attention_reference(q, k, v, bias, scale=0.4, causal=True), rtol=1e-5, atol=1e-5)


def test_alternatives_out_of_order_are_no_pattern():
    with pytest.raises(ValueError, match="must be numbered in order"):
        Pattern.decode([1, -1, 1, 0, 9, 1, 0, 0, -1, 1, 0, 9, 1, 0], 4)
    with pytest.raises(ValueError, match="modulus is from 0 to 1073741824"):
        Pattern.decode([0, -1, 1, 0, 9, 1, 2**31 - 1], 4)


def test_groups_end_at_rows_that_are_there():
    rows, weight = torch.randn(4, 3), torch.randn(2, 3, 5)
    for ends in ([-1, 3], [3, 2], [2, 5]):
        with pytest.raises(RuntimeError, match="lissom::grouped_product has 4 rows, and group"):
            OPS.grouped_product(rows, weight, torch.tensor(ends))
    with pytest.raises(RuntimeError, match="takes input"):
        OPS.grouped_product(rows, weight[..., :2, :], torch.tensor([1, 4]))


def test_linear_attention_without_key_heads_or_tokens():
    q, k = torch.rand(1, 2, 4, 3), torch.rand(1, 0, 4, 3)
    with pytest.raises(RuntimeError, match="with heads a multiple of key_heads"):
        OPS.linear_attention(q, k, k)
    with pytest.raises(RuntimeError, match="chunks of at least one token, not 0"):
        OPS.linear_attention(q, q, q, causal=True, chunk=0)
    for causal in (False, True):
        assert OPS.linear_attention(q[:, :, :0], q[:, :, :0], q[:, :, :0], causal=causal).shape == (1, 2, 0, 3)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_without_inputs_are_zero(rows, dtype):
    pair = (2,) if dtype == torch.bfloat16 else ()
    found = OPS.packed_linear(torch.empty(rows, 0, dtype=dtype), torch.empty(1, 0, 32, *pair, dtype=dtype), features=8)
    assert torch.equal(found, torch.zeros(rows, 8, dtype=dtype))
