"""Tests of eliminate-dead as a whole: its kinds of units, and that it follows passes that prune."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.pipeline.spelling import format_pipeline, parse_pipeline
from lissom.driver.options import resolve_passes
from lissom.errors import PipelineTextError, UnsupportedError
from lissom.passes import PASSES, RECIPES
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead
from tests.passes.prune.eliminate_dead.test_heads import Attention
from tests.passes.prune.eliminate_dead.test_hidden import Stream
from tests.passes.prune.eliminate_dead.test_layers import Branches
from tests.passes.prune.eliminate_dead.test_neurons import half_dead
from tests.support import captures
from tests.support.harness import check_golden, rewrite
from tests.support.models import normal, seeded


def test_rewrites() -> None:
    examples = {
        "layers": (seeded(Branches), normal(2, 5, 8)),
        "heads": (seeded(Attention), normal(2, 5, 8)),
        "neurons": (seeded(half_dead), normal(2, 5, 8)),
        "hidden": (seeded(lambda: Stream(nn.LayerNorm(8))), normal(2, 5, 4)),
    }
    found = [rewrite(EliminateDead((kind,)), *example)[1].diff(0, 1) for kind, example in examples.items()]  # pyright: ignore
    check_golden("eliminate_dead", "\n".join(found))


def test_only_the_kinds_named_go() -> None:
    model = nn.Sequential(seeded(half_dead), seeded(Attention))
    count = sum(weight.numel() for weight in model.parameters())

    def left(units: str) -> int:
        program = captures.optimize(model, normal(2, 5, 8), passes=f"eliminate-dead{{units=[{units}]}}").program
        return sum(weight.numel() for weight in program.weights().values())

    assert left("heads,neurons") < min(left("heads"), left("neurons"))
    assert max(left("heads"), left("neurons")) < count == left("hidden")


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="knows no units 'head'; allowed are layers, experts, heads, neurons, hidden"):
        EliminateDead(("head",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(PipelineTextError, match="one of layers, experts, heads, neurons, hidden"):
        parse_pipeline("eliminate-dead{units=[head]}", PASSES)


def test_it_follows_every_pruning_pass_before_final_exact() -> None:
    exact = RECIPES["exact"]
    assert format_pipeline(resolve_passes("quantize")) == f"{exact},quantize"
    assert (
        format_pipeline(resolve_passes("prune-heads{keep=0.5},prune-neurons{keep=0.5},quantize"))
        == f"{exact},prune-heads{{keep=0.5}},eliminate-dead,prune-neurons{{keep=0.5}},eliminate-dead,{exact},quantize"
    )


@pytest.mark.parametrize("passes", ["prune-heads{keep=0.5},prune-neurons{keep=0.5},quantize", "prune-layers{keep=0.5}"])
def test_passes_resolved_before_stay_as_they_are(passes: str) -> None:
    """The command line and decoders resolve passes to check them, and hand them on."""
    once = resolve_passes(passes)
    assert resolve_passes(once) == once


def test_one_that_is_written_out_is_not_added_again() -> None:
    written = resolve_passes("prune-heads{keep=0.5},eliminate-dead,quantize")
    assert written == resolve_passes("prune-heads{keep=0.5},quantize")


def test_a_pruned_model_is_smaller_without_being_told_so() -> None:
    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    program = captures.optimize(seeded(FeedForward), normal(2, 5, 8), passes="prune-neurons{keep=0.5}").program
    assert sorted(tuple(weight.shape) for weight in program.weights().values()) == [(8,), (8, 16), (16,), (16, 8)]
