"""Tests of values sharded by position between the layers."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.parallel.partitioned_program import run_ranks
from lissom.compiler.parallel.plan import make_plan
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.inspect.sharding import Link, sharding_table, traffic
from lissom.inspect.tables import plain
from tests.support.canonical_programs import reasons, run_passes
from tests.support.harness import rewrite
from tests.support.models import FeedForward, normal, seeded
from tests.support.neighbours import all_but_slow
from tests.support.sharding import NAMES_AND_SIZES, decoder_program_of, partition, partitioned, program_of

SEQUENCE = ",sequence=true"


def kinds(program: Program) -> tuple[int, int, int]:
    """How many all-reduces, reduce-scatters and all-gathers there are."""
    return len(program.nodes(ALL_REDUCE)), len(program.nodes(REDUCE_SCATTER)), len(program.nodes(ALL_GATHER))


def of_length(program: Program, samples: list[Sample], length: int) -> list[torch.Tensor]:
    """Inputs of that many tokens."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randint(0, 61, (2, length), generator=generator) if x.dim() == 2 else x for x in samples[0]]


@pytest.mark.parametrize(("name", "world_size"), NAMES_AND_SIZES)
def test_numbers(name: str, world_size: int) -> None:
    program, samples = program_of(name)
    after, history = partitioned(name, world_size, SEQUENCE)
    assert reasons(history) == []
    with torch.no_grad():
        # Lengths that divide and that do not, fewer positions than ranks, and a single one.
        # Mamba's recurrence is as long as its example.
        for length in (5,) if name == "mamba" else (1, 2, 3, 5, 8, 13):
            inputs = of_length(program, samples, length)
            wanted = program.run(inputs)
            for found in after.run_ranks(inputs):
                assert max(map(relative_error, wanted, found)) <= tolerance_of(program)


@pytest.mark.parametrize(
    ("name", "wanted"),
    # One reduce-scatter where there was an all-reduce, an all-gather in front of what reads all tokens, and one for the output.
    # Of NeoX's embedding two norms and the residual stream read; it is reduced once for all. Two of T5's gatherings are joined.
    [
        ("llama", (0, 5, 6)),
        ("bert", (0, 5, 6)),
        ("gpt2", (0, 5, 6)),
        ("t5", (0, 12, 12)),
        ("vit", (0, 4, 5)),
        ("cohere", (0, 3, 4)),
        pytest.param("falcon", (0, 3, 4), marks=pytest.mark.slow),
        ("neox", (1, 2, 3)),
        pytest.param("mixtral", (0, 5, 6), marks=pytest.mark.slow),
    ],
)
def test_collectives(name: str, wanted: tuple[int, int, int]) -> None:
    after, _ = partitioned(name, 2, SEQUENCE)
    assert kinds(after) == wanted


SENDING = ("llama", "gpt2", "t5", "cohere", "neox")


@pytest.mark.parametrize("name", all_but_slow([*SENDING, "mixtral"], *SENDING))
def test_sends_what_all_reduces_send(name: str) -> None:
    program, _ = program_of(name)
    numbers = dict.fromkeys(program.signature.dimensions, 12)
    sent: list[float] = []
    for sequence in (False, True):
        plan = make_plan(program, 4, sequence=sequence)
        sent.append(sum(item.sent_bytes for move in plan.moves for item in traffic(plan, move, numbers)))
    assert sent[0] == pytest.approx(sent[1], rel=1e-12)


def test_layers_that_are_not_sharded_gather_the_stream_once() -> None:
    program, samples = program_of("llama")
    whole = "plan=[*.mlp:replicate,*.layers.1.self_attn:replicate]"
    after, _ = partition(program, samples, 2, f"{SEQUENCE},{whole}")
    # The embedding's sum and the first attention's; in front of that attention and of the feed-forward behind it, then the
    # stream, which stays whole (sent with the latter, being short), and the logits.
    assert kinds(after) == (0, 2, 3)


