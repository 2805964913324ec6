"""Tests of eliminate-dead on layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.dead_structure import eliminate, program_of, sites_of, zero_bias, zero_heads, zero_neurons
from tests.support.harness import aten, calls, every_backend, rewrite
from tests.support.models import FeedForward, normal, seeded

PASS = "eliminate-dead{units=[layers]}"


class Branches(nn.Module):
    """Two feed-forwards, the first of which yields zero; with a norm or a scale behind each."""

    def __init__(self, after: str = "") -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.layer_norm = nn.RMSNorm(8), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.randn(8))
        self.after = after
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        nn.init.ones_(self.layer_norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            y = layer(nn.functional.gelu(x))
            x = x + {"": y, "norm": self.norm(y), "scale": self.scale * y, "layer_norm": self.layer_norm(y)}[self.after]
        return x


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(EliminateDead(("layers",)), seeded(FeedForward), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0
    assert reasons(history) == []


@pytest.mark.parametrize("after", ["", "norm", "scale"])
def test_what_keeps_zero_may_stand_before_the_sum(after: str) -> None:
    program, history = rewrite(EliminateDead(("layers",)), seeded(lambda: Branches(after)), normal(2, 5, 8))
    assert calls(program, aten.add.Tensor) == 1
    assert calls(program, aten.linear.default) == 1
    assert history.steps[1].rewritten == 1


def test_a_norm_with_a_bias_makes_something_of_zero() -> None:
    program, _ = rewrite(EliminateDead(("layers",)), seeded(lambda: Branches("layer_norm")), normal(2, 5, 8))
    assert calls(program, aten.linear.default) == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_attentions_and_feed_forwards_go(name: str) -> None:
    program, samples = program_of(name)
    sites = sites_of(program)
    zero_heads(program, 0, range(sites.attention[0].heads))
    zero_neurons(program, 1, range(sites.feed_forward[1].width))
    if name in ("bert", "gpt2"):
        zero_bias(program, sites.attention[0].output)
        zero_bias(program, sites.feed_forward[1].down)
    after, history = eliminate(PASS, program, samples)
    found = sites_of(after)
    assert len(found.attention) == len(sites.attention) - 1
    assert len(found.feed_forward) == len(sites.feed_forward) - 1
    assert reasons(history) == []


@every_backend
def test_composes(backend: Backend) -> None:
    module, x = seeded(Branches), normal(2, 5, 8)
    compiled = captures.compile(module, x, passes=f"exact,{PASS}", backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
