"""How the kernels multiply: in float32, by an instruction for bfloat16, by tiles of AMX or their emulation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from lissom.compiler.verify.divergence import relative_error
from lissom.ops.native import load_kernels, missing_int8_kernel, missing_weight_quantized_kernel, self_test
from lissom.ops.packed_linear import pack
from lissom.ops.quantized_linear import fill_panels, pack_bytes
from lissom.ops.weight_quantized_linear import pack_blocks, pack_stored

MISSING = load_kernels()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))

CPU = torch.device("cpu")
INT8 = missing_int8_kernel(torch.float32, CPU) is None
WEIGHT_ONLY = missing_weight_quantized_kernel(torch.float32, CPU) is None


@pytest.fixture(autouse=True, scope="module")
def _as_before() -> Iterator[None]:
    """Let the kernels multiply as before when these tests end."""
    if MISSING:
        yield
        return
    dots, amx = torch.ops.lissom.dots_bfloat16(), torch.ops.lissom.use_amx()
    yield
    torch.ops.lissom.dots_bfloat16(dots)
    torch.ops.lissom.use_amx(amx)


def multiply(*, dots: bool = False, amx: bool = False) -> bool:
    """Let the kernels multiply in this way; False where it is not there."""
    return torch.ops.lissom.dots_bfloat16(dots) == dots and torch.ops.lissom.use_amx(amx) == amx


def numbers(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("way", [{"dots": True}, {"amx": True}], ids=["dots", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_gives_the_same_each_way(dtype: torch.dtype, way: dict[str, bool]) -> None:
    if not multiply(**way):
        pytest.skip("this processor lacks the instruction")
    for name, _, operands, options in self_test.cases(dtype):
        kernel = getattr(torch.ops.lissom, name)
        multiply()
        wanted = kernel(*operands, **options)
        multiply(**way)
        # In bfloat16 attention rounds its weights to 8 bits, and each result is rounded once more.
        for one, other in zip(tree_leaves(wanted), tree_leaves(kernel(*operands, **options)), strict=True):
            assert relative_error(one.float(), other.float()) < 1e-2, name


SIZES = st.integers(1, 200)


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(8, 100), inputs=SIZES, features=SIZES, norm=st.booleans(), combine=st.sampled_from(["add", "mul"]))
def test_linear_layers_by_tiles(rows: int, inputs: int, features: int, norm: bool, combine: str) -> None:
    inputs *= 2
    x, weight = numbers(rows, inputs, dtype=torch.bfloat16), pack(numbers(features, inputs, dtype=torch.bfloat16) / inputs**0.5)
    bias, other = numbers(features), numbers(rows, features, dtype=torch.bfloat16)
    found = []
    for amx in (False, True):
        multiply(amx=amx)
        if norm:
            found.append(torch.ops.lissom.packed_linear_norm(x, weight, bias, other, features=features, eps=1e-2))
        else:
            options = {"features": features, "activation": "gelu", "combine": combine}
            found.append(torch.ops.lissom.packed_linear(x, weight, bias, other, **options))
    # The sums are in float32 in another order: a result in bfloat16 is one step of 2^-8 off at most.
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=1e-3)


@torch.inference_mode()
@pytest.mark.skipif(not INT8, reason="this processor has no int8 kernel")
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(8, 70), inputs=SIZES, features=SIZES, granularity=st.sampled_from(["token", "tensor"]))
def test_int8_by_tiles_is_bit_equal(rows: int, inputs: int, features: int, granularity: str) -> None:
    q = torch.randint(-127, 128, (features, inputs), generator=torch.Generator().manual_seed(inputs)).to(torch.int8)
    scale = fill_panels(torch.rand(features, generator=torch.Generator().manual_seed(1)) / 300, features)
    operands = numbers(rows, inputs), pack_bytes(q), scale, fill_panels(q.sum(1, dtype=torch.int32), features)
    found = []
    for amx in (False, True):
        multiply(amx=amx)
        found.append(torch.ops.lissom.quantized_linear(*operands, features=features, granularity=granularity))
    assert torch.equal(*found)


@torch.inference_mode()
@pytest.mark.skipif(not WEIGHT_ONLY, reason="this processor has no weight-only kernel")
@pytest.mark.parametrize("rows", [8, 25, 64])
def test_weight_only_layers_by_tiles(rows: int) -> None:
    features, inputs = 45, 66
    q = torch.randint(-8, 8, (features, inputs), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    operands = (
        numbers(rows, inputs, dtype=torch.bfloat16),
        pack_stored(q, "int4"),
        pack_blocks(numbers(features, 2).abs(), features),
    )
    found = []
    for amx in (False, True):
        multiply(amx=amx)
        found.append(torch.ops.lissom.weight_quantized_linear(*operands, None, features=features, format="int4"))
    # Weights are rounded to bfloat16 for tiles.
    assert relative_error(found[0].float(), found[1].float()) < 1e-2


@torch.inference_mode()
@settings(max_examples=40, deadline=None)
@given(queries=st.integers(8, 70), keys=SIZES, head_dim=st.integers(1, 70), causal=st.booleans(), masked=st.booleans())
def test_attention_by_tiles(queries: int, keys: int, head_dim: int, causal: bool, masked: bool) -> None:
    q = numbers(2, 4, queries, head_dim, dtype=torch.bfloat16)
    k, v = (numbers(2, 2, keys, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    mask = numbers(2, 1, 1, keys) > 0 if masked else None
    found = []
    for amx in (False, True):
        multiply(amx=amx)
        found.append(torch.ops.lissom.fused_attention(q, k, v, mask, scale=0.3, causal=causal).float())
    # Weights of at most 1 are rounded to 8 bits, and the result once more.
    assert relative_error(*found) < 1e-2


@torch.inference_mode()
@settings(max_examples=40, deadline=None)
@given(queries=st.integers(8, 150), window=st.integers(0, 60), head_dim=st.integers(1, 70), masked=st.booleans())
def test_block_sparse_attention_by_tiles(queries: int, window: int, head_dim: int, masked: bool) -> None:
    q, k, v = (numbers(2, 2, queries, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (0, 1, 2))
    mask = numbers(2, 1, queries, queries) > 0 if masked else None
    pattern = {"pattern": [0, -1, 1, -window, 0, 1, 0], "block": 16, "scale": 0.3}
    found = []
    for amx in (False, True):
        multiply(amx=amx)
        found.append(torch.ops.lissom.block_sparse_attention(q, k, v, mask, None, **pattern).float())
    assert relative_error(*found) < 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 5, 30, 113])
def test_products_of_bfloat16_in_float32_are_rounded_once(rows: int) -> None:
    x, weight = numbers(rows, 70, dtype=torch.bfloat16), numbers(45, 70, dtype=torch.bfloat16)
    multiply()
    options = {"features": 45, "activation": "none", "combine": "add"}
    found = torch.ops.lissom.packed_linear(x, pack(weight), None, None, **options)
    wanted = torch.ops.lissom.packed_linear(x.float(), pack(weight.float()), None, None, **options)
    # The same sums in the same order but for contraction to fused multiply-adds: a few may round the other way.
    assert (found == wanted.bfloat16()).float().mean() > 0.99


@torch.inference_mode()
def test_rounding_is_that_of_pytorch() -> None:
    """Stores are emulated where the processor cannot round to bfloat16: ties, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(2, 300, generator=generator) * torch.tensor([[1.0], [2.0**-8]])
    ends = [
        (1, 2**-8),
        (1 + 2**-7, 2**-8),
        (-1, -(2**-8)),
        (torch.inf, 1),
        (-torch.inf, 1),
        (torch.nan, 1),
        (3.38e38, 2e36),
        (0, 0),
    ]
    terms = torch.cat([torch.stack([large, small], 1), torch.tensor(ends)]).bfloat16()
    multiply()
    x, options = torch.ones(1, 2, dtype=torch.bfloat16), {"features": len(terms), "activation": "none", "combine": "add"}
    found = torch.ops.lissom.packed_linear(x, pack(terms), None, None, **options)
    torch.testing.assert_close(found, terms.float().sum(1).bfloat16()[None], rtol=0, atol=0, equal_nan=True)
