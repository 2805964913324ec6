"""Tests of fuse-attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lissom.ops import attention, fused_attention, merged_attention
from lissom.passes.lowering.fuse_attention import FuseAttention
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, rewrite
from tests.support.models import normal, tiny_bert, tiny_llama

FUSED = {
    "plain": lambda q, k: scaled_dot_product_attention(q, k, k),
    "scaled": lambda q, k: scaled_dot_product_attention(q, k, k, scale=2.0),
    "causal": lambda q, k: scaled_dot_product_attention(q, k, k, is_causal=True),
    "masked": lambda q, k: scaled_dot_product_attention(q, k, k, attn_mask=(q @ k.transpose(-1, -2)) > 0),
    "biased": lambda q, k: scaled_dot_product_attention(q, k, k, attn_mask=q @ k.transpose(-1, -2)),
    "grouped": lambda q, k: scaled_dot_product_attention(q, k[:, :2], k[:, :2], enable_gqa=True),
    "soft-capped": lambda q, k: attention(q, k, k, scale=0.5, softcap=2.0),
    "a sink a head": lambda q, k: attention(q, k, k, scale=0.5, sinks=q[:1, :, :1, :1]),
}
LEFT = {
    "rank 3": lambda q, k: scaled_dot_product_attention(q[0], k[0], k[0]),
    "float64": lambda q, k: scaled_dot_product_attention(q.double(), k.double(), k.double()).float(),
    "one key head for all": lambda q, k: scaled_dot_product_attention(q, k[:, :1], k[:, :1]),
    "a sink a query": lambda q, k: attention(q, k, k, scale=0.5, sinks=q[..., :1]),
    "one batch for all": lambda q, k: scaled_dot_product_attention(q, k[:1], k[:1]),
}


@pytest.mark.parametrize("name", FUSED)
def test_attention_is_fused_and_gives_the_same(name: str) -> None:
    module = Calls(FUSED[name])
    program, _ = rewrite(FuseAttention(), module, normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1), dynamic=False)
    assert calls(program, fused_attention) == 1
    q, k = normal(2, 4, 5, 8, seed=2), normal(2, 4, 5, 8, seed=3)
    # Two float32 kernels.
    torch.testing.assert_close(program(q, k), module(q, k), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_kernel_is_left_with_the_reason(name: str) -> None:
    program, history = rewrite(
        FuseAttention(), Calls(LEFT[name]), normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1), dynamic=False
    )
    assert calls(program, aten.scaled_dot_product_attention.default) + calls(program, attention) == 1
    assert history.steps[1].skipped[0].reason


def test_rewrites() -> None:
    _, history = rewrite(FuseAttention(), Calls(FUSED["causal"]), normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1), dynamic=False)
    check_golden("fuse_attention", history.diff(0, 1))


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_every_attention_of_a_model_is_fused(build) -> None:
    case = build()
    program = captures.compile(case.model, case.inputs).program
    assert calls(program, fused_attention, merged_attention) == case.model.config.num_hidden_layers
    assert calls(program, aten.scaled_dot_product_attention.default) == 0