def test_the_stream_is_sharded() -> None:
    program, samples = program_of("llama")
    after, history = partitioned("llama", 4, SEQUENCE)
    # 13 tokens are 4 on each rank; a norm and a residual sum see these, a projection sees all of them.
    seen: dict[object, set[int]] = {}
    norm, add, linear = torch.ops.aten.rms_norm.default, torch.ops.aten.add.Tensor, torch.ops.aten.linear.default

    def observe(node: fx.Node, parts: list[object]) -> None:
        if node.target in (norm, add, linear) and isinstance(parts[0], torch.Tensor) and parts[0].dim() == 3:
            seen.setdefault(node.target, set()).add(parts[0].shape[1])

    with torch.no_grad():
        run_ranks(after.graph, after.ranks, of_length(program, samples, 13), observe)
    assert seen == {norm: {4}, add: {4}, linear: {13}}
    assert "5 reduce-scatters, 6 all-gathers to redistribute" in history.steps[1].notes[0]


def test_table_tells_what_rank_holds_of_stream() -> None:
    program, _ = program_of("llama")
    text = plain(
        sharding_table(program, make_plan(program, 4, sequence=True), {"batch": 1, "sequence": 8}, Link(1e-5, 1e9)), 140
    )
    # The embedding, and in each of 2 layers two norms and two sums, then the last norm; 32 numbers of 4 bytes a token each.
    assert "5 reduce-scatters, 6 all-gathers" in text
    assert "Between the layers: 1.15 KB of values sharded by position, 0.288 KB of them on a rank." in text


def test_what_stays_all_reduce_is_told_with_reason() -> None:
    _, history = partitioned("vit", 3, SEQUENCE)
    assert not any("all-reduce" in note for note in history.steps[1].notes)
    _, history = partitioned("neox", 2, SEQUENCE)
    assert "a sum stays an all-reduce: aten.layer_norm takes it whole" in history.steps[1].notes

    class Few(FeedForward):
        """Fewer tokens than ranks."""

    for text, inputs, reason in (
        (
            "shard{world_size=4,sequence=true},partition",
            normal(2, 3, 8),
            "the 3 positions of the example are not more than 4 ranks",
        ),
        ("shard{world_size=2,sequence=true},partition", normal(5, 8), "it has no dimension of positions"),
    ):
        after, history = rewrite(text, seeded(Few), inputs)
        assert kinds(after) == (1, 0, 0)
        assert f"a sum stays an all-reduce: {reason}" in history.steps[1].notes


def test_lengths_that_are_fixed() -> None:
    for length in (5, 6, 7, 8, 9):
        after, _ = rewrite(
            "shard{world_size=4,sequence=true},partition", seeded(FeedForward), normal(2, length, 8), dynamic=False
        )
        assert kinds(after) == (0, 1, 1)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-weight,group=8"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_quantized_layers(name: str, scheme: str) -> None:
    program, samples = program_of(name)
    quantized, _ = run_passes(f"quantize{{scheme={scheme}}},fold-quantized-weights", program, samples)
    after, _ = partition(quantized, samples, 2, SEQUENCE)
    assert kinds(after)[1:] == (5, 6)


def test_one_token_at_a_time_stays_whole() -> None:
    """The last layer continues with the last token alone, which two ranks cannot split: its two sums stay all-reduces."""
    program, samples = decoder_program_of("llama")
    after, history = partition(program, samples, 2, SEQUENCE)
    assert kinds(after) == (2, 3, 4)
    assert "2 sums stay all-reduces: the 1 positions are not more than 2 ranks" in history.steps[1].notes


def test_a_stream_that_is_returned() -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = FeedForward(), FeedForward()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.first(x)
            return self.second(x), x

    module, x = seeded(Returning), normal(2, 8, 8)
    after, _ = rewrite("shard{world_size=2,sequence=true},partition", module, x)
    with torch.no_grad():
        for found in after.run_ranks([x]):
            assert max(map(relative_error, module(x), found)) <= tolerance_of(after)
