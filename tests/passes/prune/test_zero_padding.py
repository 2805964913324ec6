"""Tests of zero-padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.passes.prune.zero_padding import ZeroPadding
from tests.support.harness import check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded


class Attention(nn.Module):
    """Hides padding, by a number or by a flag, and returns every token and the first feature of each."""

    def __init__(self, flag: bool = True) -> None:
        super().__init__()
        self.flag = flag
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.layer(x)[:, None]
        seen = mask[:, None, None, :] != 0
        hidden = seen if self.flag else (~seen).to(x.dtype) * torch.finfo(x.dtype).min
        y = functional.scaled_dot_product_attention(y, y, y, attn_mask=hidden)[:, 0]
        return y, y[..., 0]


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_rewrites() -> None:
    _, history = rewrite(ZeroPadding(), seeded(Attention), normal(2, 3, 4), MASK)
    check_golden("zero_padding", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(ZeroPadding(), seeded(FeedForward), normal(2, 5, 8))
    assert history.diff(0, 1) == ""


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_numbers(flag: bool, dtype: torch.dtype) -> None:
    module = seeded(lambda: Attention(flag))
    program, history = rewrite(ZeroPadding(), module, normal(2, 3, 4), MASK.to(dtype))
    x, mask = normal(3, 5, 4, seed=1), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])
    wanted, found = module(x, mask.to(dtype)), program(x, mask.to(dtype))
    for left, right in zip(wanted, found, strict=True):
        for row in range(3):
            for token in range(5):
                expected = left[row, token] if mask[row, token] else torch.zeros_like(left[row, token])
                assert torch.equal(right[row, token], expected)
    assert history.steps[1].summary == "rewrote 2"


def test_a_mask_that_hides_nothing_is_none() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            y = (x * weights[..., None])[:, None]
            return functional.scaled_dot_product_attention(y, y, y)[:, 0]

    _, history = rewrite(ZeroPadding(), Scaled(), normal(2, 3, 4), torch.ones(2, 3))
    assert history.steps[1].summary == "nothing to do"


def test_later_passes_are_measured_against_the_zeros() -> None:
    _, history = rewrite("zero-padding,cast", seeded(Attention), normal(2, 3, 4), MASK)
    first, second = history.steps[1:]
    assert first.relative_error is not None and first.relative_error > 0.1
    # One rounding to 8 bits is 4e-3; a layer and an attention meet some five.
    assert second.relative_error is not None and second.relative_error < 0.02
