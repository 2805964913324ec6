"""RaiseAttention where batch and heads are one dimension: `bmm`, `baddbmm`, and reshapes between three and four dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.passes.canonical.raise_attention.test_raise_attention import attention, raised
from tests.support.harness import Calls, aten, calls, rewrite
from tests.support.models import normal, seeded

PASSES = "remove-no-ops,raise-attention"
HEADS, SIZE = 2, 4


class Folded(nn.Module):
    """Self-attention by `bmm` over [batch · heads, tokens, head size]; a subclass says how scores become weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE)
        self.register_buffer("slopes", normal(HEADS, seed=5))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (part.reshape(batch * HEADS, length, SIZE) for part in self.split(x))
        found = torch.bmm(self.weigh(q, k, mask), v)
        return found.view(batch, HEADS, length, SIZE).transpose(1, 2).reshape(batch, length, width)

    def oracle(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        return attention(q, k, v, self.scale, self.bias(x, mask)).transpose(1, 2).flatten(2)


class Opt(Folded):
    """Scores unfolded to add the mask, and folded again before the softmax."""

    scale = 1.0

    def weigh(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = q.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2)).view(mask.shape[0], HEADS, length, length) + mask
        return scores.view(mask.shape[0] * HEADS, length, length).softmax(-1)

    def bias(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask


class Bloom(Folded):
    """A bias for each head by `baddbmm`; the softmax in four dimensions."""

    scale = 0.5

    def distances(self, x: torch.Tensor, length: int) -> torch.Tensor:
        return self.slopes[:, None, None] * torch.arange(length, dtype=x.dtype)

    def weigh(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length = mask.shape[0], q.shape[1]
        bias = self.distances(q, length).expand(batch, -1, 1, length).reshape(batch * HEADS, 1, length)
        scores = bias.baddbmm(q, k.transpose(1, 2), beta=2.0, alpha=0.5).view(batch, HEADS, length, length) + mask
        return scores.softmax(-1).view(batch * HEADS, length, length)

    def bias(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.distances(x, x.shape[1]) + mask


class BiasOfEachHead(Opt):
    """A bias of rank three added to unfolded scores: its first dimension is heads, not batch · heads."""

    def weigh(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = q.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2)).view(mask.shape[0], HEADS, length, length)
        return (scores + self.slopes[:, None, None] * mask[0]).view(-1, length, length).softmax(-1)

    def bias(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.slopes[:, None, None] * mask[0]


def inputs(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a mask that hides the last token of the last row where there are two or more."""
    mask = torch.zeros(batch, 1, 1, length)
    mask[-1, ..., max(1, length - 1) :] = torch.finfo(torch.float32).min
    return normal(batch, length, HEADS * SIZE, seed=seed), mask.expand(-1, -1, length, -1).contiguous()


@pytest.mark.parametrize("build", [Opt, Bloom, BiasOfEachHead])
def test_numbers(build: type[Folded]) -> None:
    module = seeded(build)
    program, _ = rewrite(PASSES, module, *inputs(2, 5), dynamic=False)
    assert (raised(program), calls(program, aten.softmax.int)) == (1, 0)
    sample = inputs(2, 5, seed=1)
    with torch.no_grad():
        # Projections and scores sum up to eight float32 terms: some ten roundings of 6e-8 on values of order 1.
        torch.testing.assert_close(program(*sample).double(), module.oracle(*sample), rtol=0, atol=2e-6)


def test_three_dimensions_with_a_mask_for_each_row() -> None:
    def masked(model: nn.Module, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.bmm((torch.bmm(q, k.transpose(1, 2)) + model.mask).softmax(-1), k)

    mask = normal(2, 1, 7, seed=4)
    program, _ = rewrite(PASSES, Calls(masked, mask=mask), normal(2, 5, 4), normal(2, 7, 4))
    q, k = normal(2, 5, 4, seed=1), normal(2, 7, 4, seed=2)
    assert raised(program) == 1
    # As above.
    torch.testing.assert_close(program(q, k).double(), attention(q[None], k[None], k[None], 1.0, mask)[0], rtol=0, atol=2e-6)


def test_heads_that_vary_are_refused() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length = mask.shape[0], q.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, -1, length, k.shape[1]) + mask
        return torch.bmm(scores.softmax(-1).view(-1, length, k.shape[1]), k)

    _, history = rewrite(PASSES, Calls(function), normal(6, 5, 4), normal(6, 7, 4), normal(2, 1, 5, 7))
    assert [skip.reason for skip in history.steps[-1].skipped] == ["the number of heads varies"]
