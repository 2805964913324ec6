"""Tests of lissom.compiler.analysis.structure.branches."""

from __future__ import annotations

import torch
from torch import nn

from lissom.compiler.analysis.structure.branches import branch_of, follow
from lissom.compiler.analysis.structure.transformer import structure
from tests.support import captures
from tests.support.models import normal, seeded
from tests.support.written_attention import optimized


class Parallel(nn.Module):
    """Two feed-forwards that are summed before the stream is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        first, second = (down(torch.relu(up(y))) for up, down in zip(self.ups, self.downs, strict=True))
        return self.last(x + (first + second))


def test_branches_in_parallel_have_one_stream_and_one_sum():
    program = captures.optimize(seeded(Parallel), normal(2, 5, 8)).program
    first, second = (branch_of(site) for site in program.fact(structure).feed_forward)
    assert first.before is second.before is program.placeholders[0]
    assert first.after is second.after and not first.post_norm
    assert first.total is second.total and first.total is not first.after
    assert (first.addend, first.rest) == (second.rest, second.addend) == (first.last, second.last)
    assert follow([first, second])


def test_norm_after_sum_joins_branch_without_prior_norm():
    for name, post in (("bert", True), ("llama", False), ("gemma3", False)):
        sites = optimized(name).program.fact(structure)
        assert {branch_of(site).post_norm for site in (*sites.attention, *sites.feed_forward)} == {post}


def test_branches_follow_when_nothing_lies_between():
    sites = optimized("gemma3").program.fact(structure)
    attention, feed_forward = (list(map(branch_of, found)) for found in (sites.attention, sites.feed_forward))
    assert follow([attention[0], feed_forward[0], attention[1], feed_forward[1]])
    assert not follow([attention[0], attention[1]])


def test_a_feed_forward_without_a_sum_has_no_branch():
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))
    (site,) = captures.optimize(model, normal(2, 5, 8)).program.fact(structure).feed_forward
    assert branch_of(site) == "its residual add cannot be found"
