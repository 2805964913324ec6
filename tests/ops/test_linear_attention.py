"""`lissom::linear_attention` against weights written out in float64: quadratic, in chunks, token by token, and in ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.base import Backend
from lissom.compiler.analysis.flops import operations
from lissom.compiler.verify.divergence import relative_error
from lissom.ops import linear_attention
from lissom.ops.linear_attention import FLOOR
from tests.support.harness import apply, capture_model, every_backend
from tests.support.models import normal

aten = torch.ops.aten


def operands(
    heads: int = 4, key_heads: int = 4, queries: int = 11, keys: int | None = None, features: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that are not negative, and values, in float64."""
    keys = keys or queries
    q, k = normal(2, heads, queries, features), normal(2, key_heads, keys, features, seed=1)
    return q.abs().double(), k.abs().double(), normal(2, key_heads, keys, 5, seed=2).double()


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Each row's weights one head at a time, as a quadratic attention has them."""
    result = q.new_empty(*q.shape[:3], v.shape[3])
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        for row in range(q.shape[2]):
            end = row + 1 if causal else k.shape[2]
            weights = torch.einsum("bf,bkf->bk", q[:, head, row], k[:, group, :end])
            result[:, head, row] = torch.einsum("bk,bkd->bd", weights / weights.sum(1, keepdim=True), v[:, group, :end])
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
# Less than a chunk, one, more than one and not a multiple, a multiple.
@pytest.mark.parametrize("tokens", [1, 3, 4, 11, 16])
def test_numbers(tokens: int, key_heads: int, causal: bool) -> None:
    q, k, v = operands(key_heads=key_heads, queries=tokens)
    found = linear_attention(q, k, v, causal=causal, chunk=4)
    # Sums of some hundred products in float64.
    assert relative_error(by_hand(q, k, v, causal), found) < 1e-13


def test_keys_that_are_not_the_queries() -> None:
    q, k, v = operands(queries=3, keys=7)
    assert relative_error(by_hand(q, k, v, causal=False), linear_attention(q, k, v)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32(dtype: torch.dtype) -> None:
    """Of ones, a sum in bfloat16 ends at 256; the mean of as many values says whether it did."""
    ones = torch.ones(1, 1, 2000, 1, dtype=dtype)
    found = linear_attention(ones, ones, ones * 0.5, causal=True)
    assert found.dtype == dtype and torch.equal(found, ones * 0.5)


def test_features_with_nothing_in_common_give_zeros() -> None:
    q, k, v = operands()
    q[..., 3:], k[..., :3] = 0, 0
    for causal in (False, True):
        assert torch.equal(linear_attention(q, k, v, causal=causal), torch.zeros(2, 4, 11, 5).double())


def test_the_smallest_sums_are_above_the_floor() -> None:
    """Float32 features of exp(-30), the smallest a key may have, under a query that is 1 at its largest."""
    assert float(torch.tensor(-30.0).exp()) > 1e10 * FLOOR


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_flow(causal: bool) -> None:
    given = [item.requires_grad_() for item in operands(key_heads=2, queries=5)]
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, causal=causal, chunk=2), given)


def test_memory_grows_with_the_length_alone() -> None:
    """All that is allocated on the way: were anything of tokens × tokens, four times as many tokens would take far more."""
    taken: list[int] = []
    for tokens in (512, 2048):
        given = [normal(1, 2, tokens, 16).abs() for _ in range(3)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            linear_attention(*given, causal=True)
        taken.append(sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0))
    assert taken[1] < 4.1 * taken[0]


class Linear(nn.Module):
    """Attention over its own input, whose features are the input's absolute values."""

    def __init__(self, causal: bool, key_heads: int = 2) -> None:
        super().__init__()
        self.causal, self.key_heads = causal, key_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.abs().unflatten(-1, (4, -1)).transpose(1, 2)
        k = q[:, : self.key_heads]
        return linear_attention(q, k, k, causal=self.causal, chunk=8)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_backends_give_the_same(backend: Backend, causal: bool) -> None:
    module = Linear(causal)
    found = lissom.compile(module, (normal(2, 5, 16),), backend=backend)
    for tokens in (2, 8, 21):
        x = normal(3, tokens, 16, seed=tokens)
        # Float32 on both sides, in another order.
        assert relative_error(module(x), found(x)) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_operations_are_counted(causal: bool) -> None:
    captured = capture_model(Linear(causal), normal(2, 5, 16))
    program, _ = apply("exact", captured.program, captured.example)
    (node,) = program.nodes(linear_attention)
    shapes = {item: tuple(size) for item, size in zip(node.args, ((3, 4, 7, 4), (3, 2, 7, 4), (3, 2, 7, 4)), strict=True)}
    shapes[node] = (3, 4, 7, 4)
    # Two for each product: of keys with values and the ones beside them, and of queries with what that sums up to.
    wanted = 2 * 3 * 7 * (2 * 4 * 5 + 4 * 4 * 5 + (4 * 8 * (4 + 5) if causal else 0))
    assert operations(node, lambda item: shapes[item]) == wanted


def test_shapes_that_do_not_fit_are_refused_at_typing() -> None:
    q = torch.empty(1, 2, 5, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"is causal with as many keys as queries, not .1, 2, 5, 4. and .1, 2, 3, 4. and"):
        linear_attention(q, q[:, :, :3], q[:, :, :3], causal=True)
    with pytest.raises(RuntimeError, match=r"with heads a multiple of key_heads, not .1, 2, 5, 4. and .1, 2, 5, 3. and"):
        linear_attention(q, q[..., :3], q)
