"""Programs that were pruned and quantized, sharded for ranks."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from tests.support.canonical_programs import reasons, run_passes
from tests.support.harness import rewrite
from tests.support.models import FeedForward, normal, seeded
from tests.support.sharding import partition, program_of

PRUNED = "prune-heads{keep=0.75,criterion=magnitude},prune-neurons{keep=0.7,criterion=magnitude},eliminate-dead"


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(name, scheme, marks=pytest.mark.slow if (name, scheme) == ("llama", "int8-dynamic") else ())
        for name in ("llama", "bert")
        for scheme in ("int8-dynamic", "int8-weight", "int4-weight,group=8")
    ],
)
def test_pruned_and_quantized_programs_are_sharded(name: str, scheme: str) -> None:
    program, samples = program_of(name)
    compressed, _ = run_passes(f"{PRUNED},quantize{{scheme={scheme}}},fold-quantized-weights", program, samples)
    heads = [site.heads for site in compressed.fact(structure).attention]
    # Heads are left that two ranks share unevenly, or layers of which one has more than the other.
    assert heads == ([4, 2] if name == "llama" else [3, 3])
    after, history = partition(compressed, samples, 2)
    assert reasons(history) == []
    notes = " ".join(history.steps[1].notes)
    assert name == "llama" or notes.count("encoder.layer.0.attention.self is padded with zeros: 3 as 4") == 1
    # Two sums a layer and the embedding's; nothing but the output is gathered, however uneven the parts.
    assert "2 attentions, 2 feed-forwards" in notes and "5 all-reduces, 1 all-gather to redistribute" in notes
    with torch.no_grad():
        for sample in samples:
            wanted = compressed.run(sample)
            for found in after.run_ranks(sample):
                # Sums over two ranks in another order.
                assert max(map(relative_error, wanted, found)) <= tolerance_of(compressed)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_ranks_hold_their_share_of_stored_integers(name: str) -> None:
    program, samples = program_of(name)
    compressed, _ = run_passes(f"{PRUNED},quantize{{scheme=int8-dynamic}},fold-quantized-weights", program, samples)
    after, _ = partition(compressed, samples, 2)
    stored = [item for item in after.weights() if "_int" in item]
    whole = sum(compressed.weight(item).numel() for item in stored)
    for rank in range(2):
        held = sum(after.ranks[rank][item].numel() for item in stored)
        # Two heads of three are the most that a rank has of a layer.
        assert whole / 2 <= held <= 2 / 3 * whole


def test_range_found_in_parts_ignores_padding_values() -> None:
    class Turned(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.cos(self.up(self.norm(x))))

    model = seeded(lambda: Turned(8, 13))
    with torch.no_grad():
        model.up.weight.mul_(0.1)
        # All cosines are near -1, but for those of zeros that make 14 neurons of 13: these are 1.
        model.up.bias.fill_(3.0)
    text = "quantize{scheme=int8-dynamic},fold-quantized-weights,shard{world_size=2,plan=[up:column-wise]},partition"
    program, _ = rewrite(text, model, normal(2, 5, 8))
    assert any(7 in weight.shape for name, weight in program.weights().items() if name.startswith("down") and weight.dim() == 2)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-dynamic,activations=tensor", "int8-group"])
def test_inputs_are_quantized_in_parts(scheme: str) -> None:
    module, x = seeded(lambda: FeedForward(32, 64)), normal(2, 5, 32)
    quantized, _ = rewrite(f"quantize{{scheme={scheme}}}", module, x)
    program, _ = rewrite(f"quantize{{scheme={scheme}}},shard{{world_size=2}},partition", module, x)
    # The range of a row or a tensor is reduced; ranks hold whole groups.
    collectives = len(program.nodes(ALL_REDUCE)), len(program.nodes(ALL_GATHER))
    assert collectives == (1 if scheme == "int8-group" else 2, 0)
    with torch.no_grad():
        wanted = quantized.run([x])
        for found in program.run_ranks([x]):
            assert max(map(relative_error, wanted, found)) <= tolerance_of(quantized)


def test_inputs_whose_groups_do_not_fit_ranks_are_gathered() -> None:
    program, _ = rewrite(
        "quantize{scheme=int8-group},shard{world_size=4},partition", seeded(lambda: FeedForward(32, 64)), normal(2, 5, 32)
    )
    assert len(program.nodes(ALL_GATHER)) == 1
