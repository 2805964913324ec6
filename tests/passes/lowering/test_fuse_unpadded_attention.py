"""Tests of fuse-unpadded-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lissom.ops import block_sparse_attention, fused_attention, unpadded_attention
from lissom.ops.native import load_kernels
from tests.passes.prune.pack_tokens.test_pack_tokens import Encoder, Rotated, inputs
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, rewrite
from tests.support.models import normal, seeded

pytestmark = pytest.mark.skipif(bool(load_kernels()), reason=f"there are no kernels: {load_kernels()}")

PASSES = "fuse-attention,fuse-unpadded-attention"
# Two texts of six tokens, of which four and three are real; a position of padding holds the real token before it.
SLOTS = torch.tensor([0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 6, 6])
REAL = torch.tensor([0, 1, 2, 3, 6, 7, 8])
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def padded(piece: torch.Tensor, form: str, slots: torch.Tensor = SLOTS) -> torch.Tensor:
    """Heads [2, 4, 6, 4] that are looked up in [1, 7, 16] in one of the ways of `pack-tokens`."""
    if form == "rows":
        return piece.index_select(1, slots).reshape(2, 6, 16).view(2, 6, 4, 4).transpose(1, 2)
    apart = piece.view(1, 7, 4, 4)
    if form == "apart":
        return apart.index_select(1, slots).reshape(2, 6, 4, 4).transpose(1, 2)
    return apart.transpose(1, 2).index_select(2, slots).reshape(4, 2, 6, 4).transpose(0, 1)


def attend(x: torch.Tensor, forms: Sequence[str] = ("rows",) * 3, attention: Attend = scaled_dot_product_attention):
    """The attention of an encoder between lookups. x: [1, 7, 48]."""
    q, k, v = (padded(piece, form) for piece, form in zip(x.split(16, -1), forms, strict=True))
    return attention(q, k, v).transpose(1, 2).reshape(2, 6, 16).reshape(1, 12, 16).index_select(1, REAL)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return block_sparse_attention(q, k, v, pattern=[0, 1, -1, -1, 2, 1, 0], block=64, scale=0.5)


def sunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return fused_attention(q, k, v, scale=0.5, sinks=torch.zeros(1, 4, 1, 1))


FUSED = {
    "rows": attend,
    "apart": lambda x: attend(x, ("apart",) * 3),
    "heads": lambda x: attend(x, ("heads", "heads", "rows")),
    "masked": lambda x: attend(x, attention=lambda q, k, v: scaled_dot_product_attention(q, k, v, x[0, :1, :6] > 0)),
    "causal": lambda x: attend(x, attention=lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)),
    "window": lambda x: attend(x, attention=window),
}
LEFT = {
    "its queries, keys and values are padded in different ways": lambda x: attend_differently(x),
    "it has sinks, or keys and values in int8": lambda x: attend(x, attention=sunk),
    "something else than the real tokens of its result is read": lambda x: attend(x, attention=lambda *qkv: window(*qkv) * 2),
    "its pattern is no window": lambda x: attend(
        x, attention=lambda q, k, v: block_sparse_attention(q, k, v, pattern=[0, -1, 0, -3, 0, 1, 0], block=64, scale=0.5)
    ),
}


def attend_differently(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.split(16, -1)
    heads = padded(q, "rows"), padded(k, "rows", SLOTS.flip(0)), padded(v, "rows")
    found = scaled_dot_product_attention(*heads)
    return found.transpose(1, 2).reshape(2, 6, 16).reshape(1, 12, 16).index_select(1, REAL)


@pytest.mark.parametrize("name", FUSED)
def test_nothing_is_looked_up_and_answer_is_same(name: str) -> None:
    x = normal(1, 7, 48)
    program, _ = rewrite(PASSES, Calls(FUSED[name]), x, dynamic=False)
    assert calls(program, unpadded_attention) == 1
    assert calls(program, aten.index_select.default, fused_attention, block_sparse_attention) == 0
    # Sums of four products, and of six weights that sum to one.
    torch.testing.assert_close(program(x), FUSED[name](x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("reason", LEFT)
def test_others_are_left_with_the_reason(reason: str) -> None:
    x = normal(1, 7, 48)
    program, history = rewrite(PASSES, Calls(LEFT[reason]), x, dynamic=False)
    assert calls(program, unpadded_attention) == 0
    assert history.steps[-1].skipped[0].reason == reason


def test_rewrites() -> None:
    _, history = rewrite(PASSES, Calls(lambda x: attend(x, ("heads", "heads", "rows"))), normal(1, 7, 48), dynamic=False)
    check_golden("fuse_unpadded_attention", history.diff(1, 2))


@pytest.mark.parametrize("build", [Encoder, lambda: Rotated(counted=True)], ids=["plain", "rotary"])
def test_encoders_attend_without_padding(build: Callable[[], Encoder]) -> None:
    module = seeded(build)
    compiled = captures.compile(module, inputs(), passes="pack-tokens")
    assert calls(compiled.program, unpadded_attention) == 2
    for batch, length in ((5, 5), (1, 1), (7, 9)):
        x, mask = inputs(batch, length, seed=1)
        # Two layers of sums of eight float32 products of order 1.
        torch.testing.assert_close(compiled(x, mask), module(x, mask), rtol=0, atol=5e-6)
