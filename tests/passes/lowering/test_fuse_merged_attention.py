"""Tests of fuse-merged-attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lissom.ops import fused_attention, merged_attention
from tests.support import captures
from tests.support.harness import Calls, calls, check_golden, rewrite
from tests.support.models import normal, tiny_bert, tiny_gpt2, tiny_llama

PASSES = "fuse-attention,fuse-merged-attention"


def attend(qkv: torch.Tensor, sizes: int | tuple[int, ...] = (16, 16, 16), order: tuple[int, ...] = (0, 1, 2), **options):
    """Attention of heads of size 4 over the pieces of a merged projection [batch, tokens, features]."""
    batch, tokens, _ = qkv.shape
    pieces = qkv.split(sizes, -1) if sizes else qkv.chunk(3, -1)
    q, k, v = (pieces[index].view(batch, tokens, -1, 4).transpose(1, 2) for index in order)
    return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).reshape(batch, tokens, -1)


def attend_packed(qkv: torch.Tensor, *, sizes=(3, 4, 4), permutation=(2, 0, 3, 1, 4), order=(0, 1, 2), selects=False):
    """The same as timm splits it: [batch, tokens, 3, heads, head_dim], permuted and taken apart."""
    batch, tokens, _ = qkv.shape
    permuted = qkv.reshape(batch, tokens, *sizes).permute(permutation)
    pieces = permuted.unbind(0)
    q, k, v = (permuted[index] if selects else pieces[index] for index in order)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)


ROWS = torch.tensor([0, 1, 2, 1, 3, 4, 5, 5, 0, 4, 3, 2])


def attend_to_rows(qkv: torch.Tensor, *, other: bool = False):
    """The same over rows that are looked up in the pieces, as `pack-tokens` does. qkv: [1, rows, features]."""
    pieces = qkv.split(16, -1)
    rows = [ROWS, ROWS, ROWS.flip(0) if other else ROWS]
    padded = (piece.index_select(1, index).reshape(2, 6, 16) for piece, index in zip(pieces, rows, strict=True))
    q, k, v = (piece.view(2, 6, 4, 4).transpose(1, 2) for piece in padded)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 16)


FUSED = {
    "unbound": (48, attend_packed),
    "selected": (48, lambda x: attend_packed(x, selects=True)),
    "plain": (48, attend),
    "causal": (48, lambda x: attend(x, is_causal=True)),
    "masked": (48, lambda x: attend(x, attn_mask=x[:, None, :1, :6] > 0)),
    "equal pieces": (48, lambda x: attend(x, 16)),
    "in three chunks": (48, lambda x: attend(x, 0)),
    "grouped": (32, lambda x: attend(x, (16, 8, 8), enable_gqa=True)),
}
LEFT = {
    "unbound in another order": (48, lambda x: attend_packed(x, order=(0, 2, 1)), "not the heads of one merged projection"),
    "of four parts": (64, lambda x: attend_packed(x, sizes=(4, 4, 4)), "not the heads of one merged projection"),
    "another order": (48, lambda x: attend(x, order=(1, 0, 2)), "not the heads of one merged projection"),
    "one piece twice": (48, lambda x: attend(x, order=(0, 1, 1)), "not the heads of one merged projection"),
    "heads apart": (48, lambda x: attend(x).unflatten(-1, (4, 4)).transpose(1, 2) * 1.5, None),
    "a part of it": (64, lambda x: attend(x, (16, 16, 16, 16)), "not the heads of one merged projection"),
}


@pytest.mark.parametrize("name", FUSED)
def test_heads_are_split_and_joined_inside_with_equal_output(name: str) -> None:
    width, function = FUSED[name]
    x = normal(2, 6, width)
    program, _ = rewrite(PASSES, Calls(function), x)
    assert (calls(program, merged_attention), calls(program, fused_attention)) == (1, 0)
    other = normal(3, 6, width, seed=5)
    # Two float32 kernels.
    torch.testing.assert_close(program(other), function(other), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_merged_projection_is_left_with_reason(name: str) -> None:
    width, function, reason = LEFT[name]
    program, history = rewrite(PASSES, Calls(function), normal(2, 6, width))
    assert calls(program, merged_attention) == (reason is None)
    if reason is not None:
        assert reason in history.steps[-1].skipped[0].reason


@pytest.mark.parametrize("other", [False, True])
def test_rows_that_are_looked_up_are_looked_up_once(other: bool) -> None:
    x = normal(1, 8, 48)
    program, _ = rewrite(PASSES, Calls(lambda x: attend_to_rows(x, other=other)), x, dynamic=False)
    assert calls(program, merged_attention) == (not other)
    assert calls(program, torch.ops.aten.index_select.default) == (3 if other else 1)
    torch.testing.assert_close(program(x), attend_to_rows(x, other=other), rtol=0, atol=5e-6)


def test_heads_read_elsewhere_too_are_left() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (piece.view(2, 6, 4, 4).transpose(1, 2) for piece in x.split([16, 16, 16], -1))
        found = scaled_dot_product_attention(q, k, v)
        return found.transpose(1, 2).reshape(2, 6, 16), found.sum(-1)

    _, history = rewrite(PASSES, Calls(function), normal(2, 6, 48), dynamic=False)
    assert history.steps[-1].skipped[0].reason == "its heads are not joined right behind it"


def test_rewrites() -> None:
    _, history = rewrite(PASSES, Calls(attend), normal(2, 6, 48))
    check_golden("fuse_merged_attention", history.diff(1, 2))


@pytest.mark.parametrize(("build", "fused"), [(tiny_bert, True), (tiny_gpt2, True), (tiny_llama, False)])
def test_models_without_rotary_embeddings_read_their_projections_whole(build, fused: bool) -> None:
    case = build()
    compiled = captures.compile(case.model, case.inputs)
    layers = case.model.config.num_hidden_layers
    assert calls(compiled.program, merged_attention) == (layers if fused else 0)
    assert calls(compiled.program, fused_attention) == (0 if fused else layers)
